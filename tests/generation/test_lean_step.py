"""Packed weights and the steps that read them: compiled and PyTorch's own give the same numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from chiasm.generation.lean import lean_model
from chiasm.generation.native.build import library
from chiasm.generation.native.matrix import unpack
from chiasm.generation.native.step import NativeStep
from chiasm.generation.packed import pack
from chiasm.generation.slots import CacheShape, Slots
from chiasm.generation.torch_step import TorchStep

LEAN = ("llama", "qwen2", "gemma3")


@pytest.mark.parametrize(("kind", "error"), [("float32", 0.0), ("int8", 0.008), ("int4", 0.12)])
@pytest.mark.parametrize("shape", [(48, 96), (35, 41)])
def test_packed_weights(kind: str, error: float, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed = pack(weight, torch.randn(shape[0]), kind)
    assert (packed.dense() - weight).norm() <= error * weight.norm()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packing_and_unpacking_go_part_by_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(35, 41)
    whole = pack(weight, None, kind)
    monkeypatch.setattr("chiasm.generation.packed.AT_ONCE", 100)
    parts = pack(weight, None, kind)
    assert torch.equal(parts.data, whole.data) and torch.equal(parts.dense(), whole.dense())
    assert torch.equal(whole.part(3, 20).dense(), whole.dense()[3:20])
    if (compiled := library()) is not None:
        torch.testing.assert_close(unpack(compiled, whole, 3, 20), whole.dense()[3:20])


def test_four_bits_are_closer_than_from_end_to_end() -> None:
    weight = torch.randn(64, 256)
    low, high = (ends(weight.unflatten(1, (-1, 32)), dim=-1, keepdim=True) for ends in (torch.amin, torch.amax))
    plain = ((weight.unflatten(1, (-1, 32)) - low) * 15 / (high - low)).round() * (high - low) / 15 + low
    assert (pack(weight, None, "int4").dense() - weight).norm() < 0.95 * (plain.flatten(1) - weight).norm()


def test_four_bits_keep_what_lora_changed() -> None:
    """The change is smaller than a step of the grid, so that rounding alone loses most of it."""
    base = pack(torch.randn(256, 384), None, "int4")
    base = replace(base, down=None, up=None).dense()
    change = 0.002 * torch.randn(256, 16) @ torch.randn(16, 384)
    packed = pack(base + change, None, "int4")
    rounded = replace(packed, down=None, up=None).dense()
    assert (rounded - base - change).norm() > 0.7 * change.norm()
    assert (packed.dense() - base - change).norm() < 0.5 * change.norm()


def test_four_bits_keep_what_four_bits_made() -> None:
    """Weights that were once packed in 4 bits come out of packing as they went in."""
    once = replace(pack(torch.randn(8, 64), None, "int4"), down=None, up=None).dense()
    assert pack(once, None, "int4").up is None
    torch.testing.assert_close(pack(once, None, "int4").dense(), once, rtol=1e-3, atol=1e-3)
    short = torch.randint(2, 15, (8, 32)).double()  # no group reaches both ends of the sixteen numbers
    short[:, 0], short[:, 1] = 1, 14
    short = (short * 0.0625 - 0.5).float()
    assert torch.equal(pack(short, None, "int4").dense(), short)
    zeros = pack(torch.zeros(2, 32), None, "int4")
    assert not zeros.dense().any() and not pack(torch.zeros(2, 32), None, "int8").dense().any()


def language_and_tokens(family: str) -> tuple[PreTrainedModel, torch.Tensor]:
    torch.manual_seed(1)
    return tiny.language(family), torch.randint(0, 250, (2, 12))


def logits(step: Any, language: PreTrainedModel, tokens: torch.Tensor, chunk: int = 1) -> torch.Tensor:
    """Logits of every place of two sequences in slots 2 and 0, read `chunk` tokens at a time."""
    lean = step.lean
    slots = Slots(CacheShape(len(lean.layers), lean.kv_heads, lean.head_dim), 3)
    slots.take(tokens.shape[1])
    embeddings, found = language.get_input_embeddings()(tokens), []
    rows = torch.tensor([2, 0]).repeat_interleave(chunk)
    for start in range(0, tokens.shape[1], chunk):
        hidden = embeddings[:, start : start + chunk].flatten(0, 1).clone()
        positions = torch.arange(start, start + chunk).repeat(2)
        first = step.run(slots, 0, 1, hidden, rows, positions, positions)
        assert first.shape[0] == 0
        made = step.run(slots, 1, len(lean.layers), hidden, rows, positions, positions, told=2 * chunk)
        found.append(made.unflatten(0, (2, chunk)))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", LEAN)
@torch.no_grad()
def test_steps_are_the_models_forward(family: str) -> None:
    language, tokens = language_and_tokens(family)
    expected = language(input_ids=tokens).logits
    lean = lean_model(language)
    assert lean is not None
    torch.testing.assert_close(logits(TorchStep(lean), language, tokens), expected, rtol=1e-4, atol=1e-4)
    compiled = library()
    if compiled is None:
        pytest.skip("no C++ compiler")
    for chunk in (1, 3, 12):
        found = logits(NativeStep(lean, compiled), language, tokens, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", LEAN)
@torch.no_grad()
def test_packed_steps_are_the_forward_of_the_packed_weights(family: str, weights: str) -> None:
    """What packing costs is in the weights alone: a model with the unpacked ones gives the same logits."""
    compiled = library()
    if compiled is None:
        pytest.skip("no C++ compiler")
    language, tokens = language_and_tokens(family)
    lean = lean_model(language, weights)
    assert lean is not None and lean.bytes < 0.45 * sum(p.numel() * 4 for p in language.parameters())
    found = logits(NativeStep(lean, compiled), language, tokens)
    torch.testing.assert_close(logits(TorchStep(lean), language, tokens), found, rtol=1e-3, atol=1e-3)
    head = language.get_output_embeddings()
    head.weight = torch.nn.Parameter(lean.head.dense())
    for layer, packed in zip(language.model.layers, lean.layers, strict=True):
        for name in ("q", "k", "v", "o"):
            getattr(layer.self_attn, f"{name}_proj").weight.copy_(getattr(packed, name).dense())
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").weight.copy_(getattr(packed, name).dense())
    embeddings = tiny.language(family).get_input_embeddings()(tokens)
    torch.testing.assert_close(found, language(inputs_embeds=embeddings).logits, rtol=1e-3, atol=1e-3)
