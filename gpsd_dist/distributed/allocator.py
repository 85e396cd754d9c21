"""Keeps memory that CPU tensors and Arrow have freed inside the process, so that the next step reuses its pages.

By default glibc returns large blocks to the system, and every step faults the pages in again: that cost a quarter of a
discriminative CPU step at width 64, and as much of the loader with Arrow's own allocator (docs/performance.md). Peak
memory is unchanged; the process does not shrink after the peak.
"""

import ctypes
import logging

import pyarrow as pa

log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Turns returning memory off for the rest of the process. False where the C library has no such switch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        log.info("this C library has no mallopt: freed memory goes back to the system and steps are slower on CPU")
        return False
    is_kept = bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))
    if is_kept:
        pa.set_memory_pool(pa.system_memory_pool())
    return is_kept
