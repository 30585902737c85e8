"""A folder that one process at a time works in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def held(lock: Path, refusal: Exception) -> Iterator[None]:
    """Holds a lock's file while inside, without waiting for it; `refusal` is raised where another process holds it."""
    held_by_us = FileLock(lock)
    try:
        held_by_us.acquire(timeout=0)
    except Timeout:
        raise refusal from None
    try:
        yield
    finally:
        held_by_us.release()
