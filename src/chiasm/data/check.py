"""Looks at every sample and picture of a data set before training does, and names each one that cannot be used."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from chiasm.data.schema import DAMAGED_SHARD, ImageError, ImageRef, Problem, Sample, SampleError, Samples, text_of

KINDS = {
    "unreadable row": "the row is not valid, or in no known layout",
    DAMAGED_SHARD: "a tar that is cut off or damaged: the samples from there on are lost",
    "placeholders": "as many image placeholders as pictures are needed",
    "role": "roles are system (first only), then user and assistant in turn",
    "no answer": "nothing to learn or to score: the assistant says nothing",
    "empty": "a message without content",
    "missing picture": "the file is not there",
    "broken picture": "truncated, damaged, or not a picture",
    "huge picture": "more pixels or bytes than the limit",
    "too long": "more tokens than the limit",
    "cut answer": "an answer that ends behind the limit of tokens (a warning: training learns its beginning)",
    "duplicate id": "several samples have this id (a warning: they stay together in a hold-out)",
}
"""What a `Problem.kind` means."""

WARNINGS = ("cut answer", "duplicate id")
_BATCH = 512


@runtime_checkable
class Encodes(Protocol):
    """A tokenizer, of transformers or of tokenizers."""

    def encode(self, text: str) -> Any: ...


@dataclass(frozen=True)
class Finding(Problem):
    """A problem with the place where it was found: the sample's index in the data and its id."""

    index: int = -1
    id: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`: what was looked at, and the findings in the order of the data."""

    samples: int
    images: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing that would stop training; warnings aside."""
        return not self.bad_ids()

    def bad_ids(self) -> list[str]:
        """Ids of the unusable samples, each once."""
        return list(dict.fromkeys(finding.id for finding in self.findings if finding.kind not in WARNINGS))

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: samples, images, ok, counts (by kind), findings (index, id, kind, reason, file)."""
        findings = [{key: getattr(f, key) for key in ("index", "id", "kind", "reason", "file")} for f in self.findings]
        counts = dict(Counter(finding.kind for finding in self.findings))
        return {"samples": self.samples, "images": self.images, "ok": self.ok, "counts": counts, "findings": findings}

    def summary(self, at_most: int = 20) -> str:
        """Plain text: totals, then up to `at_most` findings of every kind."""
        lines = [f"{self.samples:,} samples, {self.images:,} pictures: {len(self.bad_ids()):,} samples cannot be used"]
        for kind, meaning in KINDS.items():
            found = [finding for finding in self.findings if finding.kind == kind]
            if found:
                lines.append(f"{kind}: {len(found):,} ({meaning})")
                lines += [f"  {f.index}  {f.id}  {f'{f.file}: ' if f.file else ''}{f.reason}" for f in found[:at_most]]
                lines += [f"  ... and {len(found) - at_most:,} more"] if len(found) > at_most else []
        return "\n".join(lines)


def check(
    samples: Samples,
    *,
    answered: bool = True,
    tokenizer: Encodes | None = None,
    max_tokens: int | None = None,
    tokens_per_image: int = 0,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
    encode: Callable[[Sample], Any] | None = None,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Take every sample, decode every picture, and report what cannot be used.

    Args:
        samples: from `read` or any sequence; one that raises a ValueError for a sample is reported with its reason.
        answered: a conversation must end with an answer.
        tokenizer, max_tokens: conversations with more tokens of text, plus `tokens_per_image` for each picture, are
            found; the chat template's own few tokens are not counted.
        max_pixels: a limit below the one that the pictures carry.
        max_bytes: of a picture's file.
        encode: makes a model's tokens of every sample, as training does; what its SampleErrors say is found too.
        threads: pictures are decoded by so many threads.
        progress: called with (samples looked at, all samples).
    """
    if (tokenizer is None) != (max_tokens is None):
        raise ValueError("tokenizer and max_tokens belong together: give both, or neither")
    for name, limit in (("max_pixels", max_pixels), ("max_bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, expected a whole number above 0")
    findings: list[Finding] = []
    ids: Counter[str] = Counter()
    images, known = 0, _Pictures(max_pixels, max_bytes)

    def look(index: int) -> tuple[str, int, list[Problem]]:
        try:
            sample = samples[index]
        except SampleError as error:
            return error.sample_id, 0, error.problems
        except ValueError as error:
            return f"number {index}", 0, [Problem("unreadable row", str(error))]
        problems = sample.problems(answered)
        if tokenizer is not None and max_tokens is not None and not problems:
            problems += _too_long(sample, tokenizer, max_tokens, tokens_per_image)
        problems += [problem for image in sample.images if (problem := known.look(image))]
        return sample.id, len(sample.images), problems

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(samples), _BATCH):
            batch = range(start, min(start + _BATCH, len(samples)))
            for index, (sample_id, count, problems) in zip(batch, pool.map(look, batch), strict=True):
                images += count
                if encode is not None and not problems:
                    problems = _unread(samples[index], encode)
                ids[sample_id] += 1
                if ids[sample_id] > 1:
                    problems = [*problems, Problem("duplicate id", f"number {ids[sample_id]} with this id")]
                findings += [Finding(p.kind, p.reason, p.file, index, sample_id) for p in problems]
                if progress:
                    progress(index + 1, len(samples))
    return CheckReport(len(samples), images, findings)


def _unread(sample: Sample, encode: Callable[[Sample], Any]) -> list[Problem]:
    """What is wrong with a sample for a model; one after the other, since tokenizers bear no threads."""
    try:
        encode(sample)
    except SampleError as error:
        return error.problems
    return []


class _Pictures:
    """Decodes each file once, however many samples show it."""

    def __init__(self, max_pixels: int | None, max_bytes: int | None) -> None:
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        self.seen: dict[Path, Problem | None] = {}

    def look(self, image: ImageRef) -> Problem | None:
        if image.path is None:
            return self._decode(image)
        if image.path not in self.seen:
            self.seen[image.path] = self._decode(image)
        return self.seen[image.path]

    def _decode(self, image: ImageRef) -> Problem | None:
        if self.max_bytes is not None and image.num_bytes() > self.max_bytes:
            reason = f"has {image.num_bytes():,} bytes, the limit is {self.max_bytes:,}"
            return Problem("huge picture", reason, image.name)
        if self.max_pixels is not None and self.max_pixels < image.max_pixels:
            image = replace(image, max_pixels=self.max_pixels)
        try:
            image.load()
        except ImageError as error:
            return Problem(error.kind, error.reason, image.name)
        except ValueError as error:
            return Problem("broken picture", str(error), image.name)
        return None


def _too_long(sample: Sample, tokenizer: Encodes, max_tokens: int, tokens_per_image: int) -> list[Problem]:
    text = sum(len(tokenizer.encode(text_of(message["content"]))) for message in sample.messages)
    total = text + tokens_per_image * len(sample.images)
    if total <= max_tokens:
        return []
    pictures = (
        f" and {len(sample.images)} x {tokens_per_image} for pictures" if tokens_per_image and sample.images else ""
    )
    return [Problem("too long", f"{text:,} tokens of text{pictures}, the limit is {max_tokens:,}")]
