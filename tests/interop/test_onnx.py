"""ONNX graphs give the logits and the greedy tokens of the model."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import test_unified_loaders
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import chiasm
import chiasm.api
import tiny
from chiasm.connectors import CONNECTORS
from chiasm.interop.convert import convert

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def check_same_answers(ours: Tensor, theirs: Tensor) -> None:
    """Up to the end of each."""
    for one, other in zip(ours, theirs, strict=True):
        end = (one == 257).nonzero()
        length = int(end[0]) + 1 if len(end) else len(one)
        assert torch.equal(one[:length], other[:length])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "language", "connector"), [("clip", "llama", "mlp"), ("convnext", "gemma3", "avg_pool")]
)
def test_logits_and_tokens_of_a_padded_batch(vision: str, language: str, connector: Any, tmp_path: Path) -> None:
    from chiasm.interop.onnx_model import OnnxModel

    vlm = chiasm.connect(tiny.vision(vision), tiny.language(language), connector, tokenizer=tiny.tokenizer())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = convert(vlm.model, vlm.processor, "onnx", tmp_path)
        warnings.warn("The axis name: of someone else", UserWarning, stacklevel=1)
    assert [str(one.message) for one in told if "LeafSpec" in str(one.message) or "axis name" in str(one.message)] == [
        "The axis name: of someone else"
    ]
    assert done.difference is not None and done.difference < 1e-3
    graphs = OnnxModel(tmp_path)
    pictures = [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3)]]
    inputs = vlm.processor(messages=[tiny.ask("What?"), tiny.ask("Are both of these red?", 2)], images=pictures)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = vlm.model(**inputs).logits[real]
    torch.testing.assert_close(torch.from_numpy(graphs.forward(arrays)[0])[real], expected, rtol=1e-3, atol=1e-3)
    tokens = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    found = torch.from_numpy(graphs.generate(arrays, 8))
    check_same_answers(tokens, found)


@pytest.mark.slow
def test_half_precision_and_a_repetition_penalty(tmp_path: Path) -> None:
    """Graphs of bfloat16 weights compute in float32, and the model's own penalty is theirs."""
    from chiasm.interop.onnx_model import OnnxModel

    vlm = chiasm.connect(tiny.vision("siglip"), tiny.language("qwen2"), "linear", tokenizer=tiny.tokenizer())
    vlm.model.to(torch.bfloat16)
    vlm.model.generation_config.repetition_penalty = 100.0
    done = chiasm.api.convert(vlm, "onnx", tmp_path / "out")
    assert done.difference is not None and done.difference < 1e-3 and vlm.model.dtype == torch.bfloat16
    assert any("the weights are bfloat16; the graphs compute in float32" in note for note in done.notes)
    asked = [tiny.ask("What?"), tiny.ask("Is this one of those that are red?")]
    inputs = vlm.processor(messages=asked, images=[[tiny.picture(1)], [tiny.picture(2)]])
    arrays, model = {name: tensor.numpy() for name, tensor in inputs.items()}, vlm.model.float()
    graphs, start = OnnxModel(tmp_path / "out"), inputs["input_ids"].shape[1]
    found = []
    for told in ({}, {"repetition_penalty": 1.0}):
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **told)[:, start:]
        found.append(torch.from_numpy(graphs.generate(arrays, 8, **told)))
        check_same_answers(tokens, found[-1])
    assert not torch.equal(*found)


def test_a_window_of_all_layers_is_kept() -> None:
    """Mistral's configuration tells no layers' kinds."""
    from chiasm.interop.export.onnx import Decoder

    sizes = {"vocab_size": 99, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 4, "initializer_range": 0.3}
    language = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    language.set_attn_implementation("eager")
    ids, mask, none = torch.randint(0, 99, (2, 11)), torch.ones(2, 11, dtype=torch.long), torch.zeros(2, 2, 0, 6)
    with torch.no_grad():
        expected = language(input_ids=ids).logits
        positions = torch.arange(11).expand(2, -1)
        found, *_ = Decoder(language)(language.get_input_embeddings()(ids), mask, positions, [none] * 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_graphs_is_refused(tmp_path: Path) -> None:
    options = {"fusion": "intermediate", "connector": tiny.connector("perceiver_resampler", project=False)}
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer(), **options)
    with pytest.raises(ValueError, match=r"ONNX graphs are for early fusion .* this is fusion 'intermediate'"):
        convert(vlm.model, vlm.processor, "onnx", tmp_path / "out")
    test_unified_loaders.qwen2_vl().save_pretrained(tmp_path / "qwen2_vl")
    with pytest.raises(ValueError, match=r"pictures of one size .* connector 'patch_merger'"):
        convert(chiasm.load(tmp_path / "qwen2_vl").model, None, "onnx", tmp_path / "out")


def test_a_connector_that_fixes_the_number_of_pictures_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(CONNECTORS["linear"]):  # type: ignore[misc, name-defined]
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features).reshape(len(features), *features.shape[1:2], -1)

    monkeypatch.setitem(CONNECTORS, "fixed", Fixed)
    vlm = chiasm.connect(tiny.vision("siglip"), tiny.language(), "fixed", tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match=r"connector 'fixed' .* number of pictures as a constant.*; read sizes from"):
        convert(vlm.model, vlm.processor, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
