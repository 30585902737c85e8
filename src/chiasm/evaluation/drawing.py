"""Pictures drawn for requests against the true ones: is a drawing nearest to the picture that its own words asked for?

The true pictures of all requests are the candidates. Nearness is that of colours in small, smoothed pictures, and of a
judge's vectors where there is one; beside it stands what another request's drawing reaches, and what chance does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from chiasm.data.collation import load_pixels
from chiasm.data.drawing import REQUEST, asked_in_words
from chiasm.data.schema import Samples
from chiasm.data.splits import Subset
from chiasm.data.unified import UnifiedProcessor
from chiasm.evaluation.evaluate import EvalResult, check, names_of
from chiasm.evaluation.retrieval import chance, found_within, outcome, proportion, recall
from chiasm.evaluation.skills import Row, bootstrap
from chiasm.evaluation.wrong_pictures import wrong_pictures
from chiasm.fusion.unified import UnifiedModel
from chiasm.generation.draw import Brush, draw_codes
from chiasm.generation.heatmap import grid
from chiasm.vision.image_tokenizer import as_pictures

KS = (1, 5)
SIDE = 16
"""Pixels of a side at which colours are compared."""
SHOWN = 12
"""Drawings that are left to look at."""
Judge = Callable[[list[Image.Image]], Tensor]
Progress = Callable[[int, int], None]


def requests(samples: Samples, known: Iterable[str] = ()) -> tuple[Samples, list[str]]:
    """The samples that ask for a picture in words, each words once, and a note on those that `known` has too.

    Raises:
        ValueError: there is none.
    """
    others, asked, taken = set(known), dict[str, int](), 0
    for index, sample in enumerate(samples):
        words = asked_in_words(sample)
        if words is None:
            continue
        taken += words in others
        if words not in others:
            asked.setdefault(words, index)
    if not asked:
        told = f"all {taken} requests for a picture are known" if taken else "no sample asks for a picture in words"
        raise ValueError(f"{told}; emoji-scenes:test,form=drawing has such, of which not-in leaves out known ones")
    return Subset(samples, list(asked.values())), [f"requests left out, since they are known: {taken}"] if taken else []


def known_requests(samples: Samples) -> set[str]:
    """The words of all requests for a picture."""
    return {words for sample in samples if (words := asked_in_words(sample)) is not None}


@torch.no_grad()
def evaluate_drawings(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    samples: Samples,
    brush: Brush | None = None,
    *,
    judge: Judge | None = None,
    control: bool = True,
    ks: Sequence[int] = KS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> EvalResult:
    """Recall@k of the true picture by the drawn one, and the PSNR to it and to the others.

    Args:
        samples: those of `requests`.
        judge: pictures → vectors of length 1, whose cosines are a second nearness.
        control: also with the drawing for another sample's words in the place of each.

    Raises:
        ValueError: no samples, or batches of none.
        SampleError: a picture cannot be read.
    """
    check(samples, batch_size)
    brush = brush or Brush(seed=0)
    true, drawn, back = list[Tensor](), list[Tensor](), list[Tensor]()
    shown, seen = list[Tensor](), list[Tensor]()
    for start in range(0, len(samples), batch_size):
        chunk = [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
        own = None if brush.seed is None else brush.seed + start
        codes = draw_codes(model, processor, [sample.prompt for sample in chunk], replace(brush, seed=own))
        pixels = [load_pixels(sample, processor) for sample in chunk]
        true.append(torch.cat([picture for picture in pixels if picture is not None]).float())
        drawn.append(model.vision.decode(codes).float().cpu())
        back.append(model.vision.decode(model.vision.encode(true[-1].to(model.device))).float().cpu())
        if judge is not None:
            shown.append(judge(as_pictures(true[-1])).float().cpu())
            seen.append(judge(as_pictures(drawn[-1])).float().cpu())
        if progress is not None:
            progress(start + len(chunk), len(samples))
    truth, drawings = torch.cat(true), torch.cat(drawn)
    right = _same(truth)
    tables = {"colours": nearness(drawings, truth)}
    if judge is not None:
        tables["the judge"] = torch.cat(seen) @ torch.cat(shown).T
    donors, notes = wrong_pictures(samples) if control else ({}, [])
    summary = [row for name, table in tables.items() for row in _recalls(name, table, right, ks, donors)]
    decibels, psnrs = _decibels(psnr(drawings, truth), psnr(torch.cat(back), truth), right)
    summary[0] |= decibels
    summary[0]["tokenizer_accuracy"] = recall(nearness(torch.cat(back), truth), right, ks[:1])[ks[0]]
    rows = _rows(samples, tables["colours"], right, ks, psnrs)
    sheet = _sheet(samples, as_pictures(drawings[:SHOWN]), as_pictures(truth[:SHOWN]))
    return EvalResult(rows, summary, [*notes, *drawing_lines(summary)], sheet=sheet)


def nearness(drawn: Float[Tensor, "Q 3 h w"], true: Float[Tensor, "C 3 h w"]) -> Float[Tensor, "Q C"]:
    """The negative distance of colours in pictures of `SIDE` × `SIDE`, each of which is the mean of what was there."""
    small = [F.adaptive_avg_pool2d(pictures, SIDE).flatten(1) for pictures in (drawn, true)]
    return -torch.cdist(small[0], small[1], compute_mode="donot_use_mm_for_euclid_dist")


def psnr(drawn: Float[Tensor, "Q 3 h w"], true: Float[Tensor, "C 3 h w"]) -> Float[Tensor, "Q C"]:
    """Peak signal-to-noise ratio in decibels of every pair; values from -1 to 1."""
    squares = [((picture - true) / 2).square().flatten(1).mean(dim=1) for picture in drawn]
    return -10 * torch.stack(squares).clamp(min=1e-10).log10()


def drawing_lines(summary: Sequence[Row]) -> list[str]:
    """What a table of shares cannot say."""
    row = summary[0]
    lines = [f"PSNR to its own true picture {row['psnr']:.2f} dB ({row['psnr_low']:.2f}–{row['psnr_high']:.2f})"]
    if row["psnr_gain"] is not None:
        gain = f"{row['psnr_gain']:+.2f} dB ({row['psnr_gain_low']:+.2f} to {row['psnr_gain_high']:+.2f})"
        lines[0] += f", to those of others {row['other_psnr']:.2f} dB: {gain}"
    given_back = f"{row['tokenizer_psnr']:.2f} dB, of which {row['tokenizer_accuracy']:.1%} are nearest to themselves"
    return [*lines, f"the image tokenizer alone gives the true pictures back at {given_back}"]


def drawing_fields(result: EvalResult) -> dict[str, Any]:
    """What a run's log keeps of it."""
    first = result.summary[0]
    told = {"drawn": "n", "drawn_recall": "accuracy", "drawn_chance": "chance", "drawn_psnr": "psnr"}
    return {name: first[key] for name, key in (told | {"drawn_other_psnr": "other_psnr"}).items()}


