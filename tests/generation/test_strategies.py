"""`transformers.generate` on every generative member of the family: strategies, caches, and what they hand back."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

import contracts
import members

MEMBERS = (
    members.MLP,
    members.TiedQFormer,
    members.PixelShuffle,
    members.Prefix,
    members.Tiled,
    members.Packed,
    members.Gated,
    members.Patches,
    members.Codes,
    members.Decoder,
)
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
}
PROCESSED = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
TOLD = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
GREEDY = {"do_sample": False, "pad_token_id": members.PAD}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Case:
    """A member's model, and inputs of two rows."""

    def __init__(self, kind: type[members.Member]) -> None:
        member = kind()
        self.config, inputs = member.prepare_config_and_inputs_for_common()
        self.config.get_text_config(decoder=True).eos_token_id = None
        torch.manual_seed(1)
        self.model = member.classes[-1](self.config).eval()
        contracts.open_gates(self.model, 0.5)
        self.inputs = {name: value[:2] for name, value in inputs.items()}
        self.ids, self.length = self.inputs["input_ids"], inputs["input_ids"].shape[1]
        self.pictures = {n: v for n, v in self.inputs.items() if n not in ("input_ids", "attention_mask")}

    @property
    def rest(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.items() if name != "input_ids"}

    def one(self) -> dict[str, Tensor]:
        """The first row, whose end repeats its beginning."""
        inputs = {name: value[:1].clone() for name, value in self.inputs.items()}
        inputs["input_ids"][:, -3:] = inputs["input_ids"][:, :3]
        return inputs

    def embeddings(self) -> Tensor:
        return self.model.get_input_embeddings()(self.ids)


