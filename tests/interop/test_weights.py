"""A reference's weights fill a module completely or not at all, and the message names the weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from chiasm.interop.weights import assemble, fit, read_weights, rename

TABLE = {"theirs.tower": "vision", "theirs.tower.norm": "norm", "theirs.scale": "scale", "theirs.old": None}


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.zeros(2))
        self.register_buffer("steps", torch.zeros(1))


def weights() -> dict[str, Tensor]:
    shapes = {"tower.weight": (3, 5), "tower.bias": (3,), "tower.norm.weight": (7,), "tower.norm.bias": (7,)}
    shapes |= {"scale": (2,), "old.thing": (4,)}
    return {f"theirs.{name}": torch.randn(shape) for name, shape in shapes.items()} | {"steps": torch.ones(1)}


def test_every_weight_finds_its_place() -> None:
    ours, theirs = Ours(), weights()
    ours.load_state_dict(fit(theirs, ours, TABLE, {"vision.weight": lambda weight: -weight}))
    torch.testing.assert_close(ours.vision.weight, -theirs["theirs.tower.weight"])
    torch.testing.assert_close(ours.norm.bias, theirs["theirs.tower.norm.bias"])
    torch.testing.assert_close(ours.scale, theirs["theirs.scale"])
    assert ours.steps == 1 and ours.vision.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("theirs.tower.weight", "vision.weight"),
        ("theirs.tower.norm.weight", "norm.weight"),
        ("theirs.tower.normal.weight", "vision.normal.weight"),
        ("theirs.towers.weight", "theirs.towers.weight"),
        ("theirs.scale", "scale"),
        ("theirs.old.x.y", None),
    ],
)
def test_prefixes_are_exact_and_the_longest_wins(name: str, expected: str | None) -> None:
    assert rename(name, TABLE) == expected


def test_an_empty_place_takes_the_rest_of_the_name() -> None:
    assert rename("model.lm.weight", {"model": ""}) == "lm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theirs.tower.bias": None}, r"1 weight has no value in the checkpoint: 'vision\.bias'"),
        ({"steps": None}, "1 weight has no value in the checkpoint: 'steps'"),
        ({"theirs.tower.extra": torch.zeros(1)}, r"1 weight has no place in Ours: 'theirs\.tower\.extra'"),
        ({"other": torch.zeros(1)}, "no place in Ours: 'other'"),
        ({"theirs.scale": torch.zeros(3)}, r"'theirs\.scale' is \(3,\), but 'scale' is \(2,\)"),
        ({"vision.bias": torch.zeros(3)}, r"'theirs\.tower\.bias' and 'vision\.bias' both become 'vision\.bias'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    theirs = {name: value for name, value in (weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        fit(theirs, Ours(), TABLE)


def test_a_transform_without_a_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="'visio' is to be transformed"):
        fit(weights(), Ours(), TABLE, {"visio": lambda weight: weight})


def test_buffers_that_are_computed_today_may_be_left_over() -> None:
    fit(weights() | {"theirs.tower.rotary.inv_freq": torch.ones(2), "position_ids": torch.ones(2)}, Ours(), TABLE)


@pytest.mark.parametrize("kept", [["lm_head.weight"], ["model.embed_tokens.weight"], []])
def test_one_of_tied_weights_is_enough(kept: list[str]) -> None:
    reference = tiny.language("qwen2")
    theirs = reference.state_dict()
    for name in {"lm_head.weight", "model.embed_tokens.weight"} - set(kept):
        theirs.pop(name)
    if not kept:
        with pytest.raises(ValueError, match=r"no value in the checkpoint: 'model\.embed_tokens\.weight'"):
            assemble(type(reference), reference.config, theirs, {})
        return
    ours = assemble(type(reference), reference.config, theirs, {})
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ids = torch.randint(0, 250, (2, 7))
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_tied_weights_that_differ_are_an_error() -> None:
    reference = tiny.language("qwen2")
    theirs = dict(reference.state_dict())
    theirs["lm_head.weight"] = theirs["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' and 'lm_head\.weight' are tied but differ"):
        assemble(type(reference), reference.config, theirs, {})


@pytest.mark.parametrize("family", tiny.LANGUAGE_FAMILIES)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_files_are_read_in_shards_and_in_one(family: str, shard: str, tmp_path: Path) -> None:
    reference = tiny.language(family)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    ours = assemble(type(reference), reference.config, read_weights(tmp_path), {})
    ids = torch.randint(0, 250, (2, 7))
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors; Chiasm reads safetensors only"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path)


def test_an_index_of_shards_that_were_written_over_is_not_read(tmp_path: Path) -> None:
    """transformers removes the shards, leaves the index, and reads the one file."""
    reference = tiny.language()
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert set(read_weights(tmp_path)) == set(reference.state_dict())


@pytest.mark.parametrize("text", ['{"weight_map": {"wei', "[]", '{"weight_map": null}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged: .*; fetch it again"):
        read_weights(tmp_path)


@pytest.mark.parametrize("shard", ["missing.safetensors", "../outside.safetensors"])
def test_a_shard_that_is_not_in_the_folder_is_named(shard: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"weight": "{shard}"}}}}')
    with pytest.raises(ValueError, match=f"has no {shard}; fetch it again"):
        read_weights(folder)
