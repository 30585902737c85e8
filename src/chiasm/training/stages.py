"""A stage compiled into an explicit table, parameter → learning rate or frozen, that covers every parameter.

The table is shown before the first step and held against what the first step did: `check_first_step`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from chiasm.fusion.adapters import adapter_parameters, add_adapter
from chiasm.training.fingerprint import digest
from chiasm.training.schema import OTHER_PARTS, PARTS, PartPlan, Stage

ADAM_BYTES = 8
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class PlanRow:
    """One part's line of the freeze plan. `memory` counts weights, gradients and AdamW's moments, in bytes."""

    part: str
    state: str
    lr: float | None
    tensors: int
    trainable_tensors: int
    parameters: int
    trainable: int
    share: float
    memory: int


@dataclass(frozen=True)
class FreezePlan:
    """`rates`: every parameter's peak learning rate, None where it is frozen; `states`: every part's, in words."""

    stage: str
    rates: dict[str, float | None]
    states: dict[str, str]
    rows: list[PlanRow] = field(default_factory=list)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that the stage changes."""
        return [name for name, rate in self.rates.items() if rate is not None]

    def frozen_parts(self) -> set[str]:
        """Parts without a single trainable parameter."""
        return {row.part for row in self.rows if row.trainable == 0}


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


def enter(model: PreTrainedModel, stage: Stage) -> FreezePlan:
    """Makes the model what the stage trains: LoRA weights added, `requires_grad` set, frozen parts in evaluation mode.

    Raises:
        ValueError: the stage does not say what happens to a part, names one that the model does not have, tunes
            nothing, or both tunes and freezes one tensor.
    """
    plans = _plan_of_parts(stage, parts_of(model))
    for part, plan in plans.items():
        if plan.tune == "lora":
            add_adapter(model, part, plan.rank, plan.alpha, plan.dropout, plan.targets)
    table = compile_plan(model, stage.name, plans)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(table.rates[name] is not None)
    set_modes(model, table)
    return table


def compile_plan(model: PreTrainedModel, stage: str, plans: dict[str, PartPlan]) -> FreezePlan:
    """The total table of a stage whose adapters are in place."""
    adapters = adapter_parameters(model)
    rates: dict[str, float | None] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        plan = plans[name.split(".")[0]]
        tuned = plan.tune == "full" or (plan.tune == "lora" and name in adapters)
        rates[name] = plan.lr if tuned else None
    _refuse_contradictions(model, stage, rates)
    rates = {name: rates[name] for name, _ in model.named_parameters()}
    if all(rate is None for rate in rates.values()):
        raise ValueError(f"stage {stage!r} trains nothing: every part is frozen")
    rows = [_row(model, part, plan, rates) for part, plan in plans.items()]
    return FreezePlan(stage, rates, {row.part: row.state for row in rows}, rows)


def set_modes(model: nn.Module, table: FreezePlan) -> None:
    """Training mode where something trains; frozen parts, and the statistics of every batch norm, stay as they are."""
    model.train()
    for part in table.frozen_parts():
        model.get_submodule(part).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def check_first_step(
    model: nn.Module, table: FreezePlan, before: dict[str, tuple[int, int]], factor: float
) -> list[str]:
    """Holds the freeze plan against what the first step did; call it while the gradients are still there.

    Args:
        before: every parameter's digest from before the step (`digests`).
        factor: the step's learning rates as a share of the plan's.

    Returns:
        Warnings: trainable tensors that no gradient reached.

    Raises:
        RuntimeError: a frozen tensor changed, or a tensor with a gradient did not.
    """
    unreached = []
    for name, parameter in model.named_parameters():
        rate, moved = table.rates[name], digest(parameter) != before[name]
        if rate is None and moved:
            raise RuntimeError(f"stage {table.stage!r}: {name} is frozen by the plan but changed in the first step")
        if rate is None:
            continue
        if parameter.grad is None:
            unreached.append(name)
        elif not moved and _visible(parameter, parameter.grad, rate * factor):
            raise RuntimeError(f"stage {table.stage!r}: {name} is trainable and has a gradient but did not move")
    if not unreached:
        return []
    listed = ", ".join(unreached[:3]) + (", ..." if len(unreached) > 3 else "")
    return [f"{len(unreached)} trainable tensors got no gradient in the first step, so they stay as they are: {listed}"]


def digests(model: nn.Module) -> dict[str, tuple[int, int]]:
    """A digest of every parameter."""
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


def _visible(parameter: Tensor, gradient: Tensor, rate: float) -> bool:
    """Whether a step of AdamW, which is `rate` wherever the gradient is clearly not zero, survives float32 rounding.

    LoRA's A has no gradient while B is zero, and a small step from a large value rounds away: neither is an error.
    """
    return bool(((gradient.abs() > 1e-7) & (parameter.abs() * 1.2e-7 < rate)).any())


def _plan_of_parts(stage: Stage, present: list[str]) -> dict[str, PartPlan]:
    absent = [part for part in stage.parts if part != OTHER_PARTS and part not in present]
    if absent:
        raise ValueError(
            f"stage {stage.name!r} names the part {absent[0]!r}, which this model does not have; "
            f"it has {', '.join(present)}"
        )
    unsaid = [part for part in present if part not in stage.parts and OTHER_PARTS not in stage.parts]
    if unsaid:
        raise ValueError(
            f"stage {stage.name!r} does not say what happens to {', '.join(unsaid)}; "
            f'write "{unsaid[0]}: frozen", or "{OTHER_PARTS}: frozen" for all others'
        )
    return {part: stage.parts.get(part) or stage.parts[OTHER_PARTS] for part in present}


def _refuse_contradictions(model: nn.Module, stage: str, rates: dict[str, float | None]) -> None:
    """One tensor under two names (tied weights) must have one state."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if rates[first] != rates[name]:
            raise ValueError(
                f"stage {stage!r} contradicts itself: {first} and {name} are one tensor, but the plan says "
                f"{_in_words(rates[first])} and {_in_words(rates[name])}"
            )


def _in_words(rate: float | None) -> str:
    return "frozen" if rate is None else f"lr {rate:g}"


def _row(model: nn.Module, part: str, plan: PartPlan, rates: dict[str, float | None]) -> PlanRow:
    members = list(_members(model, part))
    trained = [parameter for name, parameter in members if rates[name] is not None]
    parameters, trainable = sum(p.numel() for _, p in members), sum(p.numel() for p in trained)
    weights = sum(p.numel() * p.element_size() for _, p in members)
    return PlanRow(
        part=part,
        state=f"lora, rank {plan.rank}" if plan.tune == "lora" else plan.tune,
        lr=plan.lr,
        tensors=len(members),
        trainable_tensors=len(trained),
        parameters=parameters,
        trainable=trainable,
        share=trainable / parameters if parameters else 0.0,
        memory=weights + trainable * (GRADIENT_BYTES + ADAM_BYTES),
    )


def _members(model: nn.Module, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if name.split(".")[0] == part)
