"""Connectors that pool: tokens are means of the patches below them, on any grid no finer than the encoder's."""

import pytest
import torch
import torch.nn.functional as F

from chiasm.connectors import build_connector

POOLING = ["avg_pool", "ldp", "c_abstractor"]


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.parametrize(
    ("output_size", "grid", "expected"), [(None, (7, 5), (4, 3)), (3, (7, 5), (3, 3)), ([2, 5], (7, 5), (2, 5))]
)
def test_token_count_is_free(
    name: str, output_size: int | list[int] | None, grid: tuple[int, int], expected: tuple[int, int]
) -> None:
    connector = build_connector({"name": name, "output_size": output_size}, 20, 36, grid)
    assert connector.token_grid == expected
    assert connector(torch.randn(1, 35, 20)).shape == (1, expected[0] * expected[1], 36)


@pytest.mark.parametrize("name", POOLING)
def test_finer_grids_than_the_encoders_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"connector {name} has output_size 8×8, expected .* grid 7×7"):
        build_connector({"name": name, "output_size": 8}, 20, 36, (7, 7))


def test_avg_pool_is_an_mlp_of_means() -> None:
    connector = build_connector({"name": "avg_pool", "output_size": 3}, 20, 36, (7, 5))
    features = torch.randn(2, 35, 20)
    means = connector.attention(features) @ features
    torch.testing.assert_close(connector(features), connector.out(F.gelu(connector.up(means))))


def test_ldp_adds_a_3_by_3_neighbourhood_to_means() -> None:
    connector = build_connector("ldp", 20, 36, (6, 8))
    features = torch.randn(2, 48, 20)
    means = F.avg_pool2d(connector.out(F.gelu(connector.up(features))).mT.unflatten(2, (6, 8)), 2)
    around = F.unfold(means, 3, padding=1).unflatten(1, (36, 9))
    expected = means.flatten(2) + torch.einsum("bckt,ck->bct", around, connector.peg.weight.flatten(1))
    torch.testing.assert_close(connector(features), expected.mT, rtol=1e-4, atol=1e-5)


def test_c_abstractor_knows_places() -> None:
    """The same patch everywhere gives tokens that differ, by learned positions and by the border."""
    connector = build_connector({"name": "c_abstractor", "width": 16}, 20, 36, (6, 6))
    tokens = connector(torch.randn(1, 1, 20).expand(1, 36, 20))[0]
    assert torch.pdist(tokens).min() > 1e-4


def test_sizes_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output_size \[2, 3, 4\], expected one number or \[rows, columns\]"):
        build_connector({"name": "avg_pool", "output_size": [2, 3, 4]}, 20, 36, (7, 7))
    with pytest.raises(ValueError, match="depth=0, expected at least 1"):
        build_connector({"name": "c_abstractor", "depth": 0}, 20, 36, (7, 7))
