"""Before PyTorch is imported; and `--script sac_continuous=my_copy.py`, to test a copy of a script."""

import importlib.util
import os
import signal
import sys

# Small networks gain nothing from more threads, and a busy machine loses much to their waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it

import torch

torch.set_flush_denormal(True)  # as the scripts do: what is tested must hold without denormals

# A run ignores a closed terminal where it was ignored before, as under nohup; here it is tested that it does not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--script", action="append", default=[], metavar="NAME=FILE", help="test FILE as the script NAME")


def pytest_configure(config):
    """What imports NAME gets FILE. Tests that start NAME as a program still start the original."""
    for name, _, file in (pair.partition("=") for pair in config.getoption("--script")):
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def pytest_xdist_auto_num_workers(config):
    """One more worker than cores for `-n auto`: a core is idle while a test waits for a process."""
    return (os.cpu_count() or 1) + 1
