"""The engine answers as `transformers.generate` would, alone and together with others, and survives what callers do."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)

import chiasm
import contracts
import tiny
from chiasm.fusion.adapters import add_adapter
from chiasm.generation import constraint as constraint_module
from chiasm.generation import engine as engine_module
from chiasm.generation.batched import BatchedDecoder
from chiasm.generation.constraint import Constraint, token_reader
from chiasm.generation.decode import Decoding, prepare
from chiasm.generation.engine import Engine, QueueFull
from chiasm.generation.lean_decoder import LeanDecoder
from chiasm.generation.sequential import SequentialDecoder
from chiasm.serving.settings import Limits
from tiny import ask, picture

TOKENS = {"vocab_size": 261, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
SHAPE = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6}


def connect(fusion: str = "early", language: str = "llama", **options: Any) -> chiasm.VLM:
    vlm = chiasm.connect(tiny.vision(), tiny.language(language), fusion=fusion, tokenizer=tiny.tokenizer(), **options)
    contracts.open_gates(vlm.model, 1.0)
    return vlm


def inputs_of(vlm: chiasm.VLM) -> dict[str, torch.Tensor]:
    return prepare(vlm.model, vlm.processor, [ask("What?")], [[picture()]], 1)


def of(config: PreTrainedConfig, **options: Any) -> chiasm.VLM:
    torch.manual_seed(5)
    language = chiasm.language.adapter.build_language(config).eval()
    return chiasm.connect(tiny.vision(), language, tokenizer=tiny.tokenizer(), **options)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_together_as_alone(fusion: str, language: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of different lengths and pictures at once give the tokens that each has alone, compiled or not."""
    monkeypatch.setenv("CHIASM_NATIVE", native)
    contracts.check_engine_equals_generate(connect(fusion, language))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"attention": "prefix"}, LeanDecoder),
        ({"fusion": "intermediate", "cross_attention": {"every": 2, "mask_feed_forward": False}}, LeanDecoder),
        ({"fusion": "intermediate", "cross_attention": {"every": 1, "end_of_text": 97}}, LeanDecoder),
        ({"fusion": "intermediate", "cross_attention": {"every": 1, "mask_attention": False}}, SequentialDecoder),
        ({"connector": tiny.connector("qformer", instruction=True)}, LeanDecoder),
    ],
)
def test_every_way_of_looking(options: dict[str, Any], kind: type) -> None:
    contracts.check_engine_equals_generate(connect(**options), kind=kind)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Qwen3Config(**TOKENS, **SHAPE, head_dim=10, intermediate_size=44, num_key_value_heads=3), LeanDecoder),
        (LlamaConfig(**TOKENS, **SHAPE, intermediate_size=44, mlp_bias=True, attention_bias=True), LeanDecoder),
        (OPTConfig(**TOKENS, **SHAPE, ffn_dim=52, max_position_embeddings=299), BatchedDecoder),
    ],
)
def test_other_language_models(config: PreTrainedConfig, kind: type) -> None:
    contracts.check_engine_equals_generate(of(config), kind=kind)


def test_adapters_are_part_of_the_weights() -> None:
    vlm = connect()
    add_adapter(vlm.model, "language", rank=2)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    contracts.check_engine_equals_generate(vlm, kind=LeanDecoder)


