"""Freeze strategies by name, and the recipe that a cell trains by: a stage of captions, then a stage of questions."""

from collections.abc import Mapping
from typing import Any

LORA = {"tune": "lora", "lr": 1.5e-3, "rank": 16, "alpha": 32}

STRATEGIES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": {"language": LORA},
    "full": {"language": {"tune": "full", "lr": 2e-4}},
    "vision": {"vision": {"tune": "full", "lr": 2e-5}, "language": LORA},
}
"""What happens to parts that were there before; what is new is always trained in full. `frozen` trains that alone."""

CONTRAST: dict[str, Any] = {
    "name": "captions",
    "objectives": ["contrastive"],
    "data": "captions",
    "epochs": 20,
    "batch_size": 256,
    "group_by_length": False,
    "validation": {"samples": 0},
}
"""How late fusion's projections learn from captions behind locked towers, as in the recipe `clip`: from all of them, as
connectors of other fusions are solved for."""


def recipe_of(
    fusion: str,
    strategy: Mapping[str, Any],
    samples: int,
    seed: int,
    captions: bool,
    *,
    finds: bool,
    batch_size: int,
    caption_samples: int,
    lr: float,
    solved_lr: float,
    solved: bool,
    init: str,
    gates: str,
    warmup: float,
    betas: tuple[float, float],
    dtype: str,
    validations: int,
    validation_samples: int,
    forgetting: bool | None,
) -> dict[str, Any]:
    """A recipe for a model of a fusion.

    Args:
        captions: whether the data has captions to start from.
        finds: whether captions will be asked for their pictures: late fusion then learns from captions too.
        solved: whether the connector starts in closed form.
    """
    starts = fusion in ("early", "intermediate")
    new = new_parts(fusion, lr, solved_lr if solved else lr)
    questions: dict[str, Any] = {
        "name": "questions",
        "samples": samples,
        "data": "questions" if captions else "all",
        "parts": {"vision": "frozen", "language": "frozen"} | new | dict(strategy),
        "validation": {
            "samples": validation_samples,
            "answers": 0,
            "every": max(1, -(-samples // batch_size) // validations),
        },
    }
    first: list[dict[str, Any]] = []
    if captions and starts:
        parts = {"vision": "frozen", "language": "frozen"} | new
        align = {"name": "captions", "samples": caption_samples, "data": "captions", "parts": parts}
        first = [align | {"validation": {"samples": validation_samples, "answers": 0}}]
    if fusion == "late" and captions and finds:
        first = [CONTRAST | {"parts": {"vision": "frozen", "language": "frozen", "connector": new["connector"]}}]
    if starts:
        (first or [questions])[0] |= {"init": init, "gates": gates if fusion == "intermediate" else "keep"}
    if fusion == "late":
        questions |= {"objectives": ["answers"]}
    return {
        "batch_size": batch_size,
        "warmup": warmup,
        "betas": list(betas),
        "dtype": dtype,
        "seed": seed,
        "checkpoint_every": "2m",
        "keep_checkpoints": 1,
        "forgetting": {"text": forgetting is not False, "pictures": 32 if "vision" in strategy else 0},
        "stages": [*first, questions],
    }


def new_parts(fusion: str, lr: float, connector_lr: float) -> dict[str, Any]:
    """The parts that a fusion adds, which are always trained."""
    connector = {"tune": "full", "lr": connector_lr}
    fresh = {"tune": "full", "lr": lr}
    return {
        "early": {"connector": connector},
        "intermediate": {"connector": connector, "cross_attention": fresh},
        "late": {"connector": fresh, "answer_head": fresh},
        "unified": {"vision": fresh},
    }[fusion]
