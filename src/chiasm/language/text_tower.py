"""The text tower of late fusion: any text encoder, or a causal language model without its head, and one vector a text.

How the vector comes about is one word: `mean` of the tokens (Sentence-BERT, arXiv 1908.10084), `cls`, the first token;
`last`, the last token of a causal model (arXiv 2401.00368); `own`, what the tower itself pools (CLIP, SigLIP).
"""

from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from chiasm.language.adapter import accepts
from chiasm.sources.errors import readable_weights, without_report
from chiasm.sources.files import read_json, require_reachable

POOLINGS = ("mean", "cls", "last", "own")

OWN = ("clip_text_model", "siglip_text_model")
"""Model types that pool by themselves in a way that they were trained for."""

TWO_TOWERS = ("clip", "siglip")
"""Model types of image-text models whose text tower is `text_model`, configured by `text_config`."""

UNLISTED_CLASSES = {"siglip_text_model": "SiglipTextModel"}
"""Model type → class, for towers that transformers' AutoModel does not list."""

SENTENCE_TRANSFORMERS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""Switches in `1_Pooling/config.json` of sentence encoders → our word."""


def load_text(
    source: str | PreTrainedModel, pooling: str = "auto", dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, str]:
    """A text tower from a folder, a hub id or a loaded model, and how it pools.

    Args:
        pooling: one of `POOLINGS`; `auto` takes what the files beside a sentence encoder say, else `own` for `OWN`,
            `last` where a token does not see later ones, and `mean` elsewhere.

    Raises:
        ValueError: it is no text encoder, it lacks weights, or it does not pool in this way.
    """
    if pooling not in ("auto", *POOLINGS):
        raise ValueError(f"pooling {pooling!r} is unknown; choose one of auto, {', '.join(POOLINGS)}")
    said = _said_beside(source) if isinstance(source, str) else None
    tower, missing = (take_text(source), set()) if isinstance(source, PreTrainedModel) else _load(source, dtype)
    if pooling == "auto":
        pooling = _pooling_of(tower, said)
    if pooling != "own":
        missing -= {name for name in missing if name.startswith("pooler.")}
        _remove_pooler(tower)
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of its text encoder, such as {min(missing)!r}")
    return tower.eval(), pooling


def take_text(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a loaded model that reads text: no vision tower and no head."""
    tower: Any = model.text_model if model.config.model_type in TWO_TOWERS else model.base_model
    _check(tower.config)
    return tower


def build_text(config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
    """A text tower with fresh weights."""
    tower = _class(config)._from_config(config)
    if pooling != "own":
        _remove_pooler(tower)
    return tower


def pool_text(
    tower: PreTrainedModel,
    pooling: str,
    input_ids: Int[Tensor, "B S"],
    attention_mask: Int[Tensor, "B S"] | None = None,
    position_ids: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B D_l"]:
    """One vector for every text; padding is on the right.

    Raises:
        ValueError: the tower has no pooling of its own.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if accepts(tower, "use_cache"):
        inputs["use_cache"] = False
    outputs = tower(**inputs)
    if pooling == "own":
        if getattr(outputs, "pooler_output", None) is None:
            raise ValueError(
                f"pooling 'own' is for text encoders that pool by themselves, a {tower.config.model_type} does not; "
                "choose mean, cls or last"
            )
        return outputs.pooler_output
    states = outputs.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if pooling == "mean":
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)
    return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]


@torch.no_grad()
def text_width(tower: PreTrainedModel, pooling: str) -> int:
    """D_l: width of a text's vector."""
    device = next(tower.parameters()).device
    return pool_text(tower, pooling, torch.zeros(1, 2, dtype=torch.long, device=device)).shape[-1]


def _load(source: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, set[str]]:
    require_reachable(source)
    config, options = AutoConfig.from_pretrained(source), {}
    if config.model_type in TWO_TOWERS:
        config, options = config.text_config, {"key_mapping": {r"^text_model\.": ""}}
    with readable_weights(source), without_report():
        kind = _class(config)
        model, report = kind.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **options)
    return model, set(report["missing_keys"])


def _class(config: PreTrainedConfig) -> Any:
    _check(config)
    if config.model_type in UNLISTED_CLASSES:
        return getattr(transformers, UNLISTED_CLASSES[config.model_type])
    return MODEL_MAPPING[type(config)]


def _check(config: PreTrainedConfig) -> None:
    known = config.model_type in UNLISTED_CLASSES or type(config) in MODEL_MAPPING
    if not known or config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"a {config.model_type!r} model is no text tower here; late fusion takes a text encoder such as "
            "minilm-l6, or a causal language model"
        )


def _remove_pooler(tower: Any) -> None:
    if isinstance(getattr(tower, "pooler", None), torch.nn.Module):
        tower.pooler = None


def _said_beside(source: str) -> str | None:
    said = read_json(source, "1_Pooling/config.json") or {}
    return next((word for switch, word in SENTENCE_TRANSFORMERS.items() if said.get(switch)), None)


def _pooling_of(tower: PreTrainedModel, said: str | None) -> str:
    if tower.config.model_type in OWN:
        return "own"
    return said or ("last" if is_causal(tower) else "mean")


@torch.no_grad()
def is_causal(tower: PreTrainedModel) -> bool:
    """Whether a token does not see later ones: found out on two texts of two tokens, without a table of families."""
    device = next(tower.parameters()).device
    was_training = tower.training
    states = tower.eval()(input_ids=torch.tensor([[1, 2], [1, 3]], device=device)).last_hidden_state
    tower.train(was_training)
    return torch.allclose(states[0, 0].float(), states[1, 0].float(), rtol=1e-4, atol=1e-5)
