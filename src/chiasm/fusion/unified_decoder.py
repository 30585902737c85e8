"""The unified transformer's decoder: Llama-shaped (arXiv 2302.13971), with positions of one to three coordinates.

It is a causal language model of transformers, and its weights have the names that Llama's have.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from chiasm.fusion.unified_layers import NORM_ORDERS, QK_NORMS, HeadLayerNorm, RMSNorm, UnifiedAttention, UnifiedLayer
from chiasm.language.next_token import next_token_loss, supervised_positions
from chiasm.positions.rotary import axes_of, frequencies, rotation
from chiasm.positions.sequence import split_positions

WORD, PATCH = 0, 1
"""Rows of the modality embeddings."""


class UnifiedDecoderConfig(PreTrainedConfig):
    """Sizes and kind of a decoder; by default a small one to train from scratch.

    Args:
        positions: a word of `chiasm.positions.sequence.POSITIONS`.
        rope_sections: of `mrope`: frequencies that turn by frame, row and column.
        qk_norm: of queries and keys: `none`, `rms` (one scale for all heads) or `layer` (Chameleon's).
        norm_order: `pre`, or `post`: norms behind the blocks (Chameleon-34B, Swin).
        query_bias: whether the projections to queries, keys and values have biases (Qwen2).
    """

    model_type = "chiasm_decoder"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012  (transformers declares it so)

    vocab_size: int = 512
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    positions: str = "raster"
    rope_sections: list | None = None
    qk_norm: str = "none"
    norm_order: str = "pre"
    query_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        split_positions(self.positions)
        for name, value, known in (("qk_norm", self.qk_norm, QK_NORMS), ("norm_order", self.norm_order, NORM_ORDERS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim} (hidden_size {self.hidden_size}, num_attention_heads "
                f"{self.num_attention_heads}), but rotary positions turn channels in pairs; choose an even head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        super().__post_init__(**kwargs)


class ModalityEmbeddings(nn.Embedding):
    """Added to words and to patches; zero until it is trained."""

    def __init__(self, width: int) -> None:
        super().__init__(PATCH + 1, width)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class UnifiedPreTrained(PreTrainedModel):
    """What the decoder has in common with and without its head."""

    config_class = UnifiedDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UnifiedLayer"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": UnifiedLayer, "attentions": UnifiedAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Norms start as the identity, modality embeddings at zero: they change nothing before they are trained."""
        if isinstance(module, RMSNorm | HeadLayerNorm):
            module.weight.fill_(1.0)
            if isinstance(module, HeadLayerNorm):
                module.bias.zero_()
        elif isinstance(module, ModalityEmbeddings):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class UnifiedDecoder(UnifiedPreTrained):
    """Embeddings in, normalised hidden states out."""

    def __init__(self, config: UnifiedDecoderConfig) -> None:
        super().__init__(config)
        self.kind, modality = split_positions(config.positions)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.modality_embeddings = ModalityEmbeddings(config.hidden_size) if modality else None
        self.layers = nn.ModuleList([UnifiedLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.axes = axes_of(self.kind, int(config.head_dim or 0) // 2, config.rope_sections)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states.

        Args:
            position_ids: `(B, S)`, or `(axes, B, S)` with the coordinates of `chiasm.positions.sequence`; without them
                tokens are counted as text, behind those in the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids if position_ids.ndim == 2 else None,
        )
        turned = self.rotary(inputs_embeds, position_ids)
        states = inputs_embeds
        for layer in self.layers:
            states = layer(states, turned, attention_mask=mask, cache=cache, use_cache=use_cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), cache=cache)

    def rotary(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token's angles, in the precision of `like`."""
        inverse, scale = frequencies(self.config, like.device, position_ids)
        coordinates = position_ids if position_ids.ndim == 3 else position_ids[None]
        cos, sin = rotation(coordinates, inverse, self.axes, scale)
        return cos.to(like.dtype), sin.to(like.dtype)


class UnifiedDecoderForCausalLM(UnifiedPreTrained, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: UnifiedDecoderConfig) -> None:
        super().__init__(config)
        self.model = UnifiedDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss where labels are given."""
        count, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[:, kept])
        loss = None
        if labels is not None:
            rows, columns, targets = supervised_positions(labels, shift_labels)
            loss = next_token_loss(logits[rows, columns], targets, count)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoConfig.register("chiasm_decoder", UnifiedDecoderConfig, exist_ok=True)
AutoModelForCausalLM.register(UnifiedDecoderConfig, UnifiedDecoderForCausalLM, exist_ok=True)
