"""What finetuning costs: frozen, LoRA, and full finetuning at a low and at a high rate, side by side on real weights.

All start from one connector that was trained with everything else frozen, and see the same samples in the same order.
    python benchmarks/forgetting.py --steps 100
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import chiasm
from chiasm import api
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.demo import FEATURES, SKILLS, questions
from chiasm.training.log import read_log
from chiasm.training.recipe import load_recipe

CONNECTOR = {"tune": "full", "lr": 1e-4}


def full(language: float, vision: float) -> dict[str, Any]:
    """Everything learns."""
    return {
        "vision": {"tune": "full", "lr": vision},
        "connector": CONNECTOR,
        "language": {"tune": "full", "lr": language},
    }


STRATEGIES: dict[str, dict[str, Any]] = {
    "frozen": {"connector": CONNECTOR, "*": "frozen"},
    "LoRA, 5e-4": {"vision": "frozen", "connector": CONNECTOR, "language": {"tune": "lora", "lr": 5e-4}},
    "full, 2e-5 and 1e-5": full(2e-5, 1e-5),
    "full, 1e-3 and 1e-3": full(1e-3, 1e-3),
}
"""Name → parts; the rates of full finetuning are the language model's and the vision encoder's."""


def align(folder: Path, steps: int, seed: int) -> Path:
    """The common start: a connector from closed form, tuned a little."""
    vlm = chiasm.connect(features=FEATURES, chat_template="lean", dtype="float32", seed=seed)
    captions = list(EmojiScenes("train", size=400, seed=seed + 1000, form="caption"))
    parts = {"connector": CONNECTOR, "*": "frozen"}
    recipe = {"stages": [{"name": "align", "steps": steps, "batch_size": 4, "init": "closed_form", "parts": parts}]}
    return api.train(load_recipe(recipe), vlm, captions, folder / "align").model


def measure(name: str, start: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One strategy: what it learned, and what it forgot since its start."""
    steps, size, seed = args.steps, args.batch_size, args.seed
    stage = {
        "name": "tune",
        "steps": steps,
        "batch_size": size,
        "parts": STRATEGIES[name],
        "validation": {"samples": args.held_out, "answers": 0},
        "keep_checkpoints": 1,
    }
    run = folder / name.replace(" ", "").replace(",", "-")
    held_out = EmojiScenes("validation", size=args.held_out, seed=seed, weights=SKILLS)
    data = questions(seed, size * steps)
    result = api.train(load_recipe({"stages": [stage]}), str(start), data, run, validation_data=held_out)
    log = read_log(result.log)
    last = {event["event"]: event for event in log}
    accuracy = None
    if args.tests:
        test = EmojiScenes("test", size=args.tests, seed=seed, weights=SKILLS)
        total = api.evaluate(str(result.model), test, batch_size=32, max_new_tokens=8, control=False).summary[-1]
        accuracy = [total["accuracy"], total["low"], total["high"]]
    return {
        "strategy": name,
        "loss": [event["loss"] for event in log if event["event"] == "validation"],
        "accuracy": accuracy,
        "trainable": last["plan"]["trainable"],
        **{key: last["forgetting"][key] for key in ("perplexity", "perplexity_change", "knn_overlap", "cka")},
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    right = "–"
    if result["accuracy"] is not None:
        right = "{:.1f} % ({:.0f}–{:.0f})".format(*(100 * value for value in result["accuracy"]))
    words = []
    for text, value in result["perplexity"].items():
        change = result["perplexity_change"][text]
        words.append(f"{value:.1f} ({change:+.1f})" if change else f"{value:.1f} (0)")
    seen = [f"{100 * result['knn_overlap']:.1f} %", f"{result['cka']:.4f}"]
    learned = [f"{result['loss'][0]:.2f} → {result['loss'][-1]:.2f}", right]
    return "| " + " | ".join([result["strategy"], *learned, *words, *seen]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--align-steps", type=int, default=30)
    parser.add_argument("--tests", type=int, default=100, help="questions that are asked; 0 asks none")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a model whose connector is trained; by default one is made first")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        start = args.start or align(folder, args.align_steps, args.seed)
        results = []
        print("| strategy | loss | right | English perplexity | Korean perplexity | neighbours kept | CKA |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name in STRATEGIES:
            results.append(measure(name, start, folder, args))
            print(row(results[-1]), flush=True)
        print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
