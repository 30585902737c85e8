"""Memory that a process need not hold: what it has read of a file of weights, and what was freed between other things.

Weights that were loaded from safetensors lie in the file. What was read of them counts as the process's memory until
the system wants it back; here it is given back at once, and comes again from the file when it is read.
"""

import ctypes
import mmap
import os
import sys

import numpy as np
from torch import Tensor

PAGES = "/proc/self/pagemap"
IN_FILE, SWAPPED = np.uint64(1 << 61), np.uint64(1 << 62)
PRESENT = np.uint64(1 << 63)


def drop(tensor: Tensor) -> bool:
    """Gives back a tensor's whole pages where all of them are as they are in a file; reading brings them again.

    False where one is not, as in memory that was written to, and on systems other than Linux.
    """
    size, start = mmap.PAGESIZE, tensor.data_ptr()
    first, last = -(-start // size), (start + tensor.numel() * tensor.element_size()) // size
    if tensor.device.type != "cpu" or first >= last or not _in_file(first, last):
        return False
    place, length = ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size)
    return bool(ctypes.CDLL(None).madvise(place, length, mmap.MADV_DONTNEED) == 0)


def _in_file(first: int, last: int) -> bool:
    """Whether pages hold what a file holds, or were never touched."""
    try:
        file = os.open(PAGES, os.O_RDONLY)
    except OSError:
        return False
    try:
        found = np.frombuffer(os.pread(file, 8 * (last - first), 8 * first), dtype=np.uint64)
    finally:
        os.close(file)
    known = (found & IN_FILE != 0) | (found & (PRESENT | SWAPPED) == 0)
    return len(found) == last - first and bool(known.all())


def trim() -> None:
    """Gives freed memory back to the system, which glibc keeps where other things lie behind it."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
