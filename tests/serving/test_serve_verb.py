"""`chiasm serve`: names, keys, addresses, and a life from start to SIGTERM."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask, chunks, data_url

import chiasm
from chiasm.cli.serve import named, read_keys
from chiasm.serving.server import is_loopback, listen


def test_names(tmp_path: Path) -> None:
    assert named("a=models/b") == ("a", "models/b")
    assert named("org/model") == ("org/model", "org/model")
    assert named(str(tmp_path)) == (tmp_path.name, str(tmp_path))
    assert named("dir/x=y") == ("dir/x=y", "dir/x=y")


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who: me\none\n\n two \n")
    assert read_keys(file, "three, one") == ("one", "two", "three")
    assert read_keys(None, "") == ()
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(file, "")
    with pytest.raises(ValueError, match="key 1 of 1"):
        read_keys(None, "열쇠")


def test_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "example.com", "10.0.0.1", "::")))
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="choose another --host or --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(OSError, match="cannot listen on nowhere"):
        listen("nowhere.invalid", 0)
    assert isinstance(taken, socket.socket)


@pytest.mark.slow
def test_a_life(vlm: chiasm.VLM, tmp_path: Path) -> None:
    """SIGTERM comes while an answer is streamed, which is finished."""
    vlm.save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "chiasm", "serve", str(tmp_path / "tiny"), f"again={tmp_path / 'tiny'}"]
    with subprocess.Popen([*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            opened = json.loads(process.stdout.readline())
            assert opened["models"] == ["tiny", "again"]
            answers = [httpx.post(opened["url"] + CHAT, json=ask(data_url(), model=name)) for name in opened["models"]]
            first, second = (answer.json()["choices"] for answer in answers)
            assert first == second
            assert httpx.get(opened["url"] + "/v1/models", headers={"host": "evil.example"}).status_code == 403
            body = ask(max_tokens=900, n=8, stream=True, stream_options={"include_usage": True})
            with httpx.stream("POST", opened["url"] + CHAT, json=body, timeout=60) as answer:
                coming = answer.iter_text()
                begun = next(coming)
                process.send_signal(signal.SIGTERM)
                events = chunks(begun + "".join(coming))
            assert 'finish_reason":"' not in begun
            assert events[-1]["usage"]["completion_tokens"] == 8 * 900
        except BaseException:
            process.kill()
            raise
        assert process.wait(60) == 0
