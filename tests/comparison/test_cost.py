"""The cost model's closed form equals counted parameters, tokens, FLOPs and cache bytes."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Siglip2VisionConfig, Siglip2VisionModel, T5Config
from transformers.modeling_outputs import BaseModelOutput

import chiasm
import tiny
from chiasm.comparison.cost import encode_flops
from chiasm.comparison.describe import describe
from chiasm.connectors import CONNECTORS
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early_seq2seq import EarlySeq2SeqModel
from chiasm.vision.encoder import load_vision


def connect(vision: str, language: str, connector: str | dict[str, Any] = "mlp") -> chiasm.VLM:
    vlm = chiasm.connect(tiny.vision(vision), tiny.language(language), connector, tokenizer=tiny.tokenizer())
    vlm.model.set_attn_implementation("eager")
    return vlm


@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_prefill_and_cache(language: str, images: int) -> None:
    model = connect("clip", language).model
    cost = chiasm.VLM(model, None).cost(images=images, text_tokens=11)
    ids = torch.randint(0, 250, (1, 11 + images * model.num_image_tokens))
    ids[0, 5 : 5 + images * model.num_image_tokens] = model.config.image_token_id
    features = torch.randn(images, model.vision.num_patches, model.vision.width) if images else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, image_features=features, use_cache=True, logits_to_keep=1)
    assert counter.get_total_flops() == cost.prefill_flops + cost.connect_flops
    layers = output.cache.layers
    kept = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    if language != "gemma3":  # its sliding window keeps less than the closed form, which says so
        assert kept == cost.kv_cache_bytes
    assert cost.sequence == ids.shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:, :1], cache=output.cache, use_cache=True)
    if language != "gemma3":
        assert counter.get_total_flops() == cost.decode_flops


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_intermediate_fusion(images: int, masked: bool) -> None:
    settings = {
        "mask_feed_forward": masked,
        "every": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 10,
        "gated_feed_forward": True,
    }
    model = chiasm.connect(
        tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer(), fusion="intermediate", cross_attention=settings
    ).model
    model.set_attn_implementation("eager")
    cost = chiasm.VLM(model, None).cost(images=images, text_tokens=11)
    ids = torch.randint(0, 250, (1, 11 + images))
    ids[0, 3 : 3 + images] = model.config.image_token_id
    features = torch.randn(images, model.vision.num_patches, model.vision.width) if images else None
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, image_features=features, use_cache=True, logits_to_keep=1)
    assert counter.get_total_flops() == cost.prefill_flops + cost.connect_flops
    pairs = output.image_cache.keys_values if output.image_cache else []
    pairs = [*pairs, *((layer.keys, layer.values) for layer in output.cache.layers)]
    assert sum(t.numel() * t.element_size() for pair in pairs for t in pair) == cost.kv_cache_bytes
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:, :1] * 0, cache=output.cache, image_cache=output.image_cache, use_cache=True)
    assert counter.get_total_flops() == cost.decode_flops
    assert sum(cost.parameters.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("vision", ["clip", "convnext"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_encode_connect_and_parameters(vision: str, connector: str) -> None:
    vlm = connect(vision, "llama", tiny.connector(connector))
    model, cost = vlm.model, vlm.cost(images=2)
    pixels = torch.randn(2, 3, *model.vision.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.encode_images(pixels)
    assert counter.get_total_flops() == cost.encode_flops == 2 * encode_flops(model.vision)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.connect_features(features)
    assert counter.get_total_flops() == cost.connect_flops
    assert sum(cost.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert cost.visual_tokens == 2 * model.num_image_tokens


def test_an_encoder_that_looks_at_values_is_counted() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = load_vision(Siglip2VisionModel(Siglip2VisionConfig(num_patches=9, patch_size=10, **sizes)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vision(torch.zeros(1, 3, *vision.image_size))
    assert encode_flops(vision) == counter.get_total_flops() > 0


def test_description_is_complete() -> None:
    vlm = connect("clip", "llama")
    facts = describe(vlm.model)
    assert set(facts["parts"]) == {"vision", "connector", "language"}
    assert facts["tokens_per_image"] == 9
    with pytest.raises(ValueError, match="images=-1"):
        vlm.cost(images=-1)


@pytest.mark.parametrize("gated", [True, False])
def test_encoder_decoder(gated: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 262, "d_model": 36, "d_ff": 52, "d_kv": 7, "num_heads": 5, "num_layers": 2}
    text = T5Config(**sizes, num_decoder_layers=3, feed_forward_proj="gated-gelu" if gated else "relu")
    vision = load_vision(tiny.vision())
    config = ChiasmConfig(
        vision_config=vision.model.config.to_dict(),
        text_config=text.to_dict(),
        connector=tiny.connector("qformer"),
        features=vision.features.to_dict(),
        image_token_id=260,
    )
    model = EarlySeq2SeqModel(config, vision=vision).eval()
    model.set_attn_implementation("eager")
    cost = chiasm.VLM(model, None).cost(images=2, text_tokens=7)
    ids = torch.cat([torch.full((1, 10), 260), torch.randint(0, 250, (1, 7))], dim=1)
    inputs = {"input_ids": ids, "image_features": torch.randn(2, 9, 24)}
    first = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(**inputs, decoder_input_ids=first, use_cache=True)
    assert counter.get_total_flops() == cost.prefill_flops + cost.connect_flops
    caches = (output.cache.self_attention_cache, output.cache.cross_attention_cache)
    tensors = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == cost.kv_cache_bytes
    states = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(encoder_outputs=states, decoder_input_ids=first, cache=output.cache, use_cache=True)
    assert counter.get_total_flops() == cost.decode_flops
