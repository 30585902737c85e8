"""Presets: the seed's systems by name, which what is said explicitly wins over."""

from typing import Any

import pytest

import chiasm
import tiny
from chiasm.connectors import CONNECTORS
from chiasm.presets import PRESETS, Preset


def connect(vision: str = "clip", **options: Any) -> Any:
    return chiasm.connect(tiny.vision(vision), tiny.language(), tokenizer=tiny.tokenizer(), **options)


def connector_name(preset: Preset) -> str:
    return preset.connector if isinstance(preset.connector, str) else preset.connector["name"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_connects(name: str) -> None:
    preset = PRESETS[name]
    if preset.fusion == "late":
        encoder = connect(preset=name)
        assert isinstance(encoder, chiasm.DualEncoder) and encoder.score(tiny.picture(), "a cat").shape == (1, 1)
        return
    if connector_name(preset) not in CONNECTORS:
        with pytest.raises(ValueError, match=f"connector '{connector_name(preset)}' is unknown"):
            connect(preset=name)
        return
    vlm = connect(preset=name)
    config = vlm.model.config
    assert config.connector["name"] == connector_name(preset) and config.fusion == preset.fusion
    assert vlm.processor.image_processor.resize_mode == preset.resize_mode
    answer = vlm.chat(tiny.picture(), "What?", max_new_tokens=2)
    assert isinstance(answer, str)


def test_what_is_said_wins() -> None:
    vlm = connect("siglip", preset="llava", connector="mlp", features={"layers": [1]}, resize_mode="squash")
    assert vlm.model.config.connector["name"] == "mlp"
    assert vlm.model.vision.features.layers[0].layer == 1
    assert vlm.processor.image_processor.resize_mode == "squash"


def test_layers_of_a_preset_are_those_of_a_vit() -> None:
    assert connect("siglip", preset="llava").model.vision.features.layers[0].layer == 2
    assert connect("convnext", preset="llava").model.vision.features.layers[0].layer == "last"


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preset 'lava' is unknown; choose one of llava, .*internvl"):
        connect(preset="lava")
