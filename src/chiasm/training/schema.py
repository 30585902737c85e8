"""A recipe: a list of stages, each of which says for every part what is frozen, tuned in full, or given LoRA.

Every key of `Settings` may stand at the recipe's top, for all stages, and again inside a stage, for that one.
Files and command-line overrides are read by `chiasm.training.recipe`.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
)
from pydantic import model_validator as validates_model

from chiasm.objectives import CAPTION_OBJECTIVES, OBJECTIVES, PAIR_OBJECTIVES, PICTURE_OBJECTIVES

PARTS = ("vision", "connector", "language", "cross_attention", "answer_head")
OTHER_PARTS = "*"
LENGTHS = ("epochs", "steps", "samples")
EXACT_LENGTHS = ("steps", "samples")
"""Lengths beside which `min_steps` says nothing."""
RESERVED_NAMES = ("checkpoints", "model")
WITHOUT_EFFECT = ("validation", "checkpoint_every", "keep_checkpoints", "parallel", "gradient_checkpointing")
"""Settings that may differ between a run and its continuation: no weight depends on them."""

ADAPTERS = ("lora", "dora", "rslora", "qlora")
"""Values of `tune` that leave the weights as they are and train low-rank updates beside them."""

LORA_KEYS = ("rank", "alpha", "dropout", "targets")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Strict(BaseModel):
    """Unknown keys are errors, and values do not change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PartPlan(Strict):
    """What a stage does with one part or pattern. The bare word of `tune` will do where nothing else is said."""

    tune: Literal["frozen", "full", "lora", "dora", "rslora", "qlora"] = Field(
        description="`frozen`; `full`: the weights themselves; `lora` (arXiv 2106.09685), `dora` (2402.09353), "
        "`rslora` (2312.03732): a low-rank update beside them; `qlora` (2305.14314): LoRA beside weights in 4 bits"
    )
    lr: PositiveFloat | None = Field(None, description="peak learning rate; by default the stage's `lr`")
    from_layer: NonNegativeInt | None = Field(
        None, description="of a part: only layers from this one on, counted from 0, and what stands behind them"
    )
    only: Literal["norms"] | None = Field(None, description="with `tune: full`: `norms` trains normalisations alone")
    rank: PositiveInt = Field(16, description="LoRA: width of the bottleneck")
    alpha: PositiveFloat = Field(
        32.0, description="LoRA: the update is scaled by alpha / rank (rslora: by alpha / √rank)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1, description="LoRA: dropout before the bottleneck")] = 0.0
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="LoRA: linear layers by name")

    @property
    def adapts(self) -> bool:
        """Whether low-rank updates are trained instead of the weights themselves."""
        return self.tune in ADAPTERS

    @property
    def words(self) -> str:
        """The plan in words, without its learning rate."""
        rank = f", rank {self.rank}" if self.adapts else ""
        layer = f", from layer {self.from_layer}" if self.from_layer is not None else ""
        return f"{self.tune}{rank}{layer}{f', only {self.only}' if self.only else ''}"

    @validates_model(mode="after")
    def _keys_belong_together(self) -> "PartPlan":
        foreign = [key for key in LORA_KEYS if key in self.model_fields_set and not self.adapts]
        if foreign:
            raise ValueError(f"tune: {self.tune} takes no {foreign[0]!r}; only {', '.join(ADAPTERS)} do")
        if self.tune == "frozen" and self.lr is not None:
            raise ValueError(f"a frozen part takes no lr (found {self.lr}); write tune: full or tune: lora")
        if self.tune == "frozen" and self.from_layer is not None:
            raise ValueError(
                "a frozen part takes no from_layer; write tune: full or tune: lora for the layers from it on"
            )
        if self.only is not None and self.tune != "full":
            raise ValueError(f"only: {self.only} belongs to tune: full, not to tune: {self.tune}")
        if self.tune != "frozen" and self.lr is None:
            raise ValueError(f"tune: {self.tune} needs an lr, here or at the stage")
        return self


class Validation(Strict):
    """When held-out samples are looked at, and how many. At the run's start and each stage's end they always are."""

    every: PositiveInt | None = Field(None, description="steps between validations within a stage")
    samples: NonNegativeInt = Field(64, description="held-out samples, at most; 0 turns validation off")
    answers: NonNegativeInt = Field(4, description="answers that are generated and logged")


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


