"""Stop strings, seeds and a checkpoint's own settings mean the same in `chat`, `generate`, `stream` and the engine."""

import threading
import time
from typing import Any

import pytest
import torch
from test_engine import SHAPE, TOKENS, connect, of
from transformers import LlamaConfig, Phi3Config

import chiasm
import contracts
import tiny
from chiasm.generation import engine as engine_module
from chiasm.generation.decode import Decoding, prepare
from chiasm.generation.engine import Engine
from chiasm.generation.request import Request
from chiasm.generation.sequential import SequentialDecoder
from chiasm.generation.text import StopStrings
from tiny import ask


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


END = 259
NO_LETTERS = sorted({*range(END), 260} - {*ids("abcdefghijklmnopqrstuvwxyz")})


def endless() -> chiasm.VLM:
    """Its answers are small letters without an end."""
    vlm = connect()
    vlm.model.generation_config.update(eos_token_id=END, suppress_tokens=[*NO_LETTERS, END])
    return vlm


def engines(vlm: chiasm.VLM, prompt: str, **decoding: Any) -> str:
    engine = Engine(vlm.model, vlm.processor)
    said = engine.submit(ask(prompt, 0), [], Decoding(**decoding)).text().strip()
    engine.close()
    return said


def test_a_stop_string_does_not_begin_in_the_prompt() -> None:
    """A template's last letters and the answer's first ones are no stop string, whoever answers."""
    vlm = endless()
    whole = vlm.chat(None, "Hi", max_new_tokens=8)
    tokens = prepare(vlm.model, vlm.processor, [ask("Hi", 0)], [[]], 8)["input_ids"][0].tolist()
    last = vlm.processor.tokenizer.decode(tokens)[-1]
    stop = tuple(f"{last}{letter}" for letter in whole)
    options: dict[str, Any] = {"max_new_tokens": 8, "stop": tuple(one for one in stop if one not in whole)}
    assert f"{last}{whole[0]}" in options["stop"]
    assert engines(vlm, "Hi", **options) == vlm.chat(None, "Hi", **options) == whole
    assert "".join(vlm.stream(None, "Hi", **options)) == whole
    assert vlm.generate([ask("Hi", 0), ask("longer than that", 0)], **options)[0] == whole
    beams = vlm.chat(None, "Hi", max_new_tokens=8, beams=3)
    assert vlm.chat(None, "Hi", max_new_tokens=8, beams=3, stop=(f"{last}{beams[0]}",)) == beams


def test_stop_strings_are_found_in_every_row_and_beam() -> None:
    found = StopStrings(tiny.tokenizer(), ("abc",), 2)

    def rows(*answers: str) -> list[bool]:
        told = [ids(before + answer) for before, answer in zip(("ba", "ab", "ba"), answers, strict=False)]
        return found(torch.tensor(told), None).tolist()

    assert rows("a", "c") == [False, False]
    assert rows("ab", "ab", "ax") == [False, False, False]
    assert rows("axb", "abc", "abx") == [False, True, False]
    assert rows("abcd", "xabc") == [True, True]


@pytest.mark.parametrize(
    "options",
    [{"temperature": 2}, {"temperature": 1e-300}, {"temperature": 1.3, "top_p": 1, "top_k": 40, "min_p": 0.01},
     {"temperature": 1.1, "repetition_penalty": 2}],
)  # fmt: skip
def test_drawing_is_the_same_everywhere(options: dict[str, Any]) -> None:
    """And in a batch each answer draws by itself; numbers may be whole or tiny."""
    vlm = endless()
    options = options | {"max_new_tokens": 12, "seed": 5}
    alone = vlm.chat(None, "Hi", **options)
    assert alone == "".join(vlm.stream(None, "Hi", **options)) == engines(vlm, "Hi", **options)
    assert vlm.generate([ask("more of it", 0), ask("Hi", 0)], **options)[1] == alone
    inputs = prepare(vlm.model, vlm.processor, [ask("Hi", 0)], [[]], 12)
    torch.manual_seed(5)
    tokens = vlm.model.generate(**inputs, pad_token_id=258, **Decoding(**options).arguments())
    start = inputs["input_ids"].shape[1]
    assert vlm.processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip() == alone


def test_sampled_beams_take_whole_and_tiny_temperatures() -> None:
    vlm = endless()
    for temperature in (2, 1e-300):
        options = {"temperature": temperature, "beams": 2, "seed": 1, "max_new_tokens": 4}
        assert vlm.chat(None, "Hi", **options) == vlm.chat(None, "Hi", **options)


def test_sampled_beams_draw_what_they_would_alone() -> None:
    """Whatever other threads draw meanwhile, and whoever is in the batch; the program's own numbers are left alone."""
    vlm = endless()
    options = {"temperature": 1.5, "beams": 2, "seed": 4, "max_new_tokens": 12}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = [vlm.chat(None, text, **options) for text in ("Hi", "more of it")]
    assert torch.equal(torch.get_rng_state(), before)
    assert alone[0] != vlm.chat(None, "Hi", **options | {"seed": 5})
    over = threading.Event()

    def draw() -> None:
        while not over.is_set():
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    together = vlm.generate([ask("Hi", 0), ask("more of it", 0)], **options)
    over.set()
    thread.join()
    assert together == alone


def test_streams_at_once_draw_what_each_would_alone() -> None:
    """And the program's own random numbers are as if nobody had drawn."""
    vlm = endless()
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    expected = "".join(vlm.stream(None, "Hi", **options))
    torch.manual_seed(1)
    numbers = torch.rand(40)
    torch.manual_seed(1)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append("".join(vlm.stream(None, "Hi", **options)))) for _ in "abc"]
    for thread in threads:
        thread.start()
    drawn = []
    for _ in range(40):
        drawn.append(torch.rand(1))
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert found == [expected] * 3 and torch.equal(torch.cat(drawn), numbers)


