"""Packed against padded batches: samples a second of the same samples, in the same run, taking turns (A B B A).

A frozen language model of SmolLM2-135M's width (fewer layers: the ratio does not depend on them), 49 visual tokens a
picture that were encoded beforehand, texts of very different lengths, the connector trained. Padded batches come in
random order, and by similar length as the trainer makes them by default.

    python benchmarks/packing.py [--rounds 3] [--layers 6]
"""

import argparse
import statistics
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import chiasm
from chiasm.data.collation import Batch, Item, collate
from chiasm.data.packing import collate_packed
from chiasm.data.processor import IGNORE
from chiasm.training.attention import fast_attention
from chiasm.training.precision import autocast, choose_dtype, stage_precision
from chiasm.vision.image_processor import ChiasmImageProcessor

PICTURE, WIDTH, VOCABULARY, BATCH, BATCHES = 49, 768, 49152, 16, 2


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    vlm = build(options.layers)
    model, processor = vlm.model, vlm.processor
    model.requires_grad_(False).train()
    model.connector.requires_grad_(True)
    dtype = choose_dtype("auto", model.device)
    items = build_items(processor.image_token_id, model.vision.num_patches)
    by_length = sorted(items, key=lambda item: -len(item.tokens["input_ids"]))
    ways = {
        "packed": [collate_packed(part, processor) for part in parts(items)],
        "padded, random order": [collate(part, processor) for part in parts(items)],
        "padded, similar lengths": [collate(part, processor) for part in parts(by_length)],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    with stage_precision(model, dtype), fast_attention(model.language, dtype):
        for number in range(options.rounds + 1):
            for way in list(ways) if number % 2 else list(reversed(ways)):
                started = time.perf_counter()
                losses[way] = sum(step(model, batch, dtype) for batch in ways[way]) / BATCHES
                if number:
                    seconds[way].append(time.perf_counter() - started)
    rates = {way: len(items) / statistics.median(times) for way, times in seconds.items()}
    print("| what | samples/s | tokens in the batches | packed is faster | loss |\n|---|---|---|---|---|")
    for way, batches in ways.items():
        size = sum(batch.inputs["input_ids"].numel() for batch in batches)
        real = sum(batch.tokens for batch in batches) / size
        ratio = f"**{rates['packed'] / rates[way]:.2f}**" if way != "packed" else "–"
        print(f"| {way} | {rates[way]:.2f} | {size}, {real:.0%} of them real | {ratio} | {losses[way]:.4f} |")


def parts(items: list[Item]) -> list[list[Item]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def step(model: torch.nn.Module, batch: Batch, dtype: torch.dtype) -> float:
    """Forward and backward of one batch; its loss for each supervised token."""
    with autocast(torch.device("cpu"), dtype):
        loss = model(**batch.inputs, num_items_in_batch=batch.supervised, return_logits=False).loss
    loss.backward()
    model.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
