"""Looking inside: which patches of a picture every token of an answer attended to when it was chosen.

A token's attention to visual tokens, averaged over heads and layers, times what every visual token has of the patches.
With early fusion it is the language model's own attention, with intermediate fusion that of the gated blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chiasm.data.chat import Message
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import text_of
from chiasm.fusion.base import FusionModel
from chiasm.fusion.sequence import PositionedModel
from chiasm.generation import heatmap
from chiasm.generation.decode import Decoding, arguments, prepare
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vision.probe import twin

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Attention:
    """What was looked at while an answer came about.

    Args:
        answer: what `chat` says.
        tokens: pieces of text, one for every row of `patches`; together they are the answer, or question and answer.
        patches: share of every patch, which sum to 1; 0 everywhere for a token that saw nothing of the picture.
        queries: share of every patch in every visual token, where visual tokens have no place of their own.
        picture: as the encoder received it.
    """

    answer: str
    tokens: list[str]
    patches: Float[Tensor, "tokens rows columns"]
    queries: Float[Tensor, "T rows columns"] | None
    picture: Image.Image

    def overlay(self, index: int | None = None) -> Image.Image:
        """The picture, in colour where a token looked; by default where all of them did on average."""
        chosen = self.patches if index is None else self.patches[index][None]
        return heatmap.spotlight(self.picture, _mean(chosen))

    def save(self, path: str | Path) -> Path:
        """Writes one picture for every word, with the word under it."""
        words = heatmap.words(self.tokens)
        tiles = [(heatmap.spotlight(self.picture, _mean(self.patches[rows])), word) for word, rows in words]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        heatmap.grid([(self.picture, ""), *tiles]).save(path)
        return path


class NoAttention(ValueError):
    """Of such a model nobody can say where it looked."""


@torch.no_grad()
def look(
    model: FusionModel,
    processor: ChiasmProcessor,
    messages: list[Message],
    images: list[Any],
    decoding: Decoding,
    image: int = -1,
    layers: Sequence[int] | None = None,
    prompt_words: bool = False,
    answer: str | None = None,
) -> Attention:
    """Answers, and says what each token of the answer attended to.

    Args:
        answer: one that has been given before, in place of a new one.
        image: which of the prompt's pictures; by default the last.
        layers: the language model's layers whose attention is averaged; with intermediate fusion those that have a
            block in front of them. By default all.
        prompt_words: whether the words of the question come before those of the answer.

    Raises:
        ValueError: no such picture, no such layer, or a model of which it cannot be said.
    """
    _check(model, processor)
    if not -len(images) <= image < len(images):
        raise ValueError(f"attention to image {image}, but the prompt has {len(images)} image(s)")
    inputs: Inputs = prepare(model, processor, [messages], [images], 1 if answer else decoding.max_new_tokens)
    tokenizer, start = processor.tokenizer, inputs["input_ids"].shape[1]
    if answer is None:
        ids = model.generate(**inputs, **arguments(model, processor, decoding, inputs))
    else:
        given = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        ids = torch.cat([inputs["input_ids"], given], dim=1)
    answer = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    features = model.encode_images(inputs.pop("pixel_values"))
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_features": features}
    to_visual = WEIGHTS[model.config.fusion](model, inputs, layers)
    places, tokens = _places(tokenizer, ids[0].tolist(), start)
    if prompt_words:
        asked, words = _prompt_places(model, tokenizer, ids[0, :start].tolist(), text_of(messages[-1]["content"]))
        places, tokens = [*asked, *places], [*words, *(f" {token.lstrip()}" for token in tokens[:1]), *tokens[1:]]
    number = range(len(images))[image]
    shares = _patch_shares(model, inputs, features)[number].float()
    to_visual = to_visual[places].unflatten(1, (len(images), -1))[:, number].float()
    return Attention(
        answer=answer,
        tokens=tokens,
        patches=_normalised(to_visual @ shares).unflatten(1, model.vision.grid).cpu(),
        queries=None if model.connector.token_grid else _normalised(shares).unflatten(1, model.vision.grid).cpu(),
        picture=processor.image_processor.resize(images[number]),
    )


def _check(model: FusionModel, processor: ChiasmProcessor) -> None:
    """Refuses what has no one-to-one way from a token of the answer back to a grid of patches."""
    if model.config.is_encoder_decoder:
        raise NoAttention("attention is told for decoder-only language models; this one is an encoder-decoder")
    if isinstance(model, PositionedModel):
        raise NoAttention(
            f"attention is told for models with an encoder and a connector of fixed grids; this one (fusion "
            f"{model.config.fusion!r}, {model.config.vision_config.model_type}) reads pictures patch by patch"
        )
    if model.vision.features.resolution == "native" or not isinstance(processor.image_processor, ChiasmImageProcessor):
        raise NoAttention("attention is told for pictures of one size; this model's encoder takes them in their own")


def _early(model: FusionModel, inputs: Inputs, layers: Sequence[int] | None) -> Float[Tensor, "S K"]:
    """The language model's attention from every token to the visual tokens of all pictures."""
    reader = twin(model)  # the same weights in modules of its own, whose way of attending nobody else sees change
    reader.language.set_attn_implementation("eager")
    attentions = reader(**inputs, output_attentions=True, use_cache=False).attentions
    chosen = _chosen(attentions, range(len(attentions)), layers)
    return chosen[:, inputs["input_ids"][0] == model.config.image_token_id]


