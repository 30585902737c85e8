"""A recipe: a list of stages, each of which says for every part what is frozen, tuned in full, or given LoRA.

Every key of `Settings` may stand at the recipe's top, for all stages that read it, and again inside a stage, for that
one. Files and command-line overrides are read by `chiasm.training.recipe`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PrivateAttr, field_validator, model_validator

from chiasm.training.part_plan import ADAPTERS, LORA_KEYS, OTHER_PARTS, PARTS, PartPlan, Strict
from chiasm.training.settings import (
    EXACT_LENGTHS,
    LENGTHS,
    READ_BY,
    AnswerHeadSettings,
    Captions,
    Settings,
    Validation,
)

__all__ = [
    "ADAPTERS",
    "EXACT_LENGTHS",
    "LENGTHS",
    "LORA_KEYS",
    "NESTED",
    "OTHER_PARTS",
    "PARTS",
    "WITHOUT_EFFECT",
    "AnswerHeadSettings",
    "Captions",
    "Forgetting",
    "PartPlan",
    "Recipe",
    "Settings",
    "Stage",
    "Validation",
]

RESERVED_NAMES = (
    "checkpoints",
    "evaluation",
    "log.jsonl",
    "model",
    "recipe.yaml",
    "report.html",
    "tensorboard",
    "wandb",
)
"""What a run's folder holds beside its stages."""
WITHOUT_EFFECT = (
    "validation",
    "checkpoint_every",
    "keep_checkpoints",
    "parallel",
    "gradient_checkpointing",
    "skip_bad",
)
"""Settings that may differ between a run and its continuation: no weight depends on them. A run that ends without
`skip_bad` has met no sample that it leaves out."""
AFTER_A_FAULT = ("lr", "clip", "schedule", "warmup")
"""Settings of a stage that may change within it, with a warning: what may help against a loss that is not finite."""


class Forgetting(Strict):
    """What is measured before the first and after every stage, to see what training costs."""

    text: bool = Field(True, description="perplexity of short English and Korean texts, without a picture")
    pictures: NonNegativeInt = Field(32, description="held-out pictures whose features are compared; 0 compares none")

    @property
    def measures(self) -> bool:
        return self.text or self.pictures > 0


NESTED: dict[str, type[BaseModel]] = {
    "answer_head": AnswerHeadSettings,
    "captions": Captions,
    "forgetting": Forgetting,
    "validation": Validation,
}
"""Keys that hold keys of their own, of which a stage may state some."""


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
        description="what the connector starts from: `closed_form`, the ridge regression from patches to captions, or "
        "as near to it as a connector comes; `auto` is that where a new connector can, else `keep`",
    )
    gates: Literal["keep", "open"] = Field(
        "keep", description="`open`: gates that are still closed start open, behind layers that start at 0"
    )

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name.lower() in RESERVED_NAMES:
            raise ValueError(f"{name!r} is the name of something else in a run's folder; choose another name")
        return name

    @model_validator(mode="before")
    @classmethod
    def _complete_parts(cls, raw: Any) -> Any:
        """A bare word stands for `tune`, and tuned parts without a learning rate take the stage's."""
        if not isinstance(raw, dict):
            return raw
        plans = {key: raw[key] for key in ("parts", "patterns") if isinstance(raw.get(key), dict)}
        return raw | {
            key: {name: _complete(plan, raw.get("lr")) for name, plan in named.items()} for key, named in plans.items()
        }

    @model_validator(mode="after")
    def _says_what_is_read(self) -> "Stage":
        _refuse_unread(self, [self])
        return self

    @model_validator(mode="after")
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

    @property
    def skips_bad(self) -> bool:
        """Whether any stage leaves unusable samples out."""
        return any(stage.skip_bad for stage in self.stages)

    @property
    def validates(self) -> bool:
        """Whether any stage looks at held-out samples."""
        return any(stage.validation.samples > 0 for stage in self.stages)

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        """Stages take the settings at the recipe's top that they do not state themselves."""
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list):
            return raw
        shared = {key: value for key, value in raw.items() if key in Settings.model_fields}
        return {**raw, "stages": [_inherited(shared, stage) for stage in raw["stages"]]}

    @model_validator(mode="after")
    def _has_unique_names(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            other = next((other for other in names[:index] if other.lower() == name.lower()), None)
            if other is not None:
                differ = "" if other == name else f" and {name!r}, which some disks do not tell apart"
                raise ValueError(f"two stages are named {other!r}{differ}; names are folders of the run")
        return self

    @model_validator(mode="after")
    def _says_what_is_read(self) -> "Recipe":
        _refuse_unread(self, self.stages)
        return self


def _refuse_unread(settings: Settings, stages: Sequence[Settings]) -> None:
    """Refuses settings that none of the stages reads."""
    names: dict[str, list[str]] = {
        "objectives": list(dict.fromkeys(name for stage in stages for name in stage.objectives)),
        "optimizer": list(dict.fromkeys(str(stage.optimizer) for stage in stages)),
    }
    for chooser, key in unread_by(names):
        if getattr(settings, key) != _default(key):
            readers = " or ".join(READ_BY[chooser][key])
            noun = chooser.removesuffix("s")
            raise ValueError(f"{key} is for the {noun} {readers}, not for {', '.join(names[chooser])}; remove it")


def unread_by(names: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Settings that stages with these `objectives` and `optimizer`s do not read, each behind what decides it."""
    return [
        (chooser, key)
        for chooser, table in READ_BY.items()
        for key, readers in table.items()
        if not set(readers) & set(map(str, names[chooser]))
    ]


def _default(key: str) -> Any:
    return Settings.model_fields[key].get_default(call_default_factory=True)


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
    names = {key: stage.get(key, shared.get(key, _default(key))) for key in READ_BY}
    if isinstance(names["objectives"], list):
        dropped.update(key for _, key in unread_by(names | {"optimizer": [names["optimizer"]]}))
    inherited = {key: value for key, value in shared.items() if key not in dropped}
    joined = {
        key: {**inherited[key], **stage[key]} for key in NESTED if _are_mappings(inherited.get(key), stage.get(key))
    }
    return {**inherited, **stage, **joined}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)
