"""`chiasm serve`: names, keys, addresses, and a life from start to SIGTERM."""

import inspect
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
from chiasm.cli.serve import named, read_keys, serve
from chiasm.generation.constraint import MULTIPLE, TEXT
from chiasm.generation.engine import Engine
from chiasm.serving.jpeg import EXIFS, RESOURCES, SCANS, TABLES
from chiasm.serving.pictures import READS
from chiasm.serving.served import CHARACTERS_PER_TOKEN
from chiasm.serving.server import KEEP_ALIVE_SECONDS, is_loopback, listen
from chiasm.serving.settings import Limits


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


def test_the_documentation_tells_every_option_and_limit() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    options = inspect.signature(serve).parameters
    named = {f"--{name.replace('_', '-')}" for name in options if name not in ("models", "as_json")} | {"--json"}
    assert not {name for name in named if name not in page}
    limits, mib = Limits(), 2**20
    pixels = inspect.signature(Engine).parameters["pixel_bytes"].default
    assert (options["max_body"].default * mib, options["max_pixels"].default) == (limits.body_bytes, limits.pixels)
    for told in (
        f"{limits.body_bytes // mib} MiB (`--max-body`), {limits.body_seconds} s",
        f"{limits.json_depth} levels, {limits.json_values:,} values",
        f"{limits.memory_bytes // 2**30} GiB",
        f"{limits.pixels // 10**6} million pixels (`--max-pixels`)",
        f"{limits.side_ratio} : 1; of a JPEG {SCANS} scans, {EXIFS} EXIF blocks, {TABLES // 1024} KiB of tables",
        f"{RESOURCES} Photoshop resources; {READS:,} pieces",
        f"{limits.images} (`--max-images`)",
        f"{limits.fetch_seconds} s; {limits.lookups} names looked up at once, {limits.line} in line",
        f"{limits.schema_bytes // 1024} KiB, texts of {TEXT} letters, {MULTIPLE:,} for a common multiple",
        f"{limits.tokens} tokens (`--max-tokens`), {limits.default_tokens} where nothing is said",
        f"`n` {limits.choices}",
        f"{limits.request_seconds} s (`--request-seconds`)",
        f"{options['max_batch'].default} together (`--max-batch`), {options['max_waiting'].default} in line",
        f"{pixels // 2**30} GiB; those of one question may be more",
        f"{limits.pending} with pictures, {limits.pending} with a JSON schema, and {limits.pending} of words",
        f"{limits.inputs} inputs, {limits.input_characters:,} letters",
        f"one at a time, {limits.line} in line",
        f"{limits.attention_bytes // 2**30} GiB of attention weights",
        f"{limits.connections}; one that is idle for {KEEP_ALIVE_SECONDS} s",
        f"{limits.header_seconds} s for a request's head",
        f"{limits.write_seconds} s to read what waits",
        f"up to {limits.shutdown_seconds} s",
        f"{CHARACTERS_PER_TOKEN} letters for every token",
    ):
        assert told in page, told


def test_a_hundred_clients_have_room_by_default() -> None:
    batch, line = (inspect.signature(serve).parameters[name].default for name in ("max_batch", "max_waiting"))
    own = inspect.signature(Engine).parameters
    assert (batch, line) == (own["max_batch"].default, own["max_waiting"].default) and batch + line >= 100


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
