"""What benchmarks of training share: the samples, Chiasm's trainer with a gate, and rows of what both sides did."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from chiasm.comparison.cost import encode_flops, language_flops
from chiasm.data.collation import Batch
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import ImageRef, Sample, SampleError
from chiasm.fusion.early import EarlyFusionModel
from chiasm.training import trainer
from chiasm.training.batches import Order
from chiasm.training.features import Features
from chiasm.training.optimization import Taken
from chiasm.training.recipe import load_recipe
from chiasm.training.reporter import Reporter
from chiasm.training.source import Source, survey
from chiasm.training.stage_model import AnswerModel
from chiasm.training.stage_run import StageRun
from chiasm.vision.image_processor import ChiasmImageProcessor
from measure import Block, Gate, Worker, foreign_text, in_turns, quiet, ratio, reset_peak_memory

VOCABULARY = 49152
EPOCHS = (1, 3)
LR = 1e-3
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}\n{{ message['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
FRAME = 6
"""Tokens of the chat template around the words of a question and an answer."""
TUNED: dict[str, Any] = {
    "connector": "frozen",
    "lora": {"tune": "lora", "lr": LR, "rank": 16},
    "full": {"tune": "full", "lr": 1e-5},
}
"""What the language model does beside the connector, by the name of the strategy."""
SMOLLM2 = {"vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5}
SMOLLM2_135M = SMOLLM2 | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """What both sides train.

    Args:
        tokens: visual tokens of a picture of `size` pixels.
        even: all texts are equally long, so that nothing is padded.
        build: makes Chiasm's model and processor; `peer` is the other side.
        tuned: one of `TUNED`.
        compile: Chiasm's.
        layers: of the language model, where a machine is only to show that it runs.
    """

    name: str
    tokens: int
    even: bool
    batch: int
    batches: int
    folder: Path
    build: "Callable[[Case], tuple[Any, Any]]"
    peer: "Callable[[Gate, Case], None]"
    size: int = 224
    tuned: str = "connector"
    target: float | None = None
    layers: int | None = None
    dtype: str = ""
    steps: int = 0
    compile: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """Chiasm's defaults, but for warm-up, schedule and clipping, which the peers have not."""
        parts = {"vision": "frozen", "connector": {"tune": "full", "lr": LR}, "language": TUNED[self.tuned]}
        plain = {"warmup": 0.0, "schedule": "constant", "clip": None, "validation": {"samples": 0}}
        plain |= {"compile": self.compile}
        stage = {"name": "align", "parts": parts, "batch_size": self.batch, "steps": self.steps, "dtype": self.dtype}
        return {"stages": [stage | plain | {"checkpoint_every": 10**9}], "forgetting": {"text": False, "pictures": 0}}

    def samples(self) -> list[Sample]:
        return build_samples(self.batch * self.batches, self.even, self.size)

    def sized(self, language: dict[str, Any]) -> dict[str, Any]:
        """A language model's sizes, with fewer layers where the case says so."""
        return language if self.layers is None else language | {"num_hidden_layers": self.layers}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose every word is one token; the picture's placeholder is the last one."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    words = ["user", "assistant", *(f"w{number}" for number in range(VOCABULARY - len(special) - 3))]
    vocabulary = {word: index for index, word in enumerate([*special, *words, "<image>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def build_processor(tokens: int, size: int = 224) -> ChiasmProcessor:
    """CLIP's preprocessing and that tokenizer."""
    mean, std = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
    return ChiasmProcessor(ChiasmImageProcessor(size, mean, std), build_tokenizer(), num_image_tokens=tokens)


def build_samples(count: int, even: bool, size: int = 224) -> list[Sample]:
    """Random pictures; questions and answers of 32 tokens each on average, spread as in chat data unless `even`."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        spread = (1.0, 1.0) if even else np.clip(rng.gamma(2.0, 0.5, size=2), 0.1, 4.0)
        asked, answered = (max(2, round(32 * share)) for share in spread)
        text = [" ".join(f"w{word}" for word in rng.integers(0, 40000, n)) for n in (asked - FRAME + 1, answered - 1)]
        picture = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
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

    def _batches(self, step: int) -> tuple[list[Batch], dict[str, SampleError]]:
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
        learned = [name for name in self.optimizer.parameters if name.startswith("connector.")]
        self.gate.done(
            seconds=seconds,
            loss=sum(taken.losses.values()),
            moment=torch.cat([state[f"exp_avg/{name}"].flatten() for name in learned]).numpy(),
            work=work(self.model, self.batch),
            **padding(self.batch),
        )

    def _finish(self, seconds: float) -> None:
        return


def chiasm_side(gate: Gate, case: Case) -> None:
    """`chiasm.training.train` as it is, with `TimedRun` for its stages. The first block is the encoding."""
    model, processor = case.build(case)
    TimedRun.gate = gate
    with tempfile.TemporaryDirectory(dir=case.folder) as folder, patch.object(trainer, "StageRun", TimedRun):
        reset_peak_memory()
        place = Path(folder)
        trainer.train(
            case.recipe, model, processor, case.samples(), place / "run", quiet=True, cache_root=place / "features"
        )


def plain_loop(
    gate: Gate,
    case: Case,
    batches: list[Batch],
    loss_of: Callable[[Batch], Tensor],
    connector: list[Tensor],
    language: Sequence[Tensor] = (),
) -> None:
    """The loop that one writes by hand: autocast, the model's loss, backward, AdamW.

    Args:
        connector, language: the tensors that learn.
    """
    rate = TUNED["full"]["lr"] if case.tuned == "full" else LR
    groups = [{"params": connector, "lr": LR}, {"params": list(language), "lr": rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    reset_peak_memory()
    for batch in batches:
        gate.wait()
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        seconds = time.perf_counter() - started
        moment = torch.cat([optimizer.state[parameter]["exp_avg"].flatten() for parameter in connector])
        gate.done(seconds=seconds, loss=value, moment=moment.numpy())
        del loss


def drawn_batches(case: Case, model: PreTrainedModel, processor: ChiasmProcessor) -> list[Batch]:
    """The batches that Chiasm's trainer draws, with pixels instead of features."""
    samples = case.samples()
    found = survey(samples, case.tokens, False, Reporter("quiet"))
    source = Source(samples, AnswerModel(model, processor))
    order = Order(found.usable, found.lengths, load_recipe(case.recipe).stages[0], 0)
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


def header(peer: str) -> str:
    return (
        f"| what | Chiasm, samples/s | {peer}, samples/s | ratio | target | FLOP limit | share of it |\n"
        "|---|---|---|---|---|---|---|"
    )


def measured(case: Case, sides: dict[str, int], threads: int) -> tuple[list[Row], list[str]]:
    """A case's rows and notes, told as soon as they are known."""
    found = run_case(case, sides, threads)
    rows, said = _rows(case, *found), _notes(case, *found)
    print(*rows, *said, sep="\n", file=sys.stderr)
    return rows, [f"- {case.name}: {note}" for note in said]


def _rows(case: Case, first: dict[str, Block], blocks: dict[str, list[Block]]) -> list[Row]:
    """Ratios of one case. `first`: the block in which each Chiasm side encoded."""
    timed = {side: made[1:] for side, made in blocks.items()}
    ours, theirs = timed["chiasm bfloat16"], timed["peer bfloat16"]
    done = [block.result["work"] for block in ours]
    encode, naive, least = (sum(flops[key] for flops in done) for key in ("encode", "naive", "least"))
    warm = (encode + naive) / least
    rows = [Row(f"{case.name}, bfloat16, warm", *rates(case, ours, theirs), warm, case.target)]
    picture = first["chiasm bfloat16"].seconds / first["chiasm bfloat16"].result["pictures"]
    for epochs in EPOCHS:
        mine, peer, speed = rates(case, ours, theirs)
        share = mine * picture / epochs
        limit = epochs * (encode + naive) / (encode + epochs * least)
        what = f"{case.name}, bfloat16, {epochs} epoch{'s' * (epochs > 1)} with encoding"
        rows.append(Row(what, mine / (1 + share), peer, speed / (1 + share), limit, None))
    if "compiled bfloat16" in timed:
        compiled = rates(case, timed["compiled bfloat16"], theirs)
        rows.append(Row(f"{case.name}, bfloat16, compiled, warm", *compiled, warm, case.target))
    if "peer float32" in timed:
        ours32, theirs32 = timed["chiasm float32"], timed["peer float32"]
        rows.append(Row(f"{case.name}, float32, warm", *rates(case, ours32, theirs32), warm, None))
        same = ours[: len(theirs32)]
        rows.append(
            Row(f"{case.name}, Chiasm's default to the peer's (float32)", *rates(case, same, theirs32), None, 3.0)
        )
    return rows


def rates(case: Case, ours: list[Block], theirs: list[Block]) -> tuple[float, float, float]:
    """Samples per second of both, and the ratio: all of them medians."""
    mine, peer = (case.batch / median(block.seconds for block in quiet(side)) for side in (ours, theirs))
    return mine, peer, ratio(ours, theirs)


def losses_apart(ours: list[Block], theirs: list[Block]) -> float:
    """The largest relative difference of two sides' losses."""
    return max(abs(a.result["loss"] / b.result["loss"] - 1) for a, b in zip(ours, theirs, strict=True))


def _notes(case: Case, first: dict[str, Block], blocks: dict[str, list[Block]]) -> list[str]:
    """Equality of the two sides, memory, padding, and the load by other programs."""
    batches = [block.result for block in blocks["chiasm bfloat16"]]
    places, real, supervised = (sum(b[key] for b in batches) for key in ("places", "real", "supervised"))
    samples = case.batch * len(batches)
    encoded = first["chiasm bfloat16"]
    notes = [
        f"{real / samples - case.tokens:.0f} text tokens a sample, {supervised / samples:.0f} supervised, "
        f"{1 - real / places:.0%} padding; one-time set-up {encoded.result['setup']:.1f} s, "
        f"then {1e3 * encoded.seconds / encoded.result['pictures']:.0f} ms a picture"
    ]
    for dtype in ("float32", "bfloat16"):
        if f"peer {dtype}" in blocks:
            ours, theirs = blocks[f"chiasm {dtype}"], blocks[f"peer {dtype}"]
            a, b = (side[-1].result["moment"] for side in (ours, theirs))
            losses = f"{theirs[0].result['loss']:.3f} → {theirs[-1].result['loss']:.3f}"
            notes.append(
                f"{dtype}: losses ({losses}) differ by at most {losses_apart(ours, theirs):.1e}, "
                f"Adam's averages of the gradients by {np.linalg.norm(a - b) / np.linalg.norm(b):.1e}"
            )
    return [*notes, *costs_of(blocks)]


def costs_of(blocks: dict[str, list[Block]]) -> list[str]:
    """Peak memory of every side, and the load by other programs."""
    peaks = {side: made[-1].result["peak_bytes"] / 2**30 for side, made in blocks.items()}
    return [
        "peak memory: " + ", ".join(f"{side} {peak:.2f} GiB" for side, peak in peaks.items()),
        "load by others: " + foreign_text([block for made in blocks.values() for block in made]),
    ]


def run_case(case: Case, sides: dict[str, int], threads: int) -> tuple[dict[str, Block], dict[str, list[Block]]]:
    """All sides of a case in turns: the blocks in which Chiasm encoded, and those of the steps.

    Args:
        sides: `chiasm`, `compiled` or `peer` with a dtype; in every how many rounds each takes part.
    """
    workers, first = {}, {}
    try:
        for name, every in sides.items():
            program, dtype = name.split()
            steps, compiled = -(-case.batches // every), program == "compiled"
            own = replace(case, dtype=dtype, steps=steps, compile=compiled)
            workers[name] = Worker(case.peer if program == "peer" else chiasm_side, own, threads=threads)
            if program != "peer":
                first[name] = workers[name].go()
                workers[name].ready()
        return first, in_turns(workers, case.batches, sides)
    finally:
        for worker in workers.values():
            worker.stop()
