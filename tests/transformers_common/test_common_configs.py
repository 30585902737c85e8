"""transformers' common configuration tests run on Chiasm's configurations."""

import unittest
from typing import Any

import pytest
from upstream import upstream

import members
from chiasm.vision.efficientnet_lite import EfficientNetLiteConfig
from chiasm.vision.image_tokenizer import ImageTokenizerConfig
from chiasm.vision.patches import PatchConfig

ConfigTester: Any = upstream("test_configuration_common").ConfigTester

COMPOSITE = (
    members.MLP,
    members.TiedQFormer,
    members.EncoderDecoder,
    members.Tiled,
    members.Packed,
    members.Gated,
    members.Patches,
    members.Codes,
    members.DualEncoder,
    members.Retrieval,
)
PLAIN = {EfficientNetLiteConfig: ["hidden_size"], ImageTokenizerConfig: [], PatchConfig: ["hidden_size"]}


class Parent(unittest.TestCase):
    """What a `ConfigTester` asks of the test that it is used in."""

    model_tester: members.Member


@pytest.mark.parametrize("kind", COMPOSITE, ids=lambda kind: kind.__name__)
def test_configurations_of_parts(kind: type[members.Member]) -> None:
    parent = Parent()
    parent.model_tester = kind()
    made = parent.model_tester.get_config()
    ConfigTester(parent, type(made), has_text_modality=False, connector=made.connector).run_common_tests()


def test_the_decoders_configuration() -> None:
    ConfigTester(Parent(), type(members.Decoder().config), **members.DECODER).run_common_tests()


@pytest.mark.parametrize("kind", PLAIN)
def test_configurations_of_image_inputs(kind: Any) -> None:
    tester = ConfigTester(Parent(), kind, has_text_modality=False, common_properties=PLAIN[kind])
    tester.run_common_tests()