def test_who_leaves_a_stream_stops_it() -> None:
    vlm, steps = endless(), list[int]()
    vlm.model.register_forward_hook(lambda *_: steps.append(1))
    before = set(threading.enumerate())
    pieces = vlm.stream(None, "Hi", max_new_tokens=500)
    next(pieces)
    pieces.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert len(steps) < 250


PUBLISHED: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6, "eos_token_id": ids("acegikmoqsuwy")},
    {"begin_suppress_tokens": ids("abcdefghij"), "sequence_bias": {(ids("n")[0],): 4.0}, "repetition_penalty": 1.5},
    {"encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 2, "min_length": 3},
    {"exponential_decay_length_penalty": (2, 2.0), "renormalize_logits": True, "suppress_tokens": NO_LETTERS},
    {"min_p": 0.9, "typical_p": 0.1, "top_h": 0.1, "temperature": 0.1, "do_sample": True, "guidance_scale": 3.0},
    {"stop_strings": ["a"], "max_time": 1e-9, "num_beams": 2, "num_return_sequences": 2, "dola_layers": "low"},
]


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("decoding", [{}, {"temperature": 1.5, "seed": 2, "repetition_penalty": 1.2}])
def test_published_settings_count_alike(settings: dict[str, Any], decoding: dict[str, Any]) -> None:
    vlm = endless()
    options = {"max_new_tokens": 16} | decoding
    plain = vlm.chat(None, "Hi", **options)
    for name, value in settings.items():
        setattr(vlm.model.generation_config, name, value)
    said = vlm.chat(None, "Hi", **options)
    assert said == engines(vlm, "Hi", **options) == "".join(vlm.stream(None, "Hi", **options))
    if next(iter(settings)) in ("min_p", "stop_strings"):
        assert said == plain


def test_published_settings_see_no_placeholder() -> None:
    """A picture's placeholders are neither n-grams nor words that were said."""
    vlm = connect()
    vlm.model.generation_config.no_repeat_ngram_size = 2
    options: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": 1.4}
    engine = Engine(vlm.model, vlm.processor)
    found = engine.submit(ask("What?", 2), [tiny.picture(1), tiny.picture(2)], Decoding(**options)).text().strip()
    engine.close()
    assert found == vlm.chat([tiny.picture(1), tiny.picture(2)], "What?", **options)


def test_published_words_that_never_come_and_encoder_decoders() -> None:
    vlm = endless()
    vlm.model.generation_config.bad_words_ids = [[token] for token in ids("abcnopqrstuvwxyz")]
    contracts.check_engine_equals_generate(vlm)
    assert set(engines(vlm, "Hi", max_new_tokens=8)) <= set("defghijklm")
    pair = connect(language="t5")
    pair.model.generation_config.update(forced_bos_token_id=70, no_repeat_ngram_size=1, encoder_no_repeat_ngram_size=2)
    contracts.check_engine_equals_generate(pair, SequentialDecoder)


FACTORS = {"short_factor": [1.0] * 3, "long_factor": [8.0] * 3, "original_max_position_embeddings": 128, "factor": 8.0}
SMALL = {**TOKENS, **SHAPE, "intermediate_size": 44, "num_key_value_heads": 2, "max_position_embeddings": 1024}


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "phi3"])
def test_neighbours_do_not_stretch_rotations(kind: str) -> None:
    """Where frequencies depend on a sequence's length, a short one keeps its own beside a long one."""
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic" if kind == "dynamic" else "longrope"}
    rope |= {"factor": 4.0, "original_max_position_embeddings": 128} if kind == "dynamic" else FACTORS
    if kind == "phi3":
        vlm = of(Phi3Config(**SMALL, original_max_position_embeddings=128, rope_parameters=rope))
    else:
        vlm = of(LlamaConfig(**SMALL, rope_parameters=rope))
    vlm.model.generation_config.eos_token_id = 259
    decoding, asked = Decoding(max_new_tokens=12), [ask("short", 0), ask("long " * 40, 0)]
    engine = Engine(vlm.model, vlm.processor)
    assert type(engine.decoder) is SequentialDecoder
    alone = [engine.submit(one, [], decoding).text() for one in asked]
    together = [engine.submit(one, [], decoding) for one in asked]
    assert [ticket.text() for ticket in together] == alone
    engine.close()


def test_a_short_prompt_does_not_wait_for_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the shortest and of the oldest prompt are read in turns: neither waits for the other's end."""
    read: list[int] = []
    begun = threading.Event()
    reads = Engine._read

    def noted(engine: Engine, request: Request) -> None:
        begun.wait(60)
        read.append(request.ticket.prompt_tokens)
        reads(engine, request)

    monkeypatch.setattr(engine_module.Engine, "_read", noted)
    monkeypatch.setattr("chiasm.generation.batched.CHUNK", 20)
    vlm = endless()
    engine = Engine(vlm.model, vlm.processor, max_batch=8)
    decoding = Decoding(max_new_tokens=2)
    asked = [ask("long " * 60, 0), ask("middle " * 20, 0), ask("a", 0), ask("bc", 0), ask("def", 0)]
    tickets = [engine.submit(one, [], decoding) for one in asked]
    time.sleep(0.05)
    begun.set()
    assert all(len(list(ticket)) == 2 for ticket in tickets)
    engine.close()
    long, middle, *short = (ticket.prompt_tokens for ticket in tickets)
    assert max(read.index(one) for one in short) < 2 * sum(read.count(one) for one in short) + 3
    halfway = read[: 2 * read.count(long) - 2]
    assert halfway.count(long) >= len(halfway) // 2 - 1 and read.index(middle) < 20
