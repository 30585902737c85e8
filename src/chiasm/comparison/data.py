"""What the cells of a comparison learn from and are asked: the plan's data, read."""

from chiasm.comparison.choices import Choice
from chiasm.comparison.schema import Plan, Source
from chiasm.data.readers import Mixture, read
from chiasm.data.schema import Samples
from chiasm.data.splits import hold_out, spread


def data_of(plan: Plan, choice: Choice | None = None) -> tuple[Samples, Samples, Samples]:
    """Training samples (captions first), held-out and test samples: the same for cells without data of their own."""
    data = plan.data
    questions: Samples = read_source(choice.train if choice is not None and choice.train is not None else data.train)
    if data.validation is not None:
        held_out: Samples = read_source(data.validation)
    else:
        questions, held_out = hold_out(questions)
    train = questions if data.captions is None else Mixture([read_source(data.captions), questions], [1, 1])
    return train, held_out, spread(read_source(data.test), plan.evaluation.limit)


def captions_to_find(plan: Plan) -> Samples | None:
    """The captions whose pictures are to be found; None where the plan asks for none.

    Raises:
        ValueError: the data has fewer than the plan asks for.
    """
    if plan.data.test_captions is None or plan.evaluation.retrieval is None:
        return None
    given, wanted = read_source(plan.data.test_captions), plan.evaluation.retrieval
    if len(given) < wanted:
        raise ValueError(f"evaluation.retrieval is {wanted}, but data.test_captions has {len(given)}; lower it")
    return spread(given, wanted)


def read_source(source: Source) -> Samples:
    """Data as a plan names it."""
    if isinstance(source, str):
        return read(source)
    options = dict(source)
    return read(options.pop("path", None), **options)


def questions_of(plan: Plan, train: Samples) -> Samples:
    """The questions of training samples, without the captions that come first."""
    return train if plan.data.captions is None else train.sources[-1]  # type: ignore[attr-defined]
