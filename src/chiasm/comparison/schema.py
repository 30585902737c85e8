"""What a plan of a comparison says: what is connected in how many ways, on which data, under which one budget."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from pydantic import model_validator as validates_model

from chiasm.comparison.strategies import STRATEGIES
from chiasm.connectors import as_mapping, connector_settings
from chiasm.fusion.config import FUSIONS
from chiasm.positions.sequence import POSITIONS as UNIFIED_POSITIONS
from chiasm.training.schema import PartPlan, Strict

Source = str | dict[str, Any]
"""Data as `chiasm.data.readers.read` understands it; a mapping has `path` and options of `read`."""


def check_connector(connector: str | dict[str, Any]) -> dict[str, Any]:
    """Settings of a connector without its label; late fusion's `none` has none."""
    given = as_mapping(connector)
    given.pop("label", None)
    return given if given.get("name") == "none" else connector_settings(given)


def _is_known(connector: str | dict[str, Any]) -> str | dict[str, Any]:
    check_connector(connector)
    return connector


Connector = Annotated[str | dict[str, Any], AfterValidator(_is_known)]

PLACES = ("auto", "none", "grid", "regions")
"""How a visual token's place is told outside of unified fusion: coordinates in the features, names of regions."""


class Base(Strict):
    """What every cell has in common."""

    vision: str = Field("efficientnet-lite0", description="vision encoder: alias, folder or hub id")
    language: str = Field("smollm2-135m-instruct", description="language model: alias, folder or hub id")
    text: str = Field("minilm-l6", description="text encoder of late fusion")
    decoder: dict[str, Any] | None = Field(
        None, description="unified fusion: sizes of a decoder that starts from nothing, in place of `language`"
    )
    features: dict[str, Any] | None = Field(None, description="feature maps to read, as in `chiasm.connect`")
    image_size: PositiveInt | None = Field(None, description="pixels, where not the encoder's own")
    image_input: dict[str, Any] | str | None = Field(None, description="unified fusion: `patches` with its options")
    chat_template: str | None = Field(None, description="`lean` (question, line break, answer) or a Jinja template")
    regions: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="regions whose names stand in front of their tokens, where a cell can have that"
    )
    cross_attention: dict[str, Any] | None = Field(None, description="intermediate fusion's blocks")
    language_layers: PositiveInt | None = Field(
        None, description="only so many first layers of the language model, as `--quick` does; it then knows nothing"
    )


class Data(Strict):
    """The same for every cell."""

    train: Source = Field(description="questions and answers to learn from")
    captions: Source | None = Field(None, description="captions for the first stage; without them there is none")
    validation: Source | None = Field(None, description="for the learning curves; else 5 % of `train`")
    test: Source = Field(description="what every cell is asked")
    test_captions: Source | None = Field(None, description="captions by which `evaluation.retrieval` finds pictures")


class Axes(Strict):
    """Every combination of these is a cell."""

    connector: list[Connector] = Field(default=["mlp"], description="names or settings of connectors")
    fusion: list[str] = Field(default_factory=lambda: ["early"], description="early, intermediate, late, unified")
    tokens: list[PositiveInt | None] = Field(
        default=[None], description="visual tokens of a picture; null leaves it to the connector"
    )
    tune: list[str] = Field(default_factory=lambda: ["lora"], description="names of freeze strategies")
    positions: list[str] = Field(default_factory=lambda: ["auto"], description="how the place of a token is told")


class CellSpec(Strict):
    """One combination, written out. With questions of its own to learn from, its connector wants a label of its own."""

    connector: Connector = Field("mlp", description="name or settings of a connector")
    fusion: str = Field("early", description="early, intermediate, late or unified")
    tokens: PositiveInt | None = Field(None, description="visual tokens of a picture; null leaves it to the connector")
    tune: str = Field("lora", description="name of a freeze strategy")
    positions: str = Field("auto", description="how the place of a token is told")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="unified fusion: `random` has the language model's sizes and words alone"
    )
    train: Source | None = Field(None, description="questions to learn from, in place of `data.train`")


class Budget(Strict):
    """What every cell may spend on questions: one of these, the same for all."""

    samples: PositiveInt | None = Field(None, description="samples")
    tokens: PositiveInt | None = Field(None, description="places in the language model's sequence")
    flops: PositiveFloat | None = Field(None, description="floating-point operations, counted in a few steps")
    minutes: PositiveFloat | None = Field(None, description="minutes of training steps, by a measured pace")

    @validates_model(mode="after")
    def _is_one(self) -> "Budget":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"expected exactly one of samples, tokens, flops and minutes, found {found}")
        return self

    @property
    def kind(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.kind))


class Training(Strict):
    """How every cell is trained."""

    batch_size: PositiveInt = Field(4, description="samples that go through the model at once")
    caption_samples: PositiveInt = Field(40, description="samples of the first stage, beside the budget")
    lr: PositiveFloat = Field(1e-3, description="of connectors that start at random, and of new layers")
    solved_lr: PositiveFloat = Field(1e-4, description="of connectors that start in closed form")
    init: Literal["auto", "keep"] = Field("auto", description="`auto` starts connectors in closed form")
    gates: Literal["open", "keep"] = Field("open", description="intermediate fusion: `keep` starts with closed gates")
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="share of the steps in which `lr` rises")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the computation")
    validations: PositiveInt = Field(6, description="points of the learning curve")
    validation_samples: NonNegativeInt = Field(64, description="held-out samples that a point is measured on")
    forgetting: bool | None = Field(None, description="`false` leaves out what texts lose by training")


