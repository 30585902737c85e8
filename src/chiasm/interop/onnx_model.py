"""The graphs of `chiasm convert --to onnx` in ONNX Runtime: logits, and greedy answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.interop.export.onnx import DECODER, EMBEDDING, SETTINGS, VISION

Arrays = dict[str, NDArray[Any]]


class OnnxModel:
    """The three graphs of a folder; inputs are those of the model's processor, as arrays.

    Args:
        folder: what `chiasm convert --to onnx` wrote.
        providers: of ONNX Runtime, such as `["CUDAExecutionProvider"]`.
    """

    def __init__(self, folder: str | Path, providers: list[str] | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError("onnxruntime is not installed; pip install 'chiasm[onnx]'") from error
        folder, chosen = Path(folder), providers or ["CPUExecutionProvider"]
        self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        self.vision, self.embedding, self.decoder = (
            onnxruntime.InferenceSession(str(folder / name), providers=chosen) for name in (VISION, EMBEDDING, DECODER)
        )

    def forward(
        self, inputs: Arrays, past: list[NDArray[Any]] | None = None
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """Logits `(B, S, V)` of a batch, and the keys and values for the next call."""
        mask = inputs["attention_mask"].astype(np.int64)
        length = inputs["input_ids"].shape[1]
        positions = np.clip(mask.cumsum(axis=1) - 1, 0, None)[:, -length:]
        feed = {"inputs_embeds": self._embed(inputs), "attention_mask": mask, "position_ids": positions}
        names = [one.name for one in self.decoder.get_inputs()]
        heads, width = self.settings["cache"]
        past = past or [np.zeros((len(mask), heads, 0, width), np.float32)] * (2 * self.settings["layers"])
        feed |= dict(zip([name for name in names if name.startswith("past_")], past, strict=True))
        logits, *present = self.decoder.run(None, {name: feed[name] for name in names if name in feed})
        return logits, present

    def generate(
        self, inputs: Arrays, max_new_tokens: int = 64, repetition_penalty: float | None = None
    ) -> NDArray[Any]:
        """The likeliest tokens after each prompt, `(B, new)`; behind an end token they repeat it.

        Args:
            repetition_penalty: above 1, tokens of the prompt and the answer become less likely; by default the model's
                own.
        """
        penalty = self.settings.get("repetition_penalty", 1.0) if repetition_penalty is None else repetition_penalty
        mask, seen, answers = inputs["attention_mask"], inputs["input_ids"], []
        ends = self.settings["end_tokens"]
        ended = np.zeros(len(mask), dtype=bool)
        logits, past = self.forward(inputs)
        for _ in range(max_new_tokens):
            chosen = self._likeliest(logits[:, -1], seen, penalty)
            chosen = np.where(ended, ends[0] if ends else 0, chosen)
            answers.append(chosen)
            ended |= np.isin(chosen, ends)
            if ended.all():
                break
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            seen = np.concatenate([seen, chosen[:, None]], axis=1)
            logits, past = self.forward({"input_ids": chosen[:, None], "attention_mask": mask}, past)
        return np.stack(answers, axis=1)

    def _likeliest(self, scores: NDArray[Any], seen: NDArray[Any], penalty: float) -> NDArray[Any]:
        """A token for each row of `scores`, after the penalty for tokens that are in its row of `seen`."""
        if penalty != 1.0:
            known = np.zeros(scores.shape, dtype=bool)
            rows, columns = np.nonzero(seen < scores.shape[1])  # a placeholder may lie beyond the vocabulary
            known[rows, seen[rows, columns]] = True
            scores = np.where(known, np.where(scores < 0, scores * penalty, scores / penalty), scores)
        image = self.settings["image_token_id"]
        scores[:, image : image + 1] = -np.inf
        return scores.argmax(axis=1)

    def _embed(self, inputs: Arrays) -> NDArray[Any]:
        """Embeddings of the words, with the pictures' visual tokens in their places."""
        ids = inputs["input_ids"].astype(np.int64)
        places = ids == self.settings["image_token_id"]
        (embeddings,) = self.embedding.run(None, {"input_ids": np.where(places, 0, ids)})
        if "pixel_values" in inputs:
            (tokens,) = self.vision.run(None, {"pixel_values": inputs["pixel_values"].astype(np.float32)})
            if places.sum() != tokens.shape[0] * tokens.shape[1]:
                raise ValueError(
                    f"the text holds {places.sum()} image placeholders but {len(tokens)} image(s) give "
                    f"{tokens.shape[0] * tokens.shape[1]} visual tokens; build the inputs with the model's processor"
                )
            embeddings = embeddings.copy()
            embeddings[places] = tokens.reshape(-1, tokens.shape[-1])
        return embeddings
