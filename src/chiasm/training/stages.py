"""A stage compiled into an explicit table, parameter → learning rate or frozen, that covers every parameter.

The table is shown before the first step and held against what the first step did: `check_first_step`.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from chiasm.fusion.adapters import adapter_parameters, add_adapter, plain_name
from chiasm.training.fingerprint import digest
from chiasm.training.four_bit import require_four_bit
from chiasm.training.schema import Stage
from chiasm.training.selection import Group, adapter_targets, groups_of, parts_of
from chiasm.training.sharding import local

__all__ = ["FreezePlan", "PlanRow", "check_first_step", "digests", "enter", "parts_of", "require_reached", "set_modes"]

ADAM_BYTES = 8
GRADIENT_BYTES = 4
FOUR_BITS = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits with a scale for every 64 of them."""


@dataclass(frozen=True)
class PlanRow:
    """One line of the freeze plan, for a part or a pattern in it. `memory` counts weights, gradients and AdamW's
    moments, in bytes."""

    part: str
    pattern: str | None
    state: str
    lr: float | None
    tensors: int
    trainable_tensors: int
    parameters: int
    trainable: int
    share: float
    memory: int

    @property
    def label(self) -> str:
        return self.part if self.pattern is None else self.pattern


@dataclass(frozen=True)
class FreezePlan:
    """`rates`: every parameter's peak learning rate, None where it is frozen; `states`: every part's, in words;
    `labels`: every parameter's line; `four_bit`: layers whose weights the stage holds in 4 bits."""

    stage: str
    rates: dict[str, float | None]
    states: dict[str, str]
    rows: list[PlanRow] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    four_bit: list[str] = field(default_factory=list)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that the stage changes."""
        return [name for name, rate in self.rates.items() if rate is not None]

    def frozen_parts(self) -> set[str]:
        """Parts without a single trainable parameter."""
        return {row.part for row in self.rows} - {row.part for row in self.rows if row.trainable}


def enter(model: PreTrainedModel, stage: Stage) -> FreezePlan:
    """Makes the model what the stage trains: LoRA weights added, `requires_grad` set, frozen parts in evaluation mode.

    Raises:
        ValueError: the stage leaves a parameter unmatched, names a part, layer or pattern that the model does not have,
            tunes nothing, or contradicts itself.
    """
    groups = groups_of(model, stage)
    if not any(group.plan.tune != "frozen" for group in groups):
        raise ValueError(f"stage {stage.name!r} trains nothing: every part is frozen")
    _refuse_split_tensors(model, stage.name, groups)
    if any(group.plan.tune == "qlora" for group in groups):
        require_four_bit(stage, model.device)
    targets = {
        (group.part, group.label): adapter_targets(model, stage, group, sum(g.part == group.part for g in groups) == 1)
        for group in groups
        if group.plan.adapts
    }
    for group in groups:
        if group.plan.adapts:
            plan, chosen = group.plan, targets[group.part, group.label]
            method = "lora" if plan.tune == "qlora" else plan.tune
            pattern = group.label if group.is_pattern else None
            add_adapter(model, group.part, plan.rank, plan.alpha, plan.dropout, chosen, method, pattern)
    table = compile_plan(model, stage.name, groups)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(table.rates[name] is not None)
    set_modes(model, table)
    return table


def compile_plan(model: PreTrainedModel, stage: str, groups: list[Group]) -> FreezePlan:
    """The total table of a stage whose adapters are in place."""
    adapters = adapter_parameters(model)
    by_name = {name: group for group in groups for name in group.names}
    rates: dict[str, float | None] = {}
    owners: dict[str, Group] = {}
    for name, _ in model.named_parameters():
        known = next(known for known in (name, plain_name(name), _adapted_weight(name)) if known in by_name)
        group = by_name[known]
        tuned = (group.plan.tune == "full" and known in group.chosen) or (group.plan.adapts and name in adapters)
        rates[name] = group.plan.lr if tuned else None
        owners[name] = group
    rows = [_row(model, group, rates, [name for name in rates if owners[name] is group]) for group in groups]
    states: dict[str, str] = {}
    for row in rows:
        states[row.part] = row.state if row.part not in states else f"{states[row.part]}; {row.label}: {row.state}"
    four_bit = [
        name.removesuffix(".base_layer.weight")
        for name, group in owners.items()
        if group.plan.tune == "qlora" and name.endswith(".base_layer.weight")
    ]
    return FreezePlan(stage, rates, states, rows, {name: group.label for name, group in owners.items()}, four_bit)


def set_modes(model: nn.Module, table: FreezePlan) -> None:
    """Training mode where something trains; frozen parts, and the statistics of every batch norm, stay as they are."""
    model.train()
    for part in table.frozen_parts():
        model.get_submodule(part).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def check_first_step(
    model: nn.Module, table: FreezePlan, before: dict[str, tuple[int, int]], factor: float, optimizer: str = "adamw"
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
        elif not moved and _visible(local(parameter), local(parameter.grad), rate * factor, optimizer):
            raise RuntimeError(f"stage {table.stage!r}: {name} is trainable and has a gradient but did not move")
    if not unreached:
        return []
    listed = ", ".join(unreached[:3]) + (", ..." if len(unreached) > 3 else "")
    return [f"{len(unreached)} trainable tensors got no gradient in the first step, so they stay as they are: {listed}"]


def require_reached(loss: Tensor, plan: FreezePlan) -> None:
    """Refuses a loss that no trained weight has a part in.

    Raises:
        ValueError: it depends on none of them.
    """
    if not loss.requires_grad:
        raise nothing_reached(plan)


def nothing_reached(plan: FreezePlan) -> ValueError:
    """The error for a plan whose trained weights the loss does not depend on."""
    listed = ", ".join(plan.trainable[:3]) + (", ..." if len(plan.trainable) > 3 else "")
    return ValueError(
        f"stage {plan.stage!r}: the loss depends on none of the weights that the plan trains ({listed}), so they would "
        "stay as they are; tune others too"
    )


def digests(model: nn.Module) -> dict[str, tuple[int, int]]:
    """A digest of every parameter."""
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


def _visible(parameter: Tensor, gradient: Tensor, rate: float, optimizer: str) -> bool:
    """Whether a step survives float32 rounding; AdamW's is `rate` wherever the gradient is clearly not zero.

    LoRA's A has no gradient while B is zero, and a small step from a large value rounds away: neither is an error.
    """
    size = gradient.abs() if optimizer == "sgd" else (gradient.abs() > 1e-7).to(gradient.dtype)
    return bool((parameter.abs() * 1.2e-7 < size * rate).any())


def _adapted_weight(name: str) -> str:
    """The weight that a LoRA weight belongs to: `….q_proj.lora_A.default.weight` → `….q_proj.weight`."""
    return f"{name.partition('.lora_')[0]}.weight"


def _refuse_split_tensors(model: nn.Module, stage: str, groups: list[Group]) -> None:
    """One tensor under two names (tied weights) must have one state."""
    by_name = {name: group for group in groups for name in group.names}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        one, other = _rate(by_name[first], first), _rate(by_name[name], name)
        if one != other:
            raise ValueError(
                f"stage {stage!r} contradicts itself: {first} and {name} are one tensor, but the plan says "
                f"{_in_words(one)} and {_in_words(other)}"
            )


def _rate(group: Group, name: str) -> float | None:
    return group.plan.lr if group.plan.tune == "full" and name in group.chosen else None


def _in_words(rate: float | None) -> str:
    return "frozen" if rate is None else f"lr {rate:g}"


def _row(model: nn.Module, group: Group, rates: dict[str, float | None], names: list[str]) -> PlanRow:
    members = {name: model.get_parameter(name) for name in names}
    trained = [parameter for name, parameter in members.items() if rates[name] is not None]
    four_bit = {name for name in names if group.plan.tune == "qlora" and name.endswith(".base_layer.weight")}
    parameters, trainable = sum(p.numel() for p in members.values()), sum(p.numel() for p in trained)
    return PlanRow(
        part=group.part,
        pattern=group.label if group.is_pattern else None,
        state=group.plan.words,
        lr=group.plan.lr,
        tensors=len(members),
        trainable_tensors=len(trained),
        parameters=parameters,
        trainable=trainable,
        share=trainable / parameters if parameters else 0.0,
        memory=sum(weight_bytes(p, name in four_bit) for name, p in members.items())
        + trainable * (GRADIENT_BYTES + ADAM_BYTES),
    )


def weight_bytes(parameter: Tensor, in_four_bits: bool = False) -> int:
    """What a weight takes, as it is or in 4 bits."""
    return int(parameter.numel() * (FOUR_BITS if in_four_bits else parameter.element_size()))
