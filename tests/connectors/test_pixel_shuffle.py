"""Pixel shuffle equals Idefics3's and InternVL's, and odd grids are filled up."""

import pytest
import torch
from transformers import InternVLConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

from chiasm.connectors import build_connector

VISION = {"hidden_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = {"hidden_size": 18, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"intermediate_size": 12, "vocab_size": 40, "head_dim": 8}


def test_linear_equals_idefics3() -> None:
    config = Idefics3Config(vision_config=VISION, text_config={"model_type": "llama", **TEXT}, scale_factor=3)
    reference = Idefics3Connector(config)
    ours = build_connector({"name": "pixel_shuffle", "factor": 3, "projection": "linear"}, 10, 18, (6, 6))
    ours.load_state_dict({"layers.0.weight": reference.modality_projection.proj.weight})
    features = torch.randn(2, 36, 10)
    torch.testing.assert_close(ours(features), reference(features), rtol=1e-4, atol=1e-4)


def test_mlp_equals_internvl() -> None:
    vision = VISION | {"image_size": [12, 12], "patch_size": [2, 2]}
    config = InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **TEXT})
    reference = InternVLModel(config).eval()
    ours = build_connector("pixel_shuffle", 10, 18, (6, 6))
    for index, name in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
        ours.layers[index].load_state_dict(getattr(reference.multi_modal_projector, name).state_dict())
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        features = reference.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        expected = reference.get_image_features(pixels, return_dict=True).pooler_output
        torch.testing.assert_close(ours(features), expected, rtol=1e-4, atol=1e-4)


def test_odd_grids_are_filled_up_with_zeros() -> None:
    ours = build_connector("pixel_shuffle", 10, 18, (3, 5))
    whole = build_connector("pixel_shuffle", 10, 18, (4, 6))
    whole.load_state_dict(ours.state_dict())
    features = torch.randn(2, 15, 10)
    filled = torch.zeros(2, 4, 6, 10)
    filled[:, :3, :5] = features.unflatten(1, (3, 5))
    assert ours.token_grid == (2, 3)
    torch.testing.assert_close(ours(features), whole(filled.flatten(1, 2)))
    assert ours.attention(features)[0, 5].nonzero().flatten().tolist() == [14]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"factor 8, expected 1 to 7 for the encoder's grid 7×7"):
        build_connector({"name": "pixel_shuffle", "factor": 8}, 10, 18, (7, 7))
    with pytest.raises(ValueError, match="projection 'mpl' is unknown; choose one of mlp, linear"):
        build_connector({"name": "pixel_shuffle", "projection": "mpl"}, 10, 18, (4, 4))
