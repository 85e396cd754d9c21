"""Keeps memory that CPU tensors and Arrow have freed: the next step finds its pages where the last one left them.

glibc gives large blocks back to the system when they are freed, and every step pays for the pages again: a quarter of
a discriminative CPU step at width 64, and with Arrow's own allocator as much of the loader (docs/performance.md). Peak
memory stays, but does not fall afterwards.
"""

import ctypes
import logging

import pyarrow as pa

log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """For the rest of the process. False, and nothing happens, where the C library has no such switch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        log.info("this C library has no mallopt: freed memory goes back to the system and steps are slower on CPU")
        return False
    is_kept = bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))
    if is_kept:
        pa.set_memory_pool(pa.system_memory_pool())
    return is_kept
