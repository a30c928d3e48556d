"""How much memory a run has used at most, and giving back what it no longer needs."""

import gc
import resource
import sys

import torch


def reset_peak() -> None:
    """Starts a new peak on the GPU; the host's cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most GPU memory allocated since `reset_peak`, in GiB; without a GPU, the process's most resident memory ever."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def give_back_unused() -> None:
    """Lets go of what only cycles hold (a trainer and its model hold each other) and of spare blocks on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
