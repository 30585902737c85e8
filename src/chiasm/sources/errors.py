"""The one error of this layer, and what the operating system's errors become."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


class SourceError(RuntimeError):
    """Weights or assets cannot be had; the message is one line that names the cause and the fix."""


@contextmanager
def clear_errors(alias: str, folder: Path) -> Iterator[None]:
    """Turns a full disk and a cache that cannot be written into a `SourceError`."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise full_disk(alias, folder) from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise SourceError(
                f"{alias}: cannot write to the cache folder {folder} ({error.strerror}); "
                "set CHIASM_CACHE to a folder that you can write"
            ) from error
        raise


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that the disk is full. Safetensors and tokenizers raise classes of their own for it, which
    carry the number in their text only."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"(os error {number})" in str(error) for number in FULL)


def full_disk(alias: str, folder: Path) -> SourceError:
    """The error for a disk that became full while `alias` was fetched or converted."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free // 1_000_000
    return SourceError(
        f"{alias}: the disk of the cache folder {folder} is full ({free} MB free); free some space or set CHIASM_CACHE "
        "to another disk"
    )
