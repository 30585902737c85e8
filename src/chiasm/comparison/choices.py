"""From a plan to its cells: every combination that is possible, and why the others are not."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from chiasm.comparison.schema import Base, CellSpec, Plan, Source, check_connector
from chiasm.comparison.strategies import STRATEGIES
from chiasm.connectors import CONNECTORS, Connector, connector_settings
from chiasm.positions.sequence import POSITIONS as UNIFIED_POSITIONS

Grid = tuple[int, int]

LATE = ("linear", "mlp", "none")
REGIONS = (2, 2)
"""What the positions `regions` name where `base.regions` says nothing."""
STAND_IN = 768
"""A width on both sides of a connector that is built for its grid of tokens alone."""


@dataclass(frozen=True)
class Choice:
    """One way of connecting, trained with one seed."""

    label: str
    connector: dict[str, Any] | None
    fusion: str
    tokens: int | None
    tune: str
    positions: str
    train: Source | None = None
    weights: str = "pretrained"
    seed: int = 0
    named: bool = True

    @property
    def way(self) -> str:
        """The name that runs of all seeds share."""
        words = [self.label, self.fusion]
        words += [self.weights] if self.weights != "pretrained" else []
        words += [f"{self.tokens}-tokens"] if self.tokens else []
        words += [self.tune] if self.tune != "lora" else []
        words += [self.positions.replace("+", "-")] if self.positions != "auto" else []
        return "-".join(words)

    @property
    def name(self) -> str:
        """The name of the cell, and of its folder."""
        return f"{self.way}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """For a result and its identity; what the language model starts from, and that regions have no names, stand
        there only where it is so, so that older cells stay finished."""
        fields = asdict(self)
        usual = {"weights": "pretrained", "named": True}
        return {name: value for name, value in fields.items() if name not in usual or value != usual[name]}

    def regions(self, base: Base) -> tuple[int, int] | None:
        """Rows and columns of regions whose names stand in front of their tokens, None where the cell has none."""
        places = self.fusion == "early" and self.connector is not None and keeps_places(self.connector["name"])
        if not places or not self.named or self.positions not in ("auto", "regions"):
            return None
        return base.regions or (REGIONS if self.positions == "regions" else None)


@dataclass(frozen=True)
class Skipped:
    """A combination that cannot be, and why."""

    way: str
    reason: str


def expand(plan: Plan, grid_of: Callable[[], Grid]) -> tuple[list[Choice], list[Skipped]]:
    """The cells of a plan in order, and the combinations of its grid that are impossible.

    Args:
        grid_of: rows and columns of the encoder's patches; asked only where a cell wants a number of tokens, or names
            of regions.

    Raises:
        ValueError: an explicit cell is impossible, or two connectors have one name.
    """
    found: dict[str, Choice] = {}
    skipped: dict[str, Skipped] = {}
    for choice, explicit in _all(plan):
        made = _resolved(choice, plan, grid_of)
        made = made if isinstance(made, str) else _named(made, plan, grid_of)
        if isinstance(made, str):
            if explicit:
                raise ValueError(f"cell {choice.way!r} is impossible: {made}")
            skipped.setdefault(choice.way, Skipped(choice.way, made))
            continue
        if found.setdefault(made.way, made) != made:
            raise ValueError(f"two cells are named {made.way!r}; give one of the connectors a label of its own")
    return [replace(choice, seed=seed) for choice in found.values() for seed in plan.seeds], list(skipped.values())


def _all(plan: Plan) -> list[tuple[Choice, bool]]:
    axes = plan.grid
    combinations = (
        itertools.product(axes.fusion, axes.connector, axes.tokens, axes.tune, axes.positions) if axes else ()
    )
    fields = ("fusion", "connector", "tokens", "tune", "positions")
    made = [
        (_choice(CellSpec.model_validate(dict(zip(fields, values, strict=True)))), False) for values in combinations
    ]
    return made + [(_choice(cell), True) for cell in plan.cells]


def _choice(cell: CellSpec) -> Choice:
    rest = (cell.fusion, cell.tokens, cell.tune, cell.positions, cell.train, cell.weights)
    if cell.fusion == "unified":
        return Choice("patches", None, *rest)
    connector = cell.connector
    label = connector.get("label", connector["name"]) if isinstance(connector, dict) else connector
    settings = check_connector(connector)
    if cell.fusion == "late":  # which has projections of its own, with options of their own
        settings = {"name": settings["name"]}
    return Choice(str(label), settings, *rest)


def _resolved(choice: Choice, plan: Plan, grid_of: Callable[[], Grid]) -> Choice | str:
    """The choice with its number of tokens written into the connector's settings, or why it cannot be."""
    name = choice.connector["name"] if choice.connector else None
    if choice.fusion == "unified":
        if choice.positions not in ("auto", *UNIFIED_POSITIONS):
            return f"positions {choice.positions!r} need an encoder's patches, and unified fusion has no encoder"
        if choice.weights == "random" and plan.base.decoder is not None:
            return "base.decoder has no weights to leave out: it starts from nothing anyway"
        if choice.weights == "random" and not _learns(choice.tune, "language", plan):
            return f"tune {choice.tune!r} leaves random weights of the language part as they are; take one that is full"
        return f"unified fusion reads every patch, not {choice.tokens} tokens" if choice.tokens else choice
    if choice.weights == "random":
        return "only unified fusion can start from random weights"
    if choice.positions in UNIFIED_POSITIONS:
        return f"positions {choice.positions!r} are for unified fusion"
    if choice.fusion == "late":
        if name not in LATE:
            return f"late fusion pools a picture into one vector, so it takes {', '.join(LATE)}, not {name}"
        if plan.budget.tokens is not None:
            return "late fusion has no sequence whose tokens a budget could count; take samples, flops or minutes"
        if choice.tokens or choice.positions != "auto":
            return "late fusion has one vector for a picture, without places or a number of tokens"
        return choice
    if name == "none":
        return "connector none is for late fusion"
    if choice.positions == "regions":
        if choice.fusion != "early":
            return "names of regions stand between visual tokens, which only early fusion has in its sequence"
        if not keeps_places(str(name)):
            return f"{name}'s tokens have no places that regions could name"
    if choice.tokens is None or choice.connector is None:
        return choice
    try:
        options = CONNECTORS[str(name)].options_for(choice.tokens, grid_of())
        settings = connector_settings(choice.connector | options)
    except ValueError as error:
        return f"{name} {error}"
    return replace(choice, connector=settings)