@pytest.fixture(scope="module", params=MEMBERS, ids=lambda kind: kind.__name__)
def built(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    """Each test finds the model's settings as they were."""
    settings = built.model.generation_config.to_dict()
    yield built
    built.model.generation_config.update(**settings)
    built.model.set_attn_implementation("sdpa")


def test_the_class_says_that_it_generates(case: Case) -> None:
    assert GenerationMixin in type(case.model).__bases__ and case.model.can_generate()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_hands_back_every_state(case: Case, strategy: str, use_cache: bool) -> None:
    options, told = STRATEGIES[strategy], {**TOLD, "output_attentions": True, "output_hidden_states": True}
    case.model.set_attn_implementation("eager")
    output = case.model.generate(
        **case.inputs, **options, **PROCESSED, **told, use_cache=use_cache, max_new_tokens=3, pad_token_id=members.PAD
    )
    several, beams = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    rows, text = 2 * max(several, beams), case.config.get_text_config(decoder=True)
    assert isinstance(output, GenerateBeamDecoderOnlyOutput if beams > 1 else GenerateDecoderOnlyOutput)
    assert output.sequences.shape == (2 * several, case.length + 3)
    assert [one.shape for one in (*output.scores, *output.logits)] == [(rows, text.vocab_size)] * 6
    for step, (attentions, states) in enumerate(zip(output.attentions, output.hidden_states, strict=True)):
        seen = case.length + step
        new = 1 if use_cache and step else seen
        assert [one.shape for one in attentions] == [(rows, text.num_attention_heads, new, seen)] * members.LAYERS
        assert [one.shape for one in states] == [(rows, new, members.WIDTH)] * (members.LAYERS + 1)
    if not use_cache:
        assert output.cache is None
        return
    assert isinstance(output.cache, DynamicCache) and len(output.cache.layers) == members.LAYERS
    shape = (rows, text.num_key_value_heads, case.length + 2, members.WIDTH // members.HEADS)
    assert all(layer.keys.shape == layer.values.shape == shape for layer in output.cache.layers)


def test_nothing_is_a_prompt(case: Case) -> None:
    assert case.model.generate(**GREEDY, max_new_tokens=3).shape == (1, 4)


def test_positions_may_be_told(case: Case) -> None:
    """They are what the mask says: on one axis, and with padding in front."""
    if getattr(case.model, "kind", "raster") != "raster":
        return
    padded = {**case.inputs, "input_ids": F.pad(case.ids, (2, 0), value=members.PAD)}
    padded["attention_mask"] = F.pad(case.inputs["attention_mask"], (2, 0))
    if "token_type_ids" in padded:
        padded["token_type_ids"] = F.pad(case.inputs["token_type_ids"], (2, 0))
    positions = (padded["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    plain = case.model.generate(**padded, **GREEDY, max_new_tokens=4)
    told = case.model.generate(**padded, **GREEDY, max_new_tokens=4, position_ids=positions)
    alone = case.model.generate(**case.inputs, **GREEDY, max_new_tokens=4)
    assert torch.equal(plain, told) and torch.equal(plain[:, -4:], alone[:, -4:])


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_are_a_prompt(case: Case, beams: int) -> None:
    """With the tokens beside them and without, and other embeddings have other scores."""
    options = {**GREEDY, **TOLD, "num_beams": beams, "max_new_tokens": 4}
    words = case.model.generate(**case.inputs, **options)
    beside = case.model.generate(case.ids, inputs_embeds=case.embeddings(), **case.rest, **options)
    alone = case.model.generate(inputs_embeds=case.embeddings(), **case.rest, **options)
    assert torch.equal(words.sequences, beside.sequences)
    assert torch.equal(words.sequences[:, case.length :], alone.sequences)
    torch.testing.assert_close(torch.stack(words.scores), torch.stack(alone.scores), **CLOSE)
    noise = torch.rand_like(case.embeddings())
    other = case.model.generate(case.ids, inputs_embeds=noise, **case.rest, **options)
    assert not any(torch.allclose(a, b) for a, b in zip(words.scores, other.scores, strict=True))


def test_a_cache_of_fixed_size_has_room_for_all(case: Case) -> None:
    """Behind tokens, and behind embeddings, whose length counts too."""
    options = {**GREEDY, **TOLD, "cache_implementation": "static", "disable_compile": True}
    text = case.config.get_text_config(decoder=True)
    growing = case.model.generate(**case.inputs, **GREEDY, **TOLD, max_new_tokens=6)
    fixed = case.model.generate(**case.inputs, **options, max_new_tokens=6)
    embedded = case.model.generate(inputs_embeds=case.embeddings(), **case.rest, **options, max_length=case.length + 6)
    assert torch.equal(growing.sequences, fixed.sequences)
    torch.testing.assert_close(torch.stack(growing.scores), torch.stack(fixed.scores), **CLOSE)
    assert torch.equal(embedded.sequences, fixed.sequences[:, case.length :])
    for cache in (fixed.cache, embedded.cache):
        assert isinstance(cache, StaticCache) and len(cache.layers) == members.LAYERS
        shape = (2, text.num_key_value_heads, case.length + 5, members.WIDTH // members.HEADS)
        assert all(layer.keys.shape == shape for layer in cache.layers)


@pytest.mark.parametrize("pictures", [True, False])
def test_a_cache_goes_on(case: Case, pictures: bool) -> None:
    """Whether pictures that it holds are given again or not, it holds afterwards what one run would have left in it."""
    if pictures and "image_grid_thw" in case.pictures:
        return
    options = {**GREEDY, **TOLD}
    whole = case.model.generate(**case.inputs, **options, max_new_tokens=4)
    first = case.model.generate(**case.inputs, **options, max_new_tokens=3)
    again = {name: value for name, value in case.pictures.items() if pictures and name != "token_type_ids"}
    mask = F.pad(case.inputs["attention_mask"], (0, 3), value=1)
    rest = case.model.generate(
        first.sequences, attention_mask=mask, cache=first.cache, **again, **options, max_new_tokens=1
    )
    assert torch.equal(rest.sequences, whole.sequences)
    _check_equal(rest.cache, whole.cache)


def test_a_cache_goes_on_behind_embeddings(case: Case) -> None:
    whole = case.model.generate(inputs_embeds=case.embeddings(), **case.rest, **GREEDY, **TOLD, max_new_tokens=4)
    first = case.model.generate(inputs_embeds=case.embeddings(), **case.rest, **GREEDY, **TOLD, max_new_tokens=3)
    longer = torch.cat([case.embeddings(), case.model.get_input_embeddings()(first.sequences)], dim=1)
    mask = F.pad(case.inputs["attention_mask"], (0, 3), value=1)
    rest = case.model.generate(
        inputs_embeds=longer, attention_mask=mask, cache=first.cache, **GREEDY, **TOLD, max_new_tokens=1
    )
    assert torch.equal(torch.cat([first.sequences, rest.sequences], dim=1), whole.sequences)
    _check_equal(rest.cache, whole.cache)


def _check_equal(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, **CLOSE)
        torch.testing.assert_close(one.values, other.values, **CLOSE)


@pytest.mark.parametrize("drafts", ["good", "bad", "looked up"])
def test_drafts_change_no_answer(case: Case, drafts: str) -> None:
    """An assistant that guesses right, one that guesses wrong, and drafts that are looked up in the prompt."""
    inputs, options = case.one(), {**GREEDY, **TOLD, "max_new_tokens": 5, "eos_token_id": -1}
    plain = case.model.generate(**inputs, **options)
    more: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if drafts != "looked up":
        torch.manual_seed(2)
        assistant = case.model if drafts == "good" else type(case.model)(case.config).eval()
        assistant.generation_config.update(num_assistant_tokens=2, num_assistant_tokens_schedule="constant")
        more = {"assistant_model": assistant}
    drafted = case.model.generate(**inputs, **options, **more)
    assert torch.equal(plain.sequences, drafted.sequences)
    torch.testing.assert_close(torch.stack(plain.scores), torch.stack(drafted.scores), **CLOSE)
    sampled = case.model.generate(**inputs, **options | {"do_sample": True}, **more)
    assert sampled.sequences.shape == plain.sequences.shape


def test_all_logits_or_the_last_are_the_same(case: Case) -> None:
    options = {**GREEDY, "max_new_tokens": 4}
    assert torch.equal(
        case.model.generate(**case.inputs, **options, logits_to_keep=0), case.model.generate(**case.inputs, **options)
    )
    with torch.no_grad():
        whole, last = (case.model(**case.inputs, logits_to_keep=kept).logits for kept in (0, 2))
    torch.testing.assert_close(whole[:, -2:], last, **CLOSE)


def test_half_precision_generates(case: Case) -> None:
    """And a cache of fixed size has that precision too."""
    model = type(case.model)(case.config).half().eval()
    inputs = {n: v.half() if v.is_floating_point() else v for n, v in case.inputs.items()}
    options = {**GREEDY, **TOLD, "max_new_tokens": 3, "disable_compile": True}
    output = model.generate(**inputs, **options, cache_implementation="static")
    assert output.cache.layers[0].keys.dtype == torch.float16
    assert torch.stack(output.scores).isfinite().any()


def test_prepared_inputs_keep_what_they_do_not_know(case: Case) -> None:
    prepared = case.model.prepare_inputs_for_generation(**case.inputs, unknown="kept", is_first_iteration=True)
    assert prepared["unknown"] == "kept" and prepared.keys() >= case.pictures.keys()
