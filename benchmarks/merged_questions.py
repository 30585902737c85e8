"""Questions about one picture in one conversation, against a conversation for each: samples and supervised tokens a
second of the same questions and answers, in the same run, taking turns (A B B A).

The model is that of `packing.py`: a frozen language model of SmolLM2-135M's width, 49 visual tokens a picture that
were encoded beforehand, the connector trained. Both ways learn from the same questions in a step. Merged ones pay a
picture's tokens once, and see the questions before them.

    python benchmarks/merged_questions.py [--quick] [--questions 8] [--words 12] [--layers 4] [--rounds 5]

What merging can give at best is the places of the one over those of the other.
"""

import argparse
import statistics
import time

import torch

import chiasm
from chiasm.data.collation import Batch, Item, collate, encode_sample
from chiasm.data.merging import MergedQuestions
from chiasm.data.schema import ImageRef, Sample, Samples
from chiasm.training.attention import fast_attention
from chiasm.training.precision import choose_dtype, stage_precision
from measure import ForeignLoad, machine
from packing import WIDTH, build, step

MERGED, SINGLE = "merged", "one by one"
ANSWER = 6
WORDS = (30_000, 40_000)
"""Words by number; `w1` and `w2` are special tokens, which would be found in `w12345`."""
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
HEADER = (
    "| conversations | samples/s | supervised tokens/s | places | merged is faster | ideal | share of it |\n"
    "|---|---|---|---|---|---|---|"
)


def build_samples(pictures: int, questions: int, words: int) -> list[Sample]:
    """`questions` of so many words about each picture, each with an answer of six."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        drawn = torch.randint(*WORDS, (length,), generator=generator)
        return " ".join(f"w{number}" for number in drawn.tolist())

    samples = []
    for index in range(pictures * questions):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f" {text(words)}"}]}
        shown = ImageRef.of(str(index // questions).encode())
        samples.append(Sample(f"s{index}", [question, {"role": "assistant", "content": text(ANSWER)}], [shown]))
    return samples


def batches_of(samples: Samples, size: int, vlm: chiasm.VLM) -> list[Batch]:
    """Batches of `size` conversations, whose pictures' features are drawn."""
    features = torch.randn(1, vlm.model.vision.num_patches, WIDTH, generator=torch.Generator().manual_seed(1))
    items = [Item(one.id, encode_sample(one, vlm.processor), features, encoded=True) for one in samples]
    return [collate(items[start : start + size], vlm.processor) for start in range(0, len(items), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, one round: shows that it runs")
    parser.add_argument("--questions", type=int, default=8, help="about each picture")
    parser.add_argument("--words", type=int, default=12, help="of a question")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    layers, rounds = (1, 1) if options.quick else (options.layers, options.rounds)
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    vlm = build(layers)
    vlm.processor.chat_template = TEMPLATE
    model = vlm.model.requires_grad_(False).train()
    model.connector.requires_grad_(True)
    dtype = choose_dtype("auto", model.device)
    samples = build_samples(2 if options.quick else 4, options.questions, options.words)
    ways = {
        MERGED: batches_of(MergedQuestions(samples, options.questions), 2, vlm),
        SINGLE: batches_of(samples, 2 * options.questions, vlm),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with stage_precision(model, dtype), fast_attention(model.language, dtype), ForeignLoad() as foreign:
        for number in range(rounds + 1):
            for way in list(ways) if number % 2 else list(reversed(ways)):
                started = time.perf_counter()
                for batch in ways[way]:
                    step(model, batch, dtype, batch.supervised)
                if number:
                    seconds[way].append(time.perf_counter() - started)
    report(ways, {way: statistics.median(times) for way, times in seconds.items()}, len(samples))
    print(f"\n{str(dtype).removeprefix('torch.')}, {layers} layers; load by others {foreign.share:.0%}")


def report(ways: dict[str, list[Batch]], seconds: dict[str, float], questions: int) -> None:
    print(HEADER)
    places = {way: sum(batch.inputs["input_ids"].numel() for batch in batches) for way, batches in ways.items()}
    for way, batches in ways.items():
        supervised = sum(batch.supervised for batch in batches)
        times, ideal = seconds[way] / seconds[MERGED], places[way] / places[MERGED]
        compared = "– | – | –" if way == MERGED else f"**{times:.2f}** | {ideal:.2f} | {times / ideal:.0%}"
        rates = f"{questions / seconds[way]:.2f} | {supervised / seconds[way]:.0f}"
        print(f"| {way} | {rates} | {places[way]} | {compared} |")


if __name__ == "__main__":
    main()
