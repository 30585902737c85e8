"""What `init: closed_form` saves: naming on emoji scenes, connector-only stage, with it and without it.

Real weights (the defaults of `chiasm.connect()`), the same data, rates and order of samples in both runs; at regular
steps the loss and the answers on scenes that neither run trains on.

`--starts` asks every connector of `recipes/compare.yaml`, before any training: of the things in new pictures, how many
have a name that lies nearest to a visual token, and how long did the start take?

    python benchmarks/closed_form.py [--quick] [--steps 48] [--every 6] [--threads 2] [--starts]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import chiasm
from chiasm.comparison.plan import load_plan
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.data.emoji_vocabulary import OBJECTS, name_of
from chiasm.data.schema import Sample
from chiasm.training.closed_form import WordEmbeddings, closed_form
from chiasm.training.log import read_log
from chiasm.training.trainer import train
from measure import ForeignLoad, machine

BATCH = 16
STARTS = ("keep", "closed_form")
NAMES = {"keep": "random", "closed_form": "closed form"}


def run(start: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One stage from one start; the events of its log."""
    vlm = chiasm.connect()
    naming = {"naming": 1}
    validation = {"every": options.every, "samples": options.asked, "answers": options.asked}
    stage = {
        "name": "align",
        "init": start,
        "steps": options.steps,
        "batch_size": BATCH,
        "validation": validation,
        "parts": {"vision": "frozen", "connector": {"tune": "full", "lr": options.lr}, "language": "frozen"},
    }

    def generate(messages: list[Any], images: list[list[Any]]) -> list[str]:
        return vlm.generate(messages, images, max_new_tokens=8)

    result = train(
        {"stages": [stage]},
        vlm.model,
        vlm.processor,
        EmojiScenes("train", size=BATCH * options.steps, weights=naming, form="both"),
        folder / start,
        validation_samples=EmojiScenes("validation", size=options.asked, weights=naming),
        generate=generate,
        quiet=True,
        cache_root=folder / "features",
    )
    return read_log(result.log)


def steps_to(validations: list[dict[str, Any]], loss: float) -> float | None:
    """The step at which the loss is reached, on a straight line between two validations; None if it never is."""
    if validations[0]["loss"] <= loss:
        return 0.0
    for before, after in pairwise(validations):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["step"] + share * (after["step"] - before["step"])
    return None


def accuracy(validation: dict[str, Any]) -> float:
    answers = validation["answers"]
    return sum(answer["correct"] for answer in answers) / len(answers)


def report(logs: dict[str, list[dict[str, Any]]]) -> str:
    """The course of both runs, and what the closed form saves."""
    seen = {start: [event for event in log if event["event"] == "validation"] for start, log in logs.items()}
    lines = [
        "| step | " + " | ".join(f"{NAMES[start]}: loss | naming" for start in STARTS) + " |",
        "|---|" + "---|---|" * len(STARTS),
    ]
    for pair in zip(*(seen[start] for start in STARTS), strict=True):
        cells = " | ".join(f"{validation['loss']:.3f} | {accuracy(validation):.0%}" for validation in pair)
        lines.append(f"| {pair[0]['step']} | {cells} |")
    begin = seen["closed_form"][0]
    reached = steps_to(seen["keep"], begin["loss"])
    (made,) = (event for event in logs["closed_form"] if event["event"] == "closed_form")
    steps = [event["samples"] / event["samples_per_second"] for event in logs["keep"] if event["event"] == "step"]
    each = sorted(steps)[len(steps) // 2]
    lines += ["", f"- the closed form: {made['seconds']:.1f} s for {made['pictures']} pictures, features cached"]
    if reached is None:
        last = seen["keep"][-1]
        lines.append(
            f"- the loss that it starts with ({begin['loss']:.3f}) is not reached from a random start within "
            f"{last['step']} steps of {BATCH} samples, {last['step'] * each:.0f} s (there it is {last['loss']:.3f})"
        )
    else:
        lines.append(
            f"- the loss that it starts with ({begin['loss']:.3f}) takes {reached:.0f} steps of {BATCH} samples from a "
            f"random start, {reached * each:.0f} s ({each:.2f} s a step)"
        )
    return "\n".join(lines)


def starts(captions: int, asked: int) -> str:
    """Every connector's start from captions: time, what it misses of the regression, names told at random and after."""
    encoded: dict[str, Tensor] = {}
    plan = load_plan("compare")
    train_on = list(EmojiScenes("train", size=captions, seed=1000, form="caption"))
    scenes = list(EmojiScenes("test", size=asked, weights={"naming": 1}))
    lines = [
        "| connector | visual tokens | start, s | missed | named at random | named after |",
        "|---|---|---|---|---|---|",
    ]
    for settings in plan.grid.connector if plan.grid else ():
        vlm = chiasm.connect(connector=settings, features=plan.base.features, dtype=torch.float32)

        def features_of(sample: Sample, vlm: chiasm.VLM = vlm) -> Tensor:
            if sample.id not in encoded:
                loaded = [image.load() for image in sample.images]
                pixels = vlm.processor.image_processor(loaded, return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    encoded[sample.id] = vlm.model.encode_images(torch.as_tensor(pixels))
            return encoded[sample.id]

        for sample in train_on:
            features_of(sample)
        before, began = named(vlm, scenes, features_of), time.monotonic()
        made = closed_form(vlm.model, vlm.processor.tokenizer, train_on, features_of)
        seconds, after = time.monotonic() - began, named(vlm, scenes, features_of)
        tokens = vlm.model.connector.num_tokens
        name = vlm.model.config.connector["name"]
        lines.append(f"| `{name}` | {tokens} | {seconds:.1f} | {made.missed:.1%} | {before:.0%} | {after:.0%} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


@torch.no_grad()
def named(vlm: chiasm.VLM, scenes: list[Sample], features_of: Callable[[Sample], Tensor]) -> float:
    """In a picture of k kinds, the share of these among the k of 64 names that come nearest to any visual token."""
    words = WordEmbeddings(vlm.model, vlm.processor.tokenizer)
    names = [name_of(code, "en") for code in OBJECTS]
    vocabulary = torch.stack([torch.stack([words.of(word) for word in name.split()]).mean(dim=0) for name in names])
    centre, right, total = vocabulary.mean(dim=0), 0, 0
    for scene in scenes:
        shown = {placed["name"] for placed in scene.meta["objects"]}
        tokens = vlm.model.connect_features(features_of(scene))[0].float() - centre
        likeness = functional.normalize(tokens, dim=1) @ functional.normalize(vocabulary - centre, dim=1).T
        right += len(shown & {names[index] for index in likeness.amax(dim=0).topk(len(shown)).indices.tolist()})
        total += len(shown)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=6, help="steps between validations")
    parser.add_argument("--asked", type=int, default=64, help="scenes of a validation")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the connector")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--starts", action="store_true", help="every connector's start, and nothing else")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.every, options.asked = 4, 2, 8
    torch.set_num_threads(options.threads)
    print(machine(options.threads), flush=True)
    if options.starts:
        with ForeignLoad() as foreign:
            print(starts(80 if options.quick else 400, 20 if options.quick else 150))
        print(f"load by others {foreign.share:.0%}", file=sys.stderr)
        return
    logs = {}
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            began = time.monotonic()
            with ForeignLoad() as foreign:
                logs[start] = run(start, options, Path(folder))
            seconds = time.monotonic() - began
            print(f"{NAMES[start]}: {seconds:.0f} s, load by others {foreign.share:.0%}", file=sys.stderr)
    print(report(logs))


if __name__ == "__main__":
    main()
