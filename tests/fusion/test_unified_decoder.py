"""The unified decoder computes what Llama-shaped language models compute, and refuses the others."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import chiasm
import tiny
from chiasm import sources
from chiasm.fusion.unified_decoder import UnifiedDecoderConfig
from chiasm.fusion.unified_start import decoder_from, new_decoder
from chiasm.language.adapter import load_language

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
SHORT = SIZES | {"max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 3, "long_factor": [2.0, 3.0, 4.0]}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64}),
    "dynamic": LlamaConfig(**SHORT, rope_parameters=DYNAMIC),
    "longrope": LlamaConfig(**SHORT, rope_parameters=LONG | {"original_max_position_embeddings": 8}),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=10),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}


def _language(name: str) -> Any:
    torch.manual_seed(3)
    language = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return language


@pytest.mark.parametrize("positions", ["raster", "rope2d", "mrope+modality"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_language_models(name: str, positions: str) -> None:
    language = _language(name)
    ours = decoder_from(language, 60, positions=positions)
    tokens = torch.randint(0, 53, (2, 11))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = language(tokens, attention_mask=mask, position_ids=places).logits
        assert torch.equal(ours(tokens, attention_mask=mask, position_ids=places).logits[..., :53], theirs)
        spread = places.expand(3, -1, -1) if positions.startswith("mrope") else places
        again = ours(tokens, attention_mask=mask, position_ids=spread).logits[..., :53]
        assert torch.equal(again, theirs)


def test_rows_count_their_tokens_by_themselves() -> None:
    """Without positions; and targets that stand at their logits already take the labels' place."""
    ours, tokens = decoder_from(_language("llama"), 53), torch.randint(0, 53, (2, 5))
    told = ours(tokens, position_ids=torch.arange(5).expand(2, -1)).logits
    assert torch.equal(ours(tokens).logits, told)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    loss = ours(tokens, labels=tokens).loss
    torch.testing.assert_close(ours(tokens, labels=tokens.flip(1), shift_labels=shifted).loss, loss)


def test_generation_is_the_language_models() -> None:
    language = _language("llama")
    ours = decoder_from(language, 53)
    tokens = torch.randint(0, 53, (2, 5))
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **greedy), language.generate(tokens, **greedy))
    assert torch.equal(ours.generate(tokens, **greedy, use_cache=False), language.generate(tokens, **greedy))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fusion 'unified' starts from Llama-shaped language models .* type 'gpt2'"):
        decoder_from(tiny.language("gpt2"), 300)
    config = MistralConfig(**SIZES, sliding_window=7)
    with pytest.raises(ValueError, match="of this mistral model is"):
        decoder_from(AutoModelForCausalLM.from_config(config), 60)
    with pytest.raises(ValueError, match="language setting 'depth' is unknown; known ones are attention_dropout"):
        new_decoder({"depth": 3}, 60)
    with pytest.raises(
        ValueError, match=r"head_dim is 25 \(hidden_size 100, num_attention_heads 4\), .* an even head_dim"
    ):
        new_decoder({"hidden_size": 100, "num_attention_heads": 4}, 60)


@pytest.mark.parametrize("options", [{"qk_norm": "rms"}, {"qk_norm": "layer", "norm_order": "post"}])
def test_norms_bound_what_attention_compares(options: dict[str, str]) -> None:
    """However large the weights grow, normalised queries and keys keep their length."""
    decoder = new_decoder({"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}, 50, **options)
    attention = decoder.model.layers[0].self_attn
    states = torch.randn(1, 5, 24)
    before = attention(states, decoder.model.rotary(states, torch.arange(5)[None]))[0]
    with torch.no_grad():
        attention.q_proj.weight.mul_(50.0)
        attention.k_proj.weight.mul_(50.0)
    after = attention(states, decoder.model.rotary(states, torch.arange(5)[None]))[0]
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="qk_norm 'l2' is unknown; choose one of none, rms, layer"):
        UnifiedDecoderConfig(qk_norm="l2")


@pytest.mark.weights
def test_smollm2_is_a_unified_transformer() -> None:
    vlm = chiasm.connect(language="smollm2-135m-instruct", fusion="unified", positions="mrope", dtype=torch.float32)
    language = load_language(str(sources.pull("smollm2-135m-instruct")), dtype=torch.float32)
    tokens = vlm.processor.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = vlm.model(**tokens).logits, language(**tokens).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=1e-4, atol=1e-4)
    assert "Paris" in vlm.chat(None, "What is the capital of France?", max_new_tokens=12)


def test_attention_drops_out_as_theirs_does() -> None:
    config = LlamaConfig(**SIZES, attention_dropout=0.4)
    language = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    decoder = decoder_from(language, SIZES["vocab_size"])
    decoder.set_attn_implementation("eager")
    ids, trained = torch.arange(20)[None], []
    for model in (language, decoder):
        torch.manual_seed(4)
        trained.append(model.train()(input_ids=ids).logits)
    torch.testing.assert_close(*trained)
    assert not torch.allclose(trained[1], decoder.eval()(input_ids=ids).logits)
