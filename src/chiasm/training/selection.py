"""Which parameters a line of a recipe means: a part or a glob, from a layer on, only the norms."""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel

from chiasm.fusion.adapters import linear_layers
from chiasm.training.schema import OTHER_PARTS, PARTS, PartPlan, Stage


@dataclass(frozen=True)
class Group:
    """The parameters that one line decides on. `chosen`: those of `names` that `from_layer` and `only` leave over."""

    label: str
    part: str
    plan: PartPlan
    names: frozenset[str]
    chosen: frozenset[str]

    @property
    def is_pattern(self) -> bool:
        return self.label != self.part


def parts_of(model: nn.Module) -> list[str]:
    """The parts that the model has, in the order of `PARTS`.

    Raises:
        ValueError: a parameter belongs to no part.
    """
    prefixes: dict[str, str] = {}
    for name, _ in model.named_parameters():
        prefixes.setdefault(name.split(".")[0], name)
    strange = [name for prefix, name in prefixes.items() if prefix not in PARTS]
    if strange:
        raise ValueError(f"parameter {strange[0]!r} belongs to no part; names start with {', '.join(PARTS)}")
    return [part for part in PARTS if part in prefixes]


def groups_of(model: PreTrainedModel, stage: Stage) -> list[Group]:
    """Every parameter of a model without adapters, in the group of the line that decides on it: parts, then patterns.

    A pattern that reaches into several parts gives a group for each.

    Raises:
        ValueError: a parameter is left unmatched, a line matches nothing, or two lines contradict each other.
    """
    present = parts_of(model)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = _owners(model, stage, names)
    _refuse_absent(stage, present)
    _refuse_unmatched(stage, present, [name for name in names if name not in owners])
    found = []
    for part in present:
        inside = [name for name in names if name.split(".")[0] == part]
        plan = stage.parts.get(part) or stage.parts.get(OTHER_PARTS)
        rest = frozenset(name for name in inside if name not in owners)
        if plan is not None and rest:
            chosen = rest & _chosen(model, stage, part, plan)
            _refuse_nothing(stage, part, plan, chosen)
            found.append(Group(part, part, plan, rest, chosen))
        elif part in stage.parts:
            _refuse_nothing(stage, part, stage.parts[part], rest)
        for pattern, of_pattern in stage.patterns.items():
            own = frozenset(name for name in inside if owners.get(name) == pattern)
            if own:
                found.append(Group(pattern, part, of_pattern, own, own))
    _refuse_idle_rest(stage, [group.part for group in found if not group.is_pattern])
    return found


def teaches_speech(model: PreTrainedModel, stage: Stage) -> bool:
    """Whether a stage trains the connector with the language model; one that reads captions teaches it to look only."""
    if stage.reads_captions or not hasattr(model.config, "fresh_connector"):
        return False
    return any(group.part == "connector" and group.plan.tune != "frozen" for group in groups_of(model, stage))


def adapter_targets(model: PreTrainedModel, stage: Stage, group: Group, whole_part: bool) -> str | list[str]:
    """LoRA's targets in a group: as the recipe says it where the group is all of its part, else every layer's path.

    Raises:
        ValueError: no linear layer is left.
    """
    if whole_part and len(group.chosen) == len(group.names):
        return group.plan.targets
    inside = [path for path in linear_layers(model, group.part) if f"{group.part}.{path}.weight" in group.chosen]
    wanted = group.plan.targets
    names = [] if isinstance(wanted, str) else wanted
    meant = {name: {path for path in inside if name in (path, path.rsplit(".", 1)[-1])} for name in names}
    found = set().union(*meant.values()) if names else set(inside)
    empty = [name for name in names if not meant[name]] or ([] if found else [str(wanted)])
    if empty:
        raise ValueError(
            f"stage {stage.name!r}: {group.label!r} is given {group.plan.words}, but holds none of the linear layers "
            f"that targets ({empty[0]}) mean; choose others, or write tune: full"
        )
    return [path for path in inside if path in found]


def norm_parameters(module: nn.Module) -> set[str]:
    """Names of the weights and biases of normalisations: modules with nothing but a `weight` of one dimension and
    perhaps a `bias`, whatever a model calls them."""
    found = set()
    for path, member in module.named_modules():
        own = dict(member.named_parameters(recurse=False))
        if (
            "weight" in own
            and own.keys() <= {"weight", "bias"}
            and own["weight"].ndim == 1
            and not _has_children(member)
        ):
            found |= {f"{path}.{name}".lstrip(".") for name in own}
    return found


