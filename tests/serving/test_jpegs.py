"""JPEGs that would keep their readers busy are refused at once; what phones and cameras write is read."""

import random
import struct
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from chiasm.serving import pictures
from chiasm.serving.errors import ApiError
from chiasm.serving.jpeg import SCANS, survey
from chiasm.serving.settings import Limits

SIDE = 320


def noise() -> Image.Image:
    return Image.effect_noise((SIDE, SIDE), 100).convert("RGB")


def saved(picture: Image.Image | None = None, kind: str = "JPEG", **options: Any) -> bytes:
    file = BytesIO()
    (picture or noise()).save(file, kind, **options)
    return file.getvalue()


def film(size: int = 7_000_000) -> bytes:
    """A short film, as random as a real one: every 65,536th place of it looks like a scan."""
    return struct.pack(">I4s8s", 24, b"ftyp", b"mp42mp42") + random.Random(0).randbytes(size) + b"\xff\xda" * 20


def segment(code: int, body: bytes) -> bytes:
    return b"\xff" + bytes([code]) + struct.pack(">H", len(body) + 2) + body


def behind_start(junk: bytes, jpeg: bytes | None = None) -> bytes:
    return b"\xff\xd8" + junk + (jpeg or saved())[2:]


def read(data: bytes) -> Image.Image:
    assert pictures.pixels(data, Limits(), "image") == SIDE**2
    return pictures.decode(data, "image")


def refusal(data: bytes) -> str:
    began = time.process_time()
    with pytest.raises(ApiError) as refused:
        pictures.pixels(data, Limits(), "image")
    assert time.process_time() - began < 0.5
    assert refused.value.status_code == 400 and refused.value.code == "invalid_image"
    return str(refused.value.detail)


PHONES: dict[str, Callable[[], bytes]] = {
    "motion photo": lambda: saved(quality=92) + film(),
    "progressive motion photo": lambda: saved(progressive=True) + film(),
    "several pictures": lambda: saved(kind="MPO", save_all=True, append_images=[noise()] * 3) + film(),
    "progressive": lambda: saved(progressive=True, quality=100),
    "restart intervals": lambda: saved(restart_marker_blocks=1, quality=100),
    "thumbnail": lambda: behind_start(segment(0xE1, b"Exif\0\0" + saved(Image.new("RGB", (9, 9))))) + film(),
    "profile": lambda: saved(icc_profile=bytes(300_000)) + film(),
    "photoshop": lambda: behind_start(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 60)),
}


@pytest.mark.parametrize("name", PHONES)
def test_what_phones_write_is_read(name: str) -> None:
    data = PHONES[name]()
    with Image.open(BytesIO(data)) as expected:
        assert read(data).tobytes() == expected.convert("RGB").tobytes()


def parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """A progressive JPEG up to its second scan, that scan, and the rest."""
    first, second = (data.find(b"\xff\xda", data.find(b"\xff\xda") + skip) for skip in (0, 1))
    return data[:second], data[first:second], data[second:]


@pytest.mark.parametrize("behind", [0, 100_000])
@pytest.mark.parametrize("between", [b"", b"\0junk", b"\xff\xd0", b"\xff\0", b"\xff\xff", b"\xff\xfe\0\4\xff\xd9"])
def test_scans_are_counted_wherever_decoders_find_them(between: bytes, behind: int) -> None:
    """Nothing between them hides them: neither junk nor an end inside of a comment."""
    before, scan, rest = parts(saved(progressive=True))
    for count in (SCANS + 50, 4_000):
        assert "scans, more than 100" in refusal(before + (between + scan) * count + rest + film(behind))
    assert survey(before + (between + scan) * SCANS + rest, 10**6).scans > SCANS


def test_an_end_in_front_of_the_first_scan_ends_nothing() -> None:
    before, scan, rest = parts(saved(progressive=True))
    bomb = before + scan * 1_000 + rest
    assert "scans" in refusal(b"\xff\xd8\xff\xd9" + bomb[2:])


TABLE = b"\0" + bytes(range(1, 65))
BUSY: dict[str, Callable[[], bytes]] = {
    "quantisation tables": lambda: behind_start(segment(0xDB, TABLE * 1_000) * 370),
    "quantisation tables behind an end": lambda: behind_start(b"\xff\xd9" + segment(0xDB, TABLE * 1_000) * 370),
    "quantisation tables behind what has no size": lambda: behind_start(
        b"\xff\xf0" + segment(0xDB, TABLE * 1_000) * 370
    ),
    "frames of many layers": lambda: behind_start(segment(0xC0, b"\x08\0\x09\0\x09\xff" + b"\1\x11\0" * 21_000) * 370),
    "Photoshop resources": lambda: behind_start(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_000) * 370
    ),
}


@pytest.mark.parametrize("name", BUSY)
def test_headers_that_take_seconds_are_refused_at_once(name: str) -> None:
    data = BUSY[name]()
    assert len(data) > 20_000_000
    assert "more than" in refusal(data)
