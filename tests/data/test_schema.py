"""Samples say what is wrong with them; pictures of every kind become upright RGB or a clear error."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from chiasm.data.pixels import upright
from chiasm.data.schema import ByteRange, ImageError, ImageRef, Sample, SampleError

IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "What is this?"}
ASKED = {"role": "user", "content": [IMAGE, QUESTION]}
ANSWERED = {"role": "assistant", "content": "A cat."}
RED = ImageRef.of(Image.new("RGB", (4, 2), "red"))


def draw_blue() -> Image.Image:
    return Image.new("RGB", (3, 3), "blue")


def quarters(path: Path, **options: object) -> Path:
    """A 64 x 32 picture whose left half is red and whose right half is noise, so that it does not compress away."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    noise[:, :32] = (255, 0, 0)
    Image.fromarray(noise).save(path, **options)
    return path


def test_a_good_sample_validates_to_itself() -> None:
    sample = Sample("a", [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED, *[ASKED, ANSWERED]], [RED, RED])
    assert sample.validate() is sample
    assert sample.answer == "A cat." and sample.question == "What is this?" and len(sample.prompt) == 4


@pytest.mark.parametrize(
    ("messages", "images", "kind", "expected"),
    [
        ([ASKED, ANSWERED], [], "placeholders", "1 image placeholder in the messages, but 0 images"),
        ([ASKED, ANSWERED], [RED, RED], "placeholders", "1 image placeholder in the messages, but 2 images"),
        (
            [{"role": "user", "content": "Hi"}, ANSWERED],
            [RED],
            "placeholders",
            "0 image placeholders in the messages, but 1",
        ),
        ([ASKED], [RED], "no answer", "the last message is the user's"),
        (
            [ASKED, {"role": "assistant", "content": " \n"}],
            [RED],
            "no answer",
            "message 2, the assistant's, has no text",
        ),
        ([ASKED, ASKED, ANSWERED], [RED, RED], "role", "message 2 is the user's, expected the assistant's"),
        ([ANSWERED], [], "role", "message 1 is the assistant's, expected the user's"),
        ([ASKED, ANSWERED, {"role": "system", "content": "x"}], [RED], "role", "message 3 is the system's"),
        ([{"role": "bot", "content": "x"}], [], "role", "the role 'bot'"),
        ([{"role": "user", "content": ""}, ANSWERED], [], "empty", "message 1, the user's, is empty"),
        ([{"role": "user", "content": None}, ANSWERED], [], "empty", "the content None"),
        ([{"role": "user", "content": [{"type": "video"}]}, ANSWERED], [], "empty", "{'type': 'video'}"),
        ([], [], "empty", "no messages"),
    ],
)
def test_a_bad_sample_is_named_with_the_reason(
    messages: list[dict], images: list[ImageRef], kind: str, expected: str
) -> None:
    with pytest.raises(SampleError, match="sample 'cat-7'") as error:
        Sample("cat-7", messages, images).validate()
    assert expected in str(error.value)
    assert kind in [problem.kind for problem in error.value.problems]


def test_an_open_question_is_valid_when_no_answer_is_needed() -> None:
    assert Sample("a", [ASKED], [RED]).validate(answered=False)


def test_a_picture_alone_is_a_question() -> None:
    assert Sample("a", [{"role": "user", "content": [IMAGE]}, ANSWERED], [RED]).validate()


def test_errors_and_samples_survive_pickling(tmp_path: Path) -> None:
    sample = Sample("a", [ASKED, ANSWERED], [RED], "naming", {"x": [1]})
    assert pickle.loads(pickle.dumps(sample)).images[0].key() == RED.key()
    with pytest.raises(SampleError) as wrong:
        Sample("a", [ASKED], []).validate()
    with pytest.raises(ImageError) as missing:
        ImageRef.of(tmp_path / "no.png").load()
    for error in (wrong.value, missing.value):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_source_gives_the_same_picture_and_can_be_pickled(tmp_path: Path) -> None:
    path = quarters(tmp_path / "p.png")
    encoded = path.read_bytes()
    (tmp_path / "tar").write_bytes(b"before" + encoded + b"after")
    inside = ByteRange(tmp_path / "tar", 6, len(encoded))
    refs = [ImageRef.of(value) for value in (path, str(path), encoded, inside)]
    pixels = {pickle.loads(pickle.dumps(ref)).load().tobytes() for ref in (*refs, ImageRef.of(refs[0].load()))}
    assert len(pixels) == 1
    assert len({ref.key() for ref in refs}) == 1, "the same bytes have the same key wherever they are"
    assert refs[0].path == path and refs[2].path is None
    drawn = pickle.loads(pickle.dumps(ImageRef.of(draw_blue)))
    assert drawn.load().getpixel((0, 0)) == (0, 0, 255)
    assert drawn.key() == ImageRef.of(draw_blue()).key()