def _named(choice: Choice, plan: Plan, grid_of: Callable[[], Grid]) -> Choice | str:
    """The choice without names where regions do not divide its tokens, or why it cannot be where it is about them."""
    regions = choice.regions(plan.base)
    if regions is None or choice.connector is None:
        return choice
    options, patches = dict(choice.connector), grid_of()
    name = options.pop("name")
    try:
        with torch.device("meta"):
            tokens = CONNECTORS[name](STAND_IN, STAND_IN, patches, **options).token_grid
    except Exception:  # of anybody's class, which the cell itself says in words of its own
        return choice
    if tokens is not None and not any(side % parts for side, parts in zip(tokens, regions, strict=True)):
        return choice
    if choice.positions == "auto":
        return replace(choice, named=False)
    grid = "without a grid" if tokens is None else f"on a grid of {tokens[0]}×{tokens[1]}"
    return f"regions {regions[0]}×{regions[1]} do not divide {name}'s tokens {grid}"


def _learns(tune: str, part: str, plan: Plan) -> bool:
    """Whether a strategy trains all weights of a part."""
    if tune in plan.strategies:
        return part in plan.strategies[tune] and plan.strategies[tune][part].tune == "full"
    return bool(STRATEGIES[tune].get(part, {}).get("tune") == "full")


def keeps_places(connector: str) -> bool:
    """Whether a connector's visual tokens stand on a grid."""
    return CONNECTORS[connector].token_grid is not Connector.token_grid
