"""LoRA inside a part: no change at the start, saved and loaded as it is, merged without changing the logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from chiasm.fusion.adapters import METHODS, adapter_parameters, add_adapter, linear_layers, merge_adapters
from chiasm.fusion.build import build_fusion
from chiasm.fusion.early import EarlyFusionModel
from chiasm.vision.encoder import load_vision


def build(family: str = "llama") -> EarlyFusionModel:
    return build_fusion(load_vision(tiny.vision()), tiny.language(family), "mlp", image_token_id=260)


def logits(model: EarlyFusionModel) -> Tensor:
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 2, *[260] * 9, 5]]), pixel_values=pixels).logits


def train_a_little(model: EarlyFusionModel) -> None:
    names = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data.normal_(0, 0.3)


@pytest.mark.parametrize("family", tiny.LANGUAGE_FAMILIES)
def test_an_adapter_from_birth_to_merging(family: str, tmp_path: Path) -> None:
    model = build(family)
    plain_names, plain = {name for name, _ in model.named_parameters()}, logits(model)
    add_adapter(model, "language", rank=4)
    add_adapter(model, "vision", rank=3, targets=["q_proj", "v_proj"])
    assert torch.equal(logits(model), plain)
    train_a_little(model)
    tuned = logits(model)
    assert (tuned - plain).abs().max() > 0.1

    model.save_pretrained(tmp_path)
    loaded = EarlyFusionModel.from_pretrained(tmp_path)
    assert loaded.config.adapters == model.config.adapters
    assert torch.equal(logits(loaded), tuned)

    merge_adapters(model)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == plain_names and model.config.adapters is None
    add_adapter(model, "language", rank=2)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)


def test_all_linear_leaves_the_head_alone() -> None:
    names = linear_layers(build(), "language")
    assert "lm_head" not in names and len(names) == 3 * 7


def test_impossible_adapters_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"'qqq' is no linear layer of part 'language'; it has down_proj, .*v_proj"):
        add_adapter(model, "language", targets=["qqq"])
    add_adapter(model, "language")
    with pytest.raises(ValueError, match="'language' has a LoRA adapter already"):
        add_adapter(model, "language")


@pytest.mark.parametrize("method", METHODS)
def test_what_a_checkpoint_lacks_of_an_adapter_begins_as_a_new_one_does(method: str, tmp_path: Path) -> None:
    """Nothing changes by B, which is zero; DoRA's lengths are those of the weights. What is there stays."""
    model = build()
    plain = logits(model)
    add_adapter(model, "language", rank=4, targets=["q_proj"], method=method)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    names = adapter_parameters(model)
    assert any("magnitude" in name for name in names) == (method == "dora")
    weights = load_file(path)
    lacking = {name for name in names if "lora_A" not in name or ".0." not in name}
    kept = {name: tensor for name, tensor in weights.items() if name not in lacking}
    assert len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})
    loaded = EarlyFusionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), plain)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name]) if name in kept else parameter.isfinite().all(), name
