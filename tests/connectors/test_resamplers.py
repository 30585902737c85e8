"""The resamplers equal Idefics's and Idefics2's, take any number of patches, and tell frames apart."""

import pytest
import torch
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from chiasm.connectors import Connector, build_connector

SMALL = {"num_latents": 5, "depth": 2, "heads": 3, "head_dim": 7}
ATTENTION = {
    "latents_layer_norm": "latent_norm",
    "context_layer_norm": "patch_norm",
    "q_layer_norm": "query_norm",
    "k_layer_norm": "key_norm",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "output_proj": "out",
}
FEED_FORWARD = {"ln": "feed_forward_norm", "fc": "up", "c_proj": "down"}
IDEFICS2 = {
    "modality_projection.gate_proj": "modality_projection.gate",
    "modality_projection.up_proj": "modality_projection.up",
    "modality_projection.down_proj": "modality_projection.down",
    "perceiver_resampler.": "",
    "input_latents_norm": "latent_norm",
    "input_context_norm": "patch_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def shake(module: torch.nn.Module) -> None:
    """Weights that no two places share: norms start as ones, and some latents too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def idefics(qk_norm: bool) -> tuple[Connector, torch.nn.Module]:
    config = IdeficsConfig(
        vision_config={"embed_dim": 20}, perceiver_config={"qk_layer_norms_perceiver": qk_norm, "use_resampler": True}
    )
    reference = IdeficsPerceiverResampler(config, embed_dim=20, depth=2, n_heads=3, head_dim=7, n_latents=5)
    shake(reference)
    spec = {"name": "perceiver_resampler", **SMALL, "activation": "relu", "qk_norm": qk_norm, "project": False}
    ours = build_connector(spec, 20, 36, (3, 4))
    state = {}
    for name, tensor in reference.state_dict().items():
        match name.split("."):
            case ["blocks", layer, half, module, kind]:
                state[f"layers.{layer}.{(ATTENTION, FEED_FORWARD)[int(half)][module]}.{kind}"] = tensor
            case _:
                state[name.replace("layer_norm", "norm")] = tensor
    ours.load_state_dict(state)
    return ours, reference


@pytest.mark.parametrize("qk_norm", [False, True])
def test_perceiver_equals_idefics(qk_norm: bool) -> None:
    ours, reference = idefics(qk_norm)
    assert ours.output is None and ours.width == 20
    for patches in (12, 31):
        features = torch.randn(2, patches, 20)
        torch.testing.assert_close(ours(features), reference(features), rtol=1e-4, atol=1e-4)


def test_perceiver_projects_after_the_norm() -> None:
    plain = build_connector({"name": "perceiver_resampler", **SMALL, "project": False}, 20, 36, (3, 4))
    ours = build_connector({"name": "perceiver_resampler", **SMALL}, 20, 36, (3, 4))
    assert ours.width == 36 and ours.output is ours.proj
    plain.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("proj")})
    features = torch.randn(2, 12, 20)
    torch.testing.assert_close(ours(features), ours.proj(plain(features)))


def test_frames_have_their_own_time() -> None:
    ours = build_connector({"name": "perceiver_resampler", **SMALL, "num_frames": 3}, 20, 36, (2, 2))
    clip = torch.randn(2, 3, 4, 20)
    tokens = ours(clip.flatten(1, 2))
    assert tokens.shape == (2, 5, 36)
    assert not torch.allclose(ours(clip.flip(1).flatten(1, 2)), tokens, atol=1e-3)
    assert ours(clip[:, :1].flatten(1, 2)).shape == (2, 5, 36)
    with pytest.raises(ValueError, match="16 patches, which are no whole number of frames of 4 between 1 and num_fr"):
        ours(torch.randn(1, 16, 20))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="activation 'swish' is unknown; choose one of squared_relu, relu, gelu"):
        build_connector({"name": "perceiver_resampler", "activation": "swish"}, 20, 36, (2, 2))
    with pytest.raises(ValueError, match="num_latents=0, expected at least 1"):
        build_connector({"name": "perceiver_resampler", "num_latents": 0}, 20, 36, (2, 2))
    with pytest.raises(ValueError, match="heads=6, key_value_heads=4"):
        build_connector({"name": "idefics2_resampler", "heads": 6}, 20, 36, (2, 2))


def test_idefics2_resampler_equals_the_reference() -> None:
    config = Idefics2Config(
        vision_config={"hidden_size": 20, "num_attention_heads": 2},
        text_config={"model_type": "mistral", "hidden_size": 36, "intermediate_size": 52, "hidden_act": "silu"},
        perceiver_config={
            "hidden_size": 36,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 6,
            "resampler_head_dim": 7,
            "num_key_value_heads": 2,
        },
    )
    reference = Idefics2Connector(config).eval()
    shake(reference)
    spec = {"name": "idefics2_resampler", **SMALL, "heads": 6, "key_value_heads": 2, "projection_width": 52}
    ours = build_connector(spec, 20, 36, (3, 4))
    state = {}
    for name, tensor in reference.state_dict().items():
        for theirs, mine in IDEFICS2.items():
            name = name.replace(theirs, mine)
        state[name] = tensor
    ours.load_state_dict(state)
    features = torch.randn(2, 12, 20)
    mask = torch.ones(2, 12, dtype=torch.bool)
    torch.testing.assert_close(ours(features), reference(features, mask), rtol=1e-4, atol=1e-4)
