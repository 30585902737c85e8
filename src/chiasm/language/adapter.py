"""One small adapter over any `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`: embeddings in, states or logits out.

Chiasm never subclasses a language model. What it needs of one is here: the embedding table, the decoder without its
head, the list of layers, and the head applied to chosen positions only.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chiasm.sources.errors import SourceError, readable_weights
from chiasm.sources.files import find_file, require_reachable

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Fields of configurations that say something of every layer."""


class ContextError(ValueError):
    """A sequence that is longer than the language model's context.

    Args:
        room: tokens of an answer that it leaves.
    """

    def __init__(self, message: str, room: int) -> None:
        super().__init__(message)
        self.room = room

    def __reduce__(self) -> tuple:
        return ContextError, (str(self), self.room)


def load_language(source: str | PreTrainedModel, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal or encoder–decoder language model from a folder or hub id, or the loaded one that was given.

    Raises:
        ValueError: it has no head, or no attention (Mamba, RWKV): its state is not a cache of keys and values.
    """
    model = source if isinstance(source, PreTrainedModel) else _load(source, dtype)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"language={type(model).__name__} has no language-modelling head; "
            "load it with AutoModelForCausalLM instead of AutoModel"
        )
    if not _caches_attention(model):
        raise ValueError(
            f"language={type(model).__name__} (model type {model.config.model_type!r}) keeps no keys and values of "
            "attention, which decoding and the cost model need; choose a language model with attention"
        )
    return model


def require_causal(language: PreTrainedModel, place: str) -> None:
    """Refuses an encoder–decoder where only a causal language model can be: in `place`."""
    if language.config.is_encoder_decoder:
        raise ValueError(
            f"language={type(language).__name__} (model type {language.config.model_type!r}) is an encoder-decoder, "
            f"but {place} takes a causal language model; choose one, or connect with fusion='early' and its defaults"
        )


def _load(source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    require_reachable(source)
    config = AutoConfig.from_pretrained(source)
    kind = _auto_class(config)
    if type(config) not in kind._model_mapping and not hasattr(config, "auto_map"):
        raise ValueError(
            f"language={source!r} holds a model of type {config.model_type!r}, which is no language model that "
            "answers; name the folder or hub id of one that is"
        )
    with readable_weights(source):
        return kind.from_pretrained(source, dtype=dtype)


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@torch.no_grad()
def _caches_attention(model: PreTrainedModel) -> bool:
    """Whether a model has attention and hands out its cache: found out on one token, without a table of families."""
    if not hasattr(model.config.get_text_config(), "num_attention_heads") or not accepts(model, "use_cache"):
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    answer = {"decoder_input_ids": token} if model.config.is_encoder_decoder else {}
    return getattr(model(input_ids=token, use_cache=True, **answer), "cache", None) is not None


def build_language(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal or an encoder–decoder language model with fresh weights."""
    model: PreTrainedModel = _auto_class(config).from_config(config)
    return model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a language model, or None where the folder holds none, or one without words.

    Raises:
        ValueError: its files are damaged, or of a kind that transformers does not read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises nothing more special
        known = _tokenizer_file(source)
        if known is None:
            return None
        raise ValueError(
            f"the tokenizer in {source} cannot be loaded ({error}); fetch {known} and the files beside it again"
        ) from error
    words = getattr(tokenizer, "vocab_files_names", {}).values()
    return tokenizer if not words or any(find_file(source, name) for name in (TOKENIZER_FILES[0], *words)) else None


def _tokenizer_file(source: str) -> str | None:
    """The first of a tokenizer's files that a source has."""
    try:
        return next((name for name in TOKENIZER_FILES if find_file(source, name)), None)
    except SourceError:
        return None


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that the language model of a configuration reads; None where there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def embedding_width(language: PreTrainedModel) -> int:
    """D_l: the width of the token embeddings, which is what a connector must produce."""
    return language.get_input_embeddings().weight.shape[1]


def hidden_width(language: PreTrainedModel) -> int:
    """Width of the states between the layers, which some models (OPT) project the embeddings to."""
    return language.config.get_text_config().hidden_size


def vocabulary(language: PreTrainedModel) -> int:
    """Rows of the embedding table."""
    return language.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def embedding_scale(language: PreTrainedModel) -> float:
    """Root mean square of the token embeddings as the first layer receives them."""
    embeddings = language.get_input_embeddings()
    tokens = torch.arange(min(vocabulary(language), 4096), device=embeddings.weight.device)
    return embeddings(tokens).float().pow(2).mean().sqrt().item()


def decoder(language: PreTrainedModel) -> PreTrainedModel:
    """The language model without its head: embeddings in, last hidden state out."""
    return language.base_model


def layers(language: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers in order.

    Raises:
        ValueError: no module list, or more than one, has `num_hidden_layers` members.
    """
    count = language.config.get_text_config().num_hidden_layers
    found = [m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ValueError(f"{type(language).__name__} has {len(found)} lists of {count} layers, expected exactly one")
    return found[0]


def keep_first_layers(language: PreTrainedModel, count: int) -> None:
    """Takes all decoder layers but the first `count` away; an encoder–decoder stays as it is."""
    config = language.config.get_text_config()
    whole = config.num_hidden_layers
    if language.config.is_encoder_decoder or whole <= count:
        return
    del layers(language)[count:]
    for name in LAYER_LISTS:
        if len(getattr(config, name, None) or []) == whole:
            setattr(config, name, getattr(config, name)[:count])
    config.num_hidden_layers = count


def last_hidden_state(language: PreTrainedModel, **inputs: Any) -> Float[Tensor, "B S D_l"]:
    """The decoder's normalised output, which the head reads."""
    return decoder(language)(**inputs, use_cache=False).last_hidden_state


def head_is_direct(language: PreTrainedModel) -> bool:
    """Whether logits are just the output embedding of the last hidden state.

    Some models scale, cap or transform on the way (Gemma 2, Cohere, Granite, BERT). It is found out by comparing both
    on three tokens, so that no table of families has to be kept.
    """
    tokens = torch.arange(3, device=language.get_input_embeddings().weight.device)[None]
    was_training = language.training
    language.eval()
    with torch.no_grad():
        hidden = decoder(language)(input_ids=tokens, use_cache=False)[0]
        expected = language(input_ids=tokens, use_cache=False).logits
        direct = language.get_output_embeddings()(hidden)
    language.train(was_training)
    capped = getattr(language.config.get_text_config(), "final_logit_softcapping", None)
    return not capped and direct.shape == expected.shape and torch.allclose(direct, expected, rtol=1e-3, atol=1e-4)


def logits_at(
    language: PreTrainedModel,
    inputs: dict[str, Any],
    rows: Int[Tensor, " K"],
    columns: Int[Tensor, " K"],
    direct_head: bool,
) -> Float[Tensor, "K V"]:
    """Logits at K chosen (row, column) positions only; the others never meet the vocabulary.

    Without a direct head the model's own forward is asked for the union of the columns (`logits_to_keep`).
    """
    if direct_head:
        hidden = last_hidden_state(language, **inputs)
        chosen = hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + columns)
        return language.get_output_embeddings()(chosen)
    kept, position = torch.unique(columns, return_inverse=True)
    if accepts(language, "logits_to_keep"):
        return language(**inputs, use_cache=False, logits_to_keep=kept).logits[rows, position]
    return language(**inputs, use_cache=False).logits[rows, columns]


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward names this argument."""
    return argument in inspect.signature(module.forward).parameters
