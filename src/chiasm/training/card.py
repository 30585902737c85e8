"""The model card, `README.md` of a model's folder: what was connected, how it was trained, its scores and cost."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from chiasm.sources.uploading import CARD
from chiasm.training.card_metadata import SOURCES, metadata, origin, origins, scores
from chiasm.training.card_usage import usage
from chiasm.training.log import read_log

LIBRARY = "chiasm"
OURS = f"library_name: {LIBRARY}"


def write_card(
    folder: Path, model: PreTrainedModel, run: Path | None = None, facts: dict[str, str] | None = None
) -> None:
    """Writes the card of a model, and of the run that trained it; a card that came with the model is kept.

    Args:
        folder: where the model was saved.
        run: the run's folder, with its recipe and log.
        facts: more rows about the model, such as its cost.
    """
    source = Path(model.name_or_path or "", CARD)
    text = source.read_text(encoding="utf-8") if run is None and model.name_or_path and source.is_file() else ""
    if OURS not in text:
        events = _events(run)
        validation = list(_last(events, "validation").values())[-1:]
        text = model_card(model, _history(run, events), facts or {}, *validation)
    (folder / CARD).write_text(text, encoding="utf-8")


def model_card(
    model: PreTrainedModel, history: list[str], facts: dict[str, str], validation: dict[str, Any] | None = None
) -> str:
    """The card's text.

    Args:
        history: sections of a run.
        validation: fields of the run's last one.
    """
    config = model.config
    vision, language = (_named(getattr(config, name, None)) for name in SOURCES)
    rows: dict[str, str] = {
        "vision encoder": vision,
        "language model": language,
        "fusion": getattr(config, "fusion", config.model_type),
        "connector": (getattr(config, "connector", None) or {}).get("name", "none"),
        **{f"parameters, {part}": f"{_size(module):,}" for part, module in model.named_children() if _size(module)},
        **facts,
    }
    if (places := getattr(model, "num_image_tokens", None)) is not None:
        rows["places of a picture in the sequence"] = str(places)
    name = f"{vision} + {language}"
    lines = [
        "---",
        metadata(model, name, LIBRARY, validation or {}).strip(),
        "---",
        "",
        f"# A vision-language model: {name}",
        "",
        "Connected and trained with Chiasm.",
        "",
        *usage(model),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## Licence",
        "",
        *_licence(model),
        "",
        *history,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _licence(model: PreTrainedModel) -> list[str]:
    told = [f"- {one.name}: {one.licence or 'see where it came from'}" for one in origins(model)]
    return ["The licences of what this model was made of apply to it:", "", *told]


def _events(run: Path | None) -> list[dict[str, Any]]:
    return [] if run is None or not (run / "log.jsonl").is_file() else read_log(run / "log.jsonl")


def _history(run: Path | None, events: list[dict[str, Any]]) -> list[str]:
    """The sections of a run: recipe, data, freeze plan, scores, cost."""
    if run is None or not events:
        return []
    lines = ["## Data", "", *_data(events), "", "## Stages", ""]
    lines += ["| stage | steps | objectives | what was trained | validation loss, with a wrong picture | time |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [_stage(events, plan) for plan in _last(events, "plan").values()]
    last = [*_last(events, "validation").values()][-1:]
    told = [f"| {skill} | {right} of {asked} |" for skill, right, asked in scores(last[0] if last else {})]
    if told:
        lines += ["", "## Scores", "", "Held-out questions of the last stage, by skill.", ""]
        lines += ["| skill | right |", "|---|---|", *told]
    peak = max((event.get("peak_memory_bytes") or 0 for event in events), default=0)
    lines += ["", f"Peak memory of training: {peak / 2**20:,.0f} MiB." if peak else "", "", "## Recipe", "", "```yaml"]
    return [*lines, (run / "recipe.yaml").read_text(encoding="utf-8").strip(), "```"]


def _data(events: list[dict[str, Any]]) -> list[str]:
    start = next((event for event in events if event["event"] == "start"), {})
    shown = {name: start[name] for name in ("samples", "held_out", "bad") if name in start}
    return [f"{name.replace('_', ' ')}: {value:,}  " for name, value in shown.items() if isinstance(value, int)]


def _stage(events: list[dict[str, Any]], plan: dict[str, Any]) -> str:
    stage = plan["stage"]
    check, end = _last(events, "validation").get(stage, {}), _last(events, "stage_end").get(stage, {})
    parts = "; ".join(f"{part}: {state}" for part, state in plan["parts"].items())
    losses = ", ".join(f"{check[name]:.4f}" for name in ("loss", "shuffled_loss") if check.get(name) is not None)
    seconds = end.get("seconds")
    took = "" if seconds is None else f"{seconds / 60:.1f} min"
    return f"| {stage} | {plan['steps']} | {plan['objectives']} | {parts} | {losses} | {took} |"


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """The last event of a kind in every stage."""
    return {event["stage"]: event for event in events if event["event"] == kind and "stage" in event}


def _named(config: Any) -> str:
    return "none" if config is None else origin(config).name


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
