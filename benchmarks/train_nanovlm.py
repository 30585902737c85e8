"""Stage 1 (connector only): Chiasm's trainer against a loop as nanoVLM's.

The peer has nanoVLM's parts and way: SigLIP, pixel shuffle and one matrix without bias, a Llama; vision and language
frozen (learning rate 0), pictures through the tower in every step, logits at every place, cross-entropy over all of
them, AdamW, bfloat16 autocast around the step. It is written here on transformers' modules; both sides have the same
weights, the same batches without padding, in the same order.

    python benchmarks/train_nanovlm.py [--shapes 224 512] [--batch 4] [--rounds 3] [--layers 2]

`512` is nanoVLM's own shape: 1024 patches as 64 tokens, SmolLM2-360M.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

import chiasm
from chiasm.data.collation import Batch
from chiasm.vision.image_processor import ChiasmImageProcessor
from measure import Gate, machine
from training_sides import (
    SMOLLM2,
    SMOLLM2_135M,
    Case,
    Row,
    build_processor,
    build_tokenizer,
    drawn_batches,
    header,
    measured,
    plain_loop,
)

SMOLLM2_360M = SMOLLM2 | {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "tie_word_embeddings": True,
}
PATCH, WIDTH = 16, 768


@dataclass(frozen=True)
class Shape:
    """Pixels of a picture, side of a shuffled block, sizes of the language model, and the aim."""

    size: int
    factor: int
    language: dict[str, Any]
    target: float
    what: str

    @property
    def tokens(self) -> int:
        return (self.size // PATCH // self.factor) ** 2


SHAPES = {
    "224": Shape(224, 1, SMOLLM2_135M, 1.5, "135M"),
    "224-shuffled": Shape(224, 2, SMOLLM2_135M, 1.8, "135M"),
    "512": Shape(512, 4, SMOLLM2_360M, 2.3, "360M"),
}


def shape_of(case: Case) -> Shape:
    return next(shape for shape in SHAPES.values() if (shape.size, shape.tokens) == (case.size, case.tokens))


def modules(case: Case) -> tuple[SiglipVisionModel, nn.Linear, LlamaForCausalLM]:
    """SigLIP ViT-B/16 without its pooling head, the projection, the language model: the same on both sides."""
    torch.manual_seed(0)
    shape = shape_of(case)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = SiglipVisionConfig(image_size=shape.size, patch_size=PATCH, vision_use_head=False, **sizes)
    vision = SiglipVisionModel(config)
    projection = nn.Linear(WIDTH * shape.factor**2, shape.language["hidden_size"], bias=False)
    return vision, projection, LlamaForCausalLM(LlamaConfig(**case.sized(shape.language)))


def chiasm_model(case: Case) -> tuple[Any, Any]:
    vision, projection, language = modules(case)
    shape, images = shape_of(case), build_processor(case.tokens, case.size).image_processor
    connector = {"name": "pixel_shuffle", "factor": shape.factor, "projection": "linear"}
    pictures = ChiasmImageProcessor(shape.size, images.image_mean, images.image_std)
    own = {"tokenizer": build_tokenizer(), "image_processor": pictures, "features": {"layers": ["last"]}}
    vlm = chiasm.connect(vision, language, connector, **own)
    vlm.model.connector.output.weight.data.copy_(projection.weight)
    return vlm.model, vlm.processor


def shuffled(patches: Float[Tensor, "B N D"], factor: int) -> Float[Tensor, "B T blocks"]:
    """The channels of the patches of every block side by side."""
    side = round(patches.shape[1] ** 0.5)
    blocks = patches.unflatten(1, (side // factor, factor, side // factor, factor))
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2)


def peer_side(gate: Gate, case: Case) -> None:
    """The loop as nanoVLM's."""
    batches = drawn_batches(case, *chiasm_model(case))
    vision, projection, language = modules(case)
    vision.requires_grad_(False)
    language.requires_grad_(False)
    placeholder, factor = build_tokenizer().convert_tokens_to_ids("<image>"), shape_of(case).factor

    def loss_of(batch: Batch) -> Tensor:
        ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
        tokens = projection(shuffled(vision(batch.inputs["pixel_values"]).last_hidden_state, factor))
        embeddings = language.get_input_embeddings()(ids)
        embeddings[ids == placeholder] = tokens.flatten(0, 1).to(embeddings.dtype)
        mask = batch.inputs["attention_mask"]
        states = language.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        logits = language.lm_head(states)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    plain_loop(gate, case, batches, loss_of, [projection.weight])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["512"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="steps of every side; the first is not counted")
    parser.add_argument("--layers", type=int, help="of the language model, fewer than it has: shows that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(machine(options.threads), f"batch {options.batch}", sep="; ")
    rows, notes = list[Row](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for shape in map(SHAPES.__getitem__, options.shapes):
            name = f"{shape.size} px, {shape.tokens} tokens, {shape.what}"
            sizes = shape.tokens, True, options.batch, options.rounds
            more = {"size": shape.size, "target": shape.target, "layers": options.layers}
            case = Case(name, *sizes, Path(folder), chiasm_model, peer_side, **more)
            made, said = measured(case, {"chiasm bfloat16": 1, "peer bfloat16": 1}, options.threads)
            rows, notes = rows + made, notes + said
    print(header("a loop as nanoVLM's"), *rows, "", *notes, sep="\n")


if __name__ == "__main__":
    main()
