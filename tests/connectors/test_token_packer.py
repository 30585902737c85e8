"""TokenPacker: a query sees the patches of its own region and nothing else."""

import pytest
import torch

from chiasm.connectors import build_connector

SMALL = {"name": "token_packer", "heads": 2, "head_dim": 6}


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_a_token_sees_its_own_region_only(grid: tuple[int, int]) -> None:
    connector = build_connector({**SMALL, "levels": 2}, 20, 36, grid)
    features = torch.randn(1, grid[0] * grid[1], 20)
    features[..., 10:] = features[..., 10:].mean(dim=1, keepdim=True)  # the queries' level: the same everywhere
    changed = features.clone()
    last = grid[0] * grid[1] - 1
    changed[0, last, :10] += 5.0
    moved = (connector(changed) - connector(features)).abs().amax(dim=2)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [connector.num_tokens - 1]
    assert connector.attention(features)[0, -1, last] > 0


def test_attention_without_padding_matches_multihead_attention() -> None:
    connector = build_connector({**SMALL, "factor": 3}, 20, 36, (3, 3))
    query, key, value = connector.query, connector.key, connector.value
    reference = torch.nn.MultiheadAttention(12, 2, batch_first=True)
    reference.in_proj_weight.data = torch.cat([query[2].weight, key[4].weight, value[4].weight])
    reference.in_proj_bias.data = torch.cat([query[2].bias, torch.zeros(12), value[4].bias])
    reference.out_proj.load_state_dict(connector.attention_out.state_dict())
    features = torch.randn(2, 9, 20)
    centre = features[:, 4:5]  # bilinear interpolation of 3 × 3 to one place
    packed, weights = reference(query[:2](centre), key[:4](features), value[:4](features))
    expected = connector.out(torch.nn.functional.gelu(connector.up(packed)))
    torch.testing.assert_close(connector(features), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(connector.attention(features), weights, rtol=1e-4, atol=1e-5)


def test_levels_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="levels=3, which does not divide the 20 feature channels"):
        build_connector({**SMALL, "levels": 3}, 20, 36, (4, 4))
