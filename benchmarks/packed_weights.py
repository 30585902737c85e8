"""What packed weights cost: perplexity of the aliases' language models on English prose, and with `--model` the answers
of a trained model to questions about emoji scenes that it has not seen, each with all kinds of weights."""

import argparse
import math
import statistics
from pydoc_data.topics import topics
from typing import Any

import torch

import chiasm
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.evaluation.evaluate import EvalResult, evaluate
from chiasm.evaluation.paired import compare
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine
from chiasm.generation.packed import WEIGHTS, pack
from chiasm.language.adapter import load_language, load_tokenizer
from measure import machine

ALIASES = ("smollm2-135m-instruct", "gemma3-270m")
LENGTH = 512


@torch.no_grad()
def perplexities(alias: str, windows: int) -> dict[str, float]:
    """On the topics of `pydoc`, with each kind of weights in the model; the head is never in fewer than 8 bits."""
    source = chiasm.sources.resolve(alias)
    model, tokenizer = load_language(source, torch.float32), load_tokenizer(source)
    assert tokenizer is not None
    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)), return_tensors="pt")["input_ids"][0]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = [begin + ids[n * LENGTH : (n + 1) * LENGTH].tolist() for n in range(3, 3 + windows)]
    matrices = [
        part for layer in model.base_model.layers for part in layer.modules() if isinstance(part, torch.nn.Linear)
    ]
    head = model.get_output_embeddings()
    original = [matrix.weight for matrix in matrices], head.weight
    found = {}
    for weights in WEIGHTS:
        for matrix, weight in zip(matrices, original[0], strict=True):
            matrix.weight = torch.nn.Parameter(pack(weight, None, weights).dense())
        kind = "int8" if weights == "int4" else weights
        head.weight = torch.nn.Parameter(pack(original[1], None, kind).dense())
        losses = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows]
        found[weights] = math.exp(statistics.mean(losses))
    return found


def answers(folder: str, weights: str, questions: int) -> EvalResult:
    """The engine's answers with such weights."""
    vlm = chiasm.load(folder, dtype="float32")
    engine = Engine(vlm.model, vlm.processor, weights=weights)
    short = Decoding(max_new_tokens=16)

    def generate(messages: list[Any], images: list[Any]) -> list[str]:
        tickets = [engine.submit(*asked, short) for asked in zip(messages, images, strict=True)]
        return [ticket.text().strip() for ticket in tickets]

    skills = {"naming": 1.0, "counting": 1.0, "position": 1.0, "colour": 1.0}
    try:
        return evaluate(generate, EmojiScenes("test", size=questions, weights=skills), control=False)
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4, help=f"of {LENGTH} tokens")
    parser.add_argument("--model", help="folder of a model that was trained on emoji scenes, as `chiasm demo` does")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="one window of one model: shows that it runs")
    options = parser.parse_args()
    print(machine(torch.get_num_threads()))
    if options.model:
        found = {weights: answers(options.model, weights, options.questions) for weights in WEIGHTS}
        for weights, result in found.items():
            total = compare(result, found["float32"])[-1]
            print(weights, {key: total[key] for key in ("n", "accuracy", "difference", "low", "high")}, flush=True)
        return
    for alias in ALIASES[:1] if options.quick else ALIASES:
        found_here = perplexities(alias, 1 if options.quick else options.windows)
        print(alias, {name: round(value, 3) for name, value in found_here.items()}, flush=True)


if __name__ == "__main__":
    main()
