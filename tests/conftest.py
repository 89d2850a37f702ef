"""Before PyTorch is imported."""

import os

# Small networks gain nothing from more threads, and a busy machine loses much to their waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it

import torch

torch.set_flush_denormal(True)  # as the scripts do: what is tested must hold without denormals
