"""A model with an encoder–decoder trains in stages like any other."""

from pathlib import Path

import pytest
import torch
from helpers import LORA, run, sample, samples, stage, vlm, weights, whole_and_resumed
from transformers import Trainer, TrainingArguments

import chiasm
import tiny
from chiasm.data.collation import Collator, encode_sample
from chiasm.data.schema import SampleError
from chiasm.training.log import read_log


@pytest.mark.parametrize("language", tiny.ENCODER_DECODERS)
def test_it_learns_and_goes_on_after_a_kill(language: str, tmp_path: Path) -> None:
    """Samples without pictures and LoRA included; validation has its control."""
    control = {"validation": {"samples": 4, "every": 4}}
    recipe = {"stages": [stage(steps=10, **control), stage("instruct", parts=LORA, accumulate=2)]}
    whole, _ = whole_and_resumed(tmp_path, recipe, lambda: vlm(language), samples(), dies_at=12)
    log = read_log(whole.log)
    losses = [entry["loss"] for entry in log if entry["event"] == "step"]
    assert losses[-1] < losses[0]
    assert all(entry["shuffled_loss"] > 0 for entry in log if entry["event"] == "validation")
    again = chiasm.load(whole.model)
    assert again.processor.encoder_decoder


def test_a_stage_changes_what_it_names(tmp_path: Path) -> None:
    model = vlm("t5")
    before = weights(model)
    run(tmp_path / "run", {"stages": [stage()]}, model)
    changed = {name.split(".")[0] for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"connector"}


def test_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage 'align': pack: true is not for an encoder-decoder .*pack: false"):
        run(tmp_path / "run", {"stages": [stage(pack=True)]}, vlm("t5"))


def test_a_prompt_that_is_too_long_is_told() -> None:
    """Its end is the question, which must not be cut off; an answer's end may be."""
    processor = vlm("t5").processor
    length = len(encode_sample(sample(1), processor)["input_ids"])
    assert len(encode_sample(sample(1), processor, length)["labels"]) == len("green") + 1
    with pytest.raises(SampleError, match=rf"{length} tokens, at most {length - 1} are allowed, .* the prompt's"):
        encode_sample(sample(1), processor, length - 1)


def test_transformers_trains_it_too(tmp_path: Path) -> None:
    model = vlm("t5")
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), remove_unused_columns=False, use_cpu=True, **settings)
    collator = Collator(model.processor)
    before = weights(model)
    Trainer(model.model, arguments, train_dataset=samples(4), data_collator=collator).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
