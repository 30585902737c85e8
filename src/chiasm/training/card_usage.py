"""A model card's examples: the model from its folder or hub id, and one answer."""

from transformers import PreTrainedModel

from chiasm.fusion.late import LateFusionModel
from chiasm.sources.uploading import HERE

ASKED = ("vlm", 'print(vlm.chat("picture.jpg", "What is this?"))')
ANSWERED = ("towers", 'print(towers.answer(["picture.jpg"], ["What is this?"]))')
SCORED = ("towers", 'print(towers.score(["picture.jpg"], ["a cat", "a dog"]))')

AUTO = """\
import chiasm.interop.auto  # tells transformers of Chiasm's classes
from transformers import {kind}, AutoProcessor

model = {kind}.from_pretrained("{here}")
processor = AutoProcessor.from_pretrained("{here}")"""


def usage(model: PreTrainedModel) -> list[str]:
    """Lines of Markdown with two blocks of code."""
    name, asked = ASKED if model.can_generate() else SCORED
    if isinstance(model, LateFusionModel) and model.config.answer_head is not None:
        name, asked = ANSWERED
    auto = AUTO.format(kind="AutoModelForImageTextToText" if model.can_generate() else "AutoModel", here=HERE)
    return [
        f"Where these files are a folder on disk, its path takes the place of `{HERE}`.",
        "",
        *_code(f'import chiasm\n\n{name} = chiasm.load("{HERE}")\n{asked}'),
        "With transformers' own classes:",
        "",
        *_code(auto),
    ]


def _code(text: str) -> list[str]:
    return ["```python", *text.split("\n"), "```", ""]
