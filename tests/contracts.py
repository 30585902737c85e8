"""The invariants, written once: each function takes a member of a family and fails where it breaks its promise."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import chiasm
import tiny
from chiasm.connectors import CONNECTORS, Connector, build_connector
from chiasm.fusion.base import FusionModel
from chiasm.generation.decode import Decoding, prepare
from chiasm.generation.engine import Engine

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def check_connector(make: Callable[[tuple[int, int]], Connector], vision_width: int, language_width: int) -> None:
    """For several grids, odd ones too: shapes agree with `num_tokens`, every parameter is reached, a picture keeps to
    itself, FLOPs are those that torch counts, what a token sees sums to 1, and precision is the weights' own."""
    for grid in [(3, 3), (2, 5), (7, 7)]:
        connector = make(grid)
        features = torch.randn(2, grid[0] * grid[1], vision_width)
        tokens = connector(features)
        assert tokens.shape == (2, connector.num_tokens, language_width)
        torch.testing.assert_close(connector(features[:1]), tokens[:1], **TOLERANCE)
        assert not torch.allclose(tokens[0], tokens[1])
        tokens.square().sum().backward()
        for name, parameter in connector.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name} gets no gradient"
        _check_flops(connector, features)
        _check_attention(connector, features)
        assert connector.bfloat16()(features.bfloat16()).dtype == torch.bfloat16


def _check_flops(connector: Connector, features: Tensor) -> None:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        connector(features)
    assert counter.get_total_flops() == features.shape[0] * connector.flops()


def _check_attention(connector: Connector, features: Tensor) -> None:
    with torch.no_grad():
        shares = connector.attention(features)
    assert shares.shape == (features.shape[0], connector.num_tokens, features.shape[1])
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(dim=2), torch.ones(shares.shape[:2]), **TOLERANCE)
    if connector.token_grid is not None:
        assert connector.token_grid[0] * connector.token_grid[1] == connector.num_tokens


def check_connector_tokens(settings: dict[str, Any], grid: tuple[int, int]) -> list[int]:
    """A number of visual tokens is given exactly, or refused with a reason; answers with those that are given."""
    given = []
    for tokens in range(1, grid[0] * grid[1] + 1):
        try:
            options = CONNECTORS[settings["name"]].options_for(tokens, grid)
        except ValueError as error:
            assert "tokens" in str(error)
            continue
        assert build_connector(settings | options, 20, 36, grid).num_tokens == tokens
        given.append(tokens)
    return given


def check_connector_prefix(settings: dict[str, Any], vision_width: int, language_width: int) -> None:
    """Class and register tokens in front of the patches are either read or refused when the connector is built."""
    name = settings["name"]
    if not CONNECTORS[name].takes_prefix:
        with pytest.raises(ValueError, match=f"connector '{name}' folds the grid .* 2 class or register"):
            build_connector(settings, vision_width, language_width, (2, 3), num_prefix=2)
        return
    connector = build_connector(settings, vision_width, language_width, (2, 3), num_prefix=2)
    features = torch.randn(1, 8, vision_width)
    tokens = connector(features)
    assert tokens.shape[1] == connector.num_tokens
    features[:, 0] *= -1.0
    assert not torch.allclose(connector(features), tokens)
    shares = connector.attention(features)
    assert shares.shape == (1, connector.num_tokens, 8)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(1, connector.num_tokens))


