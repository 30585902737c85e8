"""With its weights copied, the block is the gated cross-attention layer of Llama 3.2 Vision and of Idefics."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    _prepare_cross_attention_mask,
)

from chiasm.fusion.cross_attention import GatedCrossAttention, Look
from chiasm.fusion.cross_attention_settings import CrossAttentionSettings
from chiasm.interop.idefics import BLOCK
from chiasm.interop.weights import fit

MLLAMA = {
    "cross_attn": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "cross_attn_attn_gate": "attention_gate",
    "cross_attn_mlp_gate": "feed_forward_gate",
    "mlp": "",
}
VISIBLE = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]], [[1, 0], [0, 0], [0, 0], [0, 1]]])
"""Two rows of four tokens before two pictures; some tokens see neither."""


def shake(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def block(width: int, visual_width: int, **settings: Any) -> GatedCrossAttention:
    common = {"layers": [0], "norm": "rms", "gated_feed_forward": True, "visual_norm": False}
    return GatedCrossAttention(width, visual_width, CrossAttentionSettings(**common, **settings)).eval()


def look_at(ours: GatedCrossAttention, hidden: Tensor, visual: Tensor) -> Tensor:
    mask = VISIBLE.bool().repeat_interleave(visual.shape[1] // 2, dim=-1)
    keys_values = ours.keys_values(visual)
    with torch.no_grad():
        return ours(hidden, *keys_values, Look([keys_values], mask[:, None], mask.any(dim=-1, keepdim=True)))


def test_block_is_llama_3_2_visions() -> None:
    config = MllamaTextConfig(
        hidden_size=42,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=50,
        rms_norm_eps=3e-3,
        num_hidden_layers=2,
        cross_attention_layers=[1],
    )
    config._attn_implementation = "eager"
    reference = MllamaCrossAttentionDecoderLayer(config, layer_idx=1).eval()
    shake(reference)
    ours = block(42, 42, heads=6, kv_heads=2, head_dim=7, feed_forward=50, eps=3e-3, qk_norm=True, mask_attention=False)
    ours.load_state_dict(fit(reference.state_dict(), ours, MLLAMA), strict=False)
    hidden, visual = torch.randn(2, 4, 42), torch.randn(2, 2 * 5, 42)
    mask, sees = _prepare_cross_attention_mask(VISIBLE[..., None], 5, torch.float32)
    with torch.no_grad():
        expected = reference(hidden, visual, mask, None, sees)
    torch.testing.assert_close(look_at(ours, hidden, visual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("gate", ["vector", "float"])
def test_block_is_idefics(qk_norm: bool, gate: str) -> None:
    config = IdeficsConfig(
        hidden_size=42,
        num_attention_heads=6,
        intermediate_size=50,
        rms_norm_eps=3e-3,
        qk_layer_norms=qk_norm,
        alpha_type=gate,
        vision_config={"embed_dim": 20},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    reference = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    shake(reference)
    settings = {"gate": "vector" if gate == "vector" else "scalar", "qk_norm": qk_norm, "mask_feed_forward": False}
    ours = block(42, 20, heads=6, kv_heads=6, head_dim=7, feed_forward=50, eps=3e-3, **settings)
    flat = dict.fromkeys(("attention_gate", "feed_forward_gate"), Tensor.flatten)
    ours.load_state_dict(fit(reference.state_dict(), ours, BLOCK, flat), strict=False)
    hidden, visual = torch.randn(2, 4, 42), torch.randn(2, 2 * 5, 20)
    visible = VISIBLE.bool().repeat_interleave(5, dim=-1)[:, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = reference(
            hidden,
            image_hidden_states=visual,
            image_attention_mask=mask,
            cross_attention_gate=VISIBLE.any(dim=-1).float(),
        )
    torch.testing.assert_close(look_at(ours, hidden, visual), expected, rtol=1e-5, atol=1e-5)
