"""What a stage's objectives train: a model, how samples become its batches, and its losses.

`next_token` trains the generative model itself. BLIP-2's three objectives train a retrieval model that is built around
the generative one's vision encoder and Q-Former: the very same tensors, so nothing has to be handed over afterwards.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm import sources
from chiasm.connectors.bert import initialise_from_bert, load_bert
from chiasm.data.captions import CaptionProcessor, collate_captions, encode_caption
from chiasm.data.collation import Batch, Item, collate, encode_sample
from chiasm.data.labels import IGNORE
from chiasm.data.packing import ROOM, collate_packed
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import Sample, Samples
from chiasm.fusion.qformer_retrieval import QFormerRetrieval, build_retrieval, take_own_weights
from chiasm.language.adapter import context_length, load_tokenizer
from chiasm.objectives.captions import caption_losses
from chiasm.training.batches import seed_of
from chiasm.training.reporter import Reporter
from chiasm.training.schema import Stage


class StageModel(ABC):
    """A model and what makes it learn. `processor` is saved beside it; `answers` tells whether it can be asked."""

    answers = False
    controlled = True
    """Whether a wrong picture must make the loss larger."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor = model, processor

    @abstractmethod
    def encode(self, sample: Sample) -> dict[str, list[int]]:
        """Tokens of one sample, or a SampleError."""

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> Batch:
        """Items as one batch."""

    def prepare(self, samples: Samples, indices: Sequence[int], reporter: Reporter) -> None:  # noqa: B027  (most need nothing)
        """What can be computed before the first step of the samples that the stage will meet."""

    def measures(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """What validation reports beside the losses."""
        return {}

    @abstractmethod
    def filler(self) -> Batch:
        """A batch without samples, whose loss is 0 and reaches every parameter: for a process without a share."""

    @abstractmethod
    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        """Each objective's share of the loss of `num_samples` samples with `num_tokens` supervised tokens."""


class AnswerModel(StageModel):
    """The generative model, which learns the assistant's words by `next_token`."""

    answers = True

    def __init__(
        self, model: PreTrainedModel, processor: ChiasmProcessor, max_length: int | None = None, pack: bool = False
    ) -> None:
        super().__init__(model, processor)
        self.max_length, self.pack = max_length, pack

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        return encode_sample(sample, self.processor, self.max_length)

    def collate(self, items: Sequence[Item]) -> Batch:
        if not self.pack:
            return collate(items, self.processor)
        return collate_packed(items, self.processor, min(ROOM, self.max_length or ROOM))

    def filler(self) -> Batch:
        words = torch.full((1, 2), int(self.processor.image_token_id == 0))
        labels = torch.full_like(words, IGNORE)
        return Batch({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}, [], 0, 0)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        return {"next_token": self.model(**inputs, num_items_in_batch=num_tokens, return_logits=False).loss}


class CaptionModel(StageModel):
    """A retrieval model, which learns from captions by BLIP-2's objectives."""

    def __init__(self, model: QFormerRetrieval, processor: CaptionProcessor, objectives: Sequence[str]) -> None:
        super().__init__(model, processor)
        self.objectives = objectives

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        return encode_caption(sample, self.processor)

    def collate(self, items: Sequence[Item]) -> Batch:
        return collate_captions(items, self.processor)

    def filler(self) -> Batch:
        return caption_filler(self.model)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        return caption_losses(self.model, inputs, self.objectives, num_samples, num_tokens)


def caption_filler(model: PreTrainedModel) -> Batch:
    """A batch of no pictures and no texts."""
    vision, words = model.vision, torch.zeros(0, 2, dtype=torch.long)
    if any(parameter.requires_grad for parameter in vision.parameters()):
        shown = {"pixel_values": torch.zeros(0, 3, *vision.image_size)}
    else:
        shown = {"image_features": torch.zeros(0, vision.num_patches, vision.width)}
    texts = {"input_ids": words, "attention_mask": words, "picture_ids": words[:, 0]}
    return Batch(texts | shown, [], 0, 0)


def require_isolation(model: PreTrainedModel, processor: ChiasmProcessor, stage: str) -> None:
    """Refuses to pack where a sample would see its neighbours, which is found out on five tokens.

    Raises:
        ValueError: the language model attends across positions that start again, or the model reads token types.
    """
    kind = model.config.get_text_config().model_type
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"stage {stage!r}: pack: true is not for an encoder-decoder language model ({kind}); write pack: false"
        )
    if processor.token_types:
        raise ValueError(f"stage {stage!r}: pack: true is not for a model with a prefix of its own; write pack: false")
    words = torch.arange(2, 7, device=model.device)[None]
    places = torch.tensor([[0, 1, 2, 0, 1]], device=model.device)
    was_training = model.language.training
    model.language.eval()
    with torch.no_grad():
        packed, alone = (
            model.language(input_ids=words[:, first:], position_ids=places[:, first:], use_cache=False).logits[:, -1]
            for first in (0, 3)
        )
    model.language.train(was_training)
    if not torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max())):
        raise ValueError(
            f"stage {stage!r}: a {kind} language model does not keep packed samples apart; write pack: false"
        )


def stage_model(
    model: PreTrainedModel, processor: ChiasmProcessor, stage: Stage, number: int, taught: Path | None = None
) -> StageModel:
    """What a stage trains of a generative model. New weights are a function of the stage's seed.

    Args:
        taught: the retrieval model of an earlier stage, whose text branch and heads a stage that reads captions takes.

    Raises:
        ValueError: the stage reads captions but the connector is no Q-Former.
    """
    late = [name for name in stage.objectives if name in ("sigmoid", "answers")]
    if late:
        raise ValueError(
            f"stage {stage.name!r}: objective {late[0]!r} is for fusion 'late', this model has "
            f"{model.config.fusion!r}; connect one with fusion='late'"
        )
    if stage.chunk is not None:
        raise ValueError(f"stage {stage.name!r}: chunk is for fusion 'late'; remove it")
    if not stage.reads_captions:
        context = context_length(model.config)
        lengths = (length for length in (stage.max_length, context) if length is not None)
        if stage.pack:
            require_isolation(model, processor, stage.name)
        return AnswerModel(model, processor, min(lengths, default=None), stage.pack)
    longest = model.config.connector.get("max_positions", stage.captions.length)
    if stage.captions.length > longest:
        raise ValueError(
            f"captions.length is {stage.captions.length}, but the connector has max_positions={longest}; lower it"
        )
    start, own = stage.captions.init_from, getattr(processor, "instruction_tokenizer", None)
    if start is not None and own is not None:
        raise ValueError(
            f"captions.init_from={start!r}: the connector reads instructions, so it has words; leave it out"
        )
    prepare = None
    tokenizer = own or processor.tokenizer
    if start is not None:
        folder = sources.resolve(start)
        tokenizer, bert = _tokenizer_of(folder), load_bert(folder)
        prepare = partial(initialise_from_bert, bert=bert)
    torch.manual_seed(seed_of(stage.seed, number))
    retrieval = build_retrieval(model, len(tokenizer), stage.captions.space, prepare)
    if taught is not None:
        take_own_weights(retrieval, QFormerRetrieval.from_pretrained(taught), model.connector)
    captions = CaptionProcessor(processor.image_processor, tokenizer, stage.captions.length)
    return CaptionModel(retrieval, captions, stage.objectives)


def _tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    found = load_tokenizer(folder)
    if found is None:
        raise ValueError(f"captions.init_from: {folder} holds no tokenizer that transformers can load")
    return found
