"""Cross-attention against early fusion as pictures per sample grow, and decoding with and without kept pictures.

One language model of SmolLM2-135M's shape with random weights, frozen; a CLIP ViT-B/16's shape of patch features (196 a
picture, encoded beforehand on both sides); mlp connector; cross-attention in front of every fourth layer. `Training` is
a forward and backward of one sample; what is trained is the connector, and the cross-attention where there is one.
`Decoding` answers about pictures whose keys and values are kept, against computing them again for every token.

    python benchmarks/cross_attention.py [--quick] [--images 1 2 4 7] [--threads 2]
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

import chiasm
from chiasm.comparison.cost import cost
from chiasm.training.precision import autocast, choose_dtype
from measure import Gate, Worker, foreign_text, in_turns, machine, quiet, ratio

TEXT = 64
DECODED = 8
LANGUAGE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def build(fusion: str) -> chiasm.VLM:
    """The model of one side, with everything but the connector and the cross-attention frozen."""
    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, num_hidden_layers=1))
    vlm = chiasm.connect(vision, AutoModelForCausalLM.from_config(LlamaConfig(**LANGUAGE)), "mlp", fusion)
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in ("connector", "cross_attention"))
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)
    return vlm


def sample(model: Any, images: int) -> dict[str, torch.Tensor]:
    """Pictures first, then text; the last half of the text is supervised in training."""
    places = images * model.num_image_tokens
    ids = torch.randint(0, 40000, (1, places + TEXT), generator=torch.Generator().manual_seed(1))
    ids[:, :places] = model.config.image_token_id
    features = torch.randn(images, model.vision.num_patches, model.vision.width)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_features": features}


def training(gate: Gate, fusion: str, images: int) -> None:
    """One step a block."""
    model = build(fusion).model.train()
    inputs = sample(model, images)
    labels = inputs["input_ids"].clone()
    labels[:, : -TEXT // 2] = -100

    def step() -> None:
        with autocast(model.device, choose_dtype("auto", model.device)):
            loss = model(**inputs, labels=labels).loss
        loss.backward()

    step()
    while True:
        gate.wait()
        started = time.perf_counter()
        step()
        gate.done(seconds=time.perf_counter() - started)


def decode(model: Any, token: torch.Tensor, cache: Any, pictures: dict[str, Any]) -> None:
    """One token; pictures that the cache holds would be read in place of features."""
    if "image_cache" not in pictures:
        cache.image_cache = None
    model(input_ids=token, cache=cache, use_cache=True, **pictures)


@torch.inference_mode()
def decoding(gate: Gate, way: str, images: int) -> None:
    """So many tokens a block, each with the same prompt in the cache."""
    model = build("intermediate").model.eval()
    inputs = sample(model, images)
    mask = torch.ones(1, 1, images, dtype=torch.bool)
    token = inputs["input_ids"][:, -1:]
    while True:
        prompt = model(**inputs, use_cache=True, logits_to_keep=1)
        kept = {"image_cache": prompt.image_cache, "image_attention_mask": mask}
        again = {"image_features": inputs["image_features"], "image_attention_mask": mask}
        pictures = kept if way == "kept" else again
        decode(model, token, prompt.cache, pictures)
        gate.wait()
        started = time.perf_counter()
        for _ in range(DECODED):
            decode(model, token, prompt.cache, pictures)
        gate.done(seconds=(time.perf_counter() - started) / DECODED)


def flops(fusion: str, images: int) -> int:
    """The closed form of what a prompt of this sample costs the language side."""
    return cost(build(fusion).model, images=images, text_tokens=TEXT).prefill_flops


def measured(
    task: Any, sides: tuple[str, str], images: int, options: argparse.Namespace
) -> tuple[list[float], float, str]:
    """Milliseconds of both sides, how many times faster the first is, and the foreign load."""
    workers = {side: Worker(task, side, images, threads=options.threads) for side in sides}
    blocks = in_turns(workers, options.rounds)
    for worker in workers.values():
        worker.stop()
    medians = [1000 * sorted(b.seconds for b in quiet(blocks[s]))[len(quiet(blocks[s])) // 2] for s in sides]
    return medians, ratio(blocks[sides[0]], blocks[sides[1]]), foreign_text([b for s in sides for b in blocks[s]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one number of pictures, three rounds")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 7])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = [2], 3
    print(machine(options.threads))
    print("| pictures | cross-attention, ms a step | early, ms a step | times faster | by FLOPs | foreign load |")
    print("|---|---|---|---|---|---|")
    for images in options.images:
        (ours, theirs), times, load = measured(training, ("intermediate", "early"), images, options)
        limit = flops("early", images) / flops("intermediate", images)
        print(f"| {images} | {ours:.0f} | {theirs:.0f} | **{times:.2f}** | {limit:.2f} | {load} |", flush=True)
    print("\n| pictures | kept, ms a token | computed again, ms a token | times faster | foreign load |")
    print("|---|---|---|---|---|")
    for images in options.images:
        (ours, theirs), times, load = measured(decoding, ("kept", "again"), images, options)
        print(f"| {images} | {ours:.0f} | {theirs:.0f} | **{times:.2f}** | {load} |", flush=True)


if __name__ == "__main__":
    main()
