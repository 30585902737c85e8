"""Files of very many small parts: each is a step in Python while nobody else has a turn, so that they are refused."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from asking import CHAT, ask, data_url
from fastapi.testclient import TestClient
from PIL import Image

import tiny
from chiasm.serving import pictures
from chiasm.serving.errors import ApiError
from chiasm.serving.settings import Limits


def saved(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def behind_start(junk: bytes) -> bytes:
    """A good JPEG with junk in front of its own segments."""
    return b"\xff\xd8" + junk + saved(tiny.picture())[2:]


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(picture: Image.Image, size: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG with its data in pieces of this size, and chunks around them."""
    width, height = picture.size
    pixels = picture.tobytes()
    rows = (b"\0" + pixels[start : start + 3 * width] for start in range(0, len(pixels), 3 * width))
    data = zlib.compress(b"".join(rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + before
    body = b"".join(chunk(b"IDAT", data[start : start + size]) for start in range(0, len(data), size))
    return b"\x89PNG\r\n\x1a\n" + header + body + behind + chunk(b"IEND")


def bmp(compression: int, data: bytes) -> bytes:
    """A BMP of 50 × 50 pixels with a palette."""
    header = struct.pack("<IiiHHIIiiII", 40, 50, 50, 1, 8, compression, len(data), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + bytes(range(256)) * 4 + data


def refusal(data: bytes) -> str:
    with pytest.raises(ApiError) as refused:
        pictures.pixels(data, Limits(), "image")
        pictures.decode(data, "image")
    error = refused.value.body()["error"]
    assert refused.value.status_code == 400 and error["code"] == "invalid_image" and error["param"] == "image"
    assert "\n" not in error["message"]
    return error["message"]


CUT = {
    "jpeg of padding": lambda: behind_start(b"\xff" * 120_000),
    "jpeg of padding alone": lambda: b"\xff\xd8" + b"\xff" * 120_000,
    "jpeg of zeros between segments": lambda: behind_start(b"\xff\xe5\0\2" + b"\0" * 120_000),
    "jpeg of empty APP segments": lambda: behind_start(b"\xff\xe5\0\2" * 30_000),
    "jpeg of empty comments": lambda: behind_start(b"\xff\xfe\0\2" * 30_000),
    "png of empty private chunks": lambda: png(tiny.picture(), 8192, before=chunk(b"prIv") * 30_000),
    "png of empty private chunks at its end": lambda: png(tiny.picture(), 8192, behind=chunk(b"prIv") * 30_000),
    "png of empty data": lambda: png(tiny.picture(), 8192, before=chunk(b"IDAT") * 30_000),
    "gif of short comments": lambda: (
        b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"!\xfe" + b"\1a" * 60_000 + b"\0;"
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_very_many_pieces_are_refused(name: str) -> None:
    assert "more than 50,000 pieces" in refusal(CUT[name]())


def test_a_client_is_told(client: Callable[..., TestClient]) -> None:
    response = client().post(CHAT, json=ask(data_url(CUT["jpeg of padding"]())))
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_image"
    assert "more than 50,000 pieces" in response.json()["error"]["message"]


def noise() -> Image.Image:
    return Image.effect_noise((900, 700), 100).convert("RGB")


WHOLE = {
    "png": lambda: saved(noise(), "PNG"),
    "png of small pieces": lambda: png(noise(), 8192),
    "jpeg": lambda: saved(noise(), quality=95, comment=b"a" * 60_000),
    "progressive jpeg": lambda: saved(noise(), quality=95, progressive=True),
    "mpo": lambda: saved(noise(), "MPO", save_all=True, append_images=[noise()]),
    "webp": lambda: saved(noise(), "WEBP", method=0),
    "gif": lambda: saved(noise(), "GIF", save_all=True, append_images=[noise()] * 3, comment=b"a" * 6_000),
    "bmp": lambda: saved(noise(), "BMP"),
    "bmp of a palette": lambda: bmp(0, bytes(52 * 50)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_real_files_have_far_fewer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pictures, "READS", 1_000)
    data = WHOLE[name]()
    width, height = pictures.decode(data, "image").size
    assert pictures.pixels(data, Limits(), "image") == width * height


@pytest.mark.parametrize("compression", [1, 2])
def test_a_run_length_encoded_bmp_is_refused(compression: int) -> None:
    """It would be unpacked in Python."""
    assert "run-length" in refusal(bmp(compression, b"\1\0" * 2_500))


def test_a_jpeg_of_many_exif_blocks_is_refused() -> None:
    """They would be joined one by one, each time with a copy of all before."""
    block = b"\xff\xe1\0\x0cExif\0\0abcd"
    assert pictures.decode(behind_start(block * 3), "image").size == tiny.picture().size
    assert "1,000 blocks of EXIF" in refusal(behind_start(block * 1_000))
