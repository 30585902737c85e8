"""Zero-shot classification: a picture is what the prompts say that lie nearest (CLIP, arXiv 2103.00020, section 3.1.4).

A label's vector is the mean of its prompts' vectors, made length 1 again.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chiasm.data.captions import CaptionProcessor, caption_of
from chiasm.data.collation import load_pixels
from chiasm.data.schema import Problem, Sample, SampleError, Samples
from chiasm.evaluation.evaluate import EvalResult, check, names_of
from chiasm.evaluation.retrieval import RetrievalModel, chance, found_within, outcome, proportion
from chiasm.evaluation.wrong_pictures import wrong_pictures

TEMPLATES = ("{}", "a picture of {}", "an image that shows {}", "a drawing of {}")
KS = (1, 5)
Progress = Callable[[int, int], None]


@torch.no_grad()
def label_vectors(
    model: RetrievalModel,
    processor: CaptionProcessor,
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 64,
) -> Float[Tensor, "labels P"]:
    """A vector of length 1 for every label.

    Raises:
        ValueError: no labels, one text in place of a list, no templates, or a template has no `{}`.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels is the text {labels!r}, expected a list of labels")
    if not labels or not templates:
        raise ValueError(f"{len(labels)} label(s) and {len(templates)} template(s); at least one of each is needed")
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"template {wrong[0]!r} has no {{}} where the label stands")
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    vectors = []
    for start in range(0, len(prompts), batch_size):
        inputs = processor(text=prompts[start : start + batch_size]).items()
        vectors.append(model.embed_texts(**{name: tensor.to(model.device) for name, tensor in inputs}))
    return F.normalize(torch.cat(vectors).unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)


@torch.no_grad()
def evaluate_zero_shot(
    model: RetrievalModel,
    processor: CaptionProcessor,
    samples: Samples,
    templates: Sequence[str] = TEMPLATES,
    *,
    control: bool = True,
    ks: Sequence[int] = KS,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> EvalResult:
    """Accuracy@k where the labels are all distinct captions of the samples, beside another sample's picture.

    Raises:
        ValueError: no samples, or batches of none.
        SampleError: a sample has no caption, or not exactly one readable picture.
    """
    check(samples, batch_size)
    said = [_label(sample) for sample in samples]
    labels = list(dict.fromkeys(said))
    vectors = label_vectors(model, processor, labels, templates).float()
    scores = []
    for start in range(0, len(samples), batch_size):
        pixels = [load_pixels(samples[i], processor) for i in range(start, min(start + batch_size, len(samples)))]
        patches = model.patches(torch.cat([p for p in pixels if p is not None]).to(model.device, model.dtype))
        scores.append(model.similarity(model.embed_images(patches).float(), vectors).cpu())
        if progress is not None:
            progress(min(start + batch_size, len(samples)), len(samples))
    table, right = torch.cat(scores), torch.tensor([[label == own for label in labels] for own in said])
    donors, notes = wrong_pictures(samples) if control else ({}, [])
    hits = found_within(table, right, ks)
    others = found_within(table[list(donors.values())], right[list(donors)], ks) if donors else {}
    by_chance = chance(right, ks)
    summary = [
        proportion(f"accuracy@{k}", hits[k].tolist(), others[k].tolist() if others else [], by_chance[k]) for k in ks
    ]
    best = [labels[index] for index in table.argmax(dim=1).tolist()]
    rows = []
    for name, sample, own, answer, found in zip(
        names_of(samples), samples, said, best, hits[ks[0]].tolist(), strict=True
    ):
        first = f"accuracy@{ks[0]}"
        asked = {"id": name, "sample": sample.id, "skill": first}
        rows.append(outcome(asked, own, first, found) | {"expected": own, "answer": answer})
    return EvalResult(rows, summary, [*notes, f"{len(labels)} labels, {len(templates)} prompt(s) each"])


def _label(sample: Sample) -> str:
    if len(sample.images) != 1 or not caption_of(sample):
        raise SampleError(sample.id, [Problem("no answer", "a picture to classify needs one label and no company")])
    return caption_of(sample)