def check_saved_equals_loaded(vlm: chiasm.VLM, inputs: dict[str, Tensor]) -> None:
    """save → load → the same logits, bit for bit."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = vlm.model.eval()(**inputs).logits
        vlm.save_pretrained(folder)
        again = chiasm.load(folder)
        assert torch.equal(again.model(**inputs).logits, before)
        assert {n for n, _ in again.model.named_parameters()} == {n for n, _ in vlm.model.named_parameters()}


def check_attention_implementations(model: PreTrainedModel, scores: Callable[[Any], Tensor]) -> None:
    """Whichever a saved model is loaded with, or is set to later, its scores are the same."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        before = scores(model)
        for first, then in (("eager", "sdpa"), ("sdpa", "eager")):
            again = type(model).from_pretrained(pretrained_model_name_or_path=folder, attn_implementation=first).eval()
            for implementation in (first, then):
                again.set_attn_implementation(implementation)
                assert all(part.config._attn_implementation == implementation for part in _parts(again))
                torch.testing.assert_close(scores(again), before, rtol=1e-4, atol=1e-4)


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def check_dual_encoder(encoder: chiasm.DualEncoder) -> None:
    """Vectors have length 1 and are their input's alone, padding or not; the forward's logits are their cosines scaled;
    a picture, a text and every part matter; saved equals loaded."""
    pictures, texts = [tiny.picture(seed) for seed in range(3)], ["a cat", "two dogs and a bus", "b"]
    images, words = encoder.embed_images(pictures), encoder.embed_texts(texts)
    for vectors in (images, words):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3), **TOLERANCE)
        assert not torch.allclose(vectors[0], vectors[1])
    torch.testing.assert_close(encoder.embed_texts(texts[0]), words[:1], **TOLERANCE)
    torch.testing.assert_close(encoder.embed_images(pictures[:1]), images[:1], **TOLERANCE)
    torch.testing.assert_close(encoder.score(pictures, texts), images @ words.T, **TOLERANCE)
    model, inputs = encoder.model, encoder.processor(images=pictures, text=texts)
    with torch.no_grad():
        output = model(**inputs)
        features = model.encode_images(inputs["pixel_values"])
        cached = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], image_features=features)
    torch.testing.assert_close(output.logits_per_image, model.connector.logits(images @ words.T), **TOLERANCE)
    assert torch.equal(cached.logits_per_image, output.logits_per_image)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits_per_image)
    model(**inputs, return_loss=True).loss.backward()
    for part in ("vision", "language", "connector"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_submodule(part).parameters()), part
    model.zero_grad()
    check_attention_implementations(model, lambda model: model(**inputs).logits_per_image)
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        again = chiasm.load(folder)
        assert isinstance(again, chiasm.DualEncoder)
        torch.testing.assert_close(again.score(pictures, texts), images @ words.T, rtol=0, atol=1e-6)
        assert again.processor.to_dict() == encoder.processor.to_dict()


def check_part_dtypes_survive(vlm: chiasm.VLM, inputs: dict[str, Tensor]) -> None:
    """save → load → the same dtypes and logits, bit for bit; a dtype that is asked for is still for all parts."""
    model = vlm.model.eval()
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = model(**inputs).logits
        vlm.save_pretrained(folder)
        for again in (chiasm.load(folder).model, type(model).from_pretrained(folder)):
            assert {name: p.dtype for name, p in again.named_parameters()} == dtypes
            assert torch.equal(again(**inputs).logits, before)
        for dtype in (torch.float32, torch.bfloat16):
            for again in (chiasm.load(folder, dtype=dtype).model, type(model).from_pretrained(folder, dtype=dtype)):
                assert {p.dtype for p in again.parameters()} == {dtype}


def check_image_matters(model: FusionModel, inputs: dict[str, Tensor]) -> None:
    """A different picture gives different logits and different generated scores."""
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0) + 1.0}
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, model(**other).logits)
    assert not torch.allclose(_scores(model, inputs), _scores(model, other))


def _scores(model: FusionModel, inputs: dict[str, Tensor]) -> Tensor:
    output = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    return torch.stack(output.scores)


def check_cached_equals_full(model: FusionModel, inputs: dict[str, Tensor]) -> None:
    """Decoding with a cache gives the logits of a full forward without one."""
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    kwargs |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**inputs, use_cache=True, **kwargs)
    full = model.generate(**inputs, use_cache=False, **kwargs)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=1e-4, atol=1e-4)


def check_batched_equals_single(vlm: chiasm.VLM, messages: list[Any], images: list[list[Any]]) -> None:
    """A batch of conversations of different lengths is answered as each would be alone."""
    together = vlm.generate(messages, images, max_new_tokens=8)
    alone = [vlm.generate([m], [i], max_new_tokens=8)[0] for m, i in zip(messages, images, strict=True)]
    assert together == alone


def check_padding_is_ignored(model: FusionModel, inputs: dict[str, Tensor], pad_id: int) -> None:
    """Padding on either side changes no logit of a real token."""
    with torch.no_grad():
        plain = model(**inputs).logits
        for side in ("left", "right"):
            wide = {
                name: _pad(inputs[name], fill, side) for name, fill in (("input_ids", pad_id), ("attention_mask", 0))
            }
            logits = model(**(inputs | wide)).logits
            kept = logits[:, 5:] if side == "left" else logits[:, :-5]
            torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)


def _pad(tensor: Tensor, fill: int, side: str) -> Tensor:
    block = torch.full((tensor.shape[0], 5), fill, dtype=tensor.dtype)
    return torch.cat([block, tensor] if side == "left" else [tensor, block], dim=1)


def check_text_only_is_the_language_model(model: FusionModel, language: Any, input_ids: Tensor) -> None:
    """Without pictures the logits are the language model's own, bit for bit."""
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        ours = model(input_ids=input_ids, attention_mask=mask).logits
        assert torch.equal(ours, language(input_ids=input_ids, attention_mask=mask).logits)


