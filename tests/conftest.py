"""Before PyTorch is imported."""

import os
import signal

# Small networks gain nothing from more threads, and a busy machine loses much to their waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it

import torch

torch.set_flush_denormal(True)  # as the scripts do: what is tested must hold without denormals

# A run ignores a closed terminal where it was ignored before, as under nohup; here it is tested that it does not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_xdist_auto_num_workers(config):
    """One more worker than cores for `-n auto`: a core is idle while a test waits for a process."""
    return (os.cpu_count() or 1) + 1
