"""Images per second of a frozen EfficientNet-Lite: what fills a feature cache, against the same model in plain eager.

Pretrained weights, pictures of the emoji scenes, inference only; "error" is the largest relative difference of a
feature map from eager float32. The time on the processor is all threads' together: with one thread it stays true on a
machine that others use too.

    python benchmarks/encode.py [--quick] [--model efficientnet-lite0] [--batches 1 8 32] [--threads 1] [--compile]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

import chiasm.vision.fast_inference as fast
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.sources import pull
from measure import Block, Gate, Worker, foreign_text, in_turns, machine, quiet, ratio

Encode = Callable[[Tensor], dict[str, Tensor]]

EAGER = "eager float32"
SIDES = (EAGER, "eager bfloat16 (autocast)", "fast_inference float32", "fast_inference bfloat16")
COMPILED = "folded, torch.compile float32"
HEADER = """\
| way | pictures at once | ms per picture | on the processor | times faster | error |
|---|---|---|---|---|---|"""


def encoder(way: str, model: torch.nn.Module) -> Encode:
    """One way of computing all feature maps."""
    if way == "fast_inference float32":
        run = fast.fast_inference(model)
    elif way == "fast_inference bfloat16":
        run = fast.fast_inference(model, torch.bfloat16)
    elif way == COMPILED:
        fast._onednn_agrees = lambda folded, dtype: False
        run = fast.fast_inference(model, compile=True)
    else:
        cast = torch.autocast("cpu", torch.bfloat16) if way != EAGER else nullcontext()

        def run(pictures: Tensor) -> object:
            with torch.no_grad(), cast:
                return model(pictures)

    return lambda pictures: run(pictures).feature_maps


def side(gate: Gate, way: str, name: str, batch: int) -> None:
    """Encodes at least 8 pictures a block, after one pass that is not counted."""
    folder = pull(name)
    model = AutoModel.from_pretrained(folder)
    scenes = EmojiScenes("validation", size=batch)
    images = [sample.images[0].load() for sample in (scenes[index] for index in range(batch))]
    pictures = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    encode = encoder(way, model)
    started = time.perf_counter()
    found = encode(pictures)
    first_seconds = time.perf_counter() - started
    expected = encoder(EAGER, model)(pictures)
    error = max(float((found[key].float() - expected[key]).norm() / expected[key].norm()) for key in expected)
    passes = max(1, 8 // batch)
    while True:
        gate.wait()
        encode(pictures)
        started, processor = time.perf_counter(), time.process_time()
        for _ in range(passes):
            encode(pictures)
        elapsed, used = time.perf_counter() - started, time.process_time() - processor
        count = passes * batch
        gate.done(seconds=elapsed / count, processor=used / count, error=error, first_seconds=first_seconds)


def median(blocks: Sequence[Block], key: str) -> float:
    """In ms."""
    return 1000 * sorted(block.result[key] for block in blocks)[len(blocks) // 2]


def compile_seconds(options: argparse.Namespace) -> str:
    """The first pass of the compiled side, without and with what an earlier process left on disk."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for _ in range(2):
            worker = Worker(side, COMPILED, options.model, 4, threads=options.threads)
            seconds.append(worker.go().result["first_seconds"])
            worker.stop()
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    return f"- compilation takes {seconds[0]:.1f} s, {seconds[1]:.1f} s when an earlier process left it on disk"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch size, three rounds: shows that it runs")
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile and time the compilation")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.rounds = [8], 3
    ways = (*SIDES, COMPILED) if options.compile else SIDES
    print(f"{options.model}; {machine(options.threads)}")
    rows, notes = [], [compile_seconds(options)] if options.compile else []
    for batch in options.batches:
        workers = {way: Worker(side, way, options.model, batch, threads=options.threads) for way in ways}
        blocks = in_turns(workers, options.rounds)
        for worker in workers.values():
            worker.stop()
        for way, measured in blocks.items():
            kept = quiet(measured)
            cells = [way, batch, f"{median(kept, 'seconds'):.1f}", f"{median(kept, 'processor'):.1f}"]
            cells += [f"{ratio(measured, blocks[EAGER]):.1f}", f"{measured[0].result['error']:.0e}"]
            rows.append(f"| {' | '.join(map(str, cells))} |")
            print(rows[-1], file=sys.stderr)
        notes.append(
            f"- foreign load with {batch} at once: {foreign_text([b for kind in blocks.values() for b in kind])}"
        )
    print(HEADER, *rows, "", *notes, sep="\n")


if __name__ == "__main__":
    main()
