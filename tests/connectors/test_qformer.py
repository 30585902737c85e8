"""The Q-Former computes what transformers' BLIP-2 and InstructBLIP Q-Formers compute, with any mask."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

import tiny
from chiasm.connectors.qformer import QFormer
from chiasm.interop.blip2 import qformer_names
from chiasm.interop.weights import fit
from contracts import check_connector

SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "encoder_hidden_size": 20,
    "max_position_embeddings": 19,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def ours(**options: object) -> QFormer:
    settings = tiny.connector("qformer", vocabulary=41, feed_forward=44, max_positions=19, norm_features=False)
    settings.pop("name")
    return QFormer(20, 36, (3, 3), **settings | options).eval()


def new_weights(qformer: QFormer) -> dict[str, torch.Tensor]:
    """Those that the reference's Q-Former does not hold itself."""
    return {name: tensor for name, tensor in qformer.state_dict().items() if name.startswith(("queries", "proj"))}


def mask_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])[None]


@pytest.fixture
def blip2() -> tuple[QFormer, Blip2QFormerModel, Blip2TextEmbeddings]:
    config = Blip2QFormerConfig(**SIZES, use_qformer_text_input=True)
    config._attn_implementation = "eager"
    reference, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config)
    for parameter in [*reference.parameters(), *embeddings.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    qformer = ours()
    state = {f"qformer.{name}": tensor for name, tensor in reference.state_dict().items()}
    state |= new_weights(qformer) | {f"embeddings.{name}": tensor for name, tensor in embeddings.state_dict().items()}
    qformer.load_state_dict(fit(state, qformer, qformer_names(3, has_text=True)), strict=False)
    return qformer, reference, embeddings


def test_queries_alone_equal_blip2(blip2: tuple) -> None:
    qformer, reference, _ = blip2
    features = torch.randn(2, 11, 20)
    with torch.no_grad():
        states, text = qformer.encode(qformer.query_tokens(features), features=features)
        expected = reference(query_embeds=qformer.query_tokens(features), encoder_hidden_states=features)
    torch.testing.assert_close(states, expected.last_hidden_state, **CLOSE)
    assert text.shape == (2, 0, 24)


def test_text_alone_equals_blip2(blip2: tuple) -> None:
    qformer, reference, embeddings = blip2
    ids, real = torch.randint(0, 41, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    real[1, 4:] = 0
    with torch.no_grad():
        queries, text = qformer.encode(text_ids=ids, mask=real.bool()[:, None])
        expected = reference(query_embeds=embeddings(ids), query_length=0, attention_mask=real)
    torch.testing.assert_close(text[real.bool()], expected.last_hidden_state[real.bool()], **CLOSE)
    assert queries.shape == (2, 0, 24)


def test_text_with_queries_equals_blip2(blip2: tuple) -> None:
    qformer, reference, embeddings = blip2
    ids, features = torch.randint(0, 41, (2, 7)), torch.randn(2, 11, 20)
    real = torch.ones(2, 7, dtype=torch.long)
    real[0, 5:] = 0
    tokens = qformer.query_tokens(features)
    with torch.no_grad():
        queries, text = qformer.encode(tokens, ids, qformer.look_at_all(ids, real), features)
        expected = reference(
            query_embeds=embeddings(ids, query_embeds=tokens),
            query_length=5,
            attention_mask=torch.cat([torch.ones(2, 5, dtype=torch.long), real], dim=1),
            encoder_hidden_states=features,
        ).last_hidden_state
    torch.testing.assert_close(queries, expected[:, :5], **CLOSE)
    torch.testing.assert_close(text[real.bool()], expected[:, 5:][real.bool()], **CLOSE)


def test_masks_separate_queries_and_text() -> None:
    qformer = ours()
    features, ids = torch.randn(1, 6, 20), torch.tensor([[3, 7, 9]])
    other = torch.tensor([[3, 7, 11]])
    tokens = qformer.query_tokens(features)
    causal = mask_of(["xxxxx---"] * 5 + ["xxxxxx--", "xxxxxxx-", "xxxxxxxx"])
    apart = mask_of(["xxxxx---"] * 5 + ["-----xxx"] * 3)
    with torch.no_grad():
        alone, _ = qformer.encode(tokens, features=features)
        queries, text = qformer.encode(tokens, ids, causal, features)
        _, changed = qformer.encode(tokens, other, causal, features)
        torch.testing.assert_close(queries, alone, **CLOSE)
        torch.testing.assert_close(text[:, :2], changed[:, :2], **CLOSE)
        assert not torch.allclose(text[:, 2], changed[:, 2], atol=1e-3)
        _, text = qformer.encode(tokens, ids, apart, features)
        torch.testing.assert_close(text, qformer.encode(text_ids=ids)[1], **CLOSE)


def test_instruction_equals_instructblip() -> None:
    config = InstructBlipQFormerConfig(**SIZES)
    reference = InstructBlipQFormerModel(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    qformer = ours(instruction=True)
    state = {f"qformer.{name}": tensor for name, tensor in reference.state_dict().items()} | new_weights(qformer)
    qformer.load_state_dict(fit(state, qformer, qformer_names(3, has_text=True, instruction=True)), strict=False)
    features, ids = torch.randn(2, 11, 20), torch.randint(0, 41, (2, 7))
    real = torch.ones(2, 7, dtype=torch.long)
    real[1, :3] = 0
    with torch.no_grad():
        tokens = qformer(features, instruction_ids=ids, instruction_mask=real)
        expected = reference(
            input_ids=ids,
            query_embeds=qformer.query_tokens(features),
            attention_mask=torch.cat([torch.ones(2, 5, dtype=torch.long), real], dim=1),
            encoder_hidden_states=features,
        ).last_hidden_state[:, :5]
    torch.testing.assert_close(tokens, qformer.proj(expected), **CLOSE)


def test_attention_is_the_mean_of_the_reference_weights(blip2: tuple) -> None:
    qformer, reference, _ = blip2
    features = torch.randn(2, 11, 20)
    with torch.no_grad():
        seen = qformer.attention(features)
        outputs = reference(qformer.query_tokens(features), encoder_hidden_states=features, output_attentions=True)
    expected = torch.stack([weights for weights in outputs.cross_attentions if weights.shape[-1] == 11])
    torch.testing.assert_close(seen, expected.mean(dim=(0, 2)), **CLOSE)
    torch.testing.assert_close(seen.sum(dim=2), torch.ones(2, 5))


def test_contract_without_normalised_features_and_with_other_spacing() -> None:
    settings = {"num_queries": 3, "width": 12, "depth": 4, "heads": 2, "norm_features": False}
    check_connector(lambda grid: QFormer(20, 36, grid, cross_attention_every=3, **settings), 20, 36)
    blocks = QFormer(20, 36, (2, 2), cross_attention_every=3, **settings).blocks
    assert [block.cross_attention is not None for block in blocks] == [True, False, False, True]


def test_an_instruction_reaches_every_parameter_and_changes_the_tokens() -> None:
    qformer = ours(instruction=True)
    features, ids = torch.randn(2, 9, 20), torch.tensor([[1, 2], [3, 4]])
    tokens = qformer(features, instruction_ids=ids, instruction_mask=torch.ones_like(ids))
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in qformer.parameters())
    assert not torch.allclose(tokens, qformer(features, ids + 1, torch.ones_like(ids)), atol=1e-4)
    nothing = torch.zeros_like(ids)
    torch.testing.assert_close(qformer(features, ids, nothing), qformer(features))


def test_wrong_use_is_told() -> None:
    features = torch.randn(1, 4, 20)
    with pytest.raises(ValueError, match="instruction=True but no vocabulary"):
        ours(instruction=True, vocabulary=None)
    with pytest.raises(ValueError, match="no text branch; build it with vocabulary"):
        ours(vocabulary=None).encode(text_ids=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="20 tokens, the Q-Former takes 19"):
        ours().encode(text_ids=torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="no picture to read"):
        qformer = ours()
        qformer.encode(qformer.query_tokens(features))
    with pytest.raises(ValueError, match="width=20, which does not divide into heads=3"):
        ours(width=20)
