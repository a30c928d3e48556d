"""How much memory a run has used at most, and giving back what it no longer needs."""

import gc
import resource
import sys

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing; the CPU's allocator and cuBLAS have no class of their own for it."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in _OUT_OF_MEMORY)


def give_back_unused() -> None:
    """Lets go of what only cycles hold (a trainer and its model hold each other) and of spare blocks on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
