"""The vision encoder's contract on tiny random models of many families, and equality with the models themselves."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.models.idefics.configuration_idefics import IdeficsVisionConfig
from transformers.models.idefics.vision import IdeficsVisionTransformer
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import chiasm.vision  # noqa: F401
from chiasm.vision.encoder import FastEncoder, VisionEncoder, VisionFeatures, load_vision
from chiasm.vision.towers import TWO_TOWERS, build_tower

TRANSFORMER = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
VIT = TRANSFORMER | {"image_size": 30, "patch_size": 7}
EVEN = TRANSFORMER | {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [6, 8, 10, 12], "depths": [1, 1, 1, 1], "image_size": 64}
WINDOWS = {"image_size": 64, "patch_size": 2, "embed_dim": 12, "depths": [1, 2, 1], "window_size": 4}

# model type → configuration, grid, class and register tokens, width of the default features
FAMILIES = {
    "clip_vision_model": (VIT, (4, 4), 1, 36),
    "siglip_vision_model": (VIT, (4, 4), 0, 36),
    "siglip2_vision_model": (TRANSFORMER | {"num_patches": 16, "patch_size": 7}, (4, 4), 0, 36),
    "metaclip_2_vision_model": (VIT, (4, 4), 1, 36),
    "aimv2_vision_model": (VIT, (4, 4), 0, 36),
    "blip_2_vision_model": (EVEN, (4, 4), 1, 36),
    "mlcd_vision_model": (EVEN | {"hidden_size": 48}, (4, 4), 1, 48),
    "internvl_vision": (EVEN | {"image_size": [32, 32], "patch_size": [8, 8]}, (4, 4), 1, 36),
    "idefics2_vision": (EVEN, (4, 4), 0, 36),
    "idefics3_vision": (EVEN, (4, 4), 0, 36),
    "dinov2": (VIT, (4, 4), 1, 36),
    "dinov2_with_registers": (VIT | {"num_register_tokens": 3}, (4, 4), 4, 36),
    "dinov3_vit": (EVEN | {"num_register_tokens": 3}, (4, 4), 4, 36),
    "dinov3_convnext": (STAGES, (2, 2), 1, 12),
    "vit": (VIT, (4, 4), 1, 36),
    "deit": (VIT, (4, 4), 2, 36),
    "beit": (VIT, (4, 4), 1, 36),
    "ijepa": (VIT, (4, 4), 0, 36),
    "pixio": (EVEN, (4, 4), 8, 36),
    "swin": (WINDOWS | {"num_heads": [2, 2, 2]}, (8, 8), 0, 48),
    "swinv2": (WINDOWS | {"num_heads": [2, 2, 2]}, (8, 8), 0, 48),
    "hiera": (
        {"image_size": [64, 64], "embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
        (2, 2),
        0,
        96,
    ),
    "pvt": (STAGES | {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 2, 2, 2]}, (2, 2), 1, 16),
    "convnext": (STAGES, (2, 2), 0, 12),
    "convnextv2": (STAGES, (2, 2), 0, 12),
    "resnet": ({"embedding_size": 6, "hidden_sizes": [6, 8, 10, 12], "depths": [1, 1, 1, 1]}, (7, 7), 0, 12),
    "regnet": (
        {"embedding_size": 6, "hidden_sizes": [6, 8, 10, 12], "depths": [1, 1, 1, 1], "groups_width": 2},
        (7, 7),
        0,
        12,
    ),
    "mobilenet_v1": ({"image_size": 64, "depth_multiplier": 0.25}, (2, 2), 0, 256),
    "mobilenet_v2": ({"image_size": 64, "depth_multiplier": 0.25}, (2, 2), 0, 1280),
    "mobilevit": (
        {"image_size": 64, "hidden_sizes": [12, 16, 20], "neck_hidden_sizes": [4, 4, 8, 8, 10, 12, 16]},
        (2, 2),
        0,
        16,
    ),
    "efficientnet_lite": ({"image_size": 64}, (2, 2), 0, 4 * 112 + 1280),
}
SEQUENCES = [family for family in FAMILIES if family[:3] not in ("con", "res", "reg", "mob", "eff")]


def model(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_tower(AutoConfig.for_model(family, **FAMILIES[family][0] | changes)).eval()


def plain(config: PreTrainedConfig) -> dict:
    """The configuration as it stands in a file."""
    return json.loads(config.to_json_string())


def pictures(encoder: VisionEncoder, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *encoder.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_is_read_from_the_model(family: str) -> None:
    _, grid, prefix, width = FAMILIES[family]
    encoder = load_vision(model(family))
    assert (encoder.grid, encoder.width) == (grid, width)
    assert encoder.features.layers[-1].prefix_tokens == prefix
    assert encoder.num_patches == grid[0] * grid[1]
    assert encoder(pictures(encoder)).shape == (2, encoder.num_patches, width)
    assert all(name.startswith("model.") for name in encoder.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_built_again_from_its_configuration_and_features(family: str) -> None:
    encoder = load_vision(model(family))
    features = VisionFeatures.from_dict(json.loads(json.dumps(encoder.features.to_dict())))
    assert features == encoder.features
    config = AutoConfig.for_model(**plain(encoder.model.config))
    with torch.device("meta"):
        again = VisionEncoder.from_config(config, features)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in encoder.state_dict().items()
    }


@pytest.mark.parametrize("family", [family for family in SEQUENCES if family != "siglip2_vision_model"])
def test_patches_are_the_last_tokens_of_the_models_own_output(family: str) -> None:
    encoder = load_vision(model(family), {"layers": ["last"]})
    inputs = pictures(encoder)
    tokens = encoder.model(inputs).last_hidden_state
    assert tokens.shape[1] == encoder.num_patches + FAMILIES[family][2]
    torch.testing.assert_close(encoder(inputs), tokens[:, -encoder.num_patches :])


@pytest.mark.parametrize("family", ["convnext", "resnet", "regnet", "mobilenet_v2", "mobilevit"])
def test_maps_are_read_row_by_row(family: str) -> None:
    encoder = load_vision(model(family))
    inputs = pictures(encoder)
    expected = encoder.model(inputs).last_hidden_state
    patch = encoder(inputs)[:, 1 * encoder.grid[1] + 0]
    torch.testing.assert_close(patch, expected[:, :, 1, 0])


@pytest.mark.parametrize("family", SEQUENCES)
def test_a_changed_patch_changes_its_own_place_most(family: str) -> None:
    encoder = load_vision(model(family))
    inputs, (rows, columns) = pictures(encoder, 1), encoder.grid
    before, noise = encoder(inputs), torch.randn(inputs.shape)
    height, width = (encoder.image_size[0] // rows, encoder.image_size[1] // columns)
    for row, column in [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, 0)]:
        changed = inputs.clone()
        place = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        changed[place] += noise[place]
        distance = (encoder(changed) - before).norm(dim=-1)[0]
        assert int(distance.argmax()) == row * columns + column


def test_clip_gives_what_llava_reads() -> None:
    vision = AutoConfig.for_model("clip_vision_model", **VIT)
    text = LlamaConfig(
        vocab_size=40, hidden_size=20, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    ).eval()
    inputs = torch.randn(2, 3, 30, 30)
    expected = llava.get_image_features(
        inputs, vision_feature_layer=-2, vision_feature_select_strategy="default"
    ).pooler_output
    encoder = load_vision(llava.model.vision_tower)
    states = llava.model.vision_tower(inputs, output_hidden_states=True).hidden_states
    assert torch.equal(encoder(inputs), states[-2][:, 1:])
    torch.testing.assert_close(llava.model.multi_modal_projector(encoder(inputs)), torch.stack(list(expected)))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tokens_come_first_where_they_are_kept(family: str) -> None:
    layers = ["last"] if family in SEQUENCES else None
    plain, kept = (load_vision(model(family), {"layers": layers, "prefix": word}) for word in ("drop", "keep"))
    assert (kept.num_prefix, kept.grid) == (FAMILIES[family][2], plain.grid)
    assert kept.num_patches == plain.num_patches + kept.num_prefix
    assert VisionFeatures.from_dict(json.loads(json.dumps(kept.features.to_dict()))) == kept.features
    inputs = pictures(plain)
    tokens = kept(inputs)
    assert tokens.shape[1] == kept.num_patches
    torch.testing.assert_close(tokens[:, kept.num_prefix :], plain(inputs), equal_nan=True)
    if family in SEQUENCES and family != "siglip2_vision_model":
        assert torch.equal(tokens, kept.model(inputs).last_hidden_state)


def test_pictures_of_any_size_and_their_padding() -> None:
    reference = model("idefics2_vision")
    encoder = load_vision(reference, {"resolution": "native"})
    small, mask = torch.randn(1, 3, 16, 31), torch.zeros(1, 32, 40)
    mask[:, :16, :31] = 1
    padded = torch.nn.functional.pad(small, (0, 9, 0, 16))
    alone, together = encoder(small), encoder(padded, mask)
    patches = encoder.patch_mask(mask)
    assert patches.shape == (1, 4, 5) and int(patches.sum()) == 2 * 3
    assert alone.shape == (1, 2 * 3, 36)
    torch.testing.assert_close(together[patches.flatten(1)], alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="pixel_attention_mask is for encoders with resolution: native"):
        load_vision(reference)(torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32))


@pytest.mark.parametrize("family", ["blip_2_vision_model", "instructblip_vision_model"])
def test_the_last_layer_of_blip_towers_is_normalised(family: str) -> None:
    reference = build_tower(AutoConfig.for_model(family, **EVEN)).eval()
    torch.nn.init.normal_(reference.post_layernorm.weight)
    encoder = load_vision(reference, {"layers": ["last"], "prefix": "keep"})
    inputs = pictures(encoder)
    states = reference(inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(inputs), reference.post_layernorm(states[-1]))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_tower_of_idefics_is_built_as_a_clip_tower(activation: str) -> None:
    changes = {"layer_norm_eps": 1e-3, "hidden_act": activation}
    sizes = {name: value for name, value in VIT.items() if name != "hidden_size"}
    config = IdeficsVisionConfig(embed_dim=36, **sizes, **changes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    reference = IdeficsVisionTransformer(config).eval()
    tower = build_tower(config).eval()
    tower.load_state_dict(reference.state_dict(), strict=True)
    encoder = load_vision(tower, {"layers": ["last"], "prefix": "keep"})
    inputs = pictures(encoder)
    expected = reference(inputs)
    torch.testing.assert_close(encoder(inputs), expected.last_hidden_state)
    torch.testing.assert_close(tower(inputs).pooler_output, expected.pooler_output)


@pytest.mark.parametrize("family", ["clip_vision_model", "dinov2", "swin", "dinov3_convnext", "resnet", "mobilenet_v1"])
def test_every_hidden_state_can_be_read(family: str) -> None:
    reference = model(family)
    inputs = pictures(load_vision(reference))
    states = reference(inputs, output_hidden_states=True).hidden_states
    for index, state in enumerate(states):
        encoder = load_vision(reference, {"layers": [index - len(states)]})
        assert encoder.features.layers[0].layer == index
        if state.ndim == 4:
            state = state.flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder(inputs), state[:, -encoder.num_patches :])


def test_layers_of_several_strides_meet_on_the_coarsest_grid() -> None:
    reference = model("resnet")
    encoder = load_vision(reference, {"layers": [-2, -1, -3], "reduce": ["fold", "fold", "pool"]}, image_size=64)
    assert (encoder.grid, encoder.width) == ((2, 2), 4 * 10 + 12 + 8)
    inputs = pictures(encoder)
    states = reference(inputs, output_hidden_states=True).hidden_states
    patches = encoder(inputs)[:, 2]  # second row, first column
    folded = states[-2][:, :, 2:4, 0:2].permute(0, 2, 3, 1).flatten(1)
    pooled = states[-3][:, :, 4:8, 0:4].mean(dim=(2, 3))
    torch.testing.assert_close(patches, torch.cat([folded, states[-1][:, :, 1, 0], pooled], dim=1))


def test_a_coarser_grid_can_be_asked_for() -> None:
    encoder = load_vision(model("dinov2"), {"grid": [2, 2]})
    assert (encoder.num_patches, encoder.width) == (4, 4 * 36)
    whole = load_vision(model("dinov2"))
    inputs = pictures(encoder)
    blocks = whole(inputs).unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
    torch.testing.assert_close(encoder(inputs), blocks)


def test_folding_an_odd_grid_loses_nothing() -> None:
    encoder = load_vision(model("resnet"), {"layers": [-2, -1]}, image_size=240)
    assert [layer.grid for layer in encoder.features.layers] == [(15, 15), (8, 8)]
    inputs = pictures(encoder, 1)
    state = encoder.model(inputs, output_hidden_states=True).hidden_states[-2]
    folded = encoder(inputs)[..., : 4 * 10]
    torch.testing.assert_close(folded.sum(), state.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded[0, -1], torch.cat([state[0, :, 14, 14], torch.zeros(30)]))


def test_another_image_size_interpolates_learned_positions() -> None:
    reference = model("clip_vision_model")
    encoder = load_vision(reference, image_size=42)
    assert encoder.features.interpolate_positions
    assert (encoder.grid, encoder.image_size) == ((6, 6), (42, 42))
    inputs = pictures(encoder)
    states = reference(inputs, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(inputs), states[-2][:, 1:])


@pytest.mark.parametrize("family", ["dinov2", "dinov3_vit", "siglip_vision_model", "siglip2_vision_model", "convnext"])
def test_pictures_need_not_be_square(family: str) -> None:
    encoder = load_vision(model(family), image_size=(64, 96))
    rows, columns = encoder.grid
    assert rows < columns
    inputs = pictures(encoder, 1)
    before = encoder(inputs)
    changed = inputs.clone()
    changed[:, :, : 64 // rows, -(96 // columns) :] += 1.0
    assert int((encoder(changed) - before).norm(dim=-1)[0].argmax()) == columns - 1


def test_naflex_patches_are_cut_as_its_own_processor_cuts_them() -> None:
    encoder = load_vision(model("siglip2_vision_model"))
    picture = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8).numpy()
    processor = Siglip2ImageProcessorPil(patch_size=7, max_num_patches=16)
    inputs = processor(picture, return_tensors="pt")
    expected = encoder.model(**inputs).last_hidden_state
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 * 2 - 1
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "dinov2", "vit", "convnext"])
def test_gradients_reach_exactly_the_parameters_that_are_used(family: str) -> None:
    encoder = load_vision(model(family)).train()
    unused = encoder.unused_parameters()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    encoder(pictures(encoder)).sum().backward()
    assert unused == [name for name, parameter in encoder.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("family", ["resnet", "clip_vision_model", "siglip_vision_model"])
def test_looking_at_a_model_leaves_no_trace_on_it(family: str) -> None:
    reference = model(family).train()
    before = copy.deepcopy(reference.state_dict())
    encoder = load_vision(reference)
    encoder.unused_parameters()
    encoder.fast_encoder()(pictures(encoder))
    assert all(module.training for module in reference.modules())
    assert list(reference.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert reference.eval()(pictures(encoder)).pooler_output is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_encoder_gives_the_same_features(family: str) -> None:
    encoder = load_vision(model(family))
    inputs = pictures(encoder)
    expected = encoder(inputs)
    fast = encoder.fast_encoder()(inputs)
    assert not fast.requires_grad and not fast.is_inference()
    assert (fast.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("multiplies", [True, False])
def test_the_fast_encoder_is_made_once_for_each_precision(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = list[torch.dtype](), FastEncoder.__init__

    def noting(self: FastEncoder, encoder: VisionEncoder, dtype: torch.dtype, *more: Any) -> None:
        made.append(dtype)
        init(self, encoder, dtype, *more)

    monkeypatch.setattr(FastEncoder, "__init__", noting)
    monkeypatch.setattr(f"{FastEncoder.__module__}._multiplies_bfloat16", lambda device: multiplies)
    assert load_vision(model("resnet")).fast_encoder().dtype in made
    assert made == [torch.float32, torch.bfloat16][: 1 + multiplies]


def test_without_a_compiler_the_fast_encoder_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    encoder = load_vision(model("siglip_vision_model"))
    inputs, notes = pictures(encoder), []
    run = encoder.fast_encoder(torch.float32, compile=True, note=notes.append)
    expected = encoder.fast_encoder(torch.float32)(inputs)
    assert torch.equal(run(inputs), expected) and torch.equal(run(inputs), expected)
    assert len(notes) == 1 and notes[0].startswith("not compiled")
    with pytest.warns(UserWarning, match="not compiled"):
        encoder.fast_encoder(torch.float32, compile=True)(inputs)


def test_attention_implementation_and_dtype_change_nothing_but_precision(tmp_path) -> None:
    model("siglip_vision_model").save_pretrained(tmp_path)
    sdpa = load_vision(tmp_path, attn_implementation="sdpa").eval()
    eager = load_vision(tmp_path, attn_implementation="eager").eval()
    half = load_vision(tmp_path, dtype=torch.bfloat16).eval()
    inputs = pictures(sdpa)
    assert (sdpa.model.config._attn_implementation, eager.model.config._attn_implementation) == ("sdpa", "eager")
    torch.testing.assert_close(sdpa(inputs), eager(inputs), atol=1e-5, rtol=1e-4)
    assert half(inputs).dtype == torch.bfloat16
    torch.testing.assert_close(half(inputs).float(), sdpa(inputs), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("model_type", sorted(set(TWO_TOWERS) - {"instructblip"}))
def test_of_two_towers_the_vision_tower_is_taken(model_type: str, tmp_path) -> None:
    text = TRANSFORMER | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = TRANSFORMER | {"num_patches": 16, "patch_size": 8} if model_type == "siglip2" else EVEN
    extra = {}
    if model_type == "blip-2":
        text |= {"model_type": "opt", "ffn_dim": 40, "word_embed_proj_dim": 36}
        extra["qformer_config"] = TRANSFORMER | {"encoder_hidden_size": 36, "vocab_size": 50}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **extra)
    both = AutoModel.from_config(config).eval()
    both.save_pretrained(tmp_path)
    loaded, taken = load_vision(tmp_path).eval(), load_vision(both)
    assert taken.model is both.vision_model
    assert set(loaded.state_dict()) == set(taken.state_dict())
    torch.testing.assert_close(loaded(pictures(loaded)), taken(pictures(loaded)))


def test_a_classifier_loses_its_head_and_no_pooler_is_made_up(tmp_path) -> None:
    classifier = ViTForImageClassification(ViTConfig(**VIT)).eval()
    classifier.save_pretrained(tmp_path)
    loaded, taken = load_vision(tmp_path).eval(), load_vision(classifier)
    assert not any("pooler" in name or "classifier" in name for name in loaded.state_dict())
    torch.testing.assert_close(loaded(pictures(loaded)), taken(pictures(loaded)))


class CompositeConfig(PreTrainedConfig):
    model_type = "composite_of_the_tests"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model")
    }
    vision_config: dict | PreTrainedConfig | None = None
    features: dict | None = None


class Composite(PreTrainedModel):
    config_class = CompositeConfig
    base_model_prefix = ""

    def __init__(self, config: CompositeConfig, vision: VisionEncoder | None = None) -> None:
        super().__init__(config)
        features = VisionFeatures.from_dict(config.features)
        self.vision = vision or VisionEncoder.from_config(config.vision_config, features)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_it_survives_saving_inside_a_larger_model(family: str, tmp_path) -> None:
    encoder = load_vision(model(family))
    config = CompositeConfig(vision_config=plain(encoder.model.config), features=encoder.features.to_dict())
    composite = Composite(config, encoder).eval()
    composite.save_pretrained(tmp_path)
    again, report = Composite.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    inputs = pictures(encoder)
    torch.testing.assert_close(again.eval().vision(inputs), encoder(inputs), atol=1e-5, rtol=1e-4, equal_nan=True)


def test_the_children_tell_a_larger_model_what_not_to_split() -> None:
    encoder = load_vision(model("clip_vision_model"))
    config = CompositeConfig(vision_config=plain(encoder.model.config), features=encoder.features.to_dict())
    assert "CLIPEncoderLayer" in Composite(config, encoder)._no_split_modules


def test_missing_weights_are_an_error_and_unused_ones_are_not(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model("clip_vision_model").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    used = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    unused = next(name for name in weights if name.endswith("post_layernorm.weight"))
    save_file({name: value for name, value in weights.items() if name != unused}, file, {"format": "pt"})
    load_vision(tmp_path)
    save_file({name: value for name, value in weights.items() if name != used}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .* 'model\.encoder\.layers\.0\.mlp\.fc1\.weight'"):
        load_vision(tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("clip_vision_model", {"features": {"layer": [-2]}}, "unknown key 'layer'"),
        ("clip_vision_model", {"features": {"layers": [9]}}, "layer 9 does not exist; this encoder returns 4"),
        ("clip_vision_model", {"features": {"layers": ["stage5"]}}, "layer 'stage5' is unknown; choose one of last"),
        ("clip_vision_model", {"features": {"reduce": "mean"}}, "reduce 'mean' is unknown"),
        ("clip_vision_model", {"features": {"reduce": ["fold", "pool"]}}, "reduce has 2 entries for 1 layers"),
        (
            "clip_vision_model",
            {"features": {"resolution": "native"}},
            "no resolution 'native', which these have: idefic",
        ),
        (
            "idefics2_vision",
            {"features": {"resolution": "any"}},
            "resolution 'any' is unknown; choose one of fixed, na",
        ),
        ("idefics2_vision", {"features": {"resolution": "native", "grid": [2, 2]}}, "reads layers on their own grid"),
        ("clip_vision_model", {"features": {"prefix": "front"}}, "prefix 'front' is unknown; choose one of drop, keep"),
        ("clip_vision_model", {"features": {"prefix": "keep", "grid": [2, 2]}}, "'keep' needs layers of one size"),
        ("clip_vision_model", {"features": {"grid": [8, 8]}}, "coarser than the grid 8×8"),
        ("clip_vision_model", {"features": {"grid": [3, 3]}}, "does not fold to 3×3; use reduce='pool'"),
        ("clip_vision_model", {"revision": "main"}, "'revision' is an option for loading"),
        ("clip_vision_model", {"image_size": 3}, "clip_vision_model encoder does not take pictures of 3×3 pixels"),
        ("efficientnet_lite", {"features": {"layers": ["stage9"]}}, "choose one of last, stem, stage1"),
        ("hiera", {"features": {"layers": [1]}}, "not in row order"),
    ],
)
def test_mistakes_are_told(family: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_vision(model(family), **options)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("vit_mae", EVEN, "drops most patches at random"),
        ("pixtral", EVEN | {"head_dim": 12}, "joins the pictures of a batch"),
        ("sam_vision_model", EVEN | {"output_channels": 8, "global_attn_indexes": [2], "window_size": 2}, "layer 1 .*"),
        ("qwen3_vl_vision", {"depth": 1, "hidden_size": 16, "num_heads": 2}, "needs 'hidden_states' beside the pict"),
        ("llama", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "pixel_values|pictures"),
    ],
)
def test_unsuitable_encoders_are_refused(model_type: str, options: dict, message: str) -> None:
    unsuitable = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    with pytest.raises(ValueError, match=message):
        load_vision(unsuitable, {"layers": [1]})


def test_a_picture_of_another_size_is_refused() -> None:
    encoder = load_vision(model("dinov2"))
    with pytest.raises(ValueError, match="pictures are 28×30, the encoder takes 30×30"):
        encoder(torch.zeros(1, 3, 28, 30))


def test_a_class_that_could_not_be_loaded_again_is_refused() -> None:
    class Other(CLIPVisionModel):
        pass

    with pytest.raises(ValueError, match="is a CLIPVisionModel, but a Other was given"):
        load_vision(Other(AutoConfig.for_model("clip_vision_model", **VIT)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 1}, "features has an unknown key 'stride'"),
        ({"prefix": "front"}, "prefix 'front' is unknown; choose one of drop, keep"),
        ({"width": None}, "features lacks the key 'width'"),
        ({"layers": [{"layer": "last", "grid": [4, 4], "stride": 2}]}, "features.layers has an unknown key 'stride'"),
    ],
)
def test_stored_features_are_checked(change: dict, message: str) -> None:
    stored = load_vision(model("dinov2")).features.to_dict() | change
    with pytest.raises(ValueError, match=message):
        VisionFeatures.from_dict({name: value for name, value in stored.items() if value is not None})


def test_text_weights_are_not_even_held(tmp_path) -> None:
    text = TRANSFORMER | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    CLIPModel(AutoConfig.for_model("clip", text_config=text, vision_config=EVEN)).save_pretrained(tmp_path)
    encoder = load_vision(tmp_path)
    assert type(encoder.model) is CLIPVisionModel
    assert SimpleNamespace(**encoder.features.to_dict()).grid == [4, 4]
