"""Compiling `step.cpp` with the machine's own C++ compiler into the cache; a machine without one goes without."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from chiasm.sources.cache import cache_folder

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ["-O3", "-march=native", "-ffast-math", "-std=c++17", "-fopenmp", "-fPIC"]
TIMEOUT = 120


def library() -> ctypes.CDLL | None:
    """The compiled step; None without a working compiler, or where `CHIASM_NATIVE=0` asks for none."""
    return None if os.environ.get("CHIASM_NATIVE") == "0" else _compiled()


@cache
def _compiled() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    known = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"step-{known}.so"
    try:
        if not path.is_file():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _build(compiler: str, path: Path) -> None:
    """Two commands, since linking with fast-math would change how the whole process treats tiny numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "step.o", Path(folder) / "step.so"
        for command in (
            [*FLAGS, "-c", str(SOURCE), "-o", str(made)],
            ["-shared", "-fopenmp", str(made), "-o", str(linked)],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=TIMEOUT)
        os.replace(linked, path)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
