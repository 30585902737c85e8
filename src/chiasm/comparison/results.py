"""The finished cells of a comparison as tables: `results.jsonl`, `results.csv` and `results.md`."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.comparison import tables
from chiasm.evaluation.format import amount, count, duration, percent, percent_range
from chiasm.evaluation.skills import ALL
from chiasm.sources.writing import whole_file

Result = Mapping[str, Any]
JSONL, CSV, MARKDOWN = "results.jsonl", "results.csv", "results.md"


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Writes the three files of a comparison's folder."""
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    whole_file(folder / JSONL, lines)
    rows = [flat(result) for result in results]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    target = io.StringIO()
    writer = csv.DictWriter(target, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    whole_file(folder / CSV, target.getvalue())
    whole_file(folder / MARKDOWN, to_markdown(results))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """What `results.jsonl` holds."""
    text = (folder / JSONL).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def total(result: Result) -> Result:
    """The summary over all skills."""
    rows = result["summary"]
    return next((row for row in rows if row["skill"] == ALL), rows[-1])


def by_skill(result: Result) -> dict[str, Result]:
    """The summary of every skill."""
    return {row["skill"]: row for row in result["summary"] if row["skill"] != ALL} or {ALL: total(result)}


def flat(result: Result) -> dict[str, Any]:
    """One row of numbers."""
    closed, measured, training = result["closed_form"], result["measured"], result["training"]
    forgetting = result["forgetting"] or {}
    row: dict[str, Any] = {
        "name": result["name"],
        **{key: result["choice"][key] for key in ("fusion", "label", "tokens", "tune", "positions", "seed")},
        "weights": result["choice"].get("weights", "pretrained"),
        "samples": result["samples"],
        "visual_tokens": closed["visual_tokens"],
        **{f"parameters_{part}": number for part, number in closed["parameters"].items()},
        "trainable": sum(training["trainable"].values()),
    }
    row |= {key: value for key, value in closed.items() if key not in ("parameters", "visual_tokens")}
    row |= {f"measured_{key}": value for key, value in measured.items()}
    row |= {f"training_{key}": training[key] for key in ("samples_per_second", "peak_memory_bytes", "steps")}
    row |= {f"seconds_{phase}": value for phase, value in result["seconds"].items()}
    for skill in result["summary"]:
        for key in ("accuracy", "low", "high", "control_accuracy", "chance", "n"):
            row[f"{skill['skill']}_{key}"] = skill[key]
    if found := result.get("retrieval"):
        row |= {"retrieval_pictures": found["pictures"], "seconds_per_query": found["seconds_per_query"]}
        for k, share in found["recall"].items():
            row |= {f"recall@{k}_{key}": value for key, value in share.items()}
    row |= {f"perplexity_{text}": value for text, value in forgetting.get("perplexity", {}).items()}
    row |= {f"perplexity_change_{text}": value for text, value in forgetting.get("perplexity_change", {}).items()}
    return row | result["diagnostics"]


HEADS: tuple[str, ...] = (
    "cell",
    "tokens",
    "connector",
    "trained",
    "right",
    "95 %",
    "another picture",
    "first token",
    "tokens/s",
)
HEADS += ("KV per picture", "samples/s", "peak memory", "time")


def cells_of(result: Result) -> tuple[str, ...]:
    """One row of the table for people, as the texts of `HEADS`."""
    closed, measured, training, whole = result["closed_form"], result["measured"], result["training"], total(result)
    first, kept, peak = (
        measured.get("first_token_seconds"),
        closed.get("kv_cache_bytes_per_image"),
        training["peak_memory_bytes"],
    )
    return (
        result["name"],
        str(closed["visual_tokens"]),
        count(closed["parameters"].get("connector")),
        count(sum(training["trainable"].values())),
        percent(whole["accuracy"]),
        percent_range(whole["low"], whole["high"]),
        percent(whole["control_accuracy"]),
        "–" if first is None else f"{1e3 * first:.0f} ms",
        amount(measured.get("decode_tokens_per_second"), 1),
        "–" if kept is None else f"{kept / 1024:,.0f} KiB",
        amount(training["samples_per_second"], 1),
        "–" if peak is None else f"{peak / 1e9:.2f} GB",
        duration(sum(result["seconds"].values())),
    )


def to_markdown(results: Sequence[Result]) -> str:
    """All cells as a Markdown table, and below it those that were asked to find pictures."""
    whole = tables.to_markdown({"heads": HEADS, "rows": [cells_of(result) for result in results]})
    found = tables.finding({result["name"]: [result] for result in results})
    return whole + (f"\n{tables.to_markdown(found)}" if found["rows"] else "")
