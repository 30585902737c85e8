"""Which text tower finds emoji by their names, in English and in Korean, and do several prompts name them better?

For every tower and language two locked towers learn a projection each from four views of every emoji of `train` and its
name. They are asked about pictures that they have not seen (another view of the same emoji) and about names that they
have not seen either (the emoji of `test`). Beside that: what a tower's tokenizer makes of the names.

    python benchmarks/emoji_names.py            two threads, half an hour for all; rows for docs/late_fusion.md
    python benchmarks/emoji_names.py --quick    half a minute: shows that all of it works, not that it learns

What is done stays in the output folder, so that a run that was stopped goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import chiasm
from chiasm import api
from chiasm.data.emoji_names import EmojiNames
from chiasm.evaluation import paired
from chiasm.evaluation.format import percent, percent_range
from chiasm.training.recipe import load_recipe
from chiasm.training.schema import Recipe

TOWERS = ("minilm-l6", "smollm2-135m-instruct", "gemma3-270m")
ONE_PROMPT = ("{}",)
PROMPTS = {
    "en": ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}"),
    "ko": ("{}", "{} 그림", "{} 이모지", "{} 사진"),
}
PARTS = {"vision": "frozen", "language": "frozen", "connector": {"tune": "full", "lr": 1e-3}}
CLASSES = 200
"""Of another view, whose names are many."""
WAYS = ("image → text", "text → image")
Row = dict[str, Any]


def recipe(quick: bool) -> Recipe:
    """The first stage of `clip`."""
    length = {"steps": 5, "batch_size": 32} if quick else {"epochs": 20, "batch_size": 256}
    stage = {"name": "project", "objectives": ["contrastive"], "parts": PARTS, **length}
    return load_recipe({"warmup": 0.1, "betas": [0.9, 0.98], "validation": {"samples": 64}, "stages": [stage]})


def read_names(tokenizer: Any, names: list[str]) -> Row:
    """How a tokenizer reads the names: tokens each, how many hold an unknown one, how many read like another name."""
    tokens = [tuple(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in names]
    unknown = sum(tokenizer.unk_token_id in one for one in tokens) if tokenizer.unk_token_id is not None else 0
    alike = sum(tokens.count(one) > 1 for one in tokens)
    return {"names": len(names), "tokens": sum(map(len, tokens)) / len(names), "unknown": unknown, "alike": alike}


def measure(tower: str, language: str, folder: Path, quick: bool) -> Row:
    """One tower in one language: trained, asked for recall@k, and for classes by one prompt and by several."""
    started, size = time.monotonic(), 60 if quick else None
    encoder = chiasm.connect(vision="efficientnet-lite0", language=tower, fusion="late")
    names = EmojiNames("all", language)
    told = {"names": read_names(encoder.processor.tokenizer, [sample.answer for sample in names])}
    run = folder / f"{tower}-{language}"
    chiasm.train(recipe(quick), encoder, EmojiNames("train", language, size, seed=0, views=4), run, resume=False)
    held_out = {
        "another view": EmojiNames("train", language, size, seed=1),
        "another emoji": EmojiNames("test", language, size),
    }
    found = {name: api.evaluate(encoder, data, task="retrieval").summary for name, data in held_out.items()}
    held_out["another view"] = EmojiNames("train", language, size or CLASSES, seed=1)
    classes = {name: prompts(encoder, data, language) for name, data in held_out.items()}
    return told | {"recall": found, "classes": classes, "seconds": time.monotonic() - started}


def prompts(encoder: chiasm.DualEncoder, data: EmojiNames, language: str) -> Row:
    """Accuracy by one prompt and by several, and the difference on the same pictures."""
    one, several = (
        api.evaluate(encoder, data, task="zero-shot", templates=templates)
        for templates in (ONE_PROMPT, PROMPTS[language])
    )
    return {"one": one.summary[0], "several": several.summary[0], "gap": paired.compare(several, one)[0]}


def tables(results: dict[str, Row]) -> str:
    """Three tables as Markdown: tokens, recalls, classes."""
    lines = [
        "| tower, language | tokens a name | with an unknown token | that read like another |",
        "|---|---:|---:|---:|",
    ]
    for name, told in results.items():
        read = told["names"]
        counts = f"{read['unknown']} of {read['names']} | {read['alike']}"
        lines.append(f"| {name} | {read['tokens']:.1f} | {counts} |")
    head = "| tower, language | asked for | | recall@1 | 95 % | recall@5 | recall@10 | control@1 | chance@1 |"
    lines += ["", head, "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for name, told in results.items():
        for what, summary in told["recall"].items():
            for way in WAYS:
                at = {row["skill"]: row for row in summary}
                first, *more = (at[f"{way}, recall@{k}"] for k in (1, 5, 10))
                shares = [percent(first["accuracy"]), percent_range(first["low"], first["high"])]
                shares += [percent(row["accuracy"]) for row in more]
                shares += [percent(first["control_accuracy"]), percent(first["chance"])]
                lines.append(f"| {name} | {what}, {first['n']} | {way} | " + " | ".join(shares) + " |")
    head = "| tower, language | classes | one prompt | 95 % | several prompts | 95 % | points | 95 % | chance |"
    lines += ["", head, "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, told in results.items():
        for what, row in told["classes"].items():
            both, gap = (row["one"], row["several"]), row["gap"]
            shares = [text for r in both for text in (percent(r["accuracy"]), percent_range(r["low"], r["high"]))]
            change, low, high = (f"{100 * gap[key]:+.1f}" for key in ("difference", "low", "high"))
            shares += [change, f"{low} to {high}", percent(both[0]["chance"])]
            lines.append(f"| {name} | {what}, {both[0]['n']} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="*", default=list(TOWERS))
    parser.add_argument("--languages", nargs="*", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/emoji_names"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    folder = chosen.output / "quick" if chosen.quick else chosen.output
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    done: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    for tower in chosen.towers:
        for language in chosen.languages:
            name = f"{tower}, {language}"
            if name not in done:
                done[name] = measure(tower, language, folder, chosen.quick)
                kept.write_text(json.dumps(done, indent=1))
            print(f"{name}: {done[name]['seconds']:.0f} s", flush=True)
    text = tables({name: told for name, told in done.items() if name.split(", ")[0] in chosen.towers})
    (folder / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
