"""Every connector keeps the family's contract; the closed-form start is the regression it says it is."""

import pytest
import torch
from torch import nn

import tiny
from chiasm.connectors import CONNECTORS, PACKAGED, build_connector, connector_settings
from chiasm.connectors.closed_form import NothingToLearn, Ridge, solve, start
from contracts import check_connector, check_connector_prefix, check_connector_tokens


@pytest.mark.parametrize("name", CONNECTORS)
def test_contract(name: str) -> None:
    check_connector(lambda grid: build_connector(tiny.connector(name), 20, 36, grid), 20, 36)


@pytest.mark.parametrize("name", CONNECTORS)
def test_prefix_tokens_are_read_or_refused(name: str) -> None:
    check_connector_prefix(tiny.connector(name), 20, 36)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("name", CONNECTORS)
def test_a_number_of_tokens_is_given_exactly_or_refused(name: str, grid: tuple[int, int]) -> None:
    assert check_connector_tokens(tiny.connector(name), grid) or name not in PACKAGED


def test_linear_is_one_matrix() -> None:
    connector = build_connector("linear", 20, 36, (2, 2))
    features = torch.randn(3, 4, 20)
    torch.testing.assert_close(connector(features), features @ connector.proj.weight.T + connector.proj.bias)


def test_linear_without_its_matrix_is_the_patches() -> None:
    connector = build_connector({"name": "linear", "project": False}, 20, 36, (2, 2))
    features = torch.randn(3, 4, 20)
    assert torch.equal(connector(features), features)
    assert connector.width == 20 and connector.output is None and connector.dtype is None and connector.flops() == 0
    with pytest.raises(ValueError, match="connector linear without a matrix or a bias is no affine map"):
        connector.set_affine(torch.randn(36, 20), torch.randn(36), 1.0)


@pytest.mark.parametrize(("depth", "width"), [(2, None), (3, 24)])
def test_mlp_is_linear_gelu_linear(depth: int, width: int | None) -> None:
    connector = build_connector({"name": "mlp", "depth": depth, "width": width}, 20, 36, (2, 2))
    inner = width or 36
    assert sum(p.numel() for p in connector.parameters()) == (
        (20 + 1) * inner + (depth - 2) * (inner + 1) * inner + (inner + 1) * 36
    )
    stages: list[nn.Module] = []
    for layer in connector.layers:
        stages += [layer, nn.GELU()]
    features = torch.randn(3, 4, 20)
    torch.testing.assert_close(connector(features), nn.Sequential(*stages[:-1])(features))


def test_settings_hold_the_defaults() -> None:
    assert connector_settings("mlp") == {"name": "mlp", "depth": 2, "width": None, "bias": True, "activation": "gelu"}


def test_unknown_names_and_options_are_errors() -> None:
    with pytest.raises(ValueError, match=r"'mlpp' is unknown; choose one of .*mlp"):
        build_connector("mlpp", 4, 4, (1, 1))
    with pytest.raises(ValueError, match=r"connector {'depth': 3} has no 'name'; name one of .*mlp"):
        build_connector({"depth": 3}, 4, 4, (1, 1))
    with pytest.raises(ValueError, match="no option 'dept'; its options are: depth, width, bias, activation"):
        build_connector({"name": "mlp", "dept": 3}, 4, 4, (1, 1))
    with pytest.raises(ValueError, match="activation='gelus', which is unknown; choose one of gelu"):
        build_connector({"name": "mlp", "activation": "gelus"}, 4, 4, (1, 1))
    with pytest.raises(ValueError, match="depth=1"):
        build_connector({"name": "mlp", "depth": 1}, 4, 4, (1, 1))


@pytest.mark.parametrize(("width", "activation"), [(None, "gelu"), (80, "gelu"), (None, "silu"), (None, "relu")])
def test_mlp_can_be_any_affine_map_of_its_rank(width: int | None, activation: str) -> None:
    connector = build_connector({"name": "mlp", "width": width, "activation": activation}, 12, 36, (2, 2))
    weight, bias = torch.randn(36, 12), torch.randn(36)
    connector.set_affine(weight, bias, spread=1.7)
    features = 1.7 * torch.randn(3, 4, 12)
    torch.testing.assert_close(connector(features), features @ weight.T + bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"depth": 3}, {"bias": False}])
def test_an_mlp_that_cannot_pass_a_map_through_is_refused(options: dict) -> None:
    connector = build_connector({"name": "mlp"} | options, 12, 36, (2, 2))
    assert not connector.can_be_affine
    with pytest.raises(ValueError, match="only with depth 2, a bias and an activation such as gelu"):
        connector.set_affine(torch.randn(36, 12), torch.randn(36), spread=1.0)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_closed_form_names_what_it_saw(name: str, rounds: int) -> None:
    """Four kinds of thing, each with its own feature direction and word: new patches land nearest to their word."""
    kinds, width = torch.randn(4, 20), 36
    words = torch.nn.functional.normalize(torch.randn(4, width), dim=1) * 3.0
    ridge = Ridge(20, 4)
    present = [torch.randperm(4)[:2] for _ in range(200)]
    pictures = [kinds[two].repeat_interleave(3, dim=0) + 0.3 * torch.randn(6, 20) for two in present]
    for _ in range(rounds):
        if ridge.count:
            ridge.align()
        for patches, two in zip(pictures, present, strict=True):
            ridge.add(patches, two.tolist(), torch.ones(2))
    connector = build_connector(name, 20, width, (2, 3))
    scale = words.square().mean().sqrt().item()
    solution = solve(ridge, words, words.mean(dim=0), scale)
    assert start(connector, solution, None, lambda features: features) == 0
    tokens = connector(kinds[None] + 0.1 * torch.randn(1, 4, 20))[0]
    assert (tokens @ words.T).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert 0.5 * scale < tokens.square().mean().sqrt().item() < 2.0 * scale


def test_closed_form_refuses_captions_that_all_agree() -> None:
    ridge = Ridge(8, 2)
    for _ in range(5):
        ridge.add(torch.randn(4, 8), [0, 1], torch.ones(2))
    with pytest.raises(NothingToLearn, match="every caption has the same words"):
        solve(ridge, torch.randn(2, 6), torch.zeros(6), 1.0)


def test_alignment_tells_words_of_one_caption_apart() -> None:
    """Two things that every other caption names together: after rounds, each patch is its own word's."""
    kinds, words = torch.randn(3, 12), torch.eye(3)
    ridge, apart = Ridge(12, 3), []
    captions = [[0, 1], [0, 1], [0, 2], [1, 2]] * 30
    pictures = [kinds[caption].repeat_interleave(2, dim=0) + 0.1 * torch.randn(4, 12) for caption in captions]
    for _ in range(3):
        for patches, caption in zip(pictures, captions, strict=True):
            ridge.add(patches, caption, torch.ones(2))
        shares = (kinds.double() - ridge.mean) @ ridge.solve() @ words.double()
        apart.append((shares[0, 0] - shares[0, 1]).item())
        ridge.align()
    assert apart[0] < apart[1] < apart[2]