def test_an_encoder_decoder_answers_too(tmp_path: Path) -> None:
    text = T5Config(**TOKENS, d_model=36, d_ff=52, d_kv=7, num_layers=2, num_heads=5, decoder_start_token_id=258)
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 30, "patch_size": 10}
    qformer = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    parts = {
        "vision_config": Blip2VisionConfig(**vision).to_dict(),
        "qformer_config": Blip2QFormerConfig(**qformer, vocab_size=41, encoder_hidden_size=24).to_dict(),
    }
    config = Blip2Config(**parts, text_config=text.to_dict(), num_query_tokens=5, image_token_index=260)
    made = Blip2ForConditionalGeneration(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path)
    processor = connect().processor
    processor.num_image_tokens, processor.encoder_decoder = 5, True
    contracts.check_engine_equals_generate(chiasm.VLM(chiasm.load(tmp_path).model, processor), kind=SequentialDecoder)


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("native", ["1", "0"])
def test_caches_change_no_answer(fusion: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second question on a picture, and a second turn, take up what was read; tokens are those of a fresh engine."""
    monkeypatch.setenv("CHIASM_NATIVE", native)
    vlm = connect(fusion)
    decoding = Decoding(max_new_tokens=20)
    first = ask("A long question about this picture: what is it?")
    second = ask("A long question about this picture: and where?")
    turn = [*first, {"role": "assistant", "content": "x"}, {"role": "user", "content": "And why?"}]
    asked = [(first, 1), (second, 1), (second, 2), (first, 1), (turn, 1)]
    engine, found = Engine(vlm.model, vlm.processor), []
    for messages, seed in asked:
        found.append(engine.submit(messages, [picture(seed)], decoding))
        tokens = [piece.token for piece in found[-1]]
        fresh = Engine(vlm.model, vlm.processor, prefix_cache_bytes=0, image_cache_bytes=0)
        assert tokens == [piece.token for piece in fresh.submit(messages, [picture(seed)], decoding)]
        fresh.close()
    cached = [ticket.cached_tokens for ticket in found]
    assert cached[0] == 0 and cached[1] >= 32 and cached[2] <= 16 and cached[3] > cached[1] and cached[4] >= cached[1]
    stats = engine.stats()
    assert stats.prefix_hits >= 3 and stats.prefix_tokens == sum(cached) and stats.image_bytes > 0
    assert stats.requests == 5 and stats.running == stats.waiting == 0
    engine.close()


def test_caches_keep_to_their_limits() -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor, prefix_cache_bytes=200_000, image_cache_bytes=3_000)
    for seed in range(12):
        engine.submit(ask("What is this? " * 5), [picture(seed)], Decoding(max_new_tokens=3)).text()
        stats = engine.stats()
        assert stats.prefix_bytes <= 200_000 and stats.image_bytes <= 3_000
    assert stats.prefix_bytes > 100_000 and stats.image_bytes > 1_000
    engine.close()


def test_many_callers_at_once() -> None:
    """Sixteen threads with four pictures and a small cache: each gets its own answer."""
    vlm = connect()
    decoding = Decoding(max_new_tokens=12)
    engine = Engine(vlm.model, vlm.processor, max_batch=4, prefix_cache_bytes=60_000, image_cache_bytes=3_000)
    expected = {
        seed: vlm.generate([ask(f"What is number {seed % 3}?")], [[picture(seed % 4)]], max_new_tokens=12)[0]
        for seed in range(12)
    }
    wrong: list[int] = []

    def call(start: int) -> None:
        for seed in (start, start + 3, start + 7):
            seed %= 12
            said = engine.submit(ask(f"What is number {seed % 3}?"), [picture(seed % 4)], decoding).text().strip()
            if said != expected[seed]:
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(start,)) for start in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong and engine.stats().requests == 48
    engine.close()


def test_long_prompts_and_answers_starve_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two places, two endless answers make room for a short one, and go on with the tokens they would have had."""
    monkeypatch.setattr(engine_module, "TURN", 8)
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor, max_batch=2)
    vlm.model.generation_config.eos_token_id = 259
    long = Decoding(max_new_tokens=120)
    endless = [engine.submit(ask("a"), [picture(1)], long), engine.submit(ask("b" * 300), [picture(2)], long)]
    short = engine.submit(ask("c"), [picture(3)], Decoding(max_new_tokens=4))
    assert [piece.text for piece in short] and all(ticket.finish_reason is None for ticket in endless)
    tokens = [piece.token for piece in endless[1]]
    engine.close()
    assert len(tokens) == 120
    alone = Engine(vlm.model, vlm.processor)
    assert tokens == [piece.token for piece in alone.submit(ask("b" * 300), [picture(2)], long)]
    alone.close()


def test_cancelled_requests_and_full_lines() -> None:
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    engine = Engine(vlm.model, vlm.processor, max_batch=1, max_waiting=1)
    long = Decoding(max_new_tokens=900)
    first = engine.submit(ask("a"), [picture()], long)
    next(iter(first))
    second = engine.submit(ask("b"), [picture()], Decoding(max_new_tokens=2))
    with pytest.raises(QueueFull) as full:
        engine.submit(ask("c"), [picture()], long)
    assert full.value.retry_after >= 1
    first.cancel()
    assert len(list(second)) == 2 and first.finish_reason == "cancelled" and second.finish_reason == "length"
    last = engine.submit(ask("d", 0), [], Decoding(max_new_tokens=3))
    engine.close()
    assert last.finish_reason == "length" and last.completion_tokens == 3
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(ask("c"), [picture()], long)


