"""The patch merger equals Qwen2-VL's, whose patches come block by block."""

import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from chiasm.connectors import build_connector


def test_equals_qwen2_vl() -> None:
    reference = PatchMerger(dim=18, context_dim=10, spatial_merge_size=2)
    torch.nn.init.normal_(reference.ln_q.weight)
    torch.nn.init.normal_(reference.ln_q.bias)
    ours = build_connector("patch_merger", 10, 18, (4, 6))
    for name, module in {"norm": reference.ln_q, "merge": reference.mlp[0], "out": reference.mlp[2]}.items():
        ours.get_submodule(name).load_state_dict(module.state_dict())
    features = torch.randn(3, 24, 10)
    by_block = features.view(3, 2, 2, 3, 2, 10).transpose(2, 3).reshape(3 * 24, 10)
    expected = reference(by_block).view(3, 6, 18)
    torch.testing.assert_close(ours(features), expected, rtol=1e-4, atol=1e-4)
