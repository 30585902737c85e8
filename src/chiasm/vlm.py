"""`load` and `VLM`: a vision encoder and a language model as one thing that one can talk to."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from chiasm import sources
from chiasm.comparison.cost import Cost, cost
from chiasm.comparison.describe import cost_facts
from chiasm.data.chat import Message, count_images, user_message
from chiasm.data.few_shot import Example, as_list, put_first, solved
from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.dual_encoder import DualEncoder
from chiasm.fusion.base import FusionModel
from chiasm.generation import decode
from chiasm.generation.attention import Attention, look
from chiasm.generation.decode import Decoding
from chiasm.generation.draw import Brush, draw
from chiasm.interop.loaders import LOADERS, OWN, RETRIEVAL_LOADERS, name_parts
from chiasm.sources.errors import readable_weights
from chiasm.sources.files import find_file
from chiasm.sources.uploading import upload
from chiasm.sources.writing import save_whole
from chiasm.training.card import write_card
from chiasm.training.precision import choose_dtype


class VLM:
    """A generative vision-language model: `.model` and `.processor` are transformers objects."""

    def __init__(self, model: FusionModel, processor: ChiasmProcessor | None) -> None:
        self.model = model
        self._processor = processor
        if processor is not None:
            _check_agreement(model, processor)

    @property
    def processor(self) -> ChiasmProcessor:
        """Images + messages → inputs.

        Raises:
            ValueError: the model came without its files.
        """
        if self._processor is None:
            raise ValueError(
                "this model has no processor, because it came without tokenizer or image processor files; "
                "pass tokenizer= to chiasm.connect, or put those files into the model's folder"
            )
        return self._processor

    def chat(
        self,
        images: Any,
        prompt: str,
        *,
        history: list[Message] | None = None,
        examples: Sequence[Example] = (),
        **decoding: Any,
    ) -> str:
        """The answer to a prompt about one picture, a list of pictures, or none.

        Args:
            images: a path, a PIL picture, a list of them, or None.
            prompt: the question.
            history: earlier messages of the conversation; their pictures come first in `images`.
            examples: solved ones that the prompt starts with, each (image or images, question, answer).
            decoding: fields of `Decoding`, such as `max_new_tokens` and `temperature`.
        """
        messages, pictures = _conversation(images, prompt, history, examples)
        return decode.generate(self.model, self.processor, [messages], [pictures], Decoding(**decoding))[0]

    def stream(
        self,
        images: Any,
        prompt: str,
        *,
        history: list[Message] | None = None,
        examples: Sequence[Example] = (),
        **decoding: Any,
    ) -> Iterator[str]:
        """The same answer, piece by piece."""
        messages, pictures = _conversation(images, prompt, history, examples)
        return decode.stream(self.model, self.processor, messages, pictures, Decoding(**decoding))

    def attention(
        self,
        images: Any,
        prompt: str,
        *,
        image: int = -1,
        layers: Sequence[int] | None = None,
        prompt_words: bool = False,
        history: list[Message] | None = None,
        examples: Sequence[Example] = (),
        **decoding: Any,
    ) -> Attention:
        """The answer that `chat` gives, and where in a picture each of its words looked.

        Args:
            image: which picture, counted over all that the prompt shows; by default the last.
            layers: language model layers to average over, by default all.
            prompt_words: whether to say it of the question's words too.
        """
        messages, pictures = _conversation(images, prompt, history, examples)
        return look(self.model, self.processor, messages, pictures, Decoding(**decoding), image, layers, prompt_words)

    def generate(
        self, messages: list[list[Message]], images: list[list[Any]] | None = None, **decoding: Any
    ) -> list[str]:
        """One answer for each conversation of a batch.

        Args:
            messages: conversations, each a list of chat messages (`{"role": ..., "content": text or parts}`).
            images: for each conversation the list of its pictures, in the order of its image parts; none if left out.
            decoding: fields of `Decoding`.
        """
        images = images if images is not None else [[] for _ in messages]
        return decode.generate(self.model, self.processor, messages, images, Decoding(**decoding))

    def draw(self, prompt: str, **brush: Any) -> Image.Image:
        """A picture of what the prompt says, by a unified model with the image input `vq`.

        Args:
            brush: fields of `Brush`: `temperature`, `top_k`, `guidance`, `seed`.
        """
        return draw(self.model, self.processor, [prompt], Brush(**brush))[0]

    def cost(self, images: int = 1, text_tokens: int = 64) -> Cost:
        """Parameters by part, visual tokens, FLOPs and KV-cache bytes in closed form.

        Args:
            images: pictures in the prompt.
            text_tokens: of the prompt; names of a picture's regions are counted as the picture's.
        """
        return cost(self.model, images=images, text_tokens=text_tokens, names=self.region_tokens)

    @property
    def region_tokens(self) -> int:
        """Tokens of the names of a picture's regions."""
        return 0 if self._processor is None else self._processor.region_tokens

    def to(self, *args: Any, **kwargs: Any) -> "VLM":
        """Moves the model to a device or dtype."""
        self.model.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Writes weights (safetensors), configuration, processor files and a model card, all or nothing.

        A model that is in the folder already stays whole until the new one is.
        """

        def card(place: Path) -> None:
            write_card(place, self.model, facts=cost_facts(self.model, self.region_tokens))

        save_whole(folder, self.model, self._processor, card, **kwargs)

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype | str = "auto") -> "VLM":
        """What `chiasm.load` gives of a generative model's folder or hub id."""
        return load_vlm(source, dtype)

    def push_to_hub(self, repository: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes, in one commit; returns the repository's address.

        Args:
            repository: `name/model`; made where it is not there.
            **kwargs: of `save_pretrained`, and `commit_message`.
        """
        return upload(self.save_pretrained, repository, private, token, **kwargs)


def load(source: str | Path, dtype: torch.dtype | str = "auto") -> VLM | DualEncoder:
    """A Chiasm checkpoint, or a transformers one of a kind in `LOADERS` or `RETRIEVAL_LOADERS`: a `VLM`, or the
    `DualEncoder` of a retrieval model, told by `model_type` and `architectures` in its configuration.

    Args:
        source: a folder or a hub id.
        dtype: of the weights; `auto` keeps the checkpoint's own.

    Raises:
        ValueError: no model, or one of a kind that is not read; the message lists those that are.
    """
    source = sources.resolve(source)
    config = read_config(source)
    model_type, kind = config["model_type"], _retrieval_kind(config)
    if kind is None and model_type not in LOADERS:
        known = ", ".join([*LOADERS, *RETRIEVAL_LOADERS])
        raise ValueError(f"{source} holds a {model_type!r} model; chiasm.load reads {known}")
    with readable_weights(source):
        loaded: VLM | DualEncoder = (
            VLM(*LOADERS[model_type](source, dtype))
            if kind is None
            else DualEncoder(*RETRIEVAL_LOADERS[kind](source, dtype))
        )
    if model_type not in OWN:
        name_parts(loaded.model, source)
    return loaded


def is_retrieval(source: str | Path) -> bool:
    """Whether a checkpoint is a retrieval model, by its configuration alone."""
    return _retrieval_kind(read_config(sources.resolve(source))) is not None


def _retrieval_kind(config: dict[str, Any]) -> str | None:
    """The name in `RETRIEVAL_LOADERS` that a configuration goes by."""
    names = (config["model_type"], *(config.get("architectures") or []))
    return next((name for name in names if name in RETRIEVAL_LOADERS), None)


def load_vlm(source: str | Path, dtype: torch.dtype | str = "auto") -> VLM:
    """The same, for what needs a generative model.

    Raises:
        ValueError: it is a retrieval model.
    """
    loaded = load(source, dtype)
    if not isinstance(loaded, VLM):
        raise ValueError(f"{source} holds a retrieval model, which scores pictures and texts but gives no answers")
    return loaded


def best_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def ready_to_answer(vlm: VLM | DualEncoder) -> Any:
    """The model on the best device, in float32 where it is bfloat16 and the device computes that in software."""
    device = best_device()
    emulated = choose_dtype("auto", device) == torch.float32
    slow = emulated and any(parameter.dtype == torch.bfloat16 for parameter in vlm.model.parameters())
    return vlm.to(device, torch.float32) if slow else vlm.to(device)


def ready_to_step(vlm: VLM, weights: str) -> VLM:
    """The same for an engine: on a CPU in float32 unless weights are packed, since its compiled step reads those."""
    ready: VLM = ready_to_answer(vlm)
    whole = ready.model.device.type == "cpu" and weights == "float32"
    return ready.to(torch.float32) if whole else ready


def read_config(source: str) -> dict[str, Any]:
    path = find_file(source, "config.json")
    if path is None and find_file(source, "adapter_config.json"):
        raise ValueError(f"{source} holds PEFT adapters without their model; merge_and_unload them, and save the model")
    if path is None:
        raise ValueError(f"{source} holds no config.json, so it is no model; name the folder that has it")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        str(config["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a model: it is no JSON object with model_type") from error
    return config


def _check_agreement(model: FusionModel, processor: ChiasmProcessor) -> None:
    pairs = {
        "num_image_tokens": (model.num_image_tokens, processor.num_image_tokens),
        "image_token_id": (model.config.image_token_id, processor.image_token_id),
        "tiles": (model.config.tiles, getattr(processor, "tiles", None)),
        "regions": (model.config.regions, processor.regions and list(processor.regions)),
        "encoder_decoder": (model.config.is_encoder_decoder, processor.encoder_decoder),
        "reads_instruction": (model.reads_instruction, isinstance(processor, InstructionProcessor)),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ValueError(f"the model's {name} is {ours} but the processor's is {theirs}; load them from one folder")
    if isinstance(processor, InstructionProcessor):
        known, words = model.config.connector["vocabulary"], len(processor.instruction_tokenizer)
        if words > known:
            raise ValueError(f"the instruction's tokenizer has {words} tokens, the connector's vocabulary {known}")


def _conversation(
    images: Any, prompt: str, history: list[Message] | None, examples: Sequence[Example]
) -> tuple[list[Message], list[Any]]:
    pictures, earlier = as_list(images), count_images(history or [])
    turns, shown = solved(examples)
    asked = [*(history or []), *user_message(prompt, len(pictures) - earlier)]
    return put_first(turns, asked), [*shown, *pictures]
