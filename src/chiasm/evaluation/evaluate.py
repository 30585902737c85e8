"""Ask a model every question of a data set, once with its own pictures and once with another sample's, and score both.

The model is a callable `generate(messages, images) -> answers` over a batch, such as `VLM.generate`: nothing here knows
how answers come about. Each assistant turn of a conversation is a question, asked with the true history before it.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from PIL import Image

from chiasm.data.drawing import draws
from chiasm.data.few_shot import put_first
from chiasm.data.schema import ImageRef, Sample, Samples, text_of
from chiasm.evaluation import captions
from chiasm.evaluation.kept import KeptAnswers
from chiasm.evaluation.metrics import METRICS, anls, contains, token_f1, tokens
from chiasm.evaluation.skills import ALL, Row, summarise
from chiasm.evaluation.wrong_pictures import wrong_pictures
from chiasm.rgb import to_rgb
from chiasm.sources.writing import whole_file

Generate = Callable[[list[list[dict]], list[list[Image.Image]]], list[str]]
Progress = Callable[[int, int], None]

CAPTION_WORDS = 5  # expected answers longer than this on average are captions
ANNOTATORS = 10  # references per question from which on they are VQA's annotators, not synonyms
SHEET = "sheet.png"
RIGHT_ENOUGH = 0.5  # the score from which on an answer counts as correct where scores are fractions


@dataclass(frozen=True)
class Question:
    """One assistant turn: the messages before it, how many of the sample's images they show, what is accepted."""

    id: str
    sample: int
    turn: int
    skill: str
    prompt: list[dict]
    num_images: int
    text: str
    references: list[str]
    examples: tuple[Sample, ...] = ()

    @property
    def messages(self) -> list[dict]:
        """The solved examples and the prompt."""
        return put_first([message for example in self.examples for message in example.messages], self.prompt)

    def pictures(self, shown: Sample) -> list[ImageRef]:
        """The examples' own pictures, then those of the sample that is shown."""
        before = [ref for example in self.examples for ref in example.images]
        return [*before, *shown.images[: self.num_images]]

    @property
    def place(self) -> tuple[int, int]:
        return self.sample, self.turn


@dataclass
class EvalResult:
    """`rows`: one dict per question; `summary`: one per skill (`skills.summarise`); `notes`: what to know about them.

    `sheet`: pictures to look at, where the answers are pictures.
    `loss` and `shuffled_loss` are the caller's: the validation loss with the right and with a wrong picture; so is
    `skipped`: `id` and `reason` of the samples that were left out because they cannot be used.
    """

    rows: list[Row]
    summary: list[Row]
    notes: list[str] = field(default_factory=list)
    loss: float | None = None
    shuffled_loss: float | None = None
    skipped: list[Row] = field(default_factory=list)
    sheet: Image.Image | None = None

    def save(self, folder: str | Path) -> Path:
        """Write `results.jsonl` (the rows), `sheet.png` and `summary.json` (everything else) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.rows)
        whole_file(folder / "results.jsonl", lines)
        rest = {key: value for key, value in vars(self).items() if key not in ("rows", "sheet")}
        if self.sheet is not None:
            self.sheet.save(folder / SHEET)
        text = json.dumps(rest, ensure_ascii=False, allow_nan=False, indent=2)
        whole_file(folder / "summary.json", text + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "EvalResult":
        """What `save` wrote."""
        folder = Path(folder)
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")
        rest = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        sheet = to_rgb(Image.open(folder / SHEET)) if (folder / SHEET).is_file() else None
        return cls(rows=[json.loads(line) for line in lines if line], **rest, sheet=sheet)


def evaluate(
    generate: Generate,
    samples: Samples,
    batch_size: int = 8,
    control: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    metric: str | None = None,
    examples: Sequence[Samples] | None = None,
    kept: KeptAnswers | None = None,
) -> EvalResult:
    """Score `generate` on `samples`, with the shuffled-image control beside it.

    Args:
        generate: a batch of conversations and their lists of RGB pictures → one answer each.
        control: ask every question with images a second time, with another sample's pictures (`wrong_pictures`).
        seed: of the control's choice and the bootstrap.
        progress: called with the answers so far and the answers in total.
        metric: a key of `METRICS` for everything; by default chosen for each skill by `choose_metric`.
        examples: for every sample, solved ones that its questions start with; the control shows them as they are.
        kept: answers of an evaluation that was stopped, which are not asked for again; new ones are added.

    A sample may list further accepted answers to its last question in `meta["answers"]`. Where a sample's id comes
    again, its question's `id` is numbered; `sample` is the id as it is. Requests for a picture are left
    out and counted.

    Raises:
        ValueError: no samples, or none answered in words; an unknown metric; not one answer a question.
        SampleError: a sample without an answer, or with an image too many or too few.
    """
    if metric is not None and metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    check(samples, batch_size)
    for sample in samples:
        sample.validate()
    names = names_of(samples)
    questions = [q for number, sample in enumerate(samples) for q in _questions(number, names[number], sample)]
    drawings = sum(draws(m) for sample in samples for m in sample.messages if m["role"] == "assistant")
    told = f"requests for a picture, which task drawing scores: {drawings}"
    if not questions:
        raise ValueError(f"nothing to answer in words; {told}")
    if examples is not None:
        questions = [replace(question, examples=tuple(examples[question.sample])) for question in questions]
    donors, notes = wrong_pictures(samples, seed) if control else ({}, list[str]())
    notes += [f"left out: {told}"] if drawings else []
    controlled = [q for q in questions if q.num_images and q.sample in donors]
    total = len(questions) + len(controlled)
    own = {question.sample: question.sample for question in questions}
    ask, tell = partial(_ask, generate, samples, batch_size, kept), progress or (lambda *_: None)
    answers = ask(questions, own, lambda done: tell(done, total))
    others = ask(controlled, donors, lambda done: tell(len(questions) + done, total))
    metrics = _metrics(questions, metric)
    rows = []
    for question in questions:
        row = _row(question, samples[question.sample], answers[question.place], metrics[question.skill])
        if question.place in others:
            row |= _control_row(row, others[question.place], samples[donors[question.sample]].id)
        rows.append(row)
    summary = summarise(rows, seed)
    if captions.has_captions(rows):
        if captions.available():
            summary = captions.add_caption_scores(summary, rows, seed)
        else:
            notes.append(captions.MISSING)
    return EvalResult(rows, summary, notes)


def check(samples: Samples, batch_size: int) -> None:
    """Refuses to evaluate nothing, or in batches of nothing."""
    if not samples:
        raise ValueError("samples is empty: there is nothing to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")


def names_of(samples: Samples) -> list[str]:
    """The samples' ids; where one comes again, as in a mixture that takes it twice, it is numbered."""
    ids = [sample.id for sample in samples]
    taken, times = set(ids), Counter[str]()
    names = []
    for sample_id in ids:
        times[sample_id] += 1
        name = sample_id
        while times[sample_id] > 1 and (name := f"{sample_id} ({times[sample_id]})") in taken:
            times[sample_id] += 1
        taken.add(name)
        names.append(name)
    return names