def test_who_gave_its_place_is_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a copy of its keys and values: no more requests are there than run and wait."""
    monkeypatch.setattr(engine_module, "TURN", 2)
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    engine = Engine(vlm.model, vlm.processor, max_batch=1, max_waiting=2)
    long = Decoding(max_new_tokens=900)
    begun = [engine.submit(ask(letter, 0), [], long) for letter in "abc"]
    for ticket in begun:
        next(iter(ticket))
    for _ in range(20):
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            engine.submit(ask("d", 0), [], long)
    stats = engine.stats()
    assert stats.running + stats.waiting == 3 and stats.requests == 3
    begun[0].cancel()
    while engine.stats().running + engine.stats().waiting > 2:
        time.sleep(0.001)
    assert engine.submit(ask("e", 0), [], Decoding(max_new_tokens=3)).text()
    engine.close(finish=False)


def test_pictures_in_line_are_bounded_in_bytes() -> None:
    """Those of one request may be more, or it could never be answered; words are always taken."""
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    size = inputs_of(vlm)["pixel_values"].nbytes
    engine = Engine(vlm.model, vlm.processor, max_batch=1, pixel_bytes=2 * size)
    long, short = Decoding(max_new_tokens=900), Decoding(max_new_tokens=2)
    begun = [*engine.submit_all(ask("a"), [picture(0)], [long, long]), engine.submit(ask("a"), [picture(1)], long)]
    with pytest.raises(QueueFull, match="3 requests have large pictures already"):
        engine.submit(ask("a"), [picture(2)], long)
    assert engine.stats().pixel_bytes == 2 * size and engine.stats().requests == 3
    words = engine.submit(ask("b", 0), [], short)
    for ticket in begun:
        ticket.cancel()
    assert words.text() and engine.stats().pixel_bytes == 0
    assert engine.submit(ask("c", 3), [picture(seed) for seed in range(3)], short).text()
    engine.close()


def test_answers_to_one_prompt_are_all_in_line_or_none() -> None:
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    engine = Engine(vlm.model, vlm.processor, max_batch=1, max_waiting=2)
    first = engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=900))
    next(iter(first))
    short = [Decoding(max_new_tokens=2)]
    with pytest.raises(ValueError, match="4 answers to one prompt, expected at most the 3"):
        engine.submit_all(ask("b"), [picture()], short * 4)  # no later moment has room for them
    with pytest.raises(QueueFull):
        engine.submit_all(ask("b"), [picture()], short * 3)
    assert engine.stats().waiting == 0 and engine.stats().requests == 1
    tickets = engine.submit_all(ask("b"), [picture()], short * 2)
    first.cancel()
    assert [len(list(ticket)) for ticket in tickets] == [2, 2]
    while engine.stats().running:
        time.sleep(0.001)
    assert [len(list(ticket)) for ticket in engine.submit_all(ask("b"), [picture()], short * 3)] == [2, 2, 2]
    engine.close()


def test_closing_without_finishing() -> None:
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    engine = Engine(vlm.model, vlm.processor, max_batch=1)
    tickets = [engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=900)) for _ in range(3)]
    engine.close(finish=False)
    assert {ticket.finish_reason for ticket in tickets} == {"cancelled"}


def test_a_failure_is_the_callers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    engine = Engine(vlm.model, vlm.processor)
    good = engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=60))
    bad = engine.submit(ask("b"), [picture(2)], Decoding(max_new_tokens=30))
    bad_text = engine._waiting[-1].text if engine._waiting else next(r.text for r in engine._running if r.ticket is bad)
    monkeypatch.setattr(bad_text, "push", lambda token: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bad.text()
    assert bad.finish_reason == "error" and len(list(good)) == 60
    engine.close()


def test_an_engine_survives_what_its_decoder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out where a slot is copied: into the prefix cache, or for a request that gives its place."""
    vlm = connect()
    vlm.model.generation_config.eos_token_id = 259
    monkeypatch.setattr("chiasm.generation.engine.TURN", 4)
    engine = Engine(vlm.model, vlm.processor, max_batch=1)
    read = engine.decoder.slots.read
    failing = threading.Event()
    monkeypatch.setattr(engine.decoder.slots, "read", lambda *place: 1 / 0 if failing.is_set() else read(*place))
    first = engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=900))
    next(iter(first))
    failing.set()
    second = engine.submit(ask("b", 0), [], Decoding(max_new_tokens=1))
    for ticket in (first, second):
        with pytest.raises(ZeroDivisionError):
            ticket.text()
    failing.clear()
    assert engine.alive and len(engine.decoder.slots.free) == 1
    assert len(list(engine.submit(ask("c"), [picture()], Decoding(max_new_tokens=20)))) == 20
    engine.close()