class Forgetting(Strict):
    """What is measured before the first and after every stage, to see what training costs."""

    text: bool = Field(True, description="perplexity of short English and Korean texts, without a picture")
    pictures: NonNegativeInt = Field(32, description="held-out pictures whose features are compared; 0 compares none")

    @property
    def measures(self) -> bool:
        return self.text or self.pictures > 0


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
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's")
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
    objectives: Annotated[list[str], Field(min_length=1, description="what is learned; their losses are summed")] = [
        "next_token"
    ]
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
    max_length: PositiveInt | None = Field(None, description="tokens of a sample; by default the model's context")
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

    @validates_model(mode="after")
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

    @validates_model(mode="after")
    def _packs_answers(self) -> "Settings":
        if self.pack and self.objectives != ["next_token"]:
            raise ValueError(f"pack: true is for the objective next_token, not for {self.objectives[0]}; remove it")
        return self

    @validates_model(mode="after")
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


class Stage(Settings):
    """One training phase."""

    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="of the stage, and of its folder in the run")
    ]
    parts: dict[str, PartPlan] = Field(
        description="what happens to every part: vision, connector, language, cross_attention, or `*` for all others"
    )
    patterns: dict[str, PartPlan] = Field(
        default_factory=dict,
        description="parameters by name, which win over their part: a glob such as `language.*.self_attn.*`, or the "
        "path of a module or parameter",
    )
    init: Literal["keep", "closed_form", "auto"] = Field(
        "keep",
        description="what the connector starts from; `auto` is `closed_form` where a new connector can, else `keep`",
    )
    gates: Literal["keep", "open"] = Field(
        "keep", description="`open`: gates that are still closed start open, behind layers that start at 0"
    )

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"{name!r} is a folder of every run; choose another name")
        return name

    @validates_model(mode="before")
    @classmethod
    def _complete_parts(cls, raw: Any) -> Any:
        """A bare word stands for `tune`, and tuned parts without a learning rate take the stage's."""
        if not isinstance(raw, dict):
            return raw
        plans = {key: raw[key] for key in ("parts", "patterns") if isinstance(raw.get(key), dict)}
        return raw | {
            key: {name: _complete(plan, raw.get("lr")) for name, plan in named.items()} for key, named in plans.items()
        }

    @validates_model(mode="after")
    def _names_known_parts(self) -> "Stage":
        for part in self.parts:
            if part not in (*PARTS, OTHER_PARTS):
                raise ValueError(
                    f"{part!r} is no part; parts are {', '.join(PARTS)}, and {OTHER_PARTS!r} for all others; "
                    "parameters by name belong under patterns"
                )
        for pattern, plan in self.patterns.items():
            if plan.from_layer is not None:
                raise ValueError(f"pattern {pattern!r}: from_layer is for parts; name the layers in the pattern")
        return self


class Recipe(Settings):
    """What `chiasm train` runs."""

    forgetting: Forgetting = Field(
        default_factory=lambda: Forgetting.model_validate({}), description="what is measured to see what training costs"
    )
    logs: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="where numbers go beside `log.jsonl`"
    )
    stages: Annotated[list[Stage], Field(min_length=1, description="what is run, one after the other")]
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @validates_model(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        """Stages take the settings at the recipe's top that they do not state themselves."""
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list):
            return raw
        shared = {key: value for key, value in raw.items() if key in Settings.model_fields}
        return {**raw, "stages": [_inherited(shared, stage) for stage in raw["stages"]]}

    @validates_model(mode="after")
    def _has_unique_names(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two stages are named {twice!r}; names are folders of the run")
        return self


def _complete(plan: Any, lr: Any) -> Any:
    plan = {"tune": plan} if isinstance(plan, str) else plan
    tuned = isinstance(plan, dict) and plan.get("tune") in ("full", *ADAPTERS)
    return {"lr": lr, **plan} if tuned and lr is not None else plan


def _inherited(shared: dict[str, Any], stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    dropped: set[str] = set(LENGTHS) if any(key in stage for key in LENGTHS) else set()
    if any(stage.get(key) is not None for key in EXACT_LENGTHS):
        dropped.add("min_steps")
    inherited = {key: value for key, value in shared.items() if key not in dropped}
    if isinstance(stage.get("validation"), dict) and isinstance(shared.get("validation"), dict):
        inherited["validation"] = shared["validation"]
        stage = {**stage, "validation": {**shared["validation"], **stage["validation"]}}
    return {**inherited, **stage}
