"""Scores of one answer against its accepted answers: exact match, VQA accuracy, ANLS, token F1, containment.

Every function is pure, takes `(answer, references)` and returns a number from 0 to 1. `references` is one string or
several, of which the best match counts. Text is compared after Unicode NFKC and case folding, in any script.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

References = str | Sequence[str]

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen"
_UNITS += " fourteen fifteen sixteen seventeen eighteen nineteen"
_TEN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_KOREAN = "하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉 열"
_TENS = {word: 10 * n for n, word in enumerate(_TEN_WORDS.split(), start=2)}
NUMBER_WORDS: dict[str, int] = {word: n for n, word in enumerate(_UNITS.split())} | _TENS
NUMBER_WORDS |= {word: n for n, word in enumerate(_KOREAN.split(), start=1)}

_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff\ufe0e\ufe0f"))
_ARTICLE = re.compile(r"(?<![\w'’-])(?:a|an|the)\s+(?=[\"'“‘«(\[]*\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER_MARK = re.compile(r"(?<=\d)[.:/](?=\d)|(?<=\d)[%‰]|(?<![^\s(])-(?=\d)")
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff])"
)


def fold(text: str) -> str:
    """One spelling of the same characters: NFKC, case folded, invisible characters dropped, single spaces."""
    text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE).replace("−", "-")
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def normalise(text: str) -> str:
    """The form in which two short answers are compared: "The three Cats!" and "3 cats" are the same.

    Case, punctuation, whitespace and English articles are dropped (an article is one only before another word: the
    choice "A" stays); number words up to 99 in English, up to ten in Korean, and the digits of every script become
    ASCII digits. Marks inside a number (3.5, 10:30, 1/2, -3, 10%) stay. A text of nothing but punctuation stays too.
    """
    folded = fold(text)
    bare = _THOUSANDS.sub("", _ARTICLE.sub("", folded))
    kept = {match.start() for match in _NUMBER_MARK.finditer(bare)}
    characters = []
    for position, character in enumerate(bare):
        if unicodedata.category(character).startswith("P") and position not in kept:
            character = "" if character in "'’" else " "
        characters.append(character)
    return " ".join(_digits("".join(characters).split())) or folded


def _digits(words: list[str]) -> list[str]:
    """Write every number word as ASCII digits; a ten and its unit ("twenty one") become one number."""
    written: list[str] = []
    previous = ""
    for word in words:
        value = NUMBER_WORDS.get(word)
        if value is None and len(word) == 1 and not word.isascii():
            numeric = unicodedata.numeric(word, -1.0)
            value = int(numeric) if numeric >= 0 and numeric.is_integer() else None
        if value is not None and 0 < value < 10 and previous in _TENS:
            written[-1] = str(_TENS[previous] + value)
        elif value is not None:
            written.append(str(value))
        else:
            written.append("".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in word))
        previous = word
    return written


def tokens(text: str) -> list[str]:
    """The words of a normalised text. Scripts that do not separate words by spaces, and Korean, whose particles stick
    to them, are counted by character, as the official scorers of MLQA (Chinese) and KorQuAD do."""
    return _UNSPACED.sub(r" \1 ", normalise(text)).split()


def exact_match(answer: str, references: References) -> float:
    """1 when the answer equals a reference after `normalise`."""
    given = normalise(answer)
    return float(any(given == normalise(reference) for reference in _several(references)))


def contains(answer: str, references: References) -> float:
    """1 when the tokens of a reference stand in the answer in one piece: "It is a cat." contains "cat", not "at".

    For verbose models. Lenient by nature ("not a cat" contains "cat"), so it stands beside exact match, not for it.
    """
    given = f" {' '.join(tokens(answer))} "
    return float(any(f" {' '.join(tokens(reference))} " in given for reference in _several(references)))


def token_f1(answer: str, references: References) -> float:
    """Harmonic mean of precision and recall over the bag of tokens, best reference (SQuAD, Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250)."""
    given = Counter(tokens(answer))
    return max(_f1(given, Counter(tokens(reference))) for reference in _several(references))


def _f1(given: Counter[str], expected: Counter[str]) -> float:
    if not given or not expected:
        return float(given == expected)
    return 2 * (given & expected).total() / (given.total() + expected.total())


def anls(answer: str, references: References, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity, 0 from an edit distance of `threshold` of the longer text on, best reference
    (ST-VQA, Biten et al. 2019, https://arxiv.org/abs/1905.13648). The mean over questions is the ANLS.

    Case and whitespace are ignored, punctuation is not; the unit is the NFKC character (for Korean the syllable).
    """
    given = fold(answer)
    distances = (_relative_distance(given, fold(reference)) for reference in _several(references))
    return max(1.0 - distance if distance < threshold else 0.0 for distance in distances)


def _relative_distance(a: str, b: str) -> float:
    return levenshtein(a, b) / max(len(a), len(b), 1)


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_UNITS.split()[:11])}


def normalise_vqa(text: str) -> str:
    """The normalisation of the official VQA scorer (https://visualqa.org/evaluation.html), after NFKC.

    Punctuation is dropped where it touches a space (and everywhere when the text holds a number with a comma) and
    becomes a space elsewhere; a period stays only before a digit; "none" and zero to ten become digits; articles go.
    The scorer's table of contractions only restores missing apostrophes ("dont"), so both sides lose them here instead.
    The scorer skips all this when the annotators are unanimous; here it always runs, as in the EvalAI version.
    """
    folded = fold(text)
    bare = folded
    comma_number = re.search(r"\d,\d", folded) is not None
    for mark in _VQA_PUNCTUATION:
        drop = comma_number or f"{mark} " in folded or f" {mark}" in folded
        bare = bare.replace(mark, "" if drop else " ")
    bare = re.sub(r"\.(?!\d)|['’]", "", bare)
    words = [_VQA_NUMBERS.get(word, word) for word in bare.split() if word not in ("a", "an", "the")]
    return " ".join(words) or folded


def vqa_accuracy(answer: str, references: References) -> float:
    """Agreement with annotators: the mean over every annotator left out of min(1, others who agree / 3) (Antol et al.
    2015, https://arxiv.org/abs/1505.00468). With ten annotators 0, 1, 2, 3, 4+ who agree give 0, 0.3, 0.6, 0.9, 1.

    With fewer than four references the others cannot be three: their number takes its place; one reference is a match.
    """
    given = normalise_vqa(answer)
    expected = [normalise_vqa(reference) for reference in _several(references)]
    agree = sum(reference == given for reference in expected)
    if len(expected) == 1:
        return float(agree)
    needed = min(3, len(expected) - 1)
    scores = [min(1.0, (agree - (reference == given)) / needed) for reference in expected]
    return sum(scores) / len(scores)


def _several(references: References) -> list[str]:
    listed = [references] if isinstance(references, str) else list(references)
    if not listed:
        raise ValueError("references is empty: give at least one accepted answer")
    return listed


METRICS: dict[str, Callable[[str, References], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "token_f1": token_f1,
}
