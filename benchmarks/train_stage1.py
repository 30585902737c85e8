"""Stage 1 (connector only): Chiasm's trainer against transformers' LLaVA trained frozen in plain PyTorch.

Both sides start from the same weights (`load_llava`), and take the same batches in the same order. The peer is what one
writes by hand: `requires_grad_(False)` on everything but the projector, AdamW, the model's own loss, pictures through
the vision tower in every step. Its batches lie ready in memory, while Chiasm's time includes preparing them.

    python benchmarks/train_stage1.py [--quick] [--compile] [--tokens 196 49] [--batch 8] [--rounds 8]
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from chiasm.comparison.cost import encode_flops, language_flops
from chiasm.data.collation import Batch
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import ImageRef, Sample, SampleError
from chiasm.fusion.early import EarlyFusionModel
from chiasm.interop.llava import load_llava
from chiasm.training import trainer
from chiasm.training.batches import Order
from chiasm.training.features import Features
from chiasm.training.log import Reporter
from chiasm.training.optimization import Taken
from chiasm.training.recipe import load_recipe
from chiasm.training.source import Source, survey
from chiasm.training.stage_model import AnswerModel
from chiasm.training.stage_run import StageRun
from chiasm.vision.image_processor import ChiasmImageProcessor
from measure import Block, Gate, Worker, foreign_text, in_turns, machine, quiet, ratio, reset_peak_memory

PATCH = {196: 16, 49: 32}
"""Patch size of the vision tower (CLIP ViT-B at 224 pixels) by visual tokens."""
VOCABULARY = 49152
EPOCHS = (1, 3)
LR = 1e-3
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}\n{{ message['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
FRAME = 6
"""Tokens of the chat template around the words of a question and an answer."""


@dataclass(frozen=True)
class Case:
    """What a side trains. `even`: all texts are equally long, so that nothing is padded; `compile` is Chiasm's."""

    tokens: int
    even: bool
    dtype: str
    batch: int
    batches: int
    steps: int
    folder: Path
    compile: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """Chiasm's defaults, but for warm-up, schedule and clipping, which the peer has not."""
        parts = {"vision": "frozen", "connector": {"tune": "full", "lr": LR}, "language": "frozen"}
        plain = {"warmup": 0.0, "schedule": "constant", "clip": None, "validation": {"samples": 0}}
        plain |= {"compile": self.compile}
        stage = {"name": "align", "parts": parts, "batch_size": self.batch, "steps": self.steps, "dtype": self.dtype}
        return {"stages": [stage | plain | {"checkpoint_every": 10**9}]}


