"""EfficientNet-Lite: the published architecture, the reference package's numbers, and the same features faster."""

import copy
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from transformers import AutoModel

import chiasm.vision.fast_inference as fast
from chiasm.vision.efficientnet_lite import (
    FEATURE_MAPS,
    STEM_CHANNELS,
    ConvNorm,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
)
from chiasm.vision.fast_inference import fast_inference, fold_batch_norms

VARIANTS = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260)}


def config_of(variant: int) -> EfficientNetLiteConfig:
    width, depth, size = VARIANTS[variant]
    return EfficientNetLiteConfig(width_coefficient=width, depth_coefficient=depth, image_size=size)


@pytest.fixture
def model() -> EfficientNetLiteModel:
    """A narrow one whose batch norms have statistics."""
    model = EfficientNetLiteModel(EfficientNetLiteConfig(width_coefficient=0.25, hidden_size=72)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model


@torch.no_grad()
def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a map."""
    return max(float((found[name].float() - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize(
    ("variant", "parameters", "grids", "stage5"),
    [
        (0, 4_652_008, (112, 112, 56, 28, 14, 14, 7, 7, 7), 112),
        (1, 5_416_680, (120, 120, 60, 30, 15, 15, 8, 8, 8), 112),
        (2, 6_092_072, (130, 130, 65, 33, 17, 17, 9, 9, 9), 120),
    ],
)
def test_published_sizes(variant: int, parameters: int, grids: tuple[int, ...], stage5: int) -> None:
    config = config_of(variant)
    with torch.device("meta"):
        model = EfficientNetLiteModel(config)
        output = model(torch.empty(2, 3, config.image_size, config.image_size))
    classifier = 1280 * 1000 + 1000
    assert sum(weight.numel() for weight in model.parameters()) + classifier == parameters
    assert tuple(output.feature_maps) == FEATURE_MAPS
    shapes = {name: tuple(features.shape) for name, features in output.feature_maps.items()}
    channels = (STEM_CHANNELS, *(stage[-1] for stage in config.stages), 1280)
    places = zip(FEATURE_MAPS, channels, grids, strict=True)
    assert shapes == {name: (2, count, grid, grid) for name, count, grid in places}
    assert shapes["stage5"][1] == stage5
    assert output.last_hidden_state is output.feature_maps["head"]


@pytest.mark.parametrize(("size", "first"), [(8, [0, 2, 4, 6]), (7, [-1, 1, 3, 5])])
def test_same_padding_is_tensorflows(size: int, first: list[int]) -> None:
    """A kernel that only looks at the start of its window shows where each window starts."""
    part = ConvNorm(EfficientNetLiteConfig(), (1, 1), kernel=3, stride=2, linear=True)
    with torch.no_grad():
        part.conv.weight.zero_()[0, 0, 0, 0] = 1
    part.norm = nn.Identity()
    picture = torch.arange(1.0, size + 1).diag_embed()[None, None]
    seen = part(picture)[0, 0].diagonal().tolist()
    assert seen == [start + 1 if start >= 0 else 0 for start in first]


@pytest.mark.parametrize("size", [(33, 47), (64, 40)])
def test_any_picture_size(model: EfficientNetLiteModel, size: tuple[int, int]) -> None:
    maps = model(torch.randn(1, 3, *size)).feature_maps
    for name, stride in {"stem": 2, "stage2": 4, "stage3": 8, "stage5": 16, "head": 32}.items():
        assert maps[name].shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


def test_survives_saving(model: EfficientNetLiteModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, EfficientNetLiteModel)
    picture = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(pixel_values=picture).last_hidden_state, model(picture).last_hidden_state)
    assert torch.equal(loaded(picture, return_dict=False)[0], model(picture).last_hidden_state)


def test_every_parameter_learns(model: EfficientNetLiteModel) -> None:
    model.train()
    model(torch.randn(4, 3, 64, 64)).last_hidden_state.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_fresh_weights_keep_the_picture() -> None:
    model = EfficientNetLiteModel(EfficientNetLiteConfig(width_coefficient=0.25)).eval()
    with torch.no_grad():
        first, second = model(torch.randn(2, 3, 64, 64)).last_hidden_state
    assert 0.01 < first.std() < 100 and (first - second).std() > 0.1 * first.std()


def test_folding_changes_nothing(model: EfficientNetLiteModel) -> None:
    before = copy.deepcopy(model.state_dict())
    picture = torch.randn(2, 3, 64, 64)
    folded = fold_batch_norms(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert distance(folded(picture).feature_maps, model(picture).feature_maps) < 5e-5
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_fast_inference_changes_nothing(
    model: EfficientNetLiteModel, onednn: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(fast, "_onednn_agrees", lambda folded, dtype: False)
    run = fast_inference(model.train())
    assert model.training and run.kernels == onednn
    model.eval()
    for batch in (1, 4, 9):
        pictures = torch.randn(batch, 3, *size)
        output = run(pixel_values=pictures)
        assert distance(output.feature_maps, model(pictures).feature_maps) < 5e-5
        assert torch.equal(output.last_hidden_state, output.feature_maps["head"])
        assert not output.last_hidden_state.requires_grad


def test_fast_inference_in_bfloat16(model: EfficientNetLiteModel) -> None:
    pictures = torch.randn(5, 3, 64, 64)
    maps = fast_inference(model, torch.bfloat16)(pictures).feature_maps
    assert all(features.dtype == torch.bfloat16 for features in maps.values())
    assert distance(maps, model(pictures).feature_maps) < 0.1


def test_fast_inference_stops_behind_the_last_map(model: EfficientNetLiteModel) -> None:
    run = fast_inference(model, feature_maps=["stage5", "stem"])
    assert len(run.parts) == 6
    pictures = torch.randn(2, 3, 64, 64)
    output = run(pictures)
    assert list(output.feature_maps) == ["stage5", "stem"] and output.last_hidden_state is None
    expected = model(pictures).feature_maps
    assert distance(output.feature_maps, {name: expected[name] for name in ("stage5", "stem")}) < 5e-5
    with pytest.raises(ValueError, match="'stage9' is unknown; choose from stem, stage1"):
        fast_inference(model, feature_maps=["stage9"])


def test_kernels_that_are_missing_or_wrong_are_not_used(
    model: EfficientNetLiteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fast._Kernel, "__call__", lambda self, x, residual=None: torch.ops.mkldnn.no_such_kernel(x))
        assert not fast_inference(model).kernels
    right = fast._Kernel.__call__
    monkeypatch.setattr(fast._Kernel, "__call__", lambda self, x, residual=None: right(self, x, residual) + 0.1)
    assert not fast_inference(model).kernels


@pytest.mark.slow
def test_without_a_compiler_it_runs_uncompiled(model: EfficientNetLiteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_onednn_agrees", lambda folded, dtype: False)
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    run = fast_inference(model, compile=True)
    pictures = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="not compiled"):
        first = run(pictures)
    assert distance(first.feature_maps, model(pictures).feature_maps) < 5e-5
    assert torch.equal(run(pictures).last_hidden_state, first.last_hidden_state)


@pytest.mark.weights
@pytest.mark.parametrize("variant", VARIANTS)
def test_pretrained_features_equal_the_reference_package(variant: int) -> None:
    reference_package = pytest.importorskip("efficientnet_lite_pytorch")
    from chiasm.sources import pull

    alias = f"efficientnet-lite{variant}"
    model = AutoModel.from_pretrained(pull(alias))
    assert model.config.to_dict().items() >= {"width_coefficient": VARIANTS[variant][0]}.items()
    reference = reference_package.EfficientNet.from_name(alias).eval()
    names = [name for name in reference.state_dict() if not name.startswith("_fc.")]
    state = dict(zip(names, model.state_dict().values(), strict=True))
    assert set(reference.load_state_dict(state, strict=False).missing_keys) == {"_fc.weight", "_fc.bias"}
    pictures = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        expected = reference.extract_features(pictures)
        torch.testing.assert_close(model(pictures).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast_inference(model)(pictures).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
