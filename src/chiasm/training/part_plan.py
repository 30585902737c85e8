"""What a stage does with one part of a model, or with the parameters of a pattern."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

PARTS = ("vision", "connector", "language", "cross_attention", "answer_head")
OTHER_PARTS = "*"

ADAPTERS = ("lora", "dora", "rslora", "qlora")
"""Values of `tune` that leave the weights as they are and train low-rank updates beside them."""

LORA_KEYS = ("rank", "alpha", "dropout", "targets")


class Strict(BaseModel):
    """Unknown keys are errors, numbers are finite and no truth values, and nothing changes after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: Any) -> Any:
        """Python takes true for 1, so that `lr: true` would be a learning rate of 1."""
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"{str(value).lower()} is no number")
        return value


def _is_number(kind: Any) -> bool:
    """Whether a field takes numbers, perhaps beside other things, and no truth values."""
    kinds = {getattr(one, "__origin__", one) for one in (kind, *get_args(kind))}
    return bool(kinds & {int, float}) and bool not in kinds


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
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="LoRA: linear layers by name"
    )

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

    @model_validator(mode="after")
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
