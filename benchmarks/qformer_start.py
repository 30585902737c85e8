"""What BLIP-2's first stage is worth: one Q-Former, its starts, the same questions learned from on real weights.

At random but for MiniLM's layers, or after ITC, ITM and ITG on captions, where finding a caption's picture is measured
too; each as it is or fitted to the closed form of an mlp. Then LoRA and the same samples in the same order for all.
    python benchmarks/qformer_start.py --epochs 4 --samples 480
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import chiasm
from chiasm import api
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.demo import SKILLS, questions
from chiasm.training.recipe import load_recipe

CONNECTOR = {"name": "qformer", "num_queries": 16, "init_from": "minilm-l6"}
STARTS = {
    "random": ("keep", 1e-4),
    "closed form": ("closed_form", 1e-4),
    "first stage": ("keep", 1e-4),
    "first stage, projection at 1e-3": ("keep", 1e-4),
    "first stage, closed form": ("closed_form", 1e-4),
}
"""Name → how the second training begins, and the connector's rate."""


def first_stage(folder: Path, args: argparse.Namespace) -> Path:
    """BLIP-2's representation learning on captions; answers with its run."""
    stage = {"captions.init_from": "minilm-l6", "epochs": args.epochs, "min_steps": 1}
    changes = [f"stages.representation.{key}={value}" for key, value in stage.items()]
    recipe = load_recipe("blip2", [*changes, f"batch_size={args.pairs}"])
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
    captions = EmojiScenes("train", size=args.captions, seed=args.seed, form="caption")
    api.train(recipe, str(folder / "new"), captions, folder / "first")
    return folder / "first"


def recalls(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """How often a caption's picture is found among the others, and the other way round."""
    scenes = list(EmojiScenes("test", size=args.tests, seed=args.seed, form="caption"))
    return {"retrieval": api.evaluate(str(run / "representation"), scenes).summary}


def second(name: str, start: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Questions, LoRA, and how many are answered, with the pictures and with wrong ones."""
    init, rate = STARTS[name]
    parts = {
        "vision": "frozen",
        "connector": {"tune": "full", "lr": rate},
        "language": {"tune": "lora", "lr": 1.5e-3, "rank": 16, "alpha": 32},
    }
    stage: dict[str, Any] = {"name": "instruct", "samples": args.samples, "batch_size": 4, "warmup": 0.05, "init": init}
    stage |= {"data": "questions", "parts": parts, "validation": {"samples": 16, "answers": 0}}
    if "projection" in name:
        stage["patterns"] = {"connector.proj.*": {"tune": "full", "lr": 1e-3}}
    captions = EmojiScenes("train", size=400, seed=args.seed + 1000, form="caption")
    data = [*captions, *questions(args.seed, args.samples)]
    held_out = EmojiScenes("validation", size=16, seed=args.seed, weights=SKILLS)
    run = folder / name.replace(" ", "-").replace(",", "")
    result = api.train(load_recipe({"stages": [stage]}), str(start), data, run, validation_data=held_out)
    test = EmojiScenes("test", size=args.tests, seed=args.seed, weights=SKILLS)
    return {"answers": api.evaluate(str(result.model), test, batch_size=32, max_new_tokens=8).summary}


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table: right answers in all and by skill."""
    total = result["answers"][-1]
    skills = [next(line for line in result["answers"] if line["skill"] == skill) for skill in SKILLS]
    cells = ["{:.1f} % ({:.0f}–{:.0f})".format(*(100 * total[key] for key in ("accuracy", "low", "high")))]
    cells += [f"{100 * share:.0f} %" for share in (total["control_accuracy"], *(line["accuracy"] for line in skills))]
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=1600)
    parser.add_argument("--epochs", type=int, default=4, help="of the first stage, through all captions")
    parser.add_argument("--pairs", type=int, default=32, help="captions that are compared with each other")
    parser.add_argument("--samples", type=int, default=480, help="scenes of four questions each, for every start")
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=Path, help="a run of the first stage; by default it is made")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        chiasm.connect(connector=CONNECTOR, dtype="float32", seed=args.seed).save_pretrained(folder / "new")
        run = args.first or first_stage(folder, args)
        print(json.dumps(recalls(run, args)), flush=True)
        print(f"| start | right | wrong picture | {' | '.join(SKILLS)} |")
        print(f"|---|---:|---:|{'---:|' * len(SKILLS)}")
        for name in args.starts:
            result = second(name, run / "model" if "first stage" in name else folder / "new", folder, args)
            print(row(name, result), flush=True)
            print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