def layers_of(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of a part's layers: of its outermost module lists the one with most parameters.

    Raises:
        ValueError: the part has no list of layers.
    """
    lists = [(path, member) for path, member in module.named_modules() if isinstance(member, nn.ModuleList)]
    outer = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise ValueError("it has no list of layers")
    return max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _owners(model: PreTrainedModel, stage: Stage, names: list[str]) -> dict[str, str]:
    """The pattern that decides on a parameter, for those that any does."""
    norms = norm_parameters(model) if any(plan.only for plan in stage.patterns.values()) else set()
    owners: dict[str, str] = {}
    for pattern, plan in stage.patterns.items():
        matched = [name for name in names if _matches(pattern, name)]
        if not matched:
            close = difflib.get_close_matches(pattern.rstrip(".*"), _paths(names), n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"stage {stage.name!r}: pattern {pattern!r} matches no parameter of this model{hint}")
        if plan.only is not None:
            matched = [name for name in matched if name in norms]
            if not matched:
                raise ValueError(f"stage {stage.name!r}: pattern {pattern!r} matches no normalisation (only: norms)")
        for name in matched:
            other = owners.setdefault(name, pattern)
            if stage.patterns[other] != plan:
                raise ValueError(
                    f"stage {stage.name!r} contradicts itself: {name} is {_in_words(stage.patterns[other])} by "
                    f"{other!r} and {_in_words(plan)} by {pattern!r}; let one pattern leave it out"
                )
    return owners


def _matches(pattern: str, name: str) -> bool:
    """A pattern without `*`, `?` or `[` is the whole name of a parameter, or of a module around it."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _paths(names: list[str]) -> list[str]:
    return sorted(
        {name[:end] for name in names for end in range(len(name) + 1) if end == len(name) or name[end] == "."}
    )


def _in_words(plan: PartPlan) -> str:
    return plan.words + (f" at lr {plan.lr:g}" if plan.lr is not None else "")


def _chosen(model: PreTrainedModel, stage: Stage, part: str, plan: PartPlan) -> frozenset[str]:
    """What `from_layer` and `only` leave of a part."""
    module = model.get_submodule(part)
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    chosen = set(named)
    if plan.from_layer is not None:
        try:
            chosen = _from_layer(module, named, plan.from_layer)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: from_layer: {plan.from_layer} of {part}: {error}") from None
    if plan.only is not None:
        chosen &= norm_parameters(module)
        if not chosen:
            raise ValueError(f"stage {stage.name!r}: {part} has no normalisation there (only: norms); tune it in full")
    return frozenset(f"{part}.{name}" for name in chosen)


def _from_layer(module: nn.Module, named: dict[str, Tensor], first: int) -> set[str]:
    """Parameters of the layers from `first` on and of what was built behind them; a head that is the embeddings is
    none of these, for they stand in front."""
    path, layers = layers_of(module)
    if first >= len(layers):
        raise ValueError(f"it has {len(layers)} layers, so the last one is {len(layers) - 1}")
    names = list(named)
    inside = [name for name in names if name.startswith(f"{path}.")]
    start = names.index(inside[0])
    before = {id(named[name]) for name in names[:start]}
    late = [name for name in inside if int(name[len(path) + 1 :].split(".")[0]) >= first]
    behind = [name for name in names[start:] if not name.startswith(f"{path}.")]
    return {name for name in (*late, *behind) if id(named[name]) not in before}


def _refuse_absent(stage: Stage, present: list[str]) -> None:
    absent = [part for part in stage.parts if part != OTHER_PARTS and part not in present]
    if absent:
        raise ValueError(
            f"stage {stage.name!r} names the part {absent[0]!r}, which this model does not have; "
            f"it has {', '.join(present)}"
        )


def _refuse_nothing(stage: Stage, part: str, plan: PartPlan, chosen: frozenset[str]) -> None:
    if not chosen:
        raise ValueError(
            f"stage {stage.name!r}: {part}: {plan.words} matches nothing, since patterns decide on all of it; remove it"
        )


def _refuse_idle_rest(stage: Stage, decided: list[str]) -> None:
    """A tuned `*` must have a part to tune; a frozen one may stand beside parts that are all named."""
    rest = stage.parts.get(OTHER_PARTS)
    if rest is not None and rest.tune != "frozen" and all(part in stage.parts for part in decided):
        raise ValueError(
            f"stage {stage.name!r}: {OTHER_PARTS!r}: {rest.words} matches nothing, since other lines decide on all "
            "parts of this model; remove it"
        )


def _refuse_unmatched(stage: Stage, present: list[str], unowned: list[str]) -> None:
    left = {name.split(".")[0]: name for name in reversed(unowned)}
    if OTHER_PARTS in stage.parts:
        return
    unsaid = [part for part in present if part not in stage.parts and part in left]
    if unsaid:
        which = f", and no pattern matches {left[unsaid[0]]}" if stage.patterns else ""
        raise ValueError(
            f"stage {stage.name!r} does not say what happens to {', '.join(unsaid)}{which}; "
            f'write "{unsaid[0]}: frozen", or "{OTHER_PARTS}: frozen" for all others'
        )
