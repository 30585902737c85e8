"""What an encoder–decoder language model of T5's (arXiv 1910.10683) or BART's shape costs, in closed form."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

T5_SHAPED = ("mt5", "t5", "umt5")
BART_SHAPED = ("bart", "blenderbot", "m2m_100", "marian", "mbart", "pegasus")


class UnknownCostError(ValueError):
    """A language model whose cost has no closed form here."""


@dataclass(frozen=True)
class LanguageCost:
    """FLOPs of reading a prompt and making the first token of the answer, and of each token after it; cached bytes.

    Args:
        cache_bytes: keys and values of the prompt for the decoder, and of the answer's first token.
        cache_bytes_per_token: what each further token of the answer adds.
    """

    prefill_flops: int
    decode_flops: int
    cache_bytes: int
    cache_bytes_per_token: int


def seq2seq_cost(language: PreTrainedModel, sequence: int) -> LanguageCost:
    """The cost of a prompt of `sequence` tokens, placeholders included.

    Raises:
        UnknownCostError: the language model has another shape.
    """
    config: Any = language.config
    if config.model_type in T5_SHAPED:
        encoder_blocks, blocks = language.get_encoder().block, language.get_decoder().block
        inner = config.num_heads * config.d_kv
        once = sum(_elements(block.layer[1].EncDecAttention, ("k", "v")) for block in blocks)
    elif config.model_type in BART_SHAPED:
        encoder_blocks, blocks = language.get_encoder().layers, language.get_decoder().layers
        inner = config.d_model
        once = sum(_elements(block.encoder_attn, ("k_proj", "v_proj")) for block in blocks)
    else:
        known = ", ".join(T5_SHAPED + BART_SHAPED)
        raise UnknownCostError(f"the cost of a {config.model_type!r} encoder-decoder is not known; known: {known}")
    depth, each = len(blocks), _elements(blocks) - once
    head = language.get_output_embeddings().weight.numel()

    def token(context: int) -> int:
        return 2 * (each + head) + 4 * inner * depth * (context + sequence)

    encoder = 2 * sequence * _elements(encoder_blocks) + 4 * inner * len(encoder_blocks) * sequence**2
    per_token = 2 * depth * inner * language.dtype.itemsize
    return LanguageCost(
        prefill_flops=encoder + 2 * sequence * once + token(1),
        decode_flops=token(2),
        cache_bytes=per_token * (sequence + 1),
        cache_bytes_per_token=per_token,
    )


def _elements(module: nn.Module, only: tuple[str, ...] = ()) -> int:
    """Elements of the linear layers of a module, or of those of its children with these names."""
    parts = [getattr(module, name) for name in only] or [module]
    return sum(m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))
