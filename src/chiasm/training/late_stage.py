"""What a stage trains of a late-fusion model: pairs that find each other, or a head that answers from a closed list."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chiasm.data.captions import CaptionProcessor, collate_captions, encode_caption, pictures, text_id, text_ids
from chiasm.data.collation import Batch, Item
from chiasm.data.schema import Problem, Sample, SampleError, Samples
from chiasm.fusion.late import LateFusionModel
from chiasm.language.next_token import IGNORE
from chiasm.objectives import PAIR_OBJECTIVES
from chiasm.objectives.late import answer_loss, pair_losses
from chiasm.training.batches import seed_of
from chiasm.training.reporter import Reporter
from chiasm.training.schema import Captions, Stage
from chiasm.training.stage_model import StageModel, caption_filler

KEPT_TEXTS = 200_000
TEXT_BATCH = 64
HEAD_SALT = 77


class TwoTowers(StageModel):
    """What stages of late fusion share: a frozen text tower reads every text once, before the first step."""

    def __init__(self, model: LateFusionModel, processor: CaptionProcessor) -> None:
        super().__init__(model, processor)
        self.known: dict[int, int] = {}
        self.vectors = torch.empty(0)

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = collate_captions(items, self.processor)
        return replace(batch, inputs=batch.inputs | {"text_ids": text_ids(items)})

    def filler(self) -> Batch:
        batch = caption_filler(self.model)
        nobody = torch.zeros(0, dtype=torch.long)
        return replace(batch, inputs=batch.inputs | {"text_ids": nobody} | ({"labels": nobody} if self.answers else {}))

    def pooled_texts(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The text tower's vectors of a batch, where all of them are known."""
        rows = [self.known.get(text) for text in inputs["text_ids"].tolist()]
        return (
            None
            if None in rows or not self.known
            else self.vectors[torch.tensor(rows, dtype=torch.long)].to(self.model.device)
        )

    @torch.no_grad()
    def prepare(self, samples: Samples, indices: Sequence[int], reporter: Reporter) -> None:
        """Vectors of all texts, similar lengths together: a function of the data alone, as a resumed run needs."""
        if any(parameter.requires_grad for parameter in self.model.language.parameters()):
            return
        texts = self._texts(samples, indices)
        order = sorted(texts, key=lambda text: (len(texts[text]), text))
        vectors = []
        with reporter.task("reading texts", len(order)) as task:
            for start in range(0, len(order), TEXT_BATCH):
                padded = self.processor.pad([texts[text] for text in order[start : start + TEXT_BATCH]])
                inputs = {name: tensor.to(self.model.device) for name, tensor in padded.items()}
                vectors.append(self.model.pooled_texts(**inputs).cpu())
                task.advance(min(TEXT_BATCH, len(order) - start))
        if vectors:
            self.known, self.vectors = {text: row for row, text in enumerate(order)}, torch.cat(vectors)

    def _texts(self, samples: Samples, indices: Sequence[int]) -> dict[int, list[int]]:
        """Tokens of the distinct texts by their number; none where they are too many to keep."""
        texts: dict[int, list[int]] = {}
        for index in indices:
            try:
                tokens = self.encode(samples[index])["input_ids"]
            except SampleError:
                continue
            texts.setdefault(text_id(tokens), tokens)
            if len(texts) > KEPT_TEXTS:
                return {}
        return texts


class PairModel(TwoTowers):
    """Two towers, which learn from captions by `contrastive` or `sigmoid`."""

    def __init__(self, model: LateFusionModel, processor: CaptionProcessor, stage: Stage) -> None:
        super().__init__(model, processor)
        self.objectives, self.chunk = stage.objectives, stage.chunk

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        return encode_caption(sample, self.processor)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        known = self.pooled_texts(inputs)
        return pair_losses(self.model, inputs, self.objectives, num_samples, self.chunk, known)


class LateAnswerModel(TwoTowers):
    """Two towers and a head, which learns a question's answer by `answers`."""

    answers = True

    def __init__(self, model: LateFusionModel, processor: CaptionProcessor) -> None:
        super().__init__(model, processor)
        self.labels = {answer: label for label, answer in enumerate((model.config.answer_head or {})["answers"])}

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        if len(sample.images) != 1:
            reason = f"{pictures(len(sample.images))}, an answer of two towers needs one"
            raise SampleError(sample.id, [Problem("placeholders", reason)])
        label = self.labels.get(sample.answer.strip(), IGNORE)
        return {"input_ids": self.processor.encode(sample.question), "labels": [label]}

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = super().collate(items)
        labels = torch.tensor([item.tokens["labels"][0] for item in items])
        known = int((labels != IGNORE).sum())
        return replace(batch, inputs=batch.inputs | {"labels": labels}, supervised=known)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        return {"answers": answer_loss(self.model, inputs, num_tokens, self.pooled_texts(inputs))}


def late_stage_model(model: LateFusionModel, processor: CaptionProcessor, stage: Stage) -> StageModel:
    """What a stage trains of a late-fusion model.

    Raises:
        ValueError: the stage's settings are of another fusion.
    """
    foreign = [name for name in stage.objectives if name not in (*PAIR_OBJECTIVES, "answers")]
    if foreign:
        raise ValueError(
            f"stage {stage.name!r}: objective {foreign[0]!r} is not for fusion 'late', which learns by "
            f"{', '.join(PAIR_OBJECTIVES)} or answers"
        )
    if stage.captions != Captions.model_validate({}):
        raise ValueError(f"stage {stage.name!r}: captions are settings of a Q-Former; remove them for fusion 'late'")
    if stage.init == "closed_form":
        raise ValueError(f"stage {stage.name!r}: init: closed_form is for visual tokens, not for fusion 'late'")
    if stage.objectives == ["answers"]:
        return LateAnswerModel(model, processor)
    if "sigmoid" in stage.objectives and model.connector.logit_bias is None:
        raise ValueError(
            f"stage {stage.name!r}: objective 'sigmoid' needs scores with a bias; connect with preset siglip, or with "
            'connector {"name": "linear", "logit_scale": 2.302585, "logit_bias": -10}'
        )
    return PairModel(model, processor, stage)


def give_answer_head(model: LateFusionModel, stage: Stage, samples: Samples, usable: Sequence[int]) -> None:
    """Adds the head that a stage trains, over the data's most frequent answers, where there is none."""
    if model.config.answer_head is not None:
        return
    counts = Counter(samples[index].answer.strip() for index in usable)
    answers = [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    settings = stage.answer_head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(stage.seed, HEAD_SALT))
        model.add_answer_head(answers[: settings.most], combine=settings.combine, hidden=settings.hidden)