def open_gates(model: FusionModel, gate: float | None) -> None:
    """Sets every gate of cross-attention to one value, where the model has gates and a value is given."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if gate is not None and name.rsplit(".", 1)[-1] in ("attention_gate", "feed_forward_gate"):
                parameter.fill_(gate)


def check_closed_gates_are_the_language_model(model: FusionModel, language: Any, inputs: dict[str, Tensor]) -> None:
    """With gates at 0, pictures or not, the logits are the text-only language model's, bit for bit."""
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    positions = (text["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, language(**text, position_ids=positions).logits)


def check_losses_agree(
    model: FusionModel, inputs: dict[str, Tensor], labels: Tensor, first: torch.nn.Parameter | None = None
) -> None:
    """The loss at supervised positions only equals the loss of full logits, and so do gradients, by default of the
    connector's first weight."""
    model.eval()
    model.zero_grad()
    short = model(**inputs, labels=labels, return_logits=False)
    assert short.logits is None
    short.loss.backward()
    first = next(model.connector.parameters()) if first is None else first
    assert first.grad is not None
    gradient = first.grad.clone()
    first.grad = None
    full = model(**inputs, labels=labels, return_logits=True)
    full.loss.backward()
    torch.testing.assert_close(short.loss, full.loss, **TOLERANCE)
    torch.testing.assert_close(gradient, first.grad, rtol=1e-3, atol=1e-5)
    reference = torch.nn.functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(short.loss, reference, **TOLERANCE)


def check_embeddings_equal_tokens(model: FusionModel, inputs: dict[str, Tensor]) -> None:
    """Token embeddings in place of token ids, placeholders included, see the same pictures."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(model(**rest, inputs_embeds=embeddings).logits, model(**inputs).logits)
        assert model(**inputs, return_dict=False)[0].shape == model(**inputs).logits.shape


def check_generation_strategies(model: FusionModel, inputs: dict[str, Tensor]) -> None:
    """Strategies of `transformers.generate` that must not change a greedy answer do not, and the others run."""
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 258}
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    expected = model.generate(**inputs, **greedy)
    static = model.generate(**inputs, **greedy, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    embedded = model.generate(**rest, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), **greedy)
    assert torch.equal(embedded, expected[:, -embedded.shape[1] :])
    several = {"num_return_sequences": 2, "max_new_tokens": 3, "pad_token_id": 258}
    rows = 2 * inputs["input_ids"].shape[0]
    assert model.generate(**inputs, **several, num_beams=3, do_sample=False).shape[0] == rows
    assert model.generate(**inputs, **several, do_sample=True).shape[0] == rows


def check_continues(model: FusionModel, inputs: dict[str, Tensor]) -> None:
    """Generation that goes on from an earlier one's cache, without its pictures, says what it would have said."""
    kwargs: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 258}
    kwargs |= {"output_logits": True, "return_dict_in_generate": True}
    whole, first = (model.generate(**inputs, **kwargs, max_new_tokens=tokens) for tokens in (5, 3))
    text = {
        "input_ids": first.sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
    }
    rest = model.generate(**text, cache=first.cache, **kwargs, max_new_tokens=2)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(first.logits + rest.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


def check_assistant(vlm: chiasm.VLM) -> None:
    """A model that drafts for its own copy guesses every token: it reads the same picture."""
    inputs = vlm.processor(messages=[tiny.ask("What?")], images=[[tiny.picture(1)]])
    kwargs: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1, "pad_token_id": 258}
    expected = vlm.model.generate(**inputs, **kwargs)
    assistant, runs = copy.deepcopy(vlm.model), list[None]()
    drafts = {
        "num_assistant_tokens": 4,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0,
    }
    assistant.generation_config.update(**drafts)
    handle = vlm.model.register_forward_hook(lambda *_: runs.append(None))
    found = vlm.model.generate(**inputs, **kwargs, assistant_model=assistant)
    handle.remove()
    assert torch.equal(found, expected) and len(runs) == 1


def check_equals_reference(model: FusionModel, reference: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    """Logits to 1e-4, loss, and greedy text with and without a cache: what the reference implementation gives."""
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    with torch.no_grad():
        ours, theirs = model(**inputs, labels=labels), reference(**inputs, labels=labels)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)
    for use_cache in (True, False):
        greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258, "use_cache": use_cache}
        greedy |= {"suppress_tokens": [model.config.image_token_id]} | options
        assert torch.equal(model.generate(**inputs, **greedy), reference.generate(**inputs, **greedy))


