"""`vlm.model` trains under transformers' `Trainer`, TRL's `SFTTrainer` and PEFT's own API, unchanged."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import chiasm
from chiasm.data.collation import Collator
from chiasm.training.log import read_log

ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "remove_unused_columns": False,
    "report_to": [],
    "use_cpu": True,
    "logging_steps": 1,
    "disable_tqdm": True,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
}


def connector_only() -> chiasm.VLM:
    vlm = helpers.vlm()
    vlm.model.requires_grad_(False)
    vlm.model.connector.requires_grad_(True)
    return vlm


class Order(torch.utils.data.Sampler):
    """The samples in their own order."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(range(len(self.data)))

    def __len__(self) -> int:
        return len(self.data)


class InOrder(Trainer):
    def _get_train_sampler(self, *arguments: Any) -> Order:
        return Order(self.train_dataset)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_transformers_trainer_learns_what_ours_learns(tmp_path: Path) -> None:
    vlm, data = connector_only(), helpers.samples(16)
    arguments = TrainingArguments(str(tmp_path / "theirs"), **ARGUMENTS)
    trainer = InOrder(vlm.model, arguments, Collator(vlm.processor), data)
    trainer.train()
    recipe: dict[str, Any] = {"stages": [helpers.stage(group_by_length=False, schedule="constant", warmup=0)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.randperm", lambda count, generator=None: torch.arange(count))
        ours = helpers.run(tmp_path / "ours", recipe, data=data)
    expected = [event["loss"] for event in read_log(ours.log) if event["event"] == "step"]
    assert losses(trainer) == pytest.approx(expected, abs=2e-4)
    trainer.save_model(str(tmp_path / "saved"))
    vlm.processor.save_pretrained(tmp_path / "saved")
    loaded = chiasm.load(tmp_path / "saved")
    assert all(torch.equal(loaded.model.state_dict()[n], t) for n, t in vlm.model.state_dict().items())


def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    vlm = connector_only()
    rows = [{"messages": s.messages, "images": [ref.load() for ref in s.images]} for s in helpers.samples(16)]
    for row in rows:
        for message in row["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "gradient_checkpointing": False}
    settings["loss_type"] = "nll"  # TRL's own chunked loss wants a backbone, which a connected model has not
    arguments = trl.SFTConfig(str(tmp_path), **ARGUMENTS, **settings, bf16=False)
    before = helpers.weights(vlm)
    trainer = trl.SFTTrainer(
        vlm.model,
        arguments,
        data_collator=Collator(vlm.processor, logits=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=vlm.processor,
    )
    trainer.train()
    after = helpers.weights(vlm)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in vlm.model.named_parameters() if name.startswith("connector.")}
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_trls_own_collator_is_told_which_one_to_take(form: str) -> None:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    sample = helpers.sample(0)
    told = {"messages": sample.messages, "prompt": sample.prompt, "completion": sample.messages[-1:]}
    row = {"images": [ref.load() for ref in sample.images]} | {
        key: told[key] for key in (("messages",) if form == "messages" else ("prompt", "completion"))
    }
    with pytest.raises(TypeError, match=r"data_collator=Collator\(processor, logits=True\) of chiasm.data.collation"):
        sft.DataCollatorForVisionLanguageModeling(helpers.vlm().processor)([row])


def test_pefts_own_api(tmp_path: Path) -> None:
    vlm = helpers.vlm()
    vlm.model.eval()
    batch = Collator(vlm.processor)(helpers.samples(4))
    before = helpers.weights(vlm)
    torch.manual_seed(0)
    adapted = get_peft_model(vlm.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    told = []
    for _ in range(4):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    assert told[-1] < told[0]
    with torch.no_grad():
        expected = adapted(**batch).logits
    adapted.save_pretrained(tmp_path)
    fresh = helpers.vlm()
    fresh.model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in helpers.weights(fresh).items())
    merged = PeftModel.from_pretrained(fresh.model, tmp_path).merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)
    assert type(merged) is type(helpers.vlm().model)


@pytest.mark.parametrize("fusion", helpers.FUSIONS)
def test_predictions_of_transformers_trainer_are_logits(tmp_path: Path, fusion: str) -> None:
    vlm = helpers.vlm(fusion=fusion)
    arguments = TrainingArguments(str(tmp_path), **ARGUMENTS, per_device_eval_batch_size=4)
    trainer = Trainer(vlm.model, arguments, Collator(vlm.processor), eval_dataset=helpers.samples(6))
    found = trainer.predict(helpers.samples(6))
    assert found.predictions.shape[0] == 6 and found.predictions.shape[2] == 261


def test_the_copies_that_peft_trains_look_at_pictures(tmp_path: Path) -> None:
    """PEFT trains copies of `modules_to_save`: cross-attention must go through them, and be there after a merge."""
    vlm = helpers.vlm(fusion="intermediate")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["connector", "cross_attention"])
    adapted = get_peft_model(vlm.model, config)
    batch = Collator(vlm.processor)(helpers.samples(4))
    adapted(**batch).loss.backward()
    copies = {name: one for name, one in adapted.named_parameters() if "modules_to_save" in name and "gate" in name}
    assert copies and all(one.grad is not None and one.grad.abs().sum() > 0 for one in copies.values())
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = (model(**batch).logits for model in (merged, chiasm.load(tmp_path).model.eval()))
    assert torch.allclose(found, expected, atol=1e-5)
