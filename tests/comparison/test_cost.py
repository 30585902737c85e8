"""The cost model's closed form equals counted parameters, tokens, FLOPs and cache bytes."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Siglip2VisionConfig, Siglip2VisionModel
from transformers.modeling_outputs import BaseModelOutput

import chiasm
import tiny
from chiasm.comparison.cost import cost, encode_flops
from chiasm.comparison.describe import describe, print_description
from chiasm.comparison.seq2seq_cost import BART_SHAPED, T5_SHAPED, UnknownCostError
from chiasm.connectors import CONNECTORS
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.early_seq2seq import EarlySeq2SeqModel
from chiasm.language.adapter import build_language
from chiasm.vision.encoder import load_vision


def connect(vision: str, language: str, connector: str | dict[str, Any] = "mlp") -> chiasm.VLM:
    vlm = chiasm.connect(tiny.vision(vision), tiny.language(language), connector, tokenizer=tiny.tokenizer())
    vlm.model.set_attn_implementation("eager")
    return vlm


def test_a_prompt_without_pictures_runs_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = connect("clip", "llama").model
    monkeypatch.delattr(f"{cost.__module__}.encode_flops")
    assert cost(model, images=0).encode_flops == 0


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


T5_SIZES = {"d_model": 36, "d_ff": 52, "d_kv": 7, "num_heads": 5, "num_layers": 2, "num_decoder_layers": 3}
BART_SIZES: dict[str, int] = {"d_model": 36, "encoder_layers": 2, "decoder_layers": 3}
BART_SIZES |= {f"{half}_ffn_dim": 52 for half in ("encoder", "decoder")}
BART_SIZES |= {f"{half}_attention_heads": 6 for half in ("encoder", "decoder")}
ENCODER_DECODERS = {
    **{kind: T5_SIZES | {"feed_forward_proj": "gated-gelu"} for kind in T5_SHAPED},
    **dict.fromkeys(BART_SHAPED, BART_SIZES),
    "t5": T5_SIZES,
}


def of_kind(kind: str, sizes: dict[str, Any]) -> Any:
    marks = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return AutoConfig.for_model(kind, vocab_size=262, max_position_embeddings=99, **marks, **sizes)


def test_an_encoder_decoder_of_unknown_cost_is_still_described() -> None:
    sizes = {**BART_SIZES, "max_encoder_position_embeddings": 64, "attention_window": 4}
    language = build_language(of_kind("led", sizes)).eval()
    model = chiasm.connect(tiny.vision(), language, tokenizer=tiny.tokenizer()).model
    with pytest.raises(UnknownCostError, match="the cost of a 'led' encoder-decoder is not known; known: mt5, t5"):
        cost(model)
    facts = describe(model)
    assert facts["cost"] is None and facts["parts"]["language"]["kind"] == "led"
    print_description(facts, console := Console(record=True))
    assert "what a prompt costs is not known of led" in console.export_text()


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_encoder_decoder(kind: str) -> None:
    torch.manual_seed(0)
    text = of_kind(kind, ENCODER_DECODERS[kind])
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
