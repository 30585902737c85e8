"""transformers' common model tests run on Chiasm's model classes."""

import unittest
from typing import Any

from upstream import upstream

import members

common: Any = upstream("test_modeling_common")


class Models(common.ModelTesterMixin):
    """transformers' checks of a model; a subclass names the member of the family and its class."""

    member: type[members.Member]
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    additional_model_inputs = ("pixel_values", "image_grid_thw", "image_sizes", "token_type_ids")

    def setUp(self) -> None:
        self.model_tester = self.member()

    @property
    def all_model_classes(self) -> Any:
        return self.member.classes

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | self.model_tester.labels(inputs) if return_labels else inputs


class Generative(Models, common.GenerationTesterMixin):
    @unittest.skip("a language model inside, whole: there is no base model without a head")
    def test_model_base_model_prefix(self) -> None: ...


class MLPTest(Generative, unittest.TestCase):
    member = members.MLP


class QFormerTest(Generative, unittest.TestCase):
    member = members.TiedQFormer
    test_all_params_have_gradient = False  # CLIP's last layer is not read


class PixelShuffleTest(Generative, unittest.TestCase):
    member = members.PixelShuffle
    test_all_params_have_gradient = False  # DINOv2's mask token is for its own training


class PrefixTest(Generative, unittest.TestCase):
    member = members.Prefix


class TiledTest(Generative, unittest.TestCase):
    member = members.Tiled


class EncoderDecoderTest(Generative, unittest.TestCase):
    member = members.EncoderDecoder
    is_encoder_decoder = True

    @unittest.skip("it compares draws by their seed, and T5 draws once more before the connector does")
    def test_can_init_all_missing_weights(self) -> None: ...

    @unittest.skip("it counts an output's fields, and this one has the visual tokens too")
    def test_attention_outputs(self) -> None: ...


class PackedTest(Generative, unittest.TestCase):
    member = members.Packed


class GatedTest(Generative, unittest.TestCase):
    member = members.Gated


class PatchesTest(Generative, unittest.TestCase):
    member = members.Patches


class CodesTest(Generative, unittest.TestCase):
    member = members.Codes
    test_all_params_have_gradient = False  # an image tokenizer is trained by itself


class DecoderTest(Models, common.GenerationTesterMixin, unittest.TestCase):
    member = members.Decoder
    _is_composite = False


class Towers(Models):
    has_attentions = False  # of two towers: transformers' own checks are of one

    @unittest.skip("two towers have hidden states of their own")
    def test_hidden_states_output(self) -> None: ...

    @unittest.skip("two towers have hidden states of their own")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...


class DualEncoderTest(Towers, unittest.TestCase):
    member = members.DualEncoder


class RetrievalTest(Towers, unittest.TestCase):
    member = members.Retrieval

    @unittest.skip("a table of another size does not fit the language-modelling head, which is refused")
    def test_model_get_set_embeddings(self) -> None: ...