def test_a_prompt_that_fails_to_begin_leaves_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor, max_batch=1)
    assert engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=2)).text()
    with monkeypatch.context() as failing:
        failing.setattr(engine.decoder.slots, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=2)).text()
    assert engine.submit(ask("a"), [picture()], Decoding(max_new_tokens=2)).text()
    engine.close()


def test_a_step_that_fails_is_not_taken_twice_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests cannot share a step, those before the one that fails have taken theirs."""
    vlm = connect("intermediate", cross_attention={"every": 1, "mask_attention": False})
    vlm.model.generation_config.eos_token_id = 259
    engine = Engine(vlm.model, vlm.processor)
    assert isinstance(engine.decoder, SequentialDecoder)
    step, taken = engine.decoder._step, Counter[Any]()

    def fail(sequence: Any, token: int) -> torch.Tensor:
        taken[id(sequence)] += 1
        if sequence is not first and taken[id(sequence)] > 3:
            raise ZeroDivisionError
        return step(sequence, token)

    good = engine.submit(ask("a"), [picture(1)], Decoding(max_new_tokens=200))
    next(iter(good))
    first = engine._running[0].sequence
    monkeypatch.setattr(engine.decoder, "_step", fail)
    with pytest.raises(ZeroDivisionError):
        engine.submit(ask("b"), [picture(2)], Decoding(max_new_tokens=40)).text()
    assert len(list(good)) == 199
    assert first.length == good.prompt_tokens + 199
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)
    monkeypatch.setattr(engine, "_read", lambda request: 1 / 0)
    ticket = engine.submit(ask("a"), [picture()], Decoding())
    with pytest.raises(ZeroDivisionError):
        ticket.text()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(ask("b"), [picture()], Decoding())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_are_for_known_shapes(weights: str) -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor, weights=weights)
    assert isinstance(engine.decoder, LeanDecoder) and engine.submit(ask("a"), [picture()], Decoding()).text()
    engine.close()
    gpt = connect(language="gpt2")
    with pytest.warns(UserWarning, match="GPT2LMHeadModel keeps its own"):
        Engine(gpt.model, gpt.processor, weights=weights).close()
    with pytest.raises(ValueError, match="weights='int3', expected one of float32, int8, int4"):
        Engine(vlm.model, vlm.processor, weights="int3")


def test_async_callers() -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)

    async def one(seed: int) -> list[int]:
        ticket = engine.submit(ask("What?"), [picture(seed)], Decoding(max_new_tokens=6))
        return [piece.token async for piece in ticket]

    async def all_() -> list[list[int]]:
        return await asyncio.gather(*(one(seed) for seed in range(5)))

    found = asyncio.run(all_())
    assert found == [asyncio.run(one(seed)) for seed in range(5)]
    engine.close()


def test_how_tokens_are_chosen() -> None:
    """Penalties, seeds, log-probabilities and stop strings; unsound values are refused by name."""
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)

    def tokens(**options: Any) -> list[int]:
        options = {"max_new_tokens": 8} | options
        return [piece.token for piece in engine.submit(ask("What?"), [picture()], Decoding(**options))]

    drawn = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    assert tokens(**drawn, seed=3) == tokens(**drawn, seed=3) != tokens(**drawn, seed=4)
    assert tokens(temperature=1.0, top_k=1) == tokens() == tokens(temperature=1.0, min_p=1.0)
    assert tokens(temperature=1e-300) == tokens(temperature=1e-30, top_p=0.5) == tokens()
    assert tokens(temperature=2.0, top_p=0.0) == tokens()
    penalised = engine.submit(ask("What?"), [picture()], Decoding(max_new_tokens=8, repetition_penalty=1.7)).text()
    expected = vlm.generate([ask("What?")], [[picture()]], max_new_tokens=8, repetition_penalty=1.7)[0]
    assert penalised.strip() == expected
    for piece in engine.submit(ask("What?"), [picture()], Decoding(max_new_tokens=3, logprobs=4)):
        assert piece.top is not None and len(piece.top) == 4 and piece.top[0] == (piece.token, piece.logprob)
        assert piece.logprob is not None and piece.logprob < 0
    for wrong in ({"beams": 2}, {"top_p": -0.1}, {"max_new_tokens": 0}, {"stop": ("",)}, {"min_p": 2.0},
                  {"repetition_penalty": 1e-9}):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
            tokens(**wrong)
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": -3.0, "presence_penalty": -3.0},
        {"logit_bias": {65: 3.0, 66: 2.9}, "frequency_penalty": 0.2},
        {"logit_bias": {66: 2.0}, "repetition_penalty": 1.2, "temperature": 0.8, "seed": 3},
    ],
)
def test_penalties_and_biases_are_those_of_generate(options: dict[str, Any]) -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)
    options = {"max_new_tokens": 16} | options
    pair = [(ask("What?"), [picture()]), (ask("And what is this, please?"), [picture(1)])]
    tickets = [engine.submit(*one, Decoding(**options)) for one in pair]
    expected = vlm.generate([one for one, _ in pair], [shown for _, shown in pair], **options)
    assert [ticket.text().strip() for ticket in tickets] == expected
    assert expected != vlm.generate([one for one, _ in pair], [shown for _, shown in pair], max_new_tokens=16)
    for wrong in ({"logit_bias": {261: 1.0}}, {"logit_bias": {1: float("nan")}}, {"presence_penalty": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine.submit(*pair[0], Decoding(**wrong))
        with pytest.raises(ValueError, match=next(iter(wrong))):
            vlm.chat(None, "What?", **wrong)
    engine.close()


def test_answers_of_a_form() -> None:
    """Choices and JSON schemas bind the engine and `generate`."""
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)
    options = {"choices": ("red", "green", "dark blue"), "max_new_tokens": 30}
    said = engine.submit(ask("What?"), [picture()], Decoding(**options)).text()
    assert said in options["choices"]
    assert vlm.chat(picture(), "What?", **options) in options["choices"]
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    ticket = engine.submit(ask("What?"), [picture()], Decoding(max_new_tokens=60, json_schema=schema, temperature=1.0))
    assert json.loads(ticket.text())["n"] in (1, 2) and ticket.finish_reason == "stop"
    with pytest.raises(ValueError, match="cannot be constrained"):
        engine.submit(ask("What?", 0), [], Decoding(json_schema={"type": "nothing"}))
    with pytest.raises(ValueError, match="beams=2, expected 1"):
        vlm.chat(picture(), "What?", beams=2, choices=("red", "green"))
    engine.close()


def test_a_schema_of_references_that_follow_each_other_ends_no_process() -> None:
    """Its compiler calls itself for each of them."""
    links = {str(number): {"items": {"$ref": f"#/$defs/{number + 1}"}} for number in range(1300)}
    schema = {"$ref": "#/$defs/0", "$defs": links | {"1300": {"type": "integer"}}}
    assert len(json.dumps(schema)) < Limits().schema_bytes
    script = "import json, sys; from test_engine import constrain; constrain(json.load(sys.stdin))"
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(schema),
        env=os.environ | {"PYTHONPATH": folders},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def constrain(schema: dict[str, Any]) -> None:
    """Begins an answer of a schema in a thread, as a server does."""
    reader = token_reader(tiny.tokenizer(), 261)

    def begin() -> torch.Tensor:
        return Constraint(reader, Decoding(json_schema=schema), {257}).allowed(torch.zeros(261))

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(begin).result().isfinite().any()


def test_a_slow_schema_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are prepared and answered while a form is compiled."""
    vlm, compiling, go_on = connect(), threading.Event(), threading.Event()
    engine = Engine(vlm.model, vlm.processor)
    compiled = constraint_module.Constraint

    def slow(*arguments: Any) -> Any:
        compiling.set()
        assert go_on.wait(30)
        return compiled(*arguments)

    monkeypatch.setattr(constraint_module, "Constraint", slow)
    tickets: list[Any] = []
    decoding = Decoding(choices=("red", "green"), max_new_tokens=30)
    asking = threading.Thread(target=lambda: tickets.append(engine.submit(ask("What?"), [picture()], decoding)))
    asking.start()
    assert compiling.wait(30)
    assert engine.submit(ask("What?"), [picture()], Decoding(max_new_tokens=3)).text() and not tickets
    go_on.set()
    asking.join()
    assert tickets[0].text() in decoding.choices
    engine.close()


