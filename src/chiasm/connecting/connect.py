"""`connect`: one word chooses where a vision encoder and a language model meet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm import sources
from chiasm.connecting.generative import connect_generative
from chiasm.connecting.late import connect_late
from chiasm.connecting.unified import connect_unified
from chiasm.data.chat import TEMPLATES
from chiasm.fusion.config import FUSIONS
from chiasm.language.adapter import load_tokenizer
from chiasm.presets import preset_named
from chiasm.vision.image_processor import ChiasmImageProcessor
from chiasm.vlm import VLM

DEFAULT_VISION = "efficientnet-lite0"
DEFAULT_LANGUAGE = "smollm2-135m-instruct"
DEFAULT_TEXT = "minilm-l6"


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
    tiles: Sequence[tuple[int, int]] | None = None,
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
        language: hub id, local folder, alias, or a loaded language model, by default `DEFAULT_LANGUAGE`: a causal one,
            or for early fusion an encoder–decoder (T5, BART). For late fusion any text encoder or causal language
            model, by default `DEFAULT_TEXT`. For unified fusion also a dictionary with the sizes of a decoder that
            starts from nothing (fields of `UnifiedDecoderConfig`).
        connector: a name of `chiasm.connectors.CONNECTORS` (docs/new_connector.md adds yours), or
            `{"name": ..., option: ...}`; `mlp` where nothing says otherwise. A `qformer` may have `init_from`, a
            BERT-shaped encoder, and `tokenizer`, which reads the instruction. For late fusion
            `linear`, `mlp` or `none`, the projections into the shared space.
        fusion: where the two meet, `early` where nothing says otherwise.
        preset: a system of `chiasm.presets.PRESETS`, whose choices stand where these arguments are not given.
        tokenizer: needed only where `language` is a loaded module without files behind it.
        chat_template: a Jinja template in place of the tokenizer's own, or the name of one of ours: `lean` (question,
            line break, answer) or `plain`.
        features: which feature maps to read, as `{"layers": [...], "reduce": ..., "grid": ...}` of
            `chiasm.vision.encoder.load_vision`; by default what suits the encoder's type.
        image_size: pixels, where it shall differ from the encoder's own.
        resize_mode: `pad`, `squash` or `crop`; by default the encoder's own.
        patch_positions: `grid` appends 2-D coordinates to patch features, `none` does not, `auto` does for CNNs.
        regions: for early fusion, rows and columns of regions, such as (2, 2), whose names ("top left") are written in
            front of their visual tokens.
        tiles: for early fusion, grids such as [(1, 2), (2, 1), (2, 2)]: rows and columns of tiles. A picture is read as
            a whole and in the tiles of the grid that suits its shape, without what pads it (LLaVA-NeXT). Needs a
            connector whose visual tokens form a grid, and takes no resize_mode.
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
        unified: further options of unified fusion: `qk_norm`, `norm_order`, `rope_sections`, `z_loss`, and
            `weights`: `random` starts from nothing, with the language model's sizes and words alone.
        dtype: of the weights; `auto` keeps each checkpoint's own.
        seed: of the new connector's weights.
    """
    chosen = preset_named(preset)
    chat_template = TEMPLATES.get(chat_template or "", chat_template)
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
        foreign |= {"tiles": tiles, "attention": None if attention == "causal" else attention}
        _refuse_given(foreign, fusion, "it has no language model that answers")
        tower, text = _resolved(vision), _resolved(language or DEFAULT_TEXT)
        return connect_late(
            tower,
            text,
            _tokenizer_for(tokenizer, text),
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
        others: dict[str, Any] = {"connector": connector, "features": features, "cross_attention": cross_attention}
        others |= {"vision": None if vision == DEFAULT_VISION else vision, "image_processor": image_processor}
        others |= {"patch_positions": None if patch_positions == "auto" else patch_positions}
        others |= {"regions": regions, "tiles": tiles}
        _refuse_given(others, fusion, "it has no vision encoder and no connector")
        sizes = {"image_size": image_size, "resize_mode": resize_mode}
        _refuse_given(sizes, fusion, "write it into image_input, as {'name': ..., 'image_size': ...}")
        language = _resolved(language)
        words = _tokenizer_for(tokenizer, None if isinstance(language, dict) else language)
        return VLM(
            *connect_unified(language, words, choices, chat_template, attention=attention, seed=seed, dtype=dtype)
        )
    tower, language = _resolved(vision), _resolved(language)
    return VLM(
        *connect_generative(
            tower,
            language,
            _tokenizer_for(tokenizer, language),
            chosen,
            connector,
            fusion,
            image_processor=image_processor,
            chat_template=chat_template,
            features=features,
            image_size=image_size,
            resize_mode=resize_mode or (None if tiles else chosen.resize_mode),
            patch_positions=patch_positions,
            regions=regions,
            tiles=tiles,
            cross_attention=cross_attention,
            attention=attention,
            dtype=dtype,
            seed=seed,
        )
    )


def _refuse_given(options: dict[str, Any], fusion: str, why: str) -> None:
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"{given}= is not for fusion {fusion!r}: {why}")


def _resolved(part: Any) -> Any:
    """The folder of a part that is named; what was loaded already as it is."""
    return sources.resolve(part) if isinstance(part, str | Path) else part


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
