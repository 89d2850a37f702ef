"""One thread per process: small networks gain nothing from more, and a busy machine loses much to their waiting."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
