"""Packed against padded batches: samples a second of the same samples, in the same run, taking turns (A B B A).

A frozen language model of SmolLM2-135M's width, 49 visual tokens a picture that were encoded beforehand, texts of very
different lengths, the connector trained. With fewer layers than its 30 the head, which packing leaves as it is, weighs
more and the ratio is smaller. Padded batches come in random order, and by similar length as the trainer makes them by
default. The peers are the same model with transformers' own attention: padded in random order, and as one sequence by
its `DataCollatorWithFlattening`.

    python benchmarks/packing.py [--rounds 3] [--layers 30] [--float32]     four layers by default

What packing can give at best is the padded batches' places over their real tokens.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import chiasm
from chiasm.data.collation import Batch, Item, collate, stack_pictures
from chiasm.data.packing import collate_packed
from chiasm.data.processor import IGNORE
from chiasm.training.attention import fast_attention
from chiasm.training.precision import autocast, choose_dtype, stage_precision
from chiasm.vision.image_processor import ChiasmImageProcessor
from measure import ForeignLoad, machine

PICTURE, WIDTH, VOCABULARY, BATCH, BATCHES = 49, 768, 49152, 16, 2
PACKED = "packed"
HEADER = (
    "| batches | samples/s | real tokens/s | real among them | packed is faster | ideal | share of it | loss apart |\n"
    "|---|---|---|---|---|---|---|---|"
)


def build(layers: int) -> chiasm.VLM:
    """One layer of CLIP ViT-B/32, whose features are drawn instead of computed, an mlp connector and a Llama."""
    torch.manual_seed(0)
    sizes = {"image_size": 224, "patch_size": 32, "hidden_size": WIDTH, "intermediate_size": 3072}
    vision = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1, num_attention_heads=12, **sizes))
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": layers}
    shape = {"vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192}
    language = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY - 8)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pictures = ChiasmImageProcessor(224, [0.5] * 3, [0.5] * 3)
    return chiasm.connect(vision, language, "mlp", tokenizer=tokenizer, image_processor=pictures)


def build_items(image_token: int, num_patches: int) -> list[Item]:
    """Samples of 10 to 400 tokens of text, most of them short; every fourth one without a picture."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(BATCH * BATCHES).log_normal_(3.9, 0.9, generator=generator).clamp(10, 400).long().tolist()
    items = []
    for index, length in enumerate(lengths):
        words = torch.randint(10, VOCABULARY - 10, (length,), generator=generator).tolist()
        shown = [image_token] * PICTURE if index % 4 else []
        labels = [IGNORE] * (len(shown) + length // 2) + words[length // 2 :]
        features = torch.randn(1, num_patches, WIDTH, generator=generator) if shown else None
        items.append(Item(f"s{index}", {"input_ids": shown + words, "labels": labels}, features, encoded=True))
    return items


def flattened(items: list[Item]) -> Batch:
    """One sequence of all samples, as transformers makes it."""
    rows = [{"input_ids": item.tokens["input_ids"], "labels": item.tokens["labels"]} for item in items]
    inputs = dict(DataCollatorWithFlattening(return_tensors="pt")(rows))
    supervised = int((inputs["labels"] != IGNORE).sum())
    return Batch(inputs | stack_pictures(items), [item.id for item in items], supervised, inputs["input_ids"].numel())


def ways_of(items: list[Item], processor: Any) -> dict[str, tuple[list[Batch], bool]]:
    """Batches of the same samples, and whether the attention is Chiasm's."""
    by_length = sorted(items, key=lambda item: -len(item.tokens["input_ids"]))
    padded = [collate(part, processor) for part in parts(items)]
    return {
        PACKED: ([collate_packed(part, processor) for part in parts(items)], True),
        "padded, random order": (padded, True),
        "padded, similar lengths": ([collate(part, processor) for part in parts(by_length)], True),
        "transformers, padded, random order": (padded, False),
        "transformers, flattened": ([flattened(part) for part in parts(items)], False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--float32", action="store_true", help="in float32, where losses can be compared to 1e-5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    vlm = build(options.layers)
    model, processor = vlm.model, vlm.processor
    model.requires_grad_(False).train()
    model.connector.requires_grad_(True)
    dtype = torch.float32 if options.float32 else choose_dtype("auto", model.device)
    items = build_items(processor.image_token_id, model.vision.num_patches)
    ways = ways_of(items, processor)
    supervised = sum(batch.supervised for batch in ways[PACKED][0])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    with stage_precision(model, dtype), ForeignLoad() as foreign:
        for number in range(options.rounds + 1):
            for way in list(ways) if number % 2 else list(reversed(ways)):
                batches, own = ways[way]
                with fast_attention(model.language, dtype) if own else nullcontext():
                    started = time.perf_counter()
                    losses[way] = sum(step(model, batch, dtype, supervised) for batch in batches)
                    if number:
                        seconds[way].append(time.perf_counter() - started)
    report(ways, {way: statistics.median(times) for way, times in seconds.items()}, losses)
    print(f"\n{str(dtype).removeprefix('torch.')}, {options.layers} layers; load by others {foreign.share:.0%}")


def report(ways: dict[str, tuple[list[Batch], bool]], seconds: dict[str, float], losses: dict[str, float]) -> None:
    print(HEADER)
    for way, (batches, _) in ways.items():
        places = sum(batch.inputs["input_ids"].numel() for batch in batches)
        real = sum(batch.tokens for batch in batches)
        times, ideal = seconds[way] / seconds[PACKED], places / real
        compared = "– | – | –" if way == PACKED else f"**{times:.2f}** | {ideal:.2f} | {times / ideal:.0%}"
        apart = abs(losses[way] / losses[PACKED] - 1)
        print(
            f"| {way} | {BATCH * BATCHES / seconds[way]:.2f} | {real / seconds[way]:.0f} | {real / places:.0%} | "
            f"{compared} | {apart:.0e} |"
        )


def parts(items: list[Item]) -> list[list[Item]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def step(model: torch.nn.Module, batch: Batch, dtype: torch.dtype, supervised: int) -> float:
    """Forward and backward of one batch; its share of the loss of all `supervised` tokens."""
    with autocast(torch.device("cpu"), dtype):
        loss = model(**batch.inputs, num_items_in_batch=supervised, return_logits=False).loss
    loss.backward()
    model.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
