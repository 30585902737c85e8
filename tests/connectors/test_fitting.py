"""Any connector can be fitted to a map of its patches: it says of new pictures what the map says of their cells."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from chiasm.connectors import CONNECTORS, Connector, build_connector, fitting
from chiasm.connectors.base import block_attention

GRID, WIDTH = (4, 4), 24
FITTED = [name for name in CONNECTORS if name != "linear"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST_STEPS", 200)
    monkeypatch.setattr(fitting, "LEARNING_RATE", 4e-3)


def task(width: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of patches that know their place, and a map of theirs."""
    torch.manual_seed(0)
    places = 2.0 * torch.randn(GRID[0] * GRID[1], width)
    return torch.randn(40, GRID[0] * GRID[1], width) + places, torch.randn(WIDTH, width) / width**0.5, torch.ones(WIDTH)


def built(name: str | dict[str, Any]) -> Connector:
    torch.manual_seed(1)
    settings = tiny.connector(name) if isinstance(name, str) else name
    return build_connector(settings, 20, WIDTH, GRID)


def identity(features: Tensor) -> Tensor:
    return features


@pytest.mark.parametrize("name", FITTED)
def test_a_connector_says_what_the_map_says(name: str) -> None:
    features, weight, bias = task()
    connector = built(name)
    before = {key: value.clone() for key, value in connector.state_dict().items()}
    missed = fitting.fit(connector, features, identity, weight, bias)
    assert missed < 0.95
    assert any(not torch.equal(value, before[key]) for key, value in connector.state_dict().items())
    again = built(name)
    assert fitting.fit(again, features, identity, weight, bias) == missed
    for key, value in again.state_dict().items():
        assert torch.equal(value, connector.state_dict()[key]), key


def test_what_it_misses_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP comes near; new pictures show the same error, and tokens are as loud as patches."""
    monkeypatch.setattr(fitting, "LEARNING_RATE", 1e-2)
    features, weight, bias = task()
    connector = built("avg_pool")
    missed = fitting.fit(connector, features[:30], identity, weight, bias)
    said = features[30:] @ weight.T + bias
    centre = said.mean(dim=(0, 1))
    targets = block_attention(GRID, (2, 2)) @ said - centre
    targets = targets * ((said - centre).square().mean() / targets.square().mean()).sqrt()
    tokens = connector(features[30:]) - centre
    assert missed < 0.05
    assert ((tokens - targets).square().mean() / targets.square().mean()).item() < 0.1
    assert 0.8 < (tokens.square().mean() / (said - centre).square().mean()).item() < 1.2


@pytest.mark.parametrize(("tokens", "cells"), [(16, (4, 4)), (6, (2, 3)), (7, (1, 7)), (1, (1, 1))])
def test_tokens_without_places_take_cells(tokens: int, cells: tuple[int, int]) -> None:
    settings = {"name": "perceiver_resampler", "num_latents": tokens, "depth": 1, "heads": 2, "head_dim": 4}
    connector = build_connector(settings, 20, WIDTH, GRID, num_prefix=1)
    assert fitting.cells_of(connector) == cells
    shares = fitting.shares_of(connector, torch.zeros(1, 17, 20))
    assert shares.shape == (tokens, 17) and not shares[:, 0].any()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(tokens))


@pytest.mark.parametrize("name", ["pixel_shuffle", "patch_merger", "token_packer"])
def test_tokens_of_blocks_are_about_the_patches_that_they_see(name: str) -> None:
    """A grid that the blocks do not fill: the last token sees the last patch alone."""
    connector = build_connector({**tiny.connector(name), "factor": 2}, 20, WIDTH, (5, 5))
    shares = fitting.shares_of(connector, torch.zeros(1, 25, 20))
    assert shares[0].nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert shares[-1].nonzero().flatten().tolist() == [24]
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(9))


@pytest.mark.parametrize("settings", [{"name": "mlp", "depth": 3}, {"name": "linear", "bias": False}])
def test_class_tokens_are_patches_too(settings: dict[str, Any]) -> None:
    features, weight, bias = task()
    features = torch.cat([features[:, :1], features], dim=1)
    connector = build_connector(settings, 20, WIDTH, GRID, num_prefix=1)
    assert fitting.fit(connector, features, identity, weight, 0 * bias) < 0.9


def test_a_connector_that_learns_nothing_stays_as_it_is() -> None:
    features, weight, bias = task()
    connector = built("avg_pool")
    before = {key: value.clone() for key, value in connector.state_dict().items()}
    assert fitting.fit(connector, features, identity, weight, math.nan * bias) == 1.0
    assert all(torch.equal(value, before[key]) for key, value in connector.state_dict().items())


def test_large_connectors_take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = built("avg_pool")
    for flops, steps in [(1e15, 200), (3 * fitting.BATCH * connector.flops() * 10, 10), (1.0, 0)]:
        monkeypatch.setattr(fitting, "MOST_FLOPS", {"cpu": flops})
        assert fitting.steps_within_reach(connector) == steps


def test_coordinates_are_appended_to_mixed_pictures() -> None:
    """Patches change pictures, coordinates stay where they are."""
    features, weight, bias = task(width=18)
    marks = torch.arange(32.0).reshape(16, 2)
    seen: list[Tensor] = []

    def with_positions(batch: Tensor) -> Tensor:
        seen.append(batch)
        return torch.cat([batch, marks.expand(len(batch), -1, -1)], dim=2)

    connector = built("avg_pool")
    fitting.fit(connector, features, with_positions, torch.cat([weight, torch.zeros(WIDTH, 2)], dim=1), bias)
    whole = (features == seen[0][0][None]).all(dim=(1, 2)).any()
    mixed = seen[1]
    assert whole and not (features == mixed[0][None]).all(dim=(1, 2)).any()
    assert all((features[:, place] == mixed[0, place]).all(dim=1).any() for place in range(16))
