"""Keeps memory that the CPU allocator frees inside the process, for reuse.

glibc hands large freed blocks back to the kernel, and every new tensor then pays for zeroed pages again: on a
CPU that costs elementwise operations a factor of three to five. Training allocates the same sizes step after
step, so the pages are worth keeping. Other C libraries are left as they are.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_pages() -> bool:
    """Returns whether the allocator took the setting (False where the C library is not glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 1 << 26))
    return all(mallopt(option, value) == 1 for option, value in settings)
