"""A training step in bfloat16 against our own in float32, and against plain autocast around transformers' LLaVA.

Three strategies: the connector alone, the language model by LoRA beside it, the language model in full; the vision
tower is frozen. The sides are Chiasm's trainer in both precisions (features cached, as always with a frozen tower) and
the loop that one writes by hand in both. All start from the same weights and take the same batches in the same order.

    python benchmarks/precision.py [--strategies connector lora full] [--batch 4] [--rounds 3] [--layers 2]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model

from measure import Gate, machine, ratio
from train_stage1 import build_llava, chiasm_model
from training_sides import (
    TUNED,
    Case,
    build_processor,
    costs_of,
    drawn_batches,
    losses_apart,
    plain_loop,
    rates,
    run_case,
)

TOKENS = 196
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
TARGET, TARGET_OF_AUTOCAST = 2.0, 1.15
HEADER = (
    "| what learns | bfloat16, samples/s | float32, samples/s | ratio | target | autocast by hand, samples/s | ratio | "
    "target | by hand in float32, samples/s | losses apart |\n|---|---|---|---|---|---|---|---|---|---|"
)


def peer_side(gate: Gate, case: Case) -> None:
    """The loop that one writes by hand around `LlavaForConditionalGeneration`, with peft for LoRA."""
    model = build_llava(case).train()
    batches = drawn_batches(case, model, build_processor(case.tokens))
    model.requires_grad_(False)
    projector = list(model.model.multi_modal_projector.requires_grad_(True).parameters())
    language = model.model.language_model
    if case.tuned == "lora":
        rank = TUNED["lora"]["rank"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR), language)
    elif case.tuned == "full":
        language.requires_grad_(True)
    learned = [parameter for parameter in language.parameters() if parameter.requires_grad]
    plain_loop(gate, case, batches, lambda batch: model(**batch.inputs, use_cache=False).loss, projector, learned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=TUNED, default=["connector"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="steps of every side; the first is not counted")
    parser.add_argument("--layers", type=int, help="of the language model, fewer than it has: shows that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(machine(options.threads), f"batch {options.batch}", sep="; ")
    print(HEADER, flush=True)
    notes = []
    sides = {f"{side} {dtype}": 1 for side in ("chiasm", "peer") for dtype in ("bfloat16", "float32")}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in options.strategies:
            sizes = TOKENS, False, options.batch, options.rounds
            more = {"tuned": strategy, "layers": options.layers}
            case = Case(strategy, *sizes, Path(folder), chiasm_model, peer_side, **more)
            _, blocks = run_case(case, sides, options.threads)
            timed = {side: made[1:] for side, made in blocks.items()}
            ours, exact, times = rates(case, timed["chiasm bfloat16"], timed["chiasm float32"])
            _, autocast, faster = rates(case, timed["chiasm bfloat16"], timed["peer bfloat16"])
            _, by_hand, _ = rates(case, timed["chiasm bfloat16"], timed["peer float32"])
            apart = losses_apart(blocks["chiasm bfloat16"], blocks["chiasm float32"])
            print(
                f"| {strategy} | {ours:.2f} | {exact:.2f} | **{times:.2f}** | {TARGET} | {autocast:.2f} | "
                f"**{faster:.2f}** | {TARGET_OF_AUTOCAST} | {by_hand:.2f} | {apart:.1e} |",
                flush=True,
            )
            same = losses_apart(blocks["chiasm float32"], blocks["peer float32"])
            hand = ratio(timed["peer bfloat16"], timed["peer float32"])
            notes += [
                f"- {strategy}: by hand bfloat16 is {hand:.2f} times as fast as float32; losses of Chiasm and the loop "
                f"by hand in float32 are {same:.1e} apart",
                *(f"- {strategy}: {note}" for note in costs_of(blocks)),
            ]
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()
