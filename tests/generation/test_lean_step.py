"""Packed weights and the steps that read them: compiled and PyTorch's own give the same numbers."""

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


def test_four_bits_keep_what_four_bits_made() -> None:
    """Weights that were once packed in 4 bits come out of packing as they went in."""
    once = pack(torch.randn(8, 64), None, "int4").dense()
    torch.testing.assert_close(pack(once, None, "int4").dense(), once, rtol=1e-3, atol=1e-3)
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
        first = step.run(slots, 0, 1, hidden, rows, positions)
        assert first.shape[0] == 0
        made = step.run(slots, 1, len(lean.layers), hidden, rows, positions, told=2 * chunk)
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
