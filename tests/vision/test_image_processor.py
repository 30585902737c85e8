"""The image processor: equality with transformers' own, pictures of every kind and size, what a source says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import chiasm.vision  # noqa: F401
from chiasm.vision.encoder import VisionEncoder, load_vision
from chiasm.vision.image_processor import ChiasmImageProcessor, image_processor_for
from chiasm.vision.pictures import to_rgb
from chiasm.vision.published import PUBLISHED, read_published
from chiasm.vision.towers import build_tower

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIZES = [(300, 200), (200, 301), (57, 91), (224, 224), (640, 480), (20, 1200), (1, 1), (3, 150)]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(
    resize_mode: str = "squash", size: int | tuple[int, int] = (4, 4), **options: object
) -> ChiasmImageProcessor:
    """One that only counts from 0 to 1."""
    return ChiasmImageProcessor(size, [0.0] * 3, [1.0] * 3, resize_mode, **options)


def encoder(family: str, **config: object) -> VisionEncoder:
    tiny = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return load_vision(build_tower(AutoConfig.for_model(family, **tiny, **config)))


REFERENCES = {
    "clip": (CLIPImageProcessorPil(), "clip_vision_model", {}),
    "llava pad": (LlavaImageProcessorPil(do_pad=True), "clip_vision_model", {"resize_mode": "pad"}),
    "siglip": (SiglipImageProcessorPil(), "siglip_vision_model", {}),
    "vit": (ViTImageProcessorPil(), "vit", {}),
    "convnext": (ConvNextImageProcessorPil(size={"shortest_edge": 224}, **IMAGENET), "convnext", {}),
    "dinov2": (
        BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET),
        "dinov2",
        {},
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("size", SIZES)
def test_numbers_equal_transformers(name: str, size: tuple[int, int]) -> None:
    reference, model_type, options = REFERENCES[name]
    ours = ChiasmImageProcessor(224, **PUBLISHED[model_type] | options)(picture(*size))["pixel_values"]
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    expected = reference(picture(*size), return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resize_mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (2, 60000), (30000, 3)])
def test_extreme_pictures_work(resize_mode: str, size: tuple[int, int]) -> None:
    pixels = processor(resize_mode, (224, 112))(picture(*size))["pixel_values"]
    assert pixels.shape == (1, 3, 224, 112)
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_the_short_cut_of_a_crop_shows_the_centre() -> None:
    wide = np.zeros((1, 5001, 3), dtype=np.uint8)
    wide[:, 2500] = 255
    pixels = processor("crop", 32)(Image.fromarray(wide))["pixel_values"]
    assert pixels[0, 0, 16, 16] > 0.5 and pixels.max() > 0.9


def test_a_target_need_not_be_square() -> None:
    wide = Image.new("RGB", (80, 20), "red")
    assert processor("squash", (10, 30))(wide)["pixel_values"].shape == (1, 3, 10, 30)
    assert processor("crop", (10, 30))(wide)["pixel_values"].shape == (1, 3, 10, 30)
    padded = ChiasmImageProcessor((10, 30), [0.5] * 3, [1.0] * 3, "pad")(wide)["pixel_values"]
    assert padded.shape == (1, 3, 10, 30)
    assert padded[0, 0, 5].min() > 0.45  # the red stripe reaches both sides
    assert padded[0, 0, 0].abs().max() < 0.01  # above it is the mean


def test_crop_fraction_keeps_the_middle() -> None:
    framed = Image.new("RGB", (100, 100), "white")
    framed.paste("black", (20, 20, 80, 80))
    assert processor("crop", 30, crop_fraction=0.5)(framed)["pixel_values"].max() == 0
    assert processor("crop", 30)(framed)["pixel_values"].max() == 1


def first_pixel(image: object) -> list[int]:
    return [round(value * 255) for value in processor()(image)["pixel_values"][0, :, 0, 0].tolist()]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (5, 7), (10, 20, 30)), [10, 20, 30]),
        (Image.new("L", (5, 7), 90), [90, 90, 90]),
        (Image.new("1", (5, 7), 1), [255, 255, 255]),
        (Image.new("CMYK", (5, 7), (0, 255, 255, 0)), [255, 0, 0]),
        (Image.new("RGBA", (5, 7), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("RGBA", (5, 7), (10, 20, 30, 0)), [255, 255, 255]),
        (Image.new("RGBA", (5, 7), (0, 0, 0, 128)), [127, 127, 127]),
        (Image.new("LA", (5, 7), (50, 0)), [255, 255, 255]),
        (Image.new("I;16", (5, 7), 0x8000), [128, 128, 128]),
        (Image.new("I", (5, 7), 0xC000), [192, 192, 192]),
        (Image.new("I", (5, 7), 77), [77, 77, 77]),
        (Image.new("HSV", (5, 7), (0, 0, 200)), [200, 200, 200]),
        (np.full((7, 5, 3), 9, dtype=np.uint8), [9, 9, 9]),
        (np.full((7, 5, 4), [9, 9, 9, 0], dtype=np.uint8), [255, 255, 255]),
        (np.full((7, 5, 1), 9, dtype=np.uint8), [9, 9, 9]),
        (np.full((3, 7, 5), 9, dtype=np.uint8), [9, 9, 9]),
        (np.full((7, 5), 9, dtype=np.int64), [9, 9, 9]),
        (np.full((7, 5, 3), 0.2), [51, 51, 51]),
        (np.full((7, 5), True), [255, 255, 255]),
        (torch.full((3, 7, 5), 9, dtype=torch.uint8), [9, 9, 9]),
        (torch.full((7, 5, 3), 9, dtype=torch.uint8), [9, 9, 9]),
        (torch.full((3, 7, 3), 0.2, requires_grad=True), [51, 51, 51]),
    ],
)
def test_pictures_of_every_kind(image: object, expected: list[int]) -> None:
    assert first_pixel(image) == expected


def test_transparent_palette_pictures_lie_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (5, 7), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert first_pixel(tmp_path / "opaque.png") == [10, 20, 30]
    assert first_pixel(str(tmp_path / "clear.png")) == [255, 255, 255]
    assert first_pixel(tmp_path / "key.png") == [255, 255, 255]


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (40, 20), "black")
    sideways.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    sideways.save(tmp_path / "turned.png", exif=exif)
    upright = to_rgb(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 255, 255) and upright.getpixel((10, 35)) == (0, 0, 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0no such block", b"Exif\0\0MM\0*", b"Exif\0\0MM\0\0\0\0\0\x08"])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_damaged_exif_block_spoils_no_pixels(tmp_path: Path, ending: str, exif: bytes) -> None:
    path = tmp_path / f"damaged.{ending}"
    Image.new("RGB", (6, 4), "white").save(path, exif=exif)
    for given in (path, Image.open(path)):
        assert to_rgb(given).getpixel((0, 0)) == (255, 255, 255)
        assert first_pixel(given) == [255, 255, 255]


def test_one_many_nested_and_none() -> None:
    one = picture(9, 8)
    for images, count in [
        (one, 1),
        ([one], 1),
        ([[one], [one, one]], 3),
        (np.stack([np.asarray(one)] * 2), 2),
        ([], 0),
    ]:
        assert processor()(images)["pixel_values"].shape == (count, 3, 4, 4)
    assert isinstance(processor()(one, return_tensors="np")["pixel_values"], np.ndarray)


def test_given_pictures_are_not_changed(tmp_path: Path) -> None:
    picture(600, 800).save(tmp_path / "photo.jpg")
    lazy = Image.open(tmp_path / "photo.jpg")
    processor(reducing_gap=2.0)(lazy)
    assert lazy.size == (800, 600)


def test_a_reducing_gap_stays_close(tmp_path: Path) -> None:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
        (1600, 1200)
    )
    smooth.save(tmp_path / "photo.jpg", quality=95)
    for mode in ("crop", "squash", "pad"):
        exact = processor(mode, 100)(tmp_path / "photo.jpg")["pixel_values"]
        quick = processor(mode, 100, reducing_gap=2.0)(tmp_path / "photo.jpg")["pixel_values"]
        assert not torch.equal(quick, exact)
        assert (quick - exact).abs().max() < 6 / 255


def test_options_for_one_call() -> None:
    ours = processor()
    white = Image.new("RGB", (5, 7), "white")
    assert ours(white, image_mean=[1.0, 1.0, 1.0])["pixel_values"].abs().max() == 0
    assert ours(white, do_rescale=False)["pixel_values"].max() == 255
    assert ours(white, do_normalize=False, size=6)["pixel_values"].shape[-1] == 6
    assert ours.size == {"height": 4, "width": 4} and ours.do_rescale


def test_saving_and_loading(tmp_path: Path) -> None:
    options = {"crop_fraction": 0.5, "reducing_gap": 2.0, "do_normalize": False, "resample": 2, "rescale_factor": 0.5}
    ours = processor("pad", (30, 44), **options)
    ours.save_pretrained(tmp_path)
    for loaded in (ChiasmImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ChiasmImageProcessor
        assert loaded.to_dict() == ours.to_dict()
    assert ChiasmImageProcessor.from_pretrained(tmp_path, resize_mode="crop").resize_mode == "crop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize_mode": "stretch"}, "resize_mode 'stretch' is unknown; choose one of crop, squash, pad"),
        ({"do_center_crop": True}, "image processor option 'do_center_crop' is unknown"),
        ({"crop_fraction": 1.5}, "crop_fraction is 1.5"),
        ({"image_mean": [0.5]}, "need three numbers"),
        ({"size": {"shortest_edge": 3}}, "expected {'height': ..., 'width': ...}"),
    ],
)
def test_wrong_options_are_told(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChiasmImageProcessor(**{"size": 4, "image_mean": [0.0] * 3, "image_std": [1.0] * 3} | options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no/such/file.png", "no/such/file.png cannot be read as a picture"),
        (Path(__file__), "test_image_processor.py cannot be read as a picture"),
        (7, "a int is not a picture"),
        (np.zeros((5, 6, 2), dtype=np.uint8), "1, 3 or 4 channels were expected"),
        (np.zeros((0, 6, 3), dtype=np.uint8), "is not a picture"),
        (np.full((5, 6, 3), 200.0), "values from 200.0 to 200.0; expected 0 to 1"),
        (np.full((5, 6, 3), 300), "expected 0 to 255"),
    ],
)
def test_what_is_not_a_picture_is_told(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()(image)


def test_a_decompression_bomb_is_told(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as a picture: .*200000000 pixels"):
        processor()(tmp_path / "bomb.png")


def written(folder: Path, **config: object) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


SQUARE = {"height": 30, "width": 30}
MEAN_STD = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_center_crop": True, "size": 224, "crop_size": 224}, {"resize_mode": "crop", "crop_fraction": 1.0}),
        (
            {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            {"resize_mode": "crop", "crop_fraction": 0.875},
        ),
        ({"do_center_crop": True, "size": SQUARE, "crop_size": SQUARE}, {"resize_mode": "squash"}),
        ({"size": {"height": 224, "width": 224}, "resample": 2}, {"resize_mode": "squash", "resample": 2}),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.9}, {"resize_mode": "crop", "crop_fraction": 0.9}),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.9}, {"resize_mode": "squash"}),
        ({"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, {"resize_mode": "pad"}),
        ({"size": 224, "do_normalize": False, "rescale_factor": 0.5}, {"do_normalize": False, "rescale_factor": 0.5}),
    ],
)
def test_a_sources_own_processing_is_read(config: dict, expected: dict, tmp_path: Path) -> None:
    tower = encoder("clip_vision_model", image_size=30, patch_size=10)
    ours = image_processor_for(written(tmp_path, **MEAN_STD, **config), tower)
    assert ours.size == {"height": 30, "width": 30}
    stated = ours.to_dict()
    assert {name: stated[name] for name in expected} == expected
    assert (stated["image_mean"], stated["image_std"]) == (MEAN_STD["image_mean"], MEAN_STD["image_std"])


@pytest.mark.parametrize("size", [{"height": 40, "width": 40}, {"shortest_edge": 20}, 20])
def test_crops_of_other_shapes_are_refused(size: object, tmp_path: Path) -> None:
    written(tmp_path, **MEAN_STD, do_center_crop=True, size=size, crop_size=SQUARE)
    with pytest.raises(ValueError, match=r"wants crop_size .* of pictures of size"):
        image_processor_for(tmp_path, encoder("clip_vision_model", image_size=30, patch_size=10))


def test_our_own_processing_is_read_back_and_options_win(tmp_path: Path) -> None:
    tower = encoder("siglip_vision_model", image_size=30, patch_size=10)
    processor("pad", 99, resample=2).save_pretrained(tmp_path)
    assert image_processor_for(tmp_path, tower).to_dict() == processor("pad", 30, resample=2).to_dict()
    assert image_processor_for(tmp_path, tower, "crop", image_mean=[0.5] * 3).to_dict()["resize_mode"] == "crop"


def test_without_files_the_published_values_are_taken(tmp_path: Path) -> None:
    tower = encoder("dinov2", image_size=30, patch_size=10)
    for source in (None, tmp_path, tower.model):
        stated = image_processor_for(source, tower).to_dict()
        assert {name: stated[name] for name in PUBLISHED["dinov2"]} == PUBLISHED["dinov2"]


def test_unknown_types_must_be_told(tmp_path: Path) -> None:
    tower = encoder("vit_msn", image_size=32, patch_size=8)
    with pytest.raises(ValueError, match=r"'vit_msn' encoder is not known .* pass image_mean= and image_std="):
        image_processor_for(None, tower)
    assert image_processor_for(None, tower, image_mean=[0.5] * 3, image_std=[0.5] * 3).image_mean == [0.5] * 3
    with pytest.raises(ValueError, match="do_flip_channel_order"):
        image_processor_for(written(tmp_path, do_flip_channel_order=True, size=224), tower)
    with pytest.raises(ValueError, match="wants do_resize: false in its image processing"):
        image_processor_for(written(tmp_path, do_resize=False, size=224), tower)


@pytest.mark.parametrize(("kept", "shortest"), [(384, 450), (336, 463), (448, 491), (224, 400), (224, 256)])
def test_a_published_shorter_side_stays_a_whole_number(kept: int, shortest: int, tmp_path: Path) -> None:
    geometry = {"do_center_crop": True, "size": {"shortest_edge": shortest}, "crop_size": kept}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor"} | geometry)
    )
    fields = read_published(tmp_path)
    made = ChiasmImageProcessor(kept, [0.5] * 3, [0.5] * 3, **fields)
    assert made.shortest(kept) == shortest


def test_a_published_share_is_rounded_down() -> None:
    made = ChiasmImageProcessor(224, [0.5] * 3, [0.5] * 3, crop_fraction=0.9)
    assert made.shortest(224) == 248
