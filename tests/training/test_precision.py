"""Frozen weights are copies for a while and themselves again; layers are compiled for a while and themselves again."""

import helpers
import pytest
import torch

from chiasm.training import compiling
from chiasm.training.compiling import compiled_layers
from chiasm.training.precision import choose_dtype, stage_precision


@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16])
def test_weights_return_as_they_were(original: torch.dtype) -> None:
    model = helpers.vlm().model.to(original)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("connector."))
    before = {name: (p.data.clone(), p.data_ptr()) for name, p in model.named_parameters()}
    with stage_precision(model, torch.bfloat16) as originals:
        for name, parameter in model.named_parameters():
            expected = {"connector": torch.float32, "vision": original, "language": torch.bfloat16}
            assert parameter.dtype == expected[name.split(".")[0]]
        assert len(originals) == (0 if original == torch.bfloat16 else sum(n.startswith("language.") for n in before))
        model.connector.output.bias.data.add_(1.0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == original
        if name.startswith("connector."):
            continue
        assert parameter.data_ptr() == before[name][1] and torch.equal(parameter, before[name][0])
    assert torch.equal(model.connector.output.bias, before["connector.layers.1.bias"][0] + 1)


def test_half_precision_models_train_in_float32_where_it_is_asked_for() -> None:
    model = helpers.vlm().model.to(torch.bfloat16).requires_grad_(False)
    with stage_precision(model, torch.float32):
        assert next(model.language.parameters()).dtype == torch.float32
    assert next(model.language.parameters()).dtype == torch.bfloat16


def test_auto_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for fast, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_dtype("auto", device) == expected
    assert choose_dtype("bfloat16", device) == torch.bfloat16


def test_layers_are_compiled_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    language = helpers.vlm().model.language
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *args, **kwargs: function(*args, **kwargs))
    forward = language.model.layers[0].forward
    with compiled_layers(language, True):
        assert language.model.layers[0].forward != forward
        language(input_ids=torch.tensor([[1, 2]]))
    assert language.model.layers[0].forward == forward
    monkeypatch.setattr(compiling, "COMPILERS", ())
    with (
        pytest.raises(ValueError, match=r"needs a C\+\+ compiler on a CPU and found none"),
        compiled_layers(language, True),
    ):
        pass
