"""Raster, rope2d or mrope, with and without modality embeddings: which reads positions on grids it never saw?

A picture is a grid of coloured cells, one patch each, and one of them is white. The question is a direction, the
answer the colour of the white cell's neighbour there. Left and right are one token away whatever the grid; above and
below are as far away as the grid is wide, so that a model which only counts tokens must know the width. Every choice
trains the same small model from the same seeds, on small grids; it is asked on those and on larger ones.

    python benchmarks/unified_positions.py                  one thread, about half an hour; rows for docs/unified.md
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.fusion.unified import UnifiedModel
from chiasm.fusion.unified_build import build_unified
from chiasm.positions.sequence import POSITIONS

COLOURS = torch.tensor(
    [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.float
)
WHITE = len(COLOURS) - 1
STEPS_TO = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])
"""Left, right, above, below; their tokens follow those of the colours."""
WORDS = len(COLOURS) + len(STEPS_TO)
TRAINED, LARGER = range(3, 7), range(8, 11)
PATCH = 2
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
Z = 1.96


def build(positions: str, seed: int) -> UnifiedModel:
    given = {"image_input": {"name": "patches", "patch_size": PATCH}, "positions": positions, "seed": seed}
    from_nothing = {**SIZES, "vocab_size": WORDS, "initializer_range": 0.05}
    model, _ = build_unified(from_nothing, None, attention="prefix", options={"qk_norm": "rms"}, **given)
    return model


def scenes(model: UnifiedModel, count: int, grids: Sequence[int], draw: torch.Generator) -> dict[str, Tensor]:
    """Questions about pictures of one grid, which is drawn too: model inputs, directions and answers."""
    rows, columns = (int(grids[torch.randint(len(grids), (1,), generator=draw)]) for _ in range(2))
    cells = torch.randint(WHITE, (count, rows, columns), generator=draw)
    direction = torch.randint(len(STEPS_TO), (count,), generator=draw)
    down, across = STEPS_TO[direction].unbind(dim=1)
    row = _inside(rows, down, draw)
    column = _inside(columns, across, draw)
    picked = torch.arange(count)
    cells[picked, row, column] = WHITE
    answer = cells[picked, row + down, column + across]
    noise = 0.1 * torch.randn(count, rows, columns, PATCH**2, 3, generator=draw)
    pixels = (COLOURS[cells] * 2 - 1)[..., None, :] + noise
    settings = model.settings
    assert settings.row_token_id and settings.begin_token_id and settings.end_token_id
    line = [model.config.image_token_id] * columns + [settings.row_token_id]
    picture = torch.tensor([settings.begin_token_id, *line * rows, settings.end_token_id]).expand(count, -1)
    ids = torch.cat([(direction + len(COLOURS))[:, None], picture, answer[:, None]], dim=1)
    types = torch.zeros_like(ids)  # question and picture see each other
    types[:, -1] = 1
    labels = torch.full_like(ids, -100)
    labels[:, -1] = answer
    inputs = {
        "input_ids": ids,
        "token_type_ids": types,
        "labels": labels,
        "pixel_values": pixels.flatten(0, 2).flatten(1),
    }
    return inputs | {"direction": direction, "answer": answer}


def _inside(length: int, step: Tensor, draw: torch.Generator) -> Tensor:
    """Places whose neighbour in the direction is on the grid."""
    place = torch.randint(length - 1, step.shape, generator=draw)
    return torch.where(
        step < 0, place + 1, torch.where(step > 0, place, torch.randint(length, step.shape, generator=draw))
    )


def train(model: UnifiedModel, steps: int, batch: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        made = scenes(model, batch, TRAINED, draw)
        inputs = {name: made[name] for name in ("input_ids", "token_type_ids", "labels", "pixel_values")}
        model(**inputs, return_logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: UnifiedModel, grids: Sequence[int], batches: int = 12, batch: int = 64) -> dict[str, float]:
    """Share of right answers beside the white cell and above or below it; the same questions for every choice."""
    draw, right = torch.Generator().manual_seed(1_000_003), []
    for _ in range(batches):
        made = scenes(model, batch, grids, draw)
        prompt = {name: made[name][:, :-1] for name in ("input_ids", "token_type_ids")}
        logits = model(**prompt, pixel_values=made["pixel_values"], logits_to_keep=1).logits
        hit = logits[:, -1, : len(COLOURS)].argmax(dim=-1) == made["answer"]
        right += [(bool(one), int(way)) for one, way in zip(hit, made["direction"], strict=True)]
    beside = [one for one, way in right if way < 2]
    upright = [one for one, way in right if way >= 2]
    return {"left, right": sum(beside) / len(beside), "above, below": sum(upright) / len(upright)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), Z * spread


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Rows of the document, and which differences are none."""
    columns = list(next(iter(results.values())))
    lines = [f"| positions | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for word, measured in results.items():
        told = [interval(measured[column]) for column in columns]
        lines.append(f"| `{word}` | " + " | ".join(f"{mean:.1%} ± {half:.1%}" for mean, half in told) + " |")
    lines.append("")
    if any(len(values) < 2 for measured in results.values() for values in measured.values()):
        return "\n".join([*lines, "One seed tells nothing about differences."])
    for column in columns:
        best = max(results, key=lambda word, column=column: interval(results[word][column])[0])
        low = interval(results[best][column])[0] - interval(results[best][column])[1]
        equal = [word for word in results if sum(interval(results[word][column])) >= low and word != best]
        said = f"no difference from {', '.join(f'`{word}`' for word in equal)}" if equal else "better than all others"
        lines.append(f"- {column}: `{best}` is the highest, {said}.")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    columns = list(next(iter(results.values())))
    for index, (axes, column) in enumerate(zip(figure.subplots(1, len(columns), sharey=True), columns, strict=True)):
        told = [interval(measured[column]) for measured in results.values()]
        axes.errorbar([mean for mean, _ in told], range(len(told)), xerr=[half for _, half in told], fmt="o", capsize=3)
        axes.set_title(column, fontsize=8)
        axes.set_xlim(0, 1.02)
        axes.axvline(1 / WHITE, linewidth=0.7, linestyle=":", color="grey")
        if not index:
            axes.set_yticks(range(len(told)), list(results))
            axes.invert_yaxis()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--positions", nargs="*", default=list(POSITIONS), choices=POSITIONS)
    parser.add_argument("--output", type=Path, default=Path("runs/unified_positions"))
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    kept = chosen.output / "results.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in range(chosen.seeds):
        for word in chosen.positions:
            key, started = f"{word} {seed} {chosen.steps} {chosen.batch}", time.monotonic()
            if key not in done:
                model = build(word, seed)
                train(model, chosen.steps, chosen.batch, seed)
                done[key] = {"trained": accuracy(model, TRAINED), "larger": accuracy(model, LARGER)}
                kept.write_text(json.dumps(done, indent=1))
            print(f"{key}: {done[key]}  ({time.monotonic() - started:.0f} s)", flush=True)
    results = {
        word: {
            f"{where}: {way}": [
                done[f"{word} {seed} {chosen.steps} {chosen.batch}"][where][way] for seed in range(chosen.seeds)
            ]
            for where in ("trained", "larger")
            for way in ("left, right", "above, below")
        }
        for word in chosen.positions
    }
    text = table(results)
    (chosen.output / "table.md").write_text(text + "\n")
    plot(results, chosen.output / "positions.svg")
    print(text)


if __name__ == "__main__":
    main()
