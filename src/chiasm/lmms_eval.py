"""Chiasm models under lmms-eval (arXiv 2407.12772): `lmms-eval --model chiasm --model_args pretrained=DIR --tasks ...`.

lmms-eval finds `manifest` by the entry point group `lmms_eval.models`; nothing of Chiasm imports this module.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from chiasm.data.schema import ImageRef
from chiasm.vlm import best_device, load_vlm, ready_to_answer

LONGEST = 128
"""New tokens where a task names no number."""


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="chiasm", chat_class_path=f"{__name__}.Chiasm")


class Chiasm(lmms):
    """Answers a task's chat messages with a model folder or hub id of Chiasm, or one that Chiasm loads."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = LONGEST,
        **more: Any,
    ) -> None:
        super().__init__()
        unknown = [key for key in more if key != "max_batch_size"]
        if unknown:
            raise ValueError(f"model_args has {unknown[0]!r}; expected pretrained, device, batch_size, max_new_tokens")
        self.vlm = ready_to_answer(load_vlm(pretrained).to(device or best_device()))
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer for each request, in batches of requests that want the same decoding."""
        answers: dict[int, str] = {}
        waiting: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            waiting.setdefault(repr(sorted(request.args[2].items())), []).append(index)
        with tqdm(total=len(requests), desc="answering") as bar:
            for indices in waiting.values():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    answers |= dict(zip(batch, self._answer([requests[i] for i in batch]), strict=True))
                    bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        asked = [self._conversation(request) for request in requests]
        options = requests[0].args[2]
        stops = options.get("until") or []
        decoding: dict[str, Any] = {
            "max_new_tokens": options.get("max_new_tokens") or self.max_new_tokens,
            "stop": tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop),
            "beams": options.get("num_beams") or 1,
        }
        if options.get("do_sample", True) and options.get("temperature"):
            decoding |= {"temperature": options["temperature"], "top_p": options.get("top_p") or 1.0}
        given = self.vlm.generate([messages for messages, _ in asked], [images for _, images in asked], **decoding)
        return [answer.strip() for answer in given]

    def _conversation(self, request: Instance) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        _, to_messages, _, doc_id, task, split = request.args
        messages, images = [], []
        for message in to_messages(self.task_dict[task][split][doc_id]):
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(ImageRef.of(part["url"]).load())
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    raise ValueError(f"task {task} shows a {part['type']}, but Chiasm's models see pictures only")
            messages.append({"role": message["role"], "content": parts})
        return messages, images

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks of output_type loglikelihood are not for chat models; take generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported; take one of output_type generate_until")
