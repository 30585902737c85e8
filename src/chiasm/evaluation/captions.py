"""CIDEr (arXiv 1411.5726) and BLEU (https://aclanthology.org/P02-1040) of captions, by the libraries that keep them.

They judge a corpus, not an answer: both are pycocoevalcap's and sacrebleu's own numbers, on the words of
`chiasm.evaluation.metrics.tokens`, since COCO's tokenizer needs Java.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from chiasm.evaluation.metrics import tokens
from chiasm.evaluation.skills import ALL, Row, bootstrap

CAPTION_METRICS = ("token_f1", "anls")
PACKAGES = ("pycocoevalcap", "sacrebleu")
MISSING = "CIDEr and BLEU need the packages pycocoevalcap and sacrebleu: pip install 'chiasm[captions]'"
FEWEST = 2
"""Captions of which CIDEr can tell rare words from common ones."""


def available() -> bool:
    """Whether both libraries are installed."""
    return all(find_spec(package) is not None for package in PACKAGES)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every answer, on its scale from 0 to 10; the corpus' CIDEr is the mean."""
    from pycocoevalcap.cider.cider import Cider

    expected = {place: [_words(text) for text in texts] for place, texts in enumerate(references)}
    given = {place: [_words(answer)] for place, answer in enumerate(answers)}
    return [float(score) for score in Cider().compute_score(expected, given)[1]]


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, from 0 to 100."""
    import sacrebleu

    most = max(map(len, references))
    columns: Any = [[_words(texts[i]) if i < len(texts) else None for texts in references] for i in range(most)]
    given = [_words(answer) for answer in answers]
    return float(sacrebleu.corpus_bleu(given, columns, tokenize="none", force=True).score)


def add_caption_scores(summary: Sequence[Row], rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """The summary with `cider`, its interval `cider_low` and `cider_high`, and `bleu` for skills that are captions."""
    return [{**row, **_scores([r for r in rows if row["skill"] in (ALL, r["skill"])], seed)} for row in summary]


def has_captions(rows: Sequence[Row]) -> bool:
    """Whether any answer is judged as a caption."""
    return any(row["metric"] in CAPTION_METRICS for row in rows)


def _scores(rows: Sequence[Row], seed: int) -> Row:
    if len(rows) < FEWEST or not all(row["metric"] in CAPTION_METRICS for row in rows):
        return {}
    answers, references = [row["answer"] for row in rows], [row["references"] for row in rows]
    each = cider(answers, references)
    low, high = bootstrap(each, seed)
    return {"cider": fmean(each), "cider_low": low, "cider_high": high, "bleu": bleu(answers, references)}


def _words(text: str) -> str:
    return " ".join(tokens(text))