def test_keys_in_memory_tell_pixels_size_and_mode_apart() -> None:
    pictures = [
        Image.new("RGB", (4, 2)),
        Image.new("RGB", (2, 4)),
        Image.new("L", (4, 6)),
        Image.new("RGB", (4, 2), "red"),
    ]
    assert len({ImageRef.of(picture).key() for picture in pictures}) == 4


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    picture = ImageRef.of(quarters(tmp_path / "turned.jpg", exif=exif)).load()
    assert picture.size == (32, 64)
    red, green, blue = picture.getpixel((16, 5))
    assert red > 200 and green < 60 and blue < 60, "the left half is on top now"
    assert ImageRef.of(picture).load().size == picture.size, "and is not turned again"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr", "I", "I;16", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    picture = Image.new(mode, (5, 3)) if mode == "I;16" else Image.new("RGB", (5, 3), "white").convert(mode)
    loaded = ImageRef.of(picture).load()
    assert loaded.mode == "RGB" and loaded.size == (5, 3)
    if mode != "I;16":
        assert min(loaded.getpixel((2, 1))) > 250


def test_cmyk_jpeg_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = ImageRef.of(tmp_path / "red.jpg").load().getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


def test_transparency_becomes_white_not_the_hidden_colour(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    hidden.putpixel((0, 0), (0, 0, 255, 255))
    hidden.save(tmp_path / "rgba.png")
    hidden.quantize(4).save(tmp_path / "palette.png")
    for name in ("rgba.png", "palette.png"):
        loaded = ImageRef.of(tmp_path / name).load()
        assert loaded.getpixel((3, 3)) == (255, 255, 255) and loaded.getpixel((0, 0)) == (0, 0, 255)


def test_sixteen_bit_grey_is_not_clipped_to_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert ImageRef.of(tmp_path / "grey.png").load().getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected"),
    [
        ("cut.jpg", 0.5, "broken picture", "truncated"),
        ("cut.png", 0.5, "broken picture", "truncated"),
        ("empty.png", b"", "broken picture", "0 bytes"),
        ("page.jpg", b"<html>404 Not Found</html>", "broken picture", "not a picture"),
        ("missing.jpg", None, "missing picture", "no such file"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, content: float | bytes | None, kind: str, expected: str
) -> None:
    path = tmp_path / name
    if isinstance(content, float):
        whole = quarters(path).read_bytes()
        path.write_bytes(whole[: int(len(whole) * content)])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        ImageRef.of(path).load()
    assert error.value.kind == kind and name in str(error.value) and expected in str(error.value)


def test_a_folder_is_not_a_picture_and_a_missing_file_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="damaged"):
        ImageRef.of(tmp_path).load()
    with pytest.raises(ImageError, match="no such file"):
        ImageRef.of(tmp_path / "x.png").key()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 400 million pixels in 50 kB
    with pytest.raises(ImageError, match=r"bomb\.png: has more pixels than Pillow opens") as error:
        ImageRef.of(tmp_path / "bomb.png").load()
    assert error.value.kind == "huge picture"
    path = quarters(tmp_path / "p.png")
    with pytest.raises(ImageError, match="has 64x32 pixels, the limit is 2,000"):
        ImageRef.of(path, max_pixels=2000).load()
    assert ImageRef.of(path, max_pixels=2048).load().size == (64, 32)


def test_a_value_that_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="not int"):
        ImageRef.of(3)


@pytest.mark.parametrize("orientation", range(10))
def test_every_exif_orientation_is_that_of_pillow(orientation: int) -> None:
    picture = Image.frombytes("RGB", (3, 2), bytes(range(18)))
    picture.getexif()[0x0112] = orientation
    loaded, expected = ImageRef.of(picture).load(), ImageOps.exif_transpose(picture)
    assert (loaded.size, loaded.tobytes()) == (expected.size, expected.tobytes())


def test_a_picture_that_pillow_turns_while_it_reads_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.tif", exif=exif)
    for ref in (ImageRef.of(tmp_path / "a.tif"), ImageRef.of(Image.open(tmp_path / "a.tif"))):
        assert ref.load().size == (20, 40)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no such block", b"Exif\0\0MM\0*", b"Exif\0\0MM\0\0\0\0\0\x08"])
def test_a_damaged_exif_block_spoils_no_pixels(form: str, exif: bytes) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(encoded, form, exif=exif)
    loaded = ImageRef.of(encoded.getvalue()).load()
    assert loaded.size == (6, 4) and not loaded.getexif()


def test_a_question_shows_a_file_as_training_does(tmp_path: Path) -> None:
    hidden, damaged = tmp_path / "hidden.png", tmp_path / "damaged.png"
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(hidden)
    Image.new("RGB", (4, 4), "white").save(damaged, exif=b"Exif\0\0no such block")
    for path in (hidden, damaged, str(hidden)):
        assert upright(path).tobytes() == ImageRef.of(path).load().tobytes() == b"\xff" * 48


def test_a_loaded_picture_is_a_copy() -> None:
    picture = Image.new("RGB", (2, 2))
    ImageRef.of(picture).load().putpixel((0, 0), (9, 9, 9))
    assert picture.getpixel((0, 0)) == (0, 0, 0)