def _questions(number: int, name: str, sample: Sample) -> Iterator[Question]:
    said = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
    turns = [index for index in said if not draws(sample.messages[index])]
    for turn, index in enumerate(turns, start=1):
        prompt = sample.messages[:index]
        references = [text_of(sample.messages[index]["content"])]
        if index == turns[-1]:
            references = [str(answer) for answer in sample.meta.get("answers", [])] or references
        question_id = name if len(turns) == 1 else f"{name}#{turn}"
        text = text_of(prompt[-1]["content"]).strip()
        yield Question(question_id, number, turn, sample.skill or ALL, prompt, _count_images(prompt), text, references)


def _count_images(messages: list[dict]) -> int:
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return sum(part["type"] == "image" for part in parts)


def _ask(
    generate: Generate,
    samples: Samples,
    batch_size: int,
    kept: KeptAnswers | None,
    questions: list[Question],
    pictures_of: dict[int, int],
    progress: Callable[[int], None],
) -> dict[tuple[int, int], str]:
    """Answers by the question's place. `pictures_of` maps a sample to the one whose pictures are shown."""
    answers: dict[tuple[int, int], str] = {}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        asked = [(question.messages, question.pictures(samples[pictures_of[question.sample]])) for question in batch]
        given = _answers(generate, asked, kept)
        answers |= {question.place: answer for question, answer in zip(batch, given, strict=True)}
        progress(start + len(batch))
    return answers


def _answers(generate: Generate, asked: list[tuple[list[dict], list[ImageRef]]], kept: KeptAnswers | None) -> list[str]:
    key = "" if kept is None else kept.key(asked)
    if kept is not None and key in kept.known:
        return kept.known[key]
    given = generate([messages for messages, _ in asked], [[ref.load() for ref in refs] for _, refs in asked])
    if len(given) != len(asked):
        raise ValueError(f"generate gave {len(given)} answers to {len(asked)} questions: it must give one each")
    if kept is not None:
        kept.keep(key, given)
    return given


def choose_metric(references: Sequence[Sequence[str]]) -> str:
    """By a skill's accepted answers, one list per question: `token_f1` for captions (more than five words on average),
    `vqa_accuracy` where ten annotators answered, else `exact_match`."""
    lengths = [max(len(texts[0].split()), len(tokens(texts[0])) / 3) for texts in references]
    if fmean(lengths) > CAPTION_WORDS:
        return "token_f1"
    return "vqa_accuracy" if min(map(len, references)) >= ANNOTATORS else "exact_match"


def _metrics(questions: list[Question], metric: str | None) -> dict[str, str]:
    references: dict[str, list[list[str]]] = defaultdict(list)
    for question in questions:
        references[question.skill].append(question.references)
    return {skill: metric or choose_metric(texts) for skill, texts in references.items()}


def _row(question: Question, sample: Sample, answer: str, metric: str) -> Row:
    score = METRICS[metric](answer, question.references)
    path = sample.images[0].path if question.num_images else None
    row = {
        "id": question.id,
        "sample": sample.id,
        "turn": question.turn,
        "skill": question.skill,
        "question": question.text,
        "expected": Counter(question.references).most_common(1)[0][0],
        "references": question.references,
        "answer": answer,
        "correct": score >= RIGHT_ENOUGH,
        "metric": metric,
        "score": score,
        "contains": contains(answer, question.references),
        "image": None if path is None else str(path),
        "control_score": None,
    }
    if question.examples:
        row["examples"] = [example.id for example in question.examples]
    if metric in ("token_f1", "anls"):
        row |= {"token_f1": token_f1(answer, question.references), "anls": anls(answer, question.references)}
    return row


def _control_row(row: Row, answer: str, donor: str) -> Row:
    score = METRICS[row["metric"]](answer, row["references"])
    return {
        "control_sample": donor,
        "control_answer": answer,
        "control_score": score,
        "control_correct": score >= RIGHT_ENOUGH,
    }