def _intermediate(model: FusionModel, inputs: Inputs, layers: Sequence[int] | None) -> Float[Tensor, "S K"]:
    """The blocks' attention from every token to the visual tokens of all pictures."""
    record: list[Tensor] = []
    model(**inputs, record=record, use_cache=False)
    return _chosen(record, model.cross_attention.settings.layers, layers)


WEIGHTS: dict[str, Callable[[Any, Inputs, Sequence[int] | None], Tensor]] = {
    "early": _early,
    "intermediate": _intermediate,
}


def _chosen(weights: Sequence[Tensor], known: Sequence[int], layers: Sequence[int] | None) -> Float[Tensor, "S K"]:
    """The mean over heads and the layers that were asked for, of weights by layer `(1, H, S, K)`."""
    by_layer = dict(zip(known, weights, strict=True))
    if wrong := [layer for layer in layers or () if layer not in by_layer]:
        raise ValueError(f"attention in layer {wrong[0]}, expected some of {', '.join(map(str, by_layer))}")
    return torch.stack([by_layer[layer][0].float().mean(dim=0) for layer in layers or by_layer]).mean(dim=0)


def _patch_shares(model: FusionModel, inputs: Inputs, features: Tensor) -> Float[Tensor, "images T patches"]:
    """What every visual token has of every patch; features that belong to no patch are left out."""
    connector = model.connector
    told = {name: inputs[name] for name in ("instruction_ids", "instruction_mask") if connector.reads_instruction}
    rows, columns = model.vision.grid
    read = model.with_positions(features.to(connector.dtype or features.dtype))
    shares = connector.attention(read, **told)[..., -rows * columns :]
    return shares if model.token_order is None else shares[:, model.token_order]


def _places(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int) -> tuple[list[int], list[str]]:
    """Where each token of the answer was chosen, which is one place before its own, and its text."""
    special = set(tokenizer.all_special_ids)
    kept = [place for place in range(start, len(ids)) if ids[place] not in special]
    return [place - 1 for place in kept], pieces(tokenizer, [ids[place] for place in kept])


def _prompt_places(
    model: FusionModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: str
) -> tuple[list[int], list[str]]:
    """The places of the question's tokens, which stand behind the last picture."""
    first = max(place for place, token in enumerate(ids) if token == model.config.image_token_id) + 1
    texts = pieces(tokenizer, ids[first:])
    end = next((n for n in range(len(texts)) if prompt.strip() in "".join(texts[: n + 1])), len(texts) - 1)
    kept = [n for n in range(end + 1) if texts[n].strip()]
    return [first + n for n in kept], [texts[n] for n in kept]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that every token adds; the bytes of one character come with its last token."""
    texts: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        whole = end == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts


def _mean(patches: Float[Tensor, "rows_of_tokens rows columns"]) -> Float[Tensor, "rows columns"]:
    return patches.mean(dim=0) if len(patches) else torch.zeros(patches.shape[1:])


def _normalised(weights: Float[Tensor, "rows patches"]) -> Float[Tensor, "rows patches"]:
    """Rows that sum to 1; those without any weight stay 0."""
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)
