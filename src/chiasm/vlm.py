"""`connect`, `load` and `VLM`: a vision encoder and a language model as one thing that one can talk to."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm import sources
from chiasm.comparison.cost import Cost, cost
from chiasm.connect_late import connect_late
from chiasm.connect_unified import connect_unified
from chiasm.data.chat import Message, count_images, user_message
from chiasm.data.few_shot import Example, as_list, put_first, solved
from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.dual_encoder import DualEncoder
from chiasm.fusion.base import FusionModel
from chiasm.fusion.build import CONVOLUTIONAL, build_fusion
from chiasm.fusion.config import FUSIONS
from chiasm.fusion.start import start_of
from chiasm.generation import decode
from chiasm.generation.attention import Attention, look
from chiasm.generation.decode import Decoding
from chiasm.generation.draw import Brush, draw
from chiasm.interop.loaders import LOADERS, RETRIEVAL_LOADERS
from chiasm.language.adapter import load_language, load_tokenizer
from chiasm.presets import Preset, preset_named
from chiasm.sources.errors import readable_weights
from chiasm.sources.files import find_file
from chiasm.training.card import write_card
from chiasm.training.precision import choose_dtype
from chiasm.vision.encoder import load_vision
from chiasm.vision.image_processor import ChiasmImageProcessor, image_processor_for

DEFAULT_VISION = "efficientnet-lite0"
DEFAULT_LANGUAGE = "smollm2-135m-instruct"
DEFAULT_TEXT = "minilm-l6"


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
        """One answer for each conversation of a batch, each with its own list of pictures."""
        images = images if images is not None else [[] for _ in messages]
        return decode.generate(self.model, self.processor, messages, images, Decoding(**decoding))

    def draw(self, prompt: str, **brush: Any) -> Image.Image:
        """A picture of what the prompt says, by a unified model with the image input `vq`.

        Args:
            brush: fields of `Brush`: `temperature`, `top_k`, `guidance`, `seed`.
        """
        return draw(self.model, self.processor, [prompt], Brush(**brush))[0]

    def cost(self, images: int = 1, text_tokens: int = 64) -> Cost:
        """Parameters by part, visual tokens, FLOPs and KV-cache bytes in closed form."""
        return cost(self.model, images=images, text_tokens=text_tokens)

    def to(self, *args: Any, **kwargs: Any) -> "VLM":
        """Moves the model to a device or dtype."""
        self.model.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Writes weights (safetensors), configuration, processor files and a model card."""
        self.model.save_pretrained(folder, **kwargs)
        if self._processor is not None:
            self._processor.save_pretrained(folder)
        write_card(Path(folder), self.model)

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
        message = kwargs.pop("commit_message", "Upload a Chiasm model")
        hub = HfApi(token=token)
        address = str(hub.create_repo(repository, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        return address


def connect(
    vision: str | PreTrainedModel = DEFAULT_VISION,
    language: str | PreTrainedModel | dict[str, Any] | None = None,
    connector: str | dict[str, Any] | None = None,
    fusion: str | None = None,
    *,
    preset: str | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    image_processor: ChiasmImageProcessor | None = None,
    chat_template: str | None = None,
    features: dict[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize_mode: str | None = None,
    patch_positions: str = "auto",
    regions: tuple[int, int] | None = None,
    cross_attention: dict[str, Any] | None = None,
    attention: str = "causal",
    pooling: dict[str, str] | None = None,
    image_input: str | dict[str, Any] | None = None,
    positions: str | None = None,
    unified: dict[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
) -> Any:
    """Connects a vision encoder and a language model; the connector is new and wants training.

    Gives a `VLM`, and for late fusion a `DualEncoder`.

    Args:
        vision: hub id, local folder, alias, or a loaded transformers vision model.
        language: hub id, local folder, alias, or a loaded causal language model; by default `DEFAULT_LANGUAGE`. For
            late fusion any text encoder or causal language model, by default `DEFAULT_TEXT`. For unified fusion also a
            dictionary with the sizes of a decoder that starts from nothing (fields of `UnifiedDecoderConfig`).
        connector: a name of `chiasm.connectors.CONNECTORS`, or `{"name": ..., option: ...}`; `mlp` where nothing says
            otherwise. A `qformer` may have `init_from`, a BERT-shaped encoder, and `tokenizer`, which reads the
            instruction. For late fusion `linear`, `mlp` or `none`, the projections into the shared space.
        fusion: where the two meet, `early` where nothing says otherwise.
        preset: a system of `chiasm.presets.PRESETS`, whose choices stand where these arguments are not given.
        tokenizer: needed only where `language` is a loaded module without files behind it.
        chat_template: a Jinja template in place of the tokenizer's own.
        features: which feature maps to read, as `{"layers": [...], "reduce": ..., "grid": ...}` of
            `chiasm.vision.encoder.load_vision`; by default what suits the encoder's type.
        image_size: pixels, where it shall differ from the encoder's own.
        resize_mode: `pad`, `squash` or `crop`; by default the encoder's own.
        patch_positions: `grid` appends 2-D coordinates to patch features, `none` does not, `auto` does for CNNs.
        regions: for early fusion, rows and columns of regions, such as (2, 2), whose names ("top left") are written in
            front of their visual tokens.
        cross_attention: for intermediate fusion, `{"every": n}` (a block in front of every n-th layer) and other fields
            of `chiasm.fusion.cross_attention_settings.CrossAttentionSettings`.
        attention: for early and unified fusion, `causal` or `prefix` (pictures and prompt are read in both directions,
            as in PaliGemma).
        pooling: for late fusion, how a picture and a text become one vector: `{"vision": "mean" | "cls" | "own",
            "text": "mean" | "cls" | "last" | "own"}`; by default what suits the tower.
        image_input: for unified fusion, which takes no vision encoder: `patches` (raw pixels) or `vq` (codes of an
            image tokenizer), or a dictionary with that `name` and options.
        positions: for unified fusion, a word of `chiasm.positions.sequence.POSITIONS`: `raster` by default, `rope2d`,
            `mrope`, each also with `+modality`.
        unified: further options of unified fusion: `qk_norm`, `norm_order`, `rope_sections`, `z_loss`.
        dtype: of the weights; `auto` keeps each checkpoint's own.
        seed: of the new connector's weights.
    """
    chosen = preset_named(preset)
    fusion = chosen.fusion if fusion is None else fusion
    if fusion not in (*FUSIONS, "late"):
        raise ValueError(f"fusion {fusion!r} is unknown; choose one of {', '.join(FUSIONS)}, late")
    _refuse_given({} if fusion == "late" else {"pooling": pooling}, fusion, "it is for fusion 'late'")
    choices = {"image_input": image_input, "positions": positions, "unified": unified}
    if fusion != "unified":
        _refuse_given(choices, fusion, "it is for fusion 'unified'")
        if isinstance(language, dict):
            raise ValueError(
                f"language={{...}} starts a decoder from nothing, which fusion {fusion!r} does not do; name one"
            )
    if fusion == "late":
        foreign: dict[str, Any] = {"cross_attention": cross_attention, "chat_template": chat_template}
        foreign |= {"patch_positions": None if patch_positions == "auto" else patch_positions, "regions": regions}
        foreign |= {"attention": None if attention == "causal" else attention}
        _refuse_given(foreign, fusion, "it has no language model that answers")
        towers = [sources.resolve(s) if isinstance(s, str | Path) else s for s in (vision, language or DEFAULT_TEXT)]
        return connect_late(
            *towers,
            _tokenizer_for(tokenizer, towers[1]),
            connector or (chosen.connector if preset else "linear"),
            pooling=pooling,
            image_processor=image_processor,
            features=features,
            image_size=image_size,
            resize_mode=resize_mode or chosen.resize_mode,
            dtype=dtype,
            seed=seed,
        )
    language = language or DEFAULT_LANGUAGE
    if fusion == "unified":
        others = {"connector": connector, "features": features, "cross_attention": cross_attention, "regions": regions}
        others |= {"vision": None if vision == DEFAULT_VISION else vision}
        _refuse_given(others, fusion, "it has no vision encoder and no connector")
        if isinstance(language, str | Path):
            language = sources.resolve(language)
        words = _tokenizer_for(tokenizer, None if isinstance(language, dict) else language)
        return VLM(
            *connect_unified(language, words, choices, chat_template, attention=attention, seed=seed, dtype=dtype)
        )
    start = start_of(chosen.connector if connector is None else connector)
    resize_mode = resize_mode or chosen.resize_mode
    vision_source = sources.resolve(vision) if isinstance(vision, str | Path) else vision
    language_source = sources.resolve(language) if isinstance(language, str | Path) else language
    features = features or _preset_features(chosen, vision_source)
    encoder = load_vision(vision_source, features=features, image_size=image_size, dtype=dtype)
    language_model = load_language(language_source, dtype=dtype)
    words = _tokenizer_for(tokenizer, language_source)
    processor = None
    image_token_id = language_model.config.get_text_config().vocab_size
    if words is not None:
        words.chat_template = chat_template or words.chat_template
        pictures = image_processor or image_processor_for(vision_source, encoder, resize_mode=resize_mode)
        processor = start.processor(pictures, words, token_types=attention == "prefix", regions=regions)
        image_token_id = processor.image_token_id
    new: dict[str, Any] = {"patch_positions": patch_positions, "seed": seed, "cross_attention": cross_attention}
    new |= {"attention": attention, "regions": regions, "initialise": start.initialise}
    model = build_fusion(encoder, language_model, start.settings, image_token_id, fusion, **new)
    if processor is not None:
        processor.num_image_tokens = model.num_image_tokens
        decode.stop_at_end_of_turn(model, processor)
    return VLM(model, processor)


def _refuse_given(options: dict[str, Any], fusion: str, why: str) -> None:
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"{given}= is not for fusion {fusion!r}: {why}")


def load(source: str | Path, dtype: torch.dtype | str = "auto") -> VLM | DualEncoder:
    """A Chiasm checkpoint, or a transformers one of a kind in `LOADERS` or `RETRIEVAL_LOADERS`: a `VLM`, or the
    `DualEncoder` of a retrieval model, told by `model_type` and `architectures` in its configuration."""
    source = sources.resolve(source)
    config = _config(source)
    model_type, kinds = config["model_type"], config.get("architectures") or []
    with readable_weights(source):
        for kind in (model_type, *kinds):
            if kind in RETRIEVAL_LOADERS:
                return DualEncoder(*RETRIEVAL_LOADERS[kind](source, dtype))
        if model_type in LOADERS:
            return VLM(*LOADERS[model_type](source, dtype))
    known = ", ".join([*LOADERS, *RETRIEVAL_LOADERS])
    raise ValueError(f"{source} holds a {model_type!r} model; chiasm.load reads {known}")


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


def _model_type(source: str) -> str:
    return _config(source)["model_type"]


def _config(source: str) -> dict[str, Any]:
    path = find_file(source, "config.json")
    if path is None:
        raise ValueError(f"{source} holds no config.json, so it is no model; name the folder that has it")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        str(config["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a model: it is no JSON object with model_type") from error
    return config


def _preset_features(preset: Preset, vision: Any) -> dict[str, Any] | None:
    """A preset's layers are those of a ViT; the grids of a convolutional encoder are another matter."""
    if preset.features is None:
        return None
    kind = _model_type(vision) if isinstance(vision, str) else vision.config.model_type
    return None if kind in CONVOLUTIONAL else preset.features


def _tokenizer_for(given: str | PreTrainedTokenizerBase | None, language: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given or named; else the one beside the language model, where there is one."""
    if isinstance(given, str):
        found = load_tokenizer(sources.resolve(given))
        if found is None:
            raise ValueError(f"tokenizer={given!r} holds no tokenizer that transformers can load; name another folder")
        return found
    if given is not None:
        return given
    name = language if isinstance(language, str) else getattr(language, "name_or_path", None)
    return load_tokenizer(name) if name else None


def _check_agreement(model: FusionModel, processor: ChiasmProcessor) -> None:
    pairs = {
        "num_image_tokens": (model.num_image_tokens, processor.num_image_tokens),
        "image_token_id": (model.config.image_token_id, processor.image_token_id),
        "regions": (model.config.regions, processor.regions and list(processor.regions)),
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
