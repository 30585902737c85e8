"""Pictures in tiles: where visual tokens stand, what they cost, and that a connected model learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import chiasm
import contracts
import tiny
from chiasm.cli import app
from chiasm.comparison.describe import describe
from chiasm.data.collation import Collator
from chiasm.data.schema import ImageRef, Sample
from chiasm.data.tiles import Tiling
from chiasm.interop.convert import convert
from chiasm.training.log import read_log

GRIDS = [(1, 2), (2, 1), (2, 2)]
SIZES = [(40, 30), (20, 90), (61, 60)]


def connect(vision: str = "clip", connector: Any = "mlp", tiles: Any = GRIDS, **options: Any) -> chiasm.VLM:
    return chiasm.connect(
        tiny.vision(vision), tiny.language(), connector, tokenizer=tiny.tokenizer(), tiles=tiles, **options
    )


def pictures() -> list[Image.Image]:
    return [tiny.picture(seed).resize(size[::-1]) for seed, size in enumerate(SIZES)]


def samples(count: int = 8) -> list[Sample]:
    """Pictures of every shape, two in some, none in some."""
    made = []
    for index in range(count):
        shown = [pictures()[(index + more) % 3] for more in range((1, 2, 1, 0)[index % 4])]
        messages = [*tiny.ask("What?", len(shown)), {"role": "assistant", "content": "red" if index % 2 else "blue"}]
        made.append(Sample(f"s{index}", messages, [ImageRef.of(one, f"picture {index}") for one in shown]))
    return made


def test_a_grid_that_suits_the_shape_without_what_pads_it() -> None:
    tiling = Tiling(((1, 2), (2, 1), (2, 2)), (30, 30), (3, 3))
    assert [tiling.grid(*size) for size in [(30, 60), (90, 20), (61, 60), (10, 10)]] == [(1, 2), (2, 1), (2, 2), (1, 2)]
    assert tiling.kept(30, 60) == (range(3), range(6)) and tiling.length(30, 60) == 9 + 3 * 7
    assert tiling.kept(20, 60) == (range(3), range(6)), "half a token of padding on either side stays"
    assert tiling.kept(10, 60) == (range(1, 2), range(6)) and tiling.length(10, 60) == 9 + 1 * 7
    assert tiling.kept(60, 1) == (range(6), range(1, 2)), "of three columns the middle one stays"
    assert tiling.kept(900, 10) == (range(3), range(3, 3)), "a line that no grid shows has ends of rows alone"


def test_tokens_stand_row_by_row_behind_the_whole() -> None:
    """Of a connector that only adds up: each token tells the pixel that it came from."""
    vlm = connect(connector={"name": "linear", "bias": False})
    model = vlm.model
    tiles = torch.randn(1, 3, 3, 30, 30)
    with torch.no_grad():
        (tokens,) = model.visual_tokens(tiles, torch.tensor([[30, 60]]))
        whole, left, right = model.connect_features(model.encode_images(tiles[0]))
    assert torch.equal(tokens[:9], whole)
    rows = tokens[9:].unflatten(0, (3, 7))
    assert torch.equal(rows[:, :3], left.unflatten(0, (3, 3))) and torch.equal(rows[:, 3:6], right.unflatten(0, (3, 3)))
    assert torch.equal(rows[:, 6], model.connector.image_newline.expand(3, -1))
    words = model.get_input_embeddings().weight
    loudness = model.connector.image_newline.pow(2).mean().sqrt()
    torch.testing.assert_close(loudness, words.float().pow(2).mean().sqrt(), rtol=0.1, atol=0)


@pytest.mark.parametrize("options", [{}, {"vision": "siglip", "connector": "avg_pool"}, {"attention": "prefix"}])
def test_contracts(options: dict[str, Any]) -> None:
    vlm = connect(**options)
    asked = [tiny.ask("What?", 2), tiny.ask("This one?")]
    inputs = dict(vlm.processor(messages=asked, images=[pictures()[:2], pictures()[2:]]))
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    contracts.check_batched_equals_single(vlm, asked, [pictures()[:2], pictures()[2:]])
    contracts.check_engine_equals_generate(vlm)
    contracts.check_assistant(vlm)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.model.config.image_token_id, -100)
    contracts.check_losses_agree(vlm.model, inputs, labels)
    with pytest.raises(ValueError, match="attention is told for pictures of one size"):
        vlm.attention(pictures()[:1], "What?")


@pytest.mark.parametrize("images", [0, 2])
def test_what_a_large_square_picture_costs(images: int) -> None:
    vlm = connect()
    vlm.model.set_attn_implementation("eager")
    cost, tiling = vlm.cost(images=images, text_tokens=11), vlm.model.tiling
    shown = [Image.new("RGB", tiling.square)] * images
    text = "<image>" * images + "a" * 11
    inputs = vlm.processor(images=shown or None, text=text)
    assert inputs["input_ids"].shape[1] == cost.sequence == 11 + images * describe(vlm.model)["tokens_per_image"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vlm.model(**inputs, use_cache=True, logits_to_keep=1)
    assert counter.get_total_flops() == cost.encode_flops + cost.connect_flops + cost.prefill_flops
    assert cost.parameters["connector"] == sum(p.numel() for p in vlm.model.connector.parameters())


@pytest.mark.parametrize("pack", [False, True])
def test_it_learns_from_pictures_of_every_shape(pack: bool, tmp_path: Path) -> None:
    """The ends of rows too, and validation shows wrong pictures of other shapes."""
    vlm = connect()
    before = vlm.model.connector.image_newline.clone()
    frozen = {"*": "frozen", "connector": {"tune": "full", "lr": 1e-2}}
    stage = {"name": "align", "steps": 3, "batch_size": 4, "dtype": "float32", "parts": frozen, "pack": pack}
    recipe = {"stages": [stage | {"validation": {"samples": 4}}]}
    result = chiasm.train(recipe, vlm, samples(), tmp_path / "run", validation_data=samples(4), quiet=True)
    events = read_log(result.log)
    assert any(event.get("shuffled_loss") is not None for event in events)
    assert not torch.equal(vlm.model.connector.image_newline, before)
    assert isinstance(chiasm.load(result.model).chat(pictures()[1], "What?", max_new_tokens=2), str)


def test_a_cache_of_features_is_refused(tmp_path: Path) -> None:
    stage = {"name": "align", "steps": 1, "parts": {"*": "frozen", "connector": {"tune": "full", "lr": 1e-2}}}
    with pytest.raises(ValueError, match="cache_features keeps one picture's features, this model reads it in tiles"):
        chiasm.train({"stages": [stage | {"cache_features": True}]}, connect(), samples(), tmp_path / "run", quiet=True)


def test_text_alone_reaches_the_ends_of_rows() -> None:
    """So that every process of a distributed run has a gradient for them."""
    vlm = connect()
    ids = torch.randint(0, 255, (1, 9))
    vlm.model.train()(input_ids=ids, labels=ids).loss.backward()
    assert vlm.model.connector.image_newline.grad is not None
    made = Collator(vlm.processor)(samples(4))
    assert made["pixel_values"].shape[:2] == (4, 5) and made["image_sizes"].shape == (4, 2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "queries": ({"connector": tiny.connector("qformer")}, "tiles need a connector whose visual tokens form a grid"),
    "class token": ({"features": {"layers": [-2], "prefix": "keep"}}, "form a grid, got 'mlp' with 10 tokens of 10"),
    "fusion": ({"fusion": "intermediate"}, "tiles are for fusion 'early' with a causal .*, got fusion 'intermediate'"),
    "late": ({"fusion": "late", "connector": "linear"}, "tiles= is not for fusion 'late'"),
    "regions": ({"regions": (3, 3)}, r"got regions \[3, 3\]; remove tiles"),
    "none": ({"tiles": []}, r"tiles \[\], expected rows and columns of one grid or more"),
    "no grid": ({"tiles": [(0, 2)]}, r"tiles \[\[0, 2\]\], expected rows and columns"),
    "resize_mode": ({"resize_mode": "pad"}, "resize_mode='pad' is not for tiles"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_tiles(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        connect(**options)
    with pytest.raises(ValueError, match="got an encoder-decoder language model; remove tiles"):
        chiasm.connect(tiny.vision(), tiny.language("t5"), tokenizer=tiny.tokenizer(), tiles=GRIDS)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_tools_for_pictures_of_one_size_get_none(target: str, tmp_path: Path) -> None:
    vlm = connect()
    with pytest.raises(ValueError, match="pictures in tiles"):
        convert(vlm.model, vlm.processor, target, tmp_path / "out")


def test_from_the_command_line(tmp_path: Path) -> None:
    tiny.vision("siglip").save_pretrained(tmp_path / "vision")
    tiny.language().save_pretrained(tmp_path / "language")
    tiny.tokenizer().save_pretrained(tmp_path / "language")
    parts = ["connect", "--vision", str(tmp_path / "vision"), "--language", str(tmp_path / "language")]
    made = CliRunner().invoke(app, [*parts, "--tiles", "1x2,2x1", "-o", str(tmp_path / "mine")])
    assert made.exit_code == 0 and "9 patches for each tile, for a large square picture" in made.output
    assert chiasm.load(tmp_path / "mine").model.config.tiles == [[1, 2], [2, 1]]
    wrong = CliRunner().invoke(app, [*parts, "--tiles", "2", "-o", str(tmp_path / "other")])
    assert isinstance(wrong.exception, ValueError) and "--tiles '2', expected rows x columns" in str(wrong.exception)
