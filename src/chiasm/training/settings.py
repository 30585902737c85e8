"""How a stage is run: the keys that may stand at a recipe's top, for all stages, and again inside a stage."""

import math
import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from chiasm.objectives import CAPTION_OBJECTIVES, OBJECTIVES, PAIR_OBJECTIVES, PICTURE_OBJECTIVES
from chiasm.training.part_plan import Strict

LENGTHS = ("epochs", "steps", "samples")
EXACT_LENGTHS = ("steps", "samples")
"""Lengths beside which `min_steps` says nothing."""

READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "objectives": {
        "answer_head": ("answers",),
        "captions": CAPTION_OBJECTIVES,
        "chunk": PAIR_OBJECTIVES,
        "max_length": ("next_token",),
        "pack": ("next_token",),
    },
    "optimizer": {"betas": ("adamw",)},
}
"""Settings that only stages with such an objective, or such an optimizer, read."""

Beta = Annotated[float, Field(ge=0, lt=1)]
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Validation(Strict):
    """When held-out samples are looked at, and how many. At the run's start and each stage's end they always are."""

    every: PositiveInt | None = Field(None, description="steps between validations within a stage")
    samples: NonNegativeInt = Field(64, description="held-out samples, at most; 0 turns validation off")
    answers: NonNegativeInt = Field(4, description="answers that are generated and logged")
    drawings: NonNegativeInt = Field(
        0, description="held-out pictures that a model which draws is asked for, and scored by"
    )


class Captions(Strict):
    """How objectives other than `next_token` read the assistant's words."""

    length: Annotated[int, Field(ge=3, description="tokens of a caption; a longer one loses its end")] = 32
    init_from: str | None = Field(None, description="a BERT-shaped encoder that lends its tokenizer and words")
    space: PositiveInt = Field(256, description="width of the space where pictures and captions are compared")


class AnswerHeadSettings(Strict):
    """The head that `answers` gives a late-fusion model which has none yet."""

    combine: Literal["concat", "product", "mlp"] = Field("mlp", description="how the two towers' vectors meet")
    hidden: PositiveInt = Field(512, description="width in which product and mlp meet")
    most: PositiveInt = Field(3000, description="answers that it knows: the data's most frequent ones")


