"""An engine that takes a model over: packed matrices in place of the full ones, and errors for what needs those."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.fusion.adapters import add_adapter
from chiasm.generation.decoders import SHORT
from chiasm.generation.engine import Engine
from chiasm.generation.lean import lean_model
from chiasm.generation.lean_decoder import LeanDecoder
from chiasm.generation.native.build import library
from chiasm.generation.packed_linear import PackedLinear
from chiasm.training.recipe import load_recipe
from tiny import picture


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if library() is None:
        pytest.skip("no C++ compiler")


def connect(language: str = "llama", **options: Any) -> chiasm.VLM:
    vlm = chiasm.connect(tiny.vision(), tiny.language(language), tokenizer=tiny.tokenizer(), **options)
    contracts.open_gates(vlm.model, 1.0)
    return vlm


def released(weights: str = "int8", **options: Any) -> chiasm.VLM:
    vlm = connect(**options)
    Engine(vlm.model, vlm.processor, weights=weights, release=True).close()
    return vlm


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"fusion": "intermediate"}, {"attention": "prefix"}])
def test_prompts_are_read_through_packed_weights(options: dict[str, Any], weights: str) -> None:
    """Long prompts and steps see the same weights: the answers are those of the released model itself."""
    contracts.check_engine_equals_generate(connect(**options), LeanDecoder, weights=weights, release=True)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("language", ["llama", "qwen2", "gemma3"])
@torch.no_grad()
def test_a_released_model_computes_with_the_packed_weights(
    language: str, weights: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiasm.generation.packed_linear.AT_ONCE", 500)
    vlm, dense = connect(language), tiny.language(language)
    dense.load_state_dict(vlm.model.language.state_dict())
    lean, tokens = lean_model(dense, weights), torch.randint(0, 250, (2, SHORT + 9))
    assert lean is not None
    embeddings = dense.get_input_embeddings()(tokens)
    dense.get_output_embeddings().weight = torch.nn.Parameter(lean.head.dense())
    for layer, packed in zip(dense.model.layers, lean.layers, strict=True):
        for name in ("q", "k", "v", "o"):
            getattr(layer.self_attn, f"{name}_proj").weight.copy_(getattr(packed, name).dense())
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").weight.copy_(getattr(packed, name).dense())
    Engine(vlm.model, vlm.processor, weights=weights, release=True).close()
    monkeypatch.setenv("CHIASM_NATIVE", native)
    found = vlm.model.language(inputs_embeds=embeddings).logits
    torch.testing.assert_close(found, dense(inputs_embeds=embeddings).logits, rtol=1e-4, atol=1e-4)


def test_the_full_matrices_are_gone() -> None:
    vlm = connect()
    add_adapter(vlm.model, "language", rank=2)
    layer = vlm.model.language.base_model.layers[0]
    weights = [weakref.ref(layer.mlp.up_proj.weight), weakref.ref(layer.self_attn.q_proj.weight)]
    engine = Engine(vlm.model, vlm.processor, weights="int4")
    gc.collect()
    assert all(weight() is not None for weight in weights)
    engine.close()
    Engine(vlm.model, vlm.processor, weights="int4", release=True).close()
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_what_needs_the_full_matrices_is_an_error(tmp_path: Path) -> None:
    vlm = released()
    with pytest.raises(RuntimeError, match="release=True has left only int8 of its matrices; load the model again"):
        vlm.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        vlm.model.train()
    with pytest.raises(RuntimeError, match="its weight was asked for"):
        _ = vlm.model.language.get_output_embeddings().weight
    with pytest.raises(ValueError, match="weights='float32', but an engine with release=True has left 'int8'"):
        Engine(vlm.model, vlm.processor)


def test_a_refusal_to_train_changes_nothing(tmp_path: Path) -> None:
    vlm = released()

    def state() -> tuple[list[bool], list[bool]]:
        return [m.training for m in vlm.model.modules()], [p.requires_grad for p in vlm.model.parameters()]

    before = state()
    stage = {"name": "tune", "steps": 1, "parts": {"*": "frozen", "connector": {"tune": "full", "lr": 1e-3}}}
    for refused in (vlm.model.train, lambda: chiasm.train(load_recipe({"stages": [stage]}), vlm, [], tmp_path / "run")):
        with pytest.raises(RuntimeError, match="cannot be trained: an engine with release=True has left only int8"):
            refused()
        assert state() == before
    assert not (tmp_path / "run").exists()


def test_another_engine_with_other_weights_is_refused_in_any_precision() -> None:
    vlm = connect().to(torch.bfloat16)
    Engine(vlm.model, vlm.processor, weights="int4", release=True).close()
    with pytest.raises(ValueError, match="weights='float32', but an engine with release=True has left 'int4'"):
        Engine(vlm.model, vlm.processor)


def test_what_does_not_need_them_goes_on() -> None:
    """A second engine with the same weights, `chat` and `attention`, also after a move that the packed ones ignore."""
    vlm = released()
    assert vlm.chat(picture(), "What?", choices=["yes", "no"], max_new_tokens=5) in ("yes", "no")
    said = vlm.chat(picture(), "What?", max_new_tokens=5)
    assert vlm.to(torch.float32).chat(picture(), "What?", max_new_tokens=5) == said
    seen = vlm.attention(picture(), "What?", max_new_tokens=5)
    assert seen.answer == said and bool(seen.patches.sum() > 0)
    packed = vlm.model.language.base_model.layers[0].mlp.up_proj
    assert isinstance(packed, PackedLinear) and packed.to(torch.bfloat16).scales.dtype == torch.float16
    contracts.check_engine_equals_generate(vlm, LeanDecoder, weights="int8")


def test_nothing_is_released_where_no_packed_weights_are() -> None:
    vlm = connect("gpt2")
    before = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    with pytest.warns(UserWarning, match="GPT2LMHeadModel keeps its own"):
        Engine(vlm.model, vlm.processor, weights="int8", release=True).close()
    assert all(torch.equal(weight, before[name]) for name, weight in vlm.model.state_dict().items())
    with pytest.raises(ValueError, match="release=True leaves packed weights only, but weights='float32'"):
        Engine(vlm.model, vlm.processor, release=True)
