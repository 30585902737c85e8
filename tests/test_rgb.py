"""Every mode of Pillow → RGB, some rows at a time."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from chiasm.rgb import ROWS, to_rgb

SIZE = (7, 2 * ROWS + 3)
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=np.uint8)


def on_white(picture: Image.Image) -> Image.Image:
    clear = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(clear, mask=clear.getchannel("A"))
    return white


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_clear_lies_on_white(mode: str) -> None:
    picture, file = Image.fromarray(NOISE).convert(mode), BytesIO()
    clear = {"P": bytes(range(256)), "RGB": tuple(NOISE[70, 3, :3].tolist())}
    picture.save(file, "PNG", **({"transparency": clear[mode]} if mode in clear else {}))
    picture = Image.open(file)
    assert picture.has_transparency_data
    assert np.array_equal(to_rgb(picture), on_white(picture))


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
@pytest.mark.parametrize("most", [256, 65_536])
def test_sixteen_bits_keep_the_upper_eight(kind: str, most: int) -> None:
    values = np.random.default_rng(1).integers(0, most, (SIZE[1], SIZE[0]))
    values[-1, -1] = most - 1
    shift = 0 if kind == "<i4" and most == 256 else 8
    rgb = np.asarray(to_rgb(Image.fromarray(values.astype(kind))))
    assert np.array_equal(rgb, np.repeat((values >> shift)[..., None], 3, axis=2))


def test_numbers_beyond_sixteen_bits_are_cut() -> None:
    values = np.array([[-5, 70_000, 255 * 256]], dtype=np.int32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 255, 255]
