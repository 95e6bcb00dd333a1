"""Keep resident memory from creeping up. Test: pytest tests/test_memory.py"""

import ctypes
from contextlib import suppress

M_ARENA_MAX, NUM_ARENAS = -8, 2  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def bound_arenas() -> None:
    """Have the C library serve all threads from two heaps. By itself, glibc gives them up to eight for each core, and
    each heap keeps the most that it has ever lent: a server with many threads grows for days. Elsewhere, nothing."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, NUM_ARENAS)