def check_strict_loading(folder: Path) -> None:
    """Without one of its tensors (every seventh is tried), or with one too many, a checkpoint is refused by name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in list(weights)[::7]:
        save_file({other: tensor for other, tensor in weights.items() if other != name}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"1 weight has no value in the checkpoint: '.*{name.rsplit('.')[-1]}'"):
            chiasm.load(folder)
    for part in {name.rsplit(".", 2)[0] for name in list(weights)[::7]}:
        save_file(weights | {f"{part}.unheard_of": torch.zeros(1)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 weight has no place in .*unheard_of"):
            chiasm.load(folder)


def check_attention(vlm: chiasm.VLM, images: list[Any], prompt: str) -> None:
    """Shapes and sums are right, the answer is `chat`'s, and the model is afterwards what it was, on error too."""
    inputs = vlm.processor(messages=[_asked(prompt, len(images))], images=[images])
    implementation = vlm.model.language.config._attn_implementation
    with torch.no_grad():
        before = vlm.model(**inputs).logits
    said = vlm.chat(images, prompt, max_new_tokens=5)
    rows, columns = vlm.model.vision.grid
    for image in range(len(images)):
        seen = vlm.attention(images, prompt, image=image, max_new_tokens=5)
        assert seen.answer == said == "".join(seen.tokens).strip()
        assert seen.patches.shape == (len(seen.tokens), rows, columns) and len(seen.tokens) > 0
        assert (seen.patches >= 0).all()
        sums = seen.patches.sum(dim=(1, 2))
        latest = image == len(images) - 1
        if vlm.model.config.fusion == "intermediate" and not latest:
            assert not sums.any()
        else:  # a sliding window may have left the picture behind
            slides = vlm.model.config.fusion == "early" and getattr(
                vlm.model.config.text_config, "sliding_window", None
            )
            assert all(abs(total - 1) < 1e-4 or (slides and total == 0) for total in sums.tolist())
        if vlm.model.connector.token_grid is None:
            assert seen.queries is not None and seen.queries.shape == (vlm.model.connector.num_tokens, rows, columns)
            torch.testing.assert_close(seen.queries.sum(dim=(1, 2)), torch.ones(len(seen.queries)), **TOLERANCE)
        else:
            assert seen.queries is None
        assert seen.overlay().size == seen.overlay(0).size == seen.picture.size
    with pytest.raises(ValueError, match="attention in layer 99, expected some of "):
        vlm.attention(images, prompt, layers=[99], max_new_tokens=5)
    assert vlm.model.language.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(vlm.model(**inputs).logits, before)


def _asked(prompt: str, images: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": prompt}]}]


def check_engine_equals_generate(vlm: chiasm.VLM, kind: type | None = None, **options: Any) -> None:
    """Requests of different lengths and pictures, several at once, are answered with the tokens of `generate`.

    Args:
        kind: of the decoder that is expected.
    """
    conversations = [
        (_asked("What?", 1), [tiny.picture(1)]),
        (_asked("And which of these two is it?", 2), [tiny.picture(2), tiny.picture(3)]),
        (_asked("No picture.", 0), []),
        (_asked("What?", 1), [tiny.picture(4)]),
    ]
    decoding = Decoding(max_new_tokens=7)
    engine = Engine(vlm.model, vlm.processor, max_batch=3, **options)
    assert kind is None or type(engine.decoder) is kind
    tickets = [engine.submit(messages, images, decoding) for messages, images in conversations * 2]
    answers = [[piece.token for piece in ticket] for ticket in tickets]
    engine.close()
    for (messages, images), *found in zip(conversations, answers, answers[4:], strict=False):
        inputs = prepare(vlm.model, vlm.processor, [messages], [images], 7)
        tokens = vlm.model.generate(**inputs, pad_token_id=258, **decoding.arguments())[0]
        start = 1 if vlm.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # behind the start token
        expected = tokens[start:].tolist()
        assert found == [expected, expected]


def check_a_new_picture(vlm: chiasm.VLM, encode: str) -> None:
    """Each picture is known by itself: the next turn of a conversation encodes the one that it brings, and no other.

    Args:
        encode: the method that encodes pictures.
    """
    first, shown = _asked("What is it?", 1), [tiny.picture(0), tiny.picture(1)]
    turns = [*first, {"role": "assistant", "content": "x"}, *_asked("And this?", 1)]
    expected = vlm.generate([first, turns, turns], [shown[:1], shown, shown[::-1]], max_new_tokens=6)
    encoded, real, decoding = [], getattr(vlm.model, encode), Decoding(max_new_tokens=6)

    def counted(pixels: Tensor, *rest: Any) -> Tensor:
        encoded.append(len(pixels))
        return real(pixels, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm.model, encode, counted)
        engine = Engine(vlm.model, vlm.processor)
        asked = [(first, shown[:1]), (turns, shown), (turns, shown[::-1]), (turns, shown)]
        tickets = [(ticket := engine.submit(*one, decoding), ticket.text().strip()) for one in asked]
        engine.close()
    assert [text for _, text in tickets] == [*expected, expected[1]]
    assert encoded == [encoded[0], encoded[0], 2 * encoded[0]]
    assert tickets[1][0].cached_tokens > tickets[0][0].prompt_tokens - 8
