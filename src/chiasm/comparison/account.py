"""What a comparison did, in words: data, numbers of questions, strategies, budget, seeds, versions, machine."""

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chiasm.comparison.choices import Choice
from chiasm.comparison.data import questions_of
from chiasm.comparison.schema import Plan, Source
from chiasm.comparison.strategies import new_parts
from chiasm.comparison.ways import FEW_SHOT, Row
from chiasm.connectors import own_code
from chiasm.connectors.own import VARIABLE
from chiasm.data.schema import Samples

PACKAGES = ("chiasm", "torch", "transformers")
NEW = {"connector": "the connector", "cross_attention": "the gated blocks", "answer_head": "the answer head"}


def account(
    plan: Plan, choices: Sequence[Choice], results: Sequence[Row], rows: Mapping[str, Sequence[Row]], train: Samples
) -> list[tuple[str, str]]:
    """Pairs of what was done and how.

    Args:
        choices: all cells of the plan.
        rows: name of a finished cell -> the rows of its evaluation.
        train: samples that the plan has to learn from, captions first.
    """
    questions = len(questions_of(plan, train))
    asked = max(([row for row in one if row.get("skill") != FEW_SHOT] for one in rows.values()), key=len)
    own = {json.dumps(choice.train, sort_keys=True): choice.train for choice in choices if choice.train is not None}
    used = sorted({result["samples"] for result in results})
    learned = f"{used[0]:,}" if len(used) == 1 else f"{used[0]:,} to {used[-1]:,}"
    data, how = plan.data, plan.training
    told = [
        ("models", f"{plan.base.vision} + {plan.base.language}"),
        ("learned from", f"{_source(data.train)}: {learned} of its {questions:,} samples in each cell"),
        *(("or, in cells of its own", _source(train)) for train in own.values()),
    ]
    if data.captions is not None:
        told.append(("captions first", f"{_source(data.captions)}: {plan.training.caption_samples:,} samples"))
    told += [
        ("asked", f"{_source(data.test)}: {len(asked):,} questions, {len({row['sample'] for row in asked}):,} samples"),
        ("budget", f"{plan.budget.amount:g} {plan.budget.kind} of questions, the same for every cell"),
    ]
    tunes = dict.fromkeys(choice.tune for choice in choices)
    told += [(f"strategy {tune}", _strategy(plan, tune)) for tune in tunes]
    fusions = dict.fromkeys(choice.fusion for choice in choices)
    told += [(f"new in {fusion} fusion", _new(plan, fusion)) for fusion in fusions]
    return [
        *told,
        ("training", f"batches of {how.batch_size}, warm-up {how.warmup:g}, dtype {how.dtype}"),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("versions", ", ".join(f"{name} {version(name)}" for name in PACKAGES)),
        ("Python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
    ]


def repeated(choices: Sequence[Choice], file: Path, output: Path) -> str:
    """The command that does it all again, into a new folder; own connectors are read from where they are."""
    whole = output.resolve()
    again = (output if output.name == whole.name else whole).with_name(f"{whole.name}-again")
    return f"{own_places(choices)}chiasm compare {shlex.quote(str(file))} -o {shlex.quote(str(again))}"


def own_places(choices: Sequence[Choice]) -> str:
    """What stands in front of a command whose plan names connectors of one's own."""
    own = any(own_code((choice.connector or {}).get("name", "")) for choice in choices)
    places = os.environ.get(VARIABLE, "")
    return f"{VARIABLE}={shlex.quote(places)} " if own and places else ""


def _source(source: Source) -> str:
    if isinstance(source, str):
        return source
    rest = ", ".join(f"{key} {_words(value)}" for key, value in source.items() if key != "path")
    return f"{source.get('path', 'data')}" + (f" ({rest})" if rest else "")


def _words(value: Any) -> str:
    return " + ".join(f"{one} {name}" for name, one in value.items()) if isinstance(value, dict) else str(value)


def _strategy(plan: Plan, tune: str) -> str:
    """What happens to the parts that were there before."""
    parts = plan.strategy(tune)
    told = [f"{part}: {_tuned(how)}" for part, how in parts.items()]
    frozen = [part for part in ("vision", "language") if part not in parts]
    return "; ".join([*told, *(f"{part}: frozen" for part in frozen)])


def _tuned(how: Mapping[str, Any]) -> str:
    kind = {"lora": "LoRA", "full": "all weights"}.get(how["tune"], how["tune"])
    more = {"rank": "rank", "lr": "learning rate", "from_layer": "from layer"}
    return ", ".join([kind, *(f"{words} {how[key]:g}" for key, words in more.items() if how.get(key) is not None)])


def _new(plan: Plan, fusion: str) -> str:
    """What is always trained in full, and at which rate."""
    how = plan.training
    parts = new_parts(fusion, how.lr, how.solved_lr)
    told = [f"{NEW.get(part, 'the patch embedding')} at learning rate {one['lr']:g}" for part, one in parts.items()]
    if fusion in ("early", "intermediate") and how.init == "auto":
        told[0] += f", or {how.lr:g} where it does not start in closed form"
    return "; ".join(told)