def test_a_form_of_several_answers_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them follows it by itself, as if it were alone."""
    vlm, compiled = connect(), []
    constraint = constraint_module.Constraint
    monkeypatch.setattr(constraint_module, "Constraint", lambda *given: compiled.append(1) or constraint(*given))
    engine = Engine(vlm.model, vlm.processor)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    drawn = [Decoding(max_new_tokens=60, json_schema=schema, temperature=1.0, seed=seed) for seed in range(6)]
    several = [ticket.text() for ticket in engine.submit_all(ask("What?"), [picture()], [*drawn, Decoding()])]
    assert len(compiled) == 1 and {json.loads(text)["n"] for text in several[:6]} == {1, 2}
    assert several[:6] == [engine.submit(ask("What?"), [picture()], decoding).text() for decoding in drawn]
    engine.close()


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "string", "minLength": n, "maxLength": n * 50} for n in range(1, 900)]},
        {"allOf": [{"properties": {f"a{n}": {"maximum": n * 10**9 + 7}}} for n in range(700)]},
        {"type": "integer", "multipleOf": 7919 * 7907},
        {"type": "integer", "multipleOf": 10**400},
        {"allOf": [{"type": "number", "multipleOf": 79.19}, {"properties": {"a": {"multipleOf": 7.907}}}]},
        {"enum": ["yes", "a" * 60_000]},
        {"const": {"title": "a" * 60_000}},
    ],
)
def test_schemas_that_are_too_much_work(schema: dict[str, Any]) -> None:
    """They are refused in a moment: when they are compiled, or at the token that would take too long."""
    vlm = connect()
    engine, started = Engine(vlm.model, vlm.processor), time.monotonic()
    with pytest.raises(ValueError, match=r"^the answer cannot be constrained so: [^\n]+$"):
        engine.submit(ask("What?"), [picture()], Decoding(json_schema=schema, max_new_tokens=100)).text()
    assert time.monotonic() - started < 10
    assert engine.submit(ask("What?"), [picture()], Decoding(max_new_tokens=3)).text()
    engine.close()


def test_schemas_that_are_little_work() -> None:
    """A long description is read by people, and a property may have any name."""
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)
    price = {"type": "number", "multipleOf": 0.01, "description": "a" * 20_000}
    schema = {"properties": {"price": price, "multipleOf": {"type": "integer", "multipleOf": 60}}}
    assert engine.submit(ask("What?"), [picture()], Decoding(json_schema=schema, max_new_tokens=5)).text()
    engine.close()


def test_tokens_that_the_models_settings_suppress() -> None:
    vlm = connect()
    first = [int(vlm.model.generate(**inputs_of(vlm), max_new_tokens=1, do_sample=False)[0, -1])]
    vlm.model.generation_config.suppress_tokens = first
    contracts.check_engine_equals_generate(vlm)
    engine = Engine(vlm.model, vlm.processor)
    assert first[0] not in [piece.token for piece in engine.submit(ask("What?"), [picture()], Decoding())]
    engine.close()


def test_stop_strings_end_answers_everywhere() -> None:
    vlm = connect()
    whole = vlm.chat(picture(), "What?", max_new_tokens=30)
    stop = next(
        whole[n : n + 2] for n in range(3, 25) if whole[n : n + 2].isprintable() and "\ufffd" not in whole[n : n + 2]
    )
    before = whole[: whole.find(stop)].strip()
    engine = Engine(vlm.model, vlm.processor)
    ticket = engine.submit(ask("What?"), [picture()], Decoding(max_new_tokens=30, stop=(stop,)))
    assert ticket.text().strip() == before and ticket.finish_reason == "stop"
    engine.close()
    assert vlm.chat(picture(), "What?", max_new_tokens=30, stop=(stop,)) == before
    assert "".join(vlm.stream(picture(), "What?", max_new_tokens=30, stop=(stop,))) == before


def test_an_idle_engine_waits_quietly() -> None:
    vlm = connect()
    engine = Engine(vlm.model, vlm.processor)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.1
    engine.close()
