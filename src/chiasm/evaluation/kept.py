"""Answers as they come, in a file beside the result, so that an evaluation that was stopped goes on from them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.schema import ImageRef
from chiasm.sources.writing import naming_full_disk
from chiasm.training.fingerprint import model_fingerprint

ANSWERS = ".answers.jsonl"
"""The file's name in the folder of the result."""


class KeptAnswers:
    """Answers by batch. A batch is known again by its messages, its pictures' content and who is asked: an answer may
    depend in its last bits on the questions that it is computed with.

    Args:
        file: one line for each batch; a line that a kill has cut is not read.
        identity: of the model and the settings (`identity_of`).
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self.identity = file, identity
        self.known: dict[str, list[str]] = {}
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        self.cut = not text.endswith("\n") and bool(text)
        for line in text.split("\n"):
            try:
                batch = json.loads(line)
                self.known[batch["batch"]] = batch["answers"]
            except (ValueError, TypeError, KeyError):
                continue

    def key(self, asked: Sequence[tuple[list[dict], list[ImageRef]]]) -> str:
        """What a batch of conversations with their pictures is known by."""
        shown = [[messages, [ref.key() for ref in refs]] for messages, refs in asked]
        return hashlib.sha256(json.dumps([self.identity, shown], ensure_ascii=False).encode()).hexdigest()

    def keep(self, key: str, answers: list[str]) -> None:
        """Writes a batch's answers down.

        Raises:
            OSError: the disk is full, or not writable; what was written before is still there.
        """
        line = json.dumps({"batch": key, "answers": answers}, ensure_ascii=False)
        with naming_full_disk(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n" if self.cut else f"{line}\n")
        self.cut = False


def identity_of(model: PreTrainedModel, processor: ProcessorMixin, **settings: Any) -> str:
    """A digest of everything beside the question that an answer follows from."""
    tokenizer = processor.tokenizer
    parts = {
        "weights": model_fingerprint(model),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "processor": processor.to_dict(),
        "tokenizer": [type(tokenizer).__name__, tokenizer.chat_template, sorted(tokenizer.get_vocab().items())],
        "software": [torch.__version__, transformers.__version__, model.device.type],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()
