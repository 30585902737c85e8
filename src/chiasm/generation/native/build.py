"""Compiling `step.cpp` with the machine's own C++ compiler into the cache; a machine without one goes without."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from chiasm.sources.cache import cache_folder

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ["-O3", "-march=native", "-ffast-math", "-std=c++17", "-fopenmp", "-fPIC"]
TIMEOUT = 120
COMPILERS = ("c++", "g++", "clang++")


def library() -> ctypes.CDLL | None:
    """The compiled step; None where there is a reason for its absence."""
    found = _found()
    return None if isinstance(found, str) else found


def absence() -> str:
    """Why there is no compiled step."""
    found = _found()
    return found if isinstance(found, str) else ""


def _found() -> ctypes.CDLL | str:
    return "CHIASM_NATIVE=0 asks for none" if os.environ.get("CHIASM_NATIVE") == "0" else _compiled()


@cache
def _compiled() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        return f"none of {', '.join(COMPILERS)} is there, and CXX names no compiler"
    words = [SOURCE.read_text(), *compiler, *FLAGS, _processor()]
    known = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    try:
        return _load(compiler, cache_folder() / "native" / f"step-{known}.so")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{shlex.join(compiler)} failed: {lines[0] if lines else f'status {error.returncode}'}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{shlex.join(compiler)} failed: {error}"


def _load(compiler: list[str], path: Path) -> ctypes.CDLL:
    """From the cache, made where it is missing or does not load; where that cannot be, from a private folder."""
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _build(compiler, path)
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="chiasm-", ignore_cleanup_errors=True) as folder:
        _build(compiler, Path(folder) / path.name)
        return ctypes.CDLL(str(Path(folder) / path.name))


def _build(compiler: list[str], path: Path) -> None:
    """Two commands, since linking with fast-math would change how the whole process treats tiny numbers."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "step.o", Path(folder) / "step.so"
        for command in (
            [*FLAGS, "-c", str(SOURCE), "-o", str(made)],
            ["-shared", "-fopenmp", str(made), "-o", str(linked)],
        ):
            subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=TIMEOUT)
        os.replace(linked, path)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
