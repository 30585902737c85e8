"""How tokens are chosen: the words of one request, read by `transformers.generate` and by the engine alike."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chiasm.language.generation_settings import SAMPLING

COLDEST = 1e-30
"""The lowest temperature that sampled beams can be divided by."""
UNREAD = (
    "guidance_scale",
    "watermarking_config",
    "stop_strings",
    "max_time",
    "prompt_lookup_num_tokens",
    "dola_layers",
)
"""Settings of a checkpoint that no answer follows: other ways of decoding, and what is said for each request."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token, above it samples within `top_k`, `top_p` and `min_p`.
        top_k: the so many likeliest; 0 is all.
        top_p: the likeliest that together have this share; 0 is the likeliest alone.
        min_p: those with at least this share of the likeliest one's probability.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
        frequency_penalty: taken from a token's logit for each time that it stands in the answer.
        presence_penalty: taken from it once, where it stands there at all.
        logit_bias: added to the logits of tokens, by their ids.
        beams: hypotheses that are followed at once; 1 is none beside the answer.
        stop: strings that end the answer and are not part of it.
        seed: of the sampling, of each answer of a batch by itself; None takes a new one each time.
        logprobs: log-probabilities of so many likeliest tokens beside the chosen one; None tells none.
        choices: the answer is one of these texts.
        json_schema: the answer is JSON of this schema.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    choices: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None

    def check(self, vocabulary: int | None = None) -> None:
        """Raises a ValueError that names the first value out of its range.

        Args:
            vocabulary: tokens that the model knows.
        """
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a finite number above"),
            ("top_k", self.top_k >= 0, "0 (all) or a number of tokens"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("beams", self.beams >= 1, "at least 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of texts that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "None or a number of tokens"),
            ("choices", not isinstance(self.choices, str) and all(self.choices), "a tuple of texts that are not empty"),
        )
        for name, right, expected in ranges:
            if not right:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected {expected}")
        for token, bias in self.logit_bias.items():
            if token < 0 or (vocabulary is not None and token >= vocabulary) or not math.isfinite(bias):
                known = "" if vocabulary is None else f" of the {vocabulary} that the model knows"
                raise ValueError(
                    f"logit_bias={{{token}: {bias}}}, expected the ids of tokens{known}, and finite numbers"
                )
        if self.choices and self.json_schema is not None:
            raise ValueError("choices and json_schema are both given; an answer can follow only one of them")
        if self.constrained and self.beams > 1:
            raise ValueError(f"beams={self.beams}, expected 1 where choices or json_schema bind the answer")

    @property
    def constrained(self) -> bool:
        """Whether an answer must have a form."""
        return bool(self.choices) or self.json_schema is not None

    @property
    def biased(self) -> bool:
        """Whether logits are added to or taken from."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `transformers.generate`, in place of what a checkpoint's own settings say of the same."""
        self.check()
        chosen: dict[str, Any] = dict.fromkeys((*SAMPLING, *UNREAD)) | {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": float(self.repetition_penalty),
            "num_beams": self.beams,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
        }
        if self.temperature > 0:
            chosen |= {"temperature": max(float(self.temperature), COLDEST), "top_p": float(self.top_p)}
            chosen |= {"top_k": self.top_k, "min_p": float(self.min_p) or None}
        return chosen