class Evaluation(Strict):
    """How every cell is asked."""

    limit: PositiveInt | None = Field(None, description="at most so many samples")
    batch_size: PositiveInt = Field(50, description="questions that are asked at once")
    max_new_tokens: PositiveInt | None = Field(
        None, description="tokens of an answer; by default what the longest expected one takes, from 8 to 128"
    )
    metric: str | None = Field(None, description="of all skills; by default each has the one that fits its answers")
    control: bool = Field(True, description="ask again with another sample's picture")
    shots: NonNegativeInt = Field(
        0, description="ask again behind so many solved examples: the skill `few-shot`, where the model has a prompt"
    )
    repeats: NonNegativeInt = Field(
        5, description="times that latencies are measured after a first one; the median counts, with 0 the first one"
    )
    pictures: PositiveInt = Field(96, description="pictures of the diagnostics without a language model")
    retrieval: Annotated[int, Field(ge=2)] | None = Field(
        None, description="so many captions of `data.test_captions` are held against so many pictures"
    )


class Claim(Strict):
    """What somebody says of two ways of connecting, to be held against the cells' numbers; of gates, of one way."""

    text: str = Field(description="the claim in words")
    better: str = Field(description="the way (a cell's name without its seed) that is said to be better")
    than: str | None = Field(None, description="the way that it is compared with")
    measure: Literal[
        "accuracy", "kv_cache_bytes_per_image", "perplexity_change", "gates", "retrieval", "seconds_per_query"
    ] = Field(
        "accuracy",
        description="what decides; of cache, perplexity and seconds less is better; `gates`: closed first, opened by "
        "training; `retrieval`: recall@1 of a caption's picture",
    )
    skills: list[str] = Field(default_factory=list, description="of accuracy: which skills count; by default all")

    @validates_model(mode="after")
    def _compares(self) -> "Claim":
        if (self.than is None) != (self.measure == "gates"):
            told = f"is missing; {self.measure} compares" if self.than is None else "is one too many; gates are told of"
            raise ValueError(f"than {told} {'two ways' if self.than is None else 'one way alone'}")
        return self

    @property
    def ways(self) -> list[str]:
        return [self.better] if self.than is None else [self.better, self.than]


class Plan(Strict):
    """What `chiasm compare` runs."""

    title: str = Field("Connections compared", description="of the report")
    base: Base = Field(default_factory=lambda: Base.model_validate({}), description="what all cells have in common")
    data: Data = Field(description="what all cells learn from and are asked")
    budget: Budget = Field(description="what every cell may spend on questions")
    grid: Axes | None = Field(None, description="axes of which every combination is a cell")
    cells: list[CellSpec] = Field(default_factory=list, description="more cells; one that is impossible is an error")
    seeds: list[int] = Field(
        default_factory=lambda: [0], min_length=1, description="every cell is trained once for each"
    )
    strategies: dict[str, dict[str, PartPlan]] = Field(
        default_factory=dict, description="freeze strategies beside the built-in ones: part -> what happens to it"
    )
    training: Training = Field(
        default_factory=lambda: Training.model_validate({}), description="how every cell is trained"
    )
    evaluation: Evaluation = Field(
        default_factory=lambda: Evaluation.model_validate({}), description="how every cell is asked"
    )
    claims: list[Claim] = Field(default_factory=list, description="what the report judges by the numbers")
    keep_models: bool = Field(False, description="leave every cell's trained model in its folder")

    def strategy(self, name: str) -> dict[str, Any]:
        """What happens to the parts that were there before, by a strategy of the plan's own or a built-in one."""
        own = self.strategies.get(name)
        if own is None:
            return STRATEGIES[name]
        return {part: how.model_dump(mode="json", exclude_unset=True) for part, how in own.items()}

    @field_validator("strategies", mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        """A bare word stands for `tune`."""
        if not isinstance(raw, dict):
            return raw
        return {
            name: {part: {"tune": plan} if isinstance(plan, str) else plan for part, plan in parts.items()}
            if isinstance(parts, dict)
            else parts
            for name, parts in raw.items()
        }

    @validates_model(mode="after")
    def _names_what_is_known(self) -> "Plan":
        if self.grid is None and not self.cells:
            raise ValueError("nothing to compare: give a grid, cells, or both")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice")
        asked: list[Any] = [*self.cells]
        grid = self.grid or Axes(connector=[], fusion=[], tokens=[], tune=[], positions=[])
        known = (*FUSIONS, "late")
        _all_known("fusion", [*grid.fusion, *(cell.fusion for cell in asked)], known)
        _all_known("tune", [*grid.tune, *(cell.tune for cell in asked)], (*STRATEGIES, *self.strategies))
        positions = [*grid.positions, *(cell.positions for cell in asked)]
        _all_known("positions", positions, (*PLACES, *UNIFIED_POSITIONS))
        return self

    @validates_model(mode="after")
    def _finds_by_captions(self) -> "Plan":
        if self.evaluation.retrieval is None:
            if self.data.test_captions is not None:
                raise ValueError("data.test_captions is read for evaluation.retrieval only, which is not given")
            return self
        missing = [name for name in ("captions", "test_captions") if getattr(self.data, name) is None]
        if missing:
            raise ValueError(
                "evaluation.retrieval needs captions to learn from (data.captions) and others to find pictures by "
                f"(data.test_captions); add data.{missing[0]}"
            )
        return self


def _all_known(axis: str, values: list[str], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{axis} {value!r} is unknown; choose of {', '.join(known)}")