def _sheet(samples: Samples, drawn: Sequence[Image.Image], true: Sequence[Image.Image]) -> Image.Image:
    """The first drawings, each with its words, and the true picture beside it."""
    words = [samples[index].question.strip().removeprefix(REQUEST.format("")) for index in range(len(drawn))]
    pairs = zip(zip(drawn, words, strict=True), ((picture, "true") for picture in true), strict=True)
    return grid([tile for pair in pairs for tile in pair])


def _same(true: Float[Tensor, "M 3 h w"]) -> Bool[Tensor, "M M"]:
    """Which true pictures are one and the same."""
    known: dict[bytes, int] = {}
    numbers = torch.tensor([known.setdefault(picture.numpy().tobytes(), len(known)) for picture in true])
    return numbers[:, None] == numbers


def _recalls(
    name: str, table: Float[Tensor, "M M"], right: Bool[Tensor, "M M"], ks: Sequence[int], donors: dict[int, int]
) -> list[Row]:
    hits, by_chance = found_within(table, right, ks), chance(right, ks)
    others = found_within(table[list(donors.values())], right[list(donors)], ks) if donors else {}
    return [
        proportion(f"by {name}, recall@{k}", hits[k].tolist(), others[k].tolist() if others else [], by_chance[k])
        for k in ks
    ]


def _decibels(
    drawn: Float[Tensor, "M M"], back: Float[Tensor, "M M"], right: Bool[Tensor, "M M"]
) -> tuple[dict[str, Any], list[float]]:
    """Means and bootstrap intervals for the summary, and every drawing's PSNR to its own picture."""
    own = drawn.diagonal().tolist()
    low, high = bootstrap(own)
    told = {"psnr": fmean(own), "psnr_low": low, "psnr_high": high, "other_psnr": None}
    told |= {"psnr_gain": None, "psnr_gain_low": None, "psnr_gain_high": None}
    strangers = [row[~same].mean().item() if (~same).any() else None for row, same in zip(drawn, right, strict=True)]
    gains = [mine - others for mine, others in zip(own, strangers, strict=True) if others is not None]
    if gains:
        low, high = bootstrap(gains)
        told |= {"other_psnr": fmean(o for o in strangers if o is not None), "psnr_gain": fmean(gains)}
        told |= {"psnr_gain_low": low, "psnr_gain_high": high}
    return told | {"tokenizer_psnr": back.diagonal().mean().item()}, own


def _rows(
    samples: Samples,
    table: Float[Tensor, "M M"],
    right: Bool[Tensor, "M M"],
    ks: Sequence[int],
    psnrs: list[float],
) -> list[Row]:
    names, skill = names_of(samples), f"by colours, recall@{ks[0]}"
    found, nearest = found_within(table, right, ks[:1])[ks[0]].tolist(), table.argmax(dim=1).tolist()
    rows = []
    for index, sample in enumerate(samples):
        asked = {"id": names[index], "sample": sample.id, "skill": skill}
        told = {"question": asked_in_words(sample), "psnr": psnrs[index], "nearest": names[nearest[index]]}
        rows.append(outcome(asked, "", f"recall@{ks[0]}", found[index]) | told)
    return rows