class Settings(Strict):
    """How a stage is run."""

    lr: PositiveFloat | None = Field(None, description="learning rate of tuned parts that name none")
    epochs: PositiveFloat | None = Field(None, description="length of a stage, 1 if nothing is said; or")
    steps: PositiveInt | None = Field(None, description="length in optimizer steps; or")
    samples: PositiveInt | None = Field(None, description="length in samples")
    min_steps: PositiveInt | None = Field(None, description="of `epochs` at least so many, however small the data")
    batch_size: PositiveInt = Field(16, description="samples that go through the model at once")
    accumulate: PositiveInt = Field(1, description="batches for one optimizer step")
    warmup: Annotated[float, Field(ge=0, le=1, description="share of the steps in which the rate rises")] = 0.03
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the rate after the warm-up")
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's, on matrices only")] = 0.0
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or plain gradient descent")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's")
    clip: PositiveFloat | None = Field(1.0, description="largest norm of the gradient; null does not clip")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the arithmetic; weights learn in float32"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="under torchrun: a whole copy in every process (ddp, auto), or one sharded over all (fsdp)"
    )
    compile: bool = Field(False, description="compile the decoder's layers: 10 % faster on long runs")
    cache_features: Literal["auto"] | bool = Field("auto", description="keep a frozen encoder's features on disk")
    validation: Validation = Field(
        default_factory=lambda: Validation.model_validate({}), description="when held-out samples are looked at"
    )
    checkpoint_every: PositiveInt | str = Field("5m", description="steps, or a time such as 90s, 5m, 1h")
    keep_checkpoints: PositiveInt = Field(2, description="how many of the newest stay")
    seed: int = Field(0, description="of the order, dropout and new LoRA weights")
    skip_bad: bool = Field(False, description="leave unusable samples out and count them, instead of stopping")
    objectives: list[str] = Field(["next_token"], min_length=1, description="what is learned; their losses are summed")
    captions: Captions = Field(
        default_factory=lambda: Captions.model_validate({}),
        description="how objectives other than `next_token` read the assistant's words",
    )
    answer_head: AnswerHeadSettings = Field(
        default_factory=lambda: AnswerHeadSettings.model_validate({}),
        description="late fusion: the head that `answers` trains",
    )
    chunk: PositiveInt | None = Field(
        None, description="late fusion: pairs in the towers at once; larger batches are computed twice (GradCache)"
    )
    max_length: PositiveInt | None = Field(
        None,
        description="tokens of a sample, by default the model's context; a longer answer loses its end and is counted",
    )
    data: Literal["all", "captions", "questions"] = Field(
        "all", description="which samples: `captions` describe their pictures in sentences, `questions` are all others"
    )
    pack: bool = Field(False, description="several samples in one sequence, none of which sees another")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    group_by_length: bool = Field(True, description="batches of samples of similar length, to pad less")

    @field_validator("objectives")
    @classmethod
    def _go_together(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in OBJECTIVES]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no objective; choose of {', '.join(OBJECTIVES)}")
        if len(set(names)) < len(names):
            raise ValueError("an objective stands here twice")
        if "answers" in names and len(names) > 1:
            raise ValueError("answers trains a head, the others the space of pictures and captions: make two stages")
        if "reconstruction" in names and len(names) > 1:
            raise ValueError("reconstruction trains an image tokenizer alone: make two stages")
        if "contrastive" in names and "sigmoid" in names:
            raise ValueError("contrastive and sigmoid are two ways to the same end; choose one")
        if "next_token" in names and len(names) > 1:
            raise ValueError("next_token trains the language model's reading, the others do without: make two stages")
        return names

    @field_validator("checkpoint_every")
    @classmethod
    def _is_a_time(cls, value: int | str) -> int | str:
        if isinstance(value, str) and not re.fullmatch(r"[1-9]\d*[smh]", value):
            raise ValueError(f"{value!r} is neither a number of steps nor a time such as 90s, 5m or 1h")
        return value

    @model_validator(mode="after")
    def _has_one_length(self) -> "Settings":
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other; give one of them")
        if self.min_steps is not None and given and given[0] in EXACT_LENGTHS:
            raise ValueError(
                f"min_steps is for epochs, not for {given[0]}: min_steps ({self.min_steps}) would not be read beside "
                f"{given[0]} ({getattr(self, given[0])}); remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _has_company(self) -> "Settings":
        compared = [name for name in self.objectives if name in ("contrastive", "matching", "sigmoid")]
        if compared and self.batch_size < 2:
            raise ValueError(f"{compared[0]} compares the pairs of a batch; batch_size must be 2 or more")
        return self

    @property
    def reads_captions(self) -> bool:
        """Whether the assistant's words are captions of one picture each, instead of answers."""
        return self.objectives[0] in (*CAPTION_OBJECTIVES, *PAIR_OBJECTIVES)

    @property
    def reads_pictures(self) -> bool:
        """Whether samples are their pictures, and no words are read."""
        return self.objectives[0] in PICTURE_OBJECTIVES

    @property
    def shows_one_picture(self) -> bool:
        """Whether samples must have exactly one picture."""
        return self.reads_captions or self.objectives[0] == "answers"

    def takes(self, num_pictures: int) -> bool:
        """Whether a sample with so many pictures can be used."""
        return num_pictures == 1 if self.shows_one_picture else num_pictures > 0 or not self.reads_pictures

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps that the stage takes on so many samples."""
        if self.steps is not None:
            return self.steps
        if self.samples is not None:
            return math.ceil(self.samples / (self.batch_size * self.accumulate))
        return max(math.ceil((self.epochs or 1.0) * self.steps_per_epoch(num_samples)), self.min_steps or 1)

    def steps_per_epoch(self, num_samples: int) -> int:
        return math.ceil(math.ceil(num_samples / self.batch_size) / self.accumulate)

    def checkpoint_due(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is due after `step` steps, `seconds` after the last one."""
        if isinstance(self.checkpoint_every, int):
            return step % self.checkpoint_every == 0
        return seconds >= int(self.checkpoint_every[:-1]) * _SECONDS[self.checkpoint_every[-1]]
