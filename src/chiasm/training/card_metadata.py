"""What the hub reads of a model card, the YAML in front of it: licence, base models, task, results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from chiasm.fusion.late import LateFusionModel
from chiasm.sources.aliases import ALIASES
from chiasm.sources.cache import cache_folder
from chiasm.sources.source import HUB_ID

LICENCES = {"Apache-2.0": "apache-2.0", "Gemma terms": "gemma"}
"""Licences of aliases as the hub names them, the freest first: what is made of several has the last of theirs."""

SOURCES = ("vision_config", "text_config")
METRICS = {
    "loss": ("loss", "validation loss"),
    "shuffled_loss": ("loss", "validation loss with a wrong picture"),
    "psnr": ("psnr", "peak signal-to-noise ratio, dB"),
    "drawn_recall": ("recall", "drawings that find their words"),
}
"""A validation's field in the log → the hub's type of metric, and its name."""


@dataclass(frozen=True)
class Origin:
    """Where a part came from.

    Args:
        name: for people.
        hub: the hub id of the same weights, where there is one.
        licence: where it is known, by a name in `LICENCES`.
    """

    name: str
    hub: str | None = None
    licence: str | None = None


def origins(model: PreTrainedModel) -> list[Origin]:
    """Where the vision encoder and the language model came from, as far as their configurations tell."""
    configs = (getattr(model.config, name, None) for name in SOURCES)
    return [origin(config) for config in configs if config is not None]


def origin(config: Any) -> Origin:
    """Where a part with this configuration came from."""
    source = getattr(config, "_name_or_path", "") or ""
    place = Path(source)
    alias = ALIASES.get(place.name) if place.parent == cache_folder() else None
    if alias is not None:
        return Origin(f"{place.name} ({config.model_type})", alias.hub, alias.licence)
    if HUB_ID.fullmatch(source) and not place.exists():
        return Origin(f"{source} ({config.model_type})", source)
    return Origin(f"{place.name} ({config.model_type})" if place.name else str(config.model_type))


def task(model: PreTrainedModel) -> str:
    """The hub's name of what a model does."""
    if model.can_generate():
        return "image-text-to-text"
    answers = isinstance(model, LateFusionModel) and model.config.answer_head is not None
    return "visual-question-answering" if answers else "zero-shot-image-classification"


def metadata(model: PreTrainedModel, name: str, library: str, validation: dict[str, Any]) -> str:
    """The YAML, without the lines of dashes around it.

    Args:
        name: the model's.
        validation: the last one's fields in the log, or nothing.
    """
    found = origins(model)
    bases = list(dict.fromkeys(one.hub for one in found if one.hub))
    return ModelCardData(
        library_name=library,
        pipeline_tag=task(model),
        license=licence(found),
        base_model=bases or None,
        tags=["chiasm", "vision-language"],
        model_name=name,
        eval_results=results(task(model), validation) or None,
    ).to_yaml()


def licence(found: list[Origin]) -> str | None:
    """The hub's name of the licence that all parts allow; None where one is not known."""
    if not found or not all(one.licence in LICENCES for one in found):
        return None
    return LICENCES[max((str(one.licence) for one in found), key=list(LICENCES).index)]


def results(kind: str, validation: dict[str, Any]) -> list[EvalResult]:
    """The numbers of a validation in the hub's form."""
    numbers = [(*METRICS[name], validation[name]) for name in METRICS if validation.get(name) is not None]
    numbers += [("exact_match", f"right answers, {skill}", right / asked) for skill, right, asked in scores(validation)]
    shown: dict[str, Any] = {"task_type": kind, "dataset_type": "custom", "dataset_name": "held-out samples"}
    return [
        EvalResult(**shown, metric_type=metric, metric_name=told, metric_value=round(value, 4))
        for metric, told, value in numbers
    ]


def scores(validation: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Skill, right answers, questions; the whole first."""
    answers = validation.get("answers") or []
    skills = dict.fromkeys(answer["skill"] for answer in answers if "skill" in answer)
    groups = {"all": answers} | {skill: [one for one in answers if one.get("skill") == skill] for skill in skills}
    return [(skill, sum(one["correct"] for one in group), len(group)) for skill, group in groups.items() if group]
