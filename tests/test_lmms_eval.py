"""lmms-eval's own evaluator on a local task: pictures of one colour, and a tiny Chiasm model that answers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training import helpers

pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")

TASK = """\
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {data}
task: colours
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "colour?"
doc_to_target: "colour"
generation_kwargs:
  max_new_tokens: 4
  until: ["\\n"]
process_results: !function utils.score
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
def visual(doc):
    return [doc["image"].convert("RGB")]


def score(doc, results):
    return {"right": float(results[0] == doc["colour"])}
"""


def local_task(folder: Path) -> Path:
    """A task as lmms-eval reads one with --include_path: a YAML file, its functions, and a folder of pictures."""
    pictures, task = folder / "data" / "test", folder / "task"
    pictures.mkdir(parents=True)
    task.mkdir()
    lines = ["file_name,colour"]
    for name, colour in helpers.COLOURS.items():
        Image.new("RGB", (30, 30), colour).save(pictures / f"{name}.png")
        lines.append(f"{name}.png,{name}")
    (pictures / "metadata.csv").write_text("\n".join(lines) + "\n")
    (task / "colours.yaml").write_text(TASK.format(data=folder / "data"))
    (task / "utils.py").write_text(UTILS)
    return task


def test_the_entry_point_is_found_and_the_class_is_one_of_theirs() -> None:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from chiasm.lmms_eval import Chiasm, manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("chiasm") is Chiasm and issubclass(Chiasm, lmms)


def test_a_local_task_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    from lmms_eval import evaluator
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from chiasm.lmms_eval import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    vlm = helpers.vlm()
    parts = {part: {"tune": "full", "lr": 1e-2} for part in ("connector", "language")}
    stage = helpers.stage(steps=60, batch_size=8, parts={"*": "frozen", **parts})
    helpers.run(tmp_path / "run", {"stages": [stage]}, vlm, data=[_sample(i) for i in range(24)])
    results: dict[str, Any] = evaluator.simple_evaluate(
        model="chiasm",
        model_args=f"pretrained={tmp_path / 'run' / 'model'},device=cpu",
        tasks=["colours"],
        batch_size=2,
        task_manager=TaskManager("ERROR", include_path=str(local_task(tmp_path)), model_name="chiasm"),
    )
    assert results["results"]["colours"]["right,none"] >= 0.75


def _sample(index: int) -> Any:
    sample = helpers.sample(index % 4)
    sample.messages[0]["content"][-1]["text"] = "colour?"
    return sample
