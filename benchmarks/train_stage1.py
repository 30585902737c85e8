"""Stage 1 (connector only): Chiasm's trainer against transformers' LLaVA trained frozen in plain PyTorch.

Both sides start from the same weights (`load_llava`), and take the same batches in the same order. The peer is what one
writes by hand: `requires_grad_(False)` on everything but the projector, AdamW, the model's own loss, pictures through
the vision tower in every step. Its batches lie ready in memory, while Chiasm's time includes preparing them.

    python benchmarks/train_stage1.py [--quick] [--compile] [--tokens 196 49] [--batch 8] [--rounds 8]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from chiasm.interop.llava import load_llava
from measure import Gate, machine
from training_sides import (
    SMOLLM2_135M,
    VOCABULARY,
    Case,
    Row,
    build_processor,
    drawn_batches,
    header,
    measured,
    plain_loop,
)

PATCH = {196: 16, 49: 32}
"""Patch size of the vision tower (CLIP ViT-B at 224 pixels) by visual tokens."""
TARGETS = {196: 1.5, 49: 1.8}


def build_llava(case: Case) -> LlavaForConditionalGeneration:
    """CLIP ViT-B, the two-layer projector and a language model of SmolLM2-135M's shape, with random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=PATCH[case.tokens],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**case.sized(SMOLLM2_135M)),
        image_token_index=VOCABULARY - 1,
        image_seq_length=case.tokens,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def chiasm_model(case: Case) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory(dir=case.folder) as written:
        build_llava(case).save_pretrained(written)
        return load_llava(written)[0], build_processor(case.tokens)


def peer_side(gate: Gate, case: Case) -> None:
    """The loop that one writes by hand around `LlavaForConditionalGeneration`."""
    model = build_llava(case).train()
    batches = drawn_batches(case, model, build_processor(case.tokens))
    model.requires_grad_(False)
    projector = list(model.model.multi_modal_projector.requires_grad_(True).parameters())
    plain_loop(gate, case, batches, lambda batch: model(**batch.inputs, use_cache=False).loss, projector)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of few samples: shows that it runs")
    parser.add_argument("--compile", action="store_true", help="`compile: true` as a third side, in place of float32")
    parser.add_argument("--tokens", type=int, nargs="+", choices=PATCH, default=list(PATCH))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="steps of every side; the first is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.quick:
        options.batch, options.rounds = 2, 3
    print(machine(options.threads), f"batch {options.batch}", sep="; ")
    rows, notes = list[Row](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for tokens in options.tokens:
            for even in (False, True):
                name = f"{tokens} tokens, {'even' if even else 'varied'} lengths"
                sizes = tokens, even, options.batch, options.rounds
                case = Case(name, *sizes, Path(folder), chiasm_model, peer_side, target=TARGETS[tokens])
                sides = {"chiasm bfloat16": 1, "peer bfloat16": 1}
                if options.compile:
                    sides["compiled bfloat16"] = 1
                elif not even:
                    sides |= {"peer float32": 2, "chiasm float32": 2}
                made, said = measured(case, sides, options.threads)
                rows, notes = rows + made, notes + said
    print(header("LLaVA"), *rows, "", *notes, sep="\n")


if __name__ == "__main__":
    main()
