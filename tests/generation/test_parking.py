"""Requests that give their places to others keep so many bytes and no more: what is let go is read again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import chiasm
import contracts
import tiny
from chiasm.generation import engine as engine_module
from chiasm.generation.decode import Decoding, prepare
from chiasm.generation.engine import Engine, Ticket
from chiasm.generation.native.build import library
from chiasm.generation.pictures import PictureCache
from chiasm.generation.prompt import read_prompt
from chiasm.generation.sequential import SequentialDecoder
from tiny import ask, picture

ASKED = [(ask("a"), [picture(1)]), (ask("b" * 70), [picture(2)]), (ask("c", 0), []), (ask("d", 2), [picture(3)] * 2)]


def connect(fusion: str = "early", language: str = "llama", **options: Any) -> chiasm.VLM:
    vision = {} if fusion == "unified" else {"vision": tiny.vision()}
    parts = {"language": tiny.language(language), "fusion": fusion, "tokenizer": tiny.tokenizer()}
    vlm = chiasm.connect(**vision, **parts, **options)
    contracts.open_gates(vlm.model, 1.0)
    vlm.model.generation_config.eos_token_id = 259
    return vlm


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "TURN", 8)


@contextmanager
def running(vlm: chiasm.VLM, **options: Any) -> Iterator[Engine]:
    engine = Engine(vlm.model, vlm.processor, **options)
    try:
        yield engine
    finally:
        engine.close(finish=False)


def told(ticket: Ticket) -> tuple[list[int], str, list[float | None], str | None]:
    pieces = list(ticket)
    return (
        [piece.token for piece in pieces],
        "".join(piece.text for piece in pieces),
        [piece.logprob for piece in pieces],
        ticket.finish_reason,
    )


def check(vlm: chiasm.VLM, *decodings: Decoding, **options: Any) -> Engine:
    """Answers that take turns, none of which keeps anything, are those of requests that are alone."""
    pairs = [(one, decodings[number % len(decodings)]) for number, one in enumerate(ASKED)]
    with running(vlm, max_batch=2, parked_bytes=0, **options) as engine:
        parks: list[Any] = []
        engine.decoder.park = parks.append
        found = [told(ticket) for ticket in [engine.submit(*one, decoding) for one, decoding in pairs]]
        again = engine.stats()
    assert not parks and again.parked_bytes == 0 and again.requests == len(ASKED)
    assert again.generated_tokens == sum(len(tokens) for tokens, *_ in found)
    with running(vlm, **options) as alone:
        for (one, decoding), (tokens, text, logprobs, reason) in zip(pairs, found, strict=True):
            expected = told(alone.submit(*one, decoding))
            assert (tokens, text, reason) == (expected[0], expected[1], expected[3])
            assert logprobs == pytest.approx(expected[2], abs=1e-3)
        assert again.prompt_tokens == alone.stats().prompt_tokens
    return engine


WAYS: dict[str, dict[str, Any]] = {
    "early": {},
    "windows": {"language": "gemma3"},
    "modules": {"language": "gpt2"},
    "both ways": {"attention": "prefix"},
    "intermediate": {"fusion": "intermediate"},
    "raster": {"fusion": "unified", "positions": "raster"},
    "mrope": {"fusion": "unified", "positions": "mrope"},
    "ends of texts": {"fusion": "intermediate", "cross_attention": {"every": 1, "end_of_text": 97}},
}


@pytest.mark.parametrize("prefix_cache_bytes", [0, 512 << 20])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_again_is_what_it_was(way: str, prefix_cache_bytes: int) -> None:
    check(connect(**WAYS[way]), Decoding(max_new_tokens=45), prefix_cache_bytes=prefix_cache_bytes)


def test_packed_weights_too() -> None:
    """A prompt is read by the model, and an answer in steps, which know the weights less exactly."""
    if library() is None:
        pytest.skip("no C++ compiler")
    check(connect(), Decoding(max_new_tokens=45), prefix_cache_bytes=0, weights="int4")


def test_one_by_one_too() -> None:
    vlm = connect("intermediate", cross_attention={"every": 1, "mask_attention": False})
    assert isinstance(check(vlm, Decoding(max_new_tokens=45)).decoder, SequentialDecoder)


def test_an_encoder_decoder_too() -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language("t5"), tokenizer=tiny.tokenizer())
    vlm.model.generation_config.eos_token_id = 259
    assert isinstance(check(vlm, Decoding(max_new_tokens=45)).decoder, SequentialDecoder)


def test_everything_of_an_answer_goes_on() -> None:
    """Seeds, penalties, log-probabilities, stop strings and forms."""
    text = {"type": "string", "minLength": 30, "maxLength": 40}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"], "additionalProperties": False}
    vlm = connect()
    check(
        vlm,
        Decoding(max_new_tokens=45, temperature=1.5, top_k=40, seed=3, logprobs=2),
        Decoding(max_new_tokens=45, repetition_penalty=1.7, logprobs=0),
        Decoding(max_new_tokens=45, stop=("~never~", "\x00\x01\x02"), logprobs=1),
        Decoding(max_new_tokens=60, json_schema=schema, temperature=1.0, seed=5),
    )
    with running(vlm, max_batch=1, parked_bytes=0) as engine:
        decoding = Decoding(max_new_tokens=400, json_schema=schema, temperature=1.0, seed=5)
        pair = [engine.submit(*one, decoding) for one in ASKED[:2]]
        assert all(len(json.loads(ticket.text())["a"]) >= 30 for ticket in pair)


def held(engine: Engine) -> int:
    """Bytes of all copies that wait."""
    rows = [request.sequence for request in (*engine._running, *engine._waiting)]
    return sum(row.parked.nbytes for row in rows if row is not None and row.parked is not None)


def test_no_more_than_the_limit_is_kept() -> None:
    vlm, long = connect(), Decoding(max_new_tokens=150)
    limit = 300_000
    with running(vlm, max_batch=2, parked_bytes=limit) as engine:
        most, park = [0], engine.decoder.park

        def watched(row: Any) -> None:
            park(row)
            most.append(held(engine))

        engine.decoder.park = watched
        begun, dropped = engine.decoder.begin, []
        engine.decoder.begin = lambda *given: dropped.append(len(given[2])) or begun(*given)
        tickets = [engine.submit(ask(letter * 40), [picture(1)], long) for letter in "abcdefgh"]
        found = [told(ticket) for ticket in tickets]
        assert limit / 2 < max(most) <= limit and sum(map(bool, dropped)) > 8
        assert engine.stats().parked_bytes == held(engine) == 0
    with running(vlm) as alone:
        for letter, answer in zip("abcdefgh", found, strict=True):
            assert told(alone.submit(ask(letter * 40), [picture(1)], long)) == answer


def test_who_leaves_while_it_waits_leaves_nothing() -> None:
    long = Decoding(max_new_tokens=900)
    for limit in (0, 512 << 20):
        with running(connect(), max_batch=1, parked_bytes=limit) as engine:
            tickets = [engine.submit(ask(letter), [picture()], long) for letter in "abc"]
            for ticket in tickets:
                next(iter(ticket))
            for ticket in tickets:
                ticket.cancel()
            for ticket in tickets:
                list(ticket)
            stats = engine.stats()
            assert stats.running == stats.waiting == stats.parked_bytes == 0
            assert len(engine.decoder.slots.free) == 1


def test_a_cache_of_any_kind_is_measured() -> None:
    vlm = connect("intermediate", cross_attention={"every": 1, "mask_attention": False})
    decoder = SequentialDecoder(vlm.model, PictureCache(vlm.model, 0))
    sequence = decoder.begin(read_prompt(prepare(vlm.model, vlm.processor, [ask("a")], [[picture()]], 20)), 20)
    decoder.read(sequence)
    layers, shown = sequence.inputs["cache"].layers, sequence.inputs["image_cache"].keys_values
    pairs = [*((layer.keys, layer.values) for layer in layers), *shown]
    own = sum(states.nbytes for pair in pairs for states in pair)
    assert own <= decoder.size(sequence) < own + 1000
