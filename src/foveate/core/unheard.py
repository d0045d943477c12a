"""Standard output without what compiled code prints to it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["unheard"]


@contextmanager
def unheard() -> Iterator[None]:
    """Keeps what compiled code prints from standard output: HiGHS prints a line at times, whatever it is told."""

    def flushed() -> None:
        for flush in (lambda: sys.stdout.flush(), lambda: ctypes.CDLL(None).fflush(None)):
            # a program may have no standard output, a system no such name for its C library
            with suppress(OSError, TypeError, ValueError, AttributeError):
                flush()

    flushed()
    try:
        real = os.dup(1)
    except OSError:
        # nobody listens
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        flushed()
        os.dup2(real, 1)
        os.close(real)
