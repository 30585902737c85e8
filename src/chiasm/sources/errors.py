"""The one error of this layer, and what the operating system's errors become."""

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


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
            raise unwritable(alias, folder, error) from error
        raise


@contextmanager
def readable_weights(source: object) -> Iterator[None]:
    """Turns safetensors' error about a damaged file into a `SourceError` that names where it came from."""
    try:
        yield
    except SafetensorError as error:
        raise SourceError(f"the weights in {source} are damaged or cut off ({error}); fetch them again") from error


@contextmanager
def without_report() -> Iterator[None]:
    """Keeps transformers from listing every weight of the other tower as unexpected."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that the disk is full. Safetensors and tokenizers raise classes of their own for it, which
    carry the number in their text only."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"(os error {number})" in str(error) for number in FULL)


def require_space(alias: str, folder: Path, megabytes: int) -> None:
    """Refuses to begin where there is no room for what `alias` takes while it is fetched and converted."""
    free = shutil.disk_usage(folder).free // 1_000_000
    if free < megabytes:
        raise SourceError(
            f"{alias}: the disk of the cache folder {folder} has {free} MB free, {megabytes} MB are needed; "
            "free some space or set CHIASM_CACHE to another disk"
        )


def full_disk(alias: str, folder: Path) -> SourceError:
    """The error for a disk that became full while `alias` was fetched or converted."""
    return SourceError(
        f"{alias}: the disk of the cache folder {folder} became full; free some space or set CHIASM_CACHE "
        "to another disk"
    )


def unwritable(alias: str, folder: Path, error: OSError) -> SourceError:
    """The error for a cache folder that cannot be made or written."""
    return SourceError(
        f"{alias}: cannot write to the cache folder {folder} ({error.strerror}); "
        "set CHIASM_CACHE to a folder that you can write"
    )
