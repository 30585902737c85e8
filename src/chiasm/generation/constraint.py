"""Answers that are one of some texts, or JSON of a schema: tokens that lead elsewhere are never chosen (llguidance)."""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from chiasm.generation.decoding import Decoding

T = TypeVar("T")
WORK = {"max_grammar_size": 500_000, "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000}
"""What llguidance may spend on a grammar, and on each token of its answer: a second of work at most."""
MULTIPLE, TEXT = 100_000, 8192
"""What it does not count: a state for each remainder of `multipleOf`, and the letters of a text at every token."""
STACK = 256 << 20
"""Bytes for compiling a schema, which goes as deep as its references lead, 8 KB each time; those that it does not write
to take no memory. On a thread's usual stack a thousand definitions that follow each other would end the process."""
STARTING = threading.Lock()
REMARKS = ("$comment", "default", "description", "examples", "title")
"""Words of a schema that bind nothing."""


class Constraint:
    """What an answer may still become.

    Args:
        reader: the model's tokenizer, by `token_reader`.

    Raises:
        ValueError: llguidance does not know the schema, or it is too much work.
    """

    def __init__(self, reader: Any, decoding: Decoding, ends: set[int]) -> None:
        guidance = _guidance()
        self.ends = ends
        limits = guidance.LLParserLimits(**WORK)
        grammar = _grammar(guidance, decoding)
        self.matcher = _on_large_stack(lambda: guidance.LLMatcher(reader, grammar, log_level=0, limits=limits))
        self._check()

    def again(self) -> "Constraint":
        """The same of another answer, as long as nothing is chosen; its form is not compiled anew."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    def allowed(self, logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """Logits of tokens that may come next; all the others are −inf."""
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.int32)
        self._check()
        flags = (bits[:, None] >> torch.arange(32)) & 1
        open_ = torch.zeros(logits.shape[0], dtype=torch.bool)
        flat = flags.flatten().bool()[: logits.shape[0]]
        open_[: flat.shape[0]] = flat
        if self.matcher.is_accepting():
            open_[[end for end in self.ends if end < open_.shape[0]]] = True
        return logits.masked_fill(~open_.to(logits.device), -torch.inf)

    def complete(self, token: int) -> bool:
        """Takes a chosen token in; whether nothing can come behind it."""
        if token in self.ends:
            return True
        self.matcher.consume_token(token)
        self._check()
        return self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = self.matcher.get_error().partition("\n")[0]
            raise ValueError(f"the answer cannot be constrained so: {reason}")


def constraints_of(decodings: Sequence[Decoding], reader: Callable[[], Any], ends: set[int]) -> list[Constraint | None]:
    """What binds each answer; a form that several have is compiled once.

    Args:
        reader: gives the model's tokenizer, by `token_reader`, where an answer is bound.
    """
    forms = [(decoding.choices, decoding.json_schema) for decoding in decodings]
    made: list[Constraint | None] = []
    for number, decoding in enumerate(decodings):
        if not decoding.constrained:
            made.append(None)
        elif (first := forms.index(forms[number])) < number:
            made.append(cast(Constraint, made[first]).again())
        else:
            made.append(Constraint(reader(), decoding, ends))
    return made


class ConstraintProcessor(LogitsProcessor):
    """The same for `transformers.generate`, one constraint for each row."""

    def __init__(self, constraints: list[Constraint], ends: set[int]) -> None:
        self.constraints, self.end = constraints, min(ends)
        self.over = [False] * len(constraints)
        self.length: int | None = None

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if self.length is not None:
            for row, (constraint, token) in enumerate(zip(self.constraints, input_ids[:, -1].tolist(), strict=True)):
                self.over[row] = self.over[row] or constraint.complete(token)
        self.length = input_ids.shape[1]
        rows = []
        for constraint, over, row in zip(self.constraints, self.over, scores, strict=True):
            closed = torch.full_like(row, -torch.inf)
            closed[self.end] = 0.0
            rows.append(closed if over else constraint.allowed(row))
        return torch.stack(rows)


def _on_large_stack(function: Callable[[], T]) -> T:
    """What a function gives, called by a thread that has a larger stack than others."""
    with ThreadPoolExecutor(1) as threads:
        with STARTING:
            usual = threading.stack_size(STACK)
            try:
                future = threads.submit(function)
            finally:
                threading.stack_size(usual)
        return future.result()


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError("choices and json_schema need llguidance; pip install 'chiasm[serve]'") from error
    return llguidance


def _grammar(guidance: Any, decoding: Decoding) -> str:
    if decoding.json_schema is not None:
        _check_work(decoding.json_schema)
        return guidance.LLMatcher.grammar_from_json_schema(json.dumps(dict(decoding.json_schema)))
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in decoding.choices)
    return guidance.LLMatcher.grammar_from_lark(f"start: {texts}")


def _check_work(schema: Mapping[str, Any]) -> None:
    """Refuses a schema whose work llguidance would not count."""
    bound = list(_bound(schema))
    longest = max((len(one) for one in bound if isinstance(one, str)), default=0)
    if longest > TEXT:
        raise ValueError(f"the answer cannot be constrained so: a text of {longest:,} letters is more than {TEXT:,}")
    steps = [Decimal(str(one)) for one in bound if not isinstance(one, str)]
    digits = max((-int(step.as_tuple().exponent) for step in steps), default=0)
    common = math.lcm(*(int(step * Decimal(10) ** max(digits, 0)) or 1 for step in steps))
    if common > MULTIPLE:
        reason = f"the numbers of multipleOf have a common multiple of more than {MULTIPLE:,}"
        raise ValueError(f"the answer cannot be constrained so: {reason}")


def _bound(schema: Any) -> Iterator[str | int | float]:
    """Texts of a schema that may be part of an answer or its pattern, and the numbers of its `multipleOf`."""
    for item in _all_of(schema, _telling):
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            fixed = [item.get(key) for key in ("const", "enum")]
            yield from (text for text in _all_of(fixed, _whole) if isinstance(text, str))
            step = item.get("multipleOf")
            if type(step) is int or (isinstance(step, float) and math.isfinite(step)):
                yield step


def _all_of(value: Any, inside: Callable[[Mapping[str, Any]], list[Any]]) -> Iterator[Any]:
    """A JSON value and everything in it; of an object, what `inside` tells."""
    rest = [value]
    while rest:
        yield (item := rest.pop())
        if isinstance(item, list | tuple):
            rest += item
        elif isinstance(item, Mapping):
            rest += inside(item)


def _whole(found: Mapping[str, Any]) -> list[Any]:
    """Names and values, all of which an answer must hold to the letter."""
    return [*found, *found.values()]


def _telling(found: Mapping[str, Any]) -> list[Any]:
    """Names and values, but for remarks."""
    return [*found, *(value for key, value in found.items() if key not in REMARKS or isinstance(value, Mapping))]


@lru_cache(maxsize=8)
def token_reader(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Any:
    """llguidance's view of a tokenizer, which takes a second to make.

    Raises:
        ValueError: llguidance is not installed.
    """
    _guidance()
    import llguidance.hf

    size = max(vocabulary, len(tokenizer))
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=tokenizer.eos_token_id)