def build_llava(tokens: int) -> LlavaForConditionalGeneration:
    """CLIP ViT-B, the two-layer projector and a language model of SmolLM2-135M's shape, with random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=PATCH[tokens],
    )
    language = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=VOCABULARY - 1,
        image_seq_length=tokens,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_processor(tokens: int) -> ChiasmProcessor:
    """CLIP's preprocessing and a tokenizer whose every word is one token."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    words = ["user", "assistant", *(f"w{number}" for number in range(VOCABULARY - len(special) - 3))]
    vocabulary = {word: index for index, word in enumerate([*special, *words, "<image>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    tokenizer.chat_template = CHATML
    mean, std = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
    return ChiasmProcessor(ChiasmImageProcessor(224, mean, std), tokenizer, num_image_tokens=tokens)


def build_samples(count: int, even: bool) -> list[Sample]:
    """Random pictures; questions and answers of 32 tokens each on average, spread as in chat data unless `even`."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        spread = (1.0, 1.0) if even else np.clip(rng.gamma(2.0, 0.5, size=2), 0.1, 4.0)
        asked, answered = (max(2, round(32 * share)) for share in spread)
        text = [" ".join(f"w{word}" for word in rng.integers(0, 40000, n)) for n in (asked - FRAME + 1, answered - 1)]
        picture = Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8))
        question = [{"type": "image"}, {"type": "text", "text": text[0]}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text[1]},
        ]
        samples.append(Sample(f"s{index}", messages, [ImageRef.of(picture, f"of s{index}")]))
    return samples


class TimedRun(StageRun):
    """The trainer's own stage, whose blocks wait for the gate and are timed; nothing is saved at the end."""

    gate: Gate

    def _prepare_data(self) -> None:
        self.gate.wait()
        fill, filled = Features.fill, []

        def timed_fill(*args: Any) -> Any:
            started = time.perf_counter()
            rows = fill(*args)
            filled.append(time.perf_counter() - started)
            return rows

        started = time.perf_counter()
        with patch.object(Features, "fill", timed_fill):
            super()._prepare_data()
        seconds = time.perf_counter() - started
        pictures = len(self.features.cache) if self.features is not None else 0
        self.prepared: dict[int, float] = {}
        self.gate.done(seconds=sum(filled), setup=seconds - sum(filled), pictures=pictures)

    def _batches(self, step: int) -> tuple[list[Batch], dict[str, str]]:
        started = time.perf_counter()
        made = super()._batches(step)
        self.prepared[step] = time.perf_counter() - started
        return made

    def _optimize(self, step: int, batches: list[Batch]) -> Taken:
        self.gate.wait()
        self.batch, self.started = batches[0], time.perf_counter()
        return super()._optimize(step, batches)

    def _log_step(self, step: int, skipped: dict[str, SampleError], taken: Taken, seconds: float) -> None:
        super()._log_step(step, skipped, taken, seconds)
        seconds = time.perf_counter() - self.started + self.prepared[step]
        state = self.optimizer.state_dict()
        moment = torch.cat([state[f"exp_avg/{name}"].flatten() for name in self.optimizer.parameters])
        self.gate.done(
            seconds=seconds,
            loss=sum(taken.losses.values()),
            moment=moment.numpy(),
            work=work(self.model, self.batch),
            **padding(self.batch),
        )

    def _finish(self, seconds: float) -> None:
        return


def chiasm_side(gate: Gate, case: Case) -> None:
    """`chiasm.training.train` as it is, with `TimedRun` for its stages. The first block is the encoding."""
    with tempfile.TemporaryDirectory(dir=case.folder) as written:
        build_llava(case.tokens).save_pretrained(written)
        model, processor = load_llava(written)[0], build_processor(case.tokens)
    samples = build_samples(case.batch * case.batches, case.even)
    TimedRun.gate = gate
    with tempfile.TemporaryDirectory(dir=case.folder) as folder, patch.object(trainer, "StageRun", TimedRun):
        reset_peak_memory()
        place = Path(folder)
        trainer.train(case.recipe, model, processor, samples, place / "run", quiet=True, cache_root=place / "features")


def peer_side(gate: Gate, case: Case) -> None:
    """The loop that one writes by hand around `LlavaForConditionalGeneration`."""
    model = build_llava(case.tokens).train()
    batches = peer_batches(case, model)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    parameters = list(projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    reset_peak_memory()
    for batch in batches:
        gate.wait()
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = model(**batch.inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        seconds = time.perf_counter() - started
        moment = torch.cat([optimizer.state[parameter]["exp_avg"].flatten() for parameter in parameters])
        gate.done(seconds=seconds, loss=value, moment=moment.numpy())
        del loss


def peer_batches(case: Case, model: LlavaForConditionalGeneration) -> list[Batch]:
    """The batches that Chiasm's trainer draws, with pixels instead of features."""
    processor, samples = build_processor(case.tokens), build_samples(case.batch * case.batches, case.even)
    found = survey(samples, case.tokens, False, Reporter("quiet"))
    source, order = (
        Source(samples, AnswerModel(model, processor)),
        Order(found.usable, found.lengths, load_recipe(case.recipe).stages[0], 0),
    )
    with ThreadPoolExecutor(1) as pool:
        made = [source.batch(indices, pool)[0] for step in range(case.steps) for indices in order.step(step)]
    return [batch for batch in made if batch is not None]


def work(model: EarlyFusionModel, batch: Batch) -> dict[str, float]:
    """FLOPs of a step: encoding its pictures, and training without and with the two savings (performance limits)."""
    rows, length = batch.inputs["input_ids"].shape
    encode, connect = rows * encode_flops(model.vision), 3 * rows * model.connector.flops()
    everywhere = 2 * rows * language_flops(model, length, length, logits=length)
    supervised = 2 * rows * language_flops(model, length, length, logits=0)
    supervised += 2 * 2 * batch.supervised * model.language.get_output_embeddings().weight.numel()
    return {"encode": encode, "naive": connect + everywhere, "least": connect + supervised}


def padding(batch: Batch) -> dict[str, int]:
    """Places, real tokens and supervised tokens of a batch."""
    return {"places": batch.inputs["input_ids"].numel(), "real": batch.tokens, "supervised": batch.supervised}


@dataclass(frozen=True)
class Row:
    """One line of the result. `limit`: how many times faster the FLOP counts allow to be."""

    what: str
    ours: float
    theirs: float
    ratio: float
    limit: float | None
    target: float | None

    def __str__(self) -> str:
        limit = f"{self.limit:.2f} | {self.ratio / self.limit:.0%}" if self.limit else "– | –"
        target = f"{self.target:.1f}" if self.target else "–"
        return f"| {self.what} | {self.ours:.2f} | {self.theirs:.2f} | **{self.ratio:.2f}** | {target} | {limit} |"


HEADER = """| what | Chiasm, samples/s | LLaVA, samples/s | ratio | target | FLOP limit | share of it |
|---|---|---|---|---|---|---|"""
TARGETS = {196: 1.5, 49: 1.8}


def rows_of(case: Case, first: dict[str, Block], blocks: dict[str, list[Block]]) -> list[Row]:
    """Ratios of one case. `first`: the block in which each Chiasm side encoded."""
    name = f"{case.tokens} tokens, {'even' if case.even else 'varied'} lengths"
    timed = {side: made[1:] for side, made in blocks.items()}
    ours, theirs = timed["chiasm bfloat16"], timed["peer bfloat16"]
    done = [block.result["work"] for block in ours]
    encode, naive, least = (sum(flops[key] for flops in done) for key in ("encode", "naive", "least"))
    rows = [Row(f"{name}, bfloat16, warm", *rates(case, ours, theirs), (encode + naive) / least, TARGETS[case.tokens])]
    picture = first["chiasm bfloat16"].seconds / first["chiasm bfloat16"].result["pictures"]
    for epochs in EPOCHS:
        mine, peer, speed = rates(case, ours, theirs)
        share = mine * picture / epochs
        limit = epochs * (encode + naive) / (encode + epochs * least)
        what = f"{name}, bfloat16, {epochs} epoch{'s' * (epochs > 1)} with encoding"
        rows.append(Row(what, mine / (1 + share), peer, speed / (1 + share), limit, None))
    if "compiled bfloat16" in timed:
        compiled = rates(case, timed["compiled bfloat16"], theirs)
        what = f"{name}, bfloat16, compiled, warm"
        rows.append(Row(what, *compiled, (encode + naive) / least, TARGETS[case.tokens]))
    if "peer float32" in timed:
        ours32, theirs32 = timed["chiasm float32"], timed["peer float32"]
        rows.append(Row(f"{name}, float32, warm", *rates(case, ours32, theirs32), (encode + naive) / least, None))
        same = ours[: len(theirs32)]
        rows.append(Row(f"{name}, Chiasm's default to LLaVA's (float32)", *rates(case, same, theirs32), None, 3.0))
    return rows


def rates(case: Case, ours: list[Block], theirs: list[Block]) -> tuple[float, float, float]:
    """Samples per second of both, and the ratio: all of them medians."""
    mine, peer = (case.batch / median(block.seconds for block in quiet(side)) for side in (ours, theirs))
    return mine, peer, ratio(ours, theirs)


def notes_of(case: Case, first: dict[str, Block], blocks: dict[str, list[Block]]) -> list[str]:
    """Equality of the two sides, memory, padding, and the load by other programs."""
    batches = [block.result for block in blocks["chiasm bfloat16"]]
    places, real, supervised = (sum(b[key] for b in batches) for key in ("places", "real", "supervised"))
    samples = case.batch * len(batches)
    notes = [
        f"{real / samples - case.tokens:.0f} text tokens a sample, {supervised / samples:.0f} supervised, "
        f"{1 - real / places:.0%} padding; one-time set-up {first['chiasm bfloat16'].result['setup']:.1f} s, "
        f"then {1e3 * first['chiasm bfloat16'].seconds / first['chiasm bfloat16'].result['pictures']:.0f} ms a picture"
    ]
    for dtype in ("float32", "bfloat16"):
        if f"peer {dtype}" in blocks:
            ours, theirs = blocks[f"chiasm {dtype}"], blocks[f"peer {dtype}"]
            apart = max(abs(a.result["loss"] / b.result["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
            a, b = (side[-1].result["moment"] for side in (ours, theirs))
            losses = f"{theirs[0].result['loss']:.3f} → {theirs[-1].result['loss']:.3f}"
            notes.append(
                f"{dtype}: losses ({losses}) differ by at most {apart:.1e}, "
                f"Adam's averages of the gradients by {np.linalg.norm(a - b) / np.linalg.norm(b):.1e}"
            )
    peaks = {side: made[-1].result["peak_bytes"] / 2**30 for side, made in blocks.items()}
    notes.append("peak memory: " + ", ".join(f"{side} {peak:.2f} GiB" for side, peak in peaks.items()))
    notes.append("load by others: " + foreign_text([block for made in blocks.values() for block in made]))
    return notes


def run_case(case: Case, sides: dict[str, int], threads: int) -> tuple[list[Row], list[str]]:
    """All sides of a case in turns. `sides`: in every how many rounds each takes part."""
    workers, first = {}, {}
    try:
        for name, every in sides.items():
            program, dtype = name.split()
            steps, compiled = -(-case.batches // every), program == "compiled"
            own = replace(case, dtype=dtype, steps=steps, compile=compiled)
            workers[name] = Worker(peer_side if program == "peer" else chiasm_side, own, threads=threads)
            if program != "peer":
                first[name] = workers[name].go()
                workers[name].ready()
        blocks = in_turns(workers, case.batches, sides)
    finally:
        for worker in workers.values():
            worker.stop()
    return rows_of(case, first, blocks), notes_of(case, first, blocks)


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
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in options.tokens:
            for even in (False, True):
                case = Case(tokens, even, "", options.batch, options.rounds, 0, Path(folder))
                sides = {"chiasm bfloat16": 1, "peer bfloat16": 1}
                if options.compile:
                    sides["compiled bfloat16"] = 1
                elif not even:
                    sides |= {"peer float32": 2, "chiasm float32": 2}
                made, said = run_case(case, sides, options.threads)
                rows += made
                notes += [f"- {tokens} tokens, {'even' if even else 'varied'} lengths: {note}" for note in said]
                print("\n".join(map(str, made)), *said, sep="\n", file=sys.stderr)
    print(HEADER, *rows, "", *notes, sep="\n")


if __name__ == "__main__":
    main()
