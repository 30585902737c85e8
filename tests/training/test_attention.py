"""Grouped attention computes what transformers' fused attention does, forwards and backwards."""

import pytest
import torch

import tiny
from chiasm.training.attention import NAME, GroupedAttention, fast_attention, grouped_attention


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_output_and_gradients_equal_the_fused_kernel(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads[0], 7, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, heads[1], 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = False
    mask[1, :, :2, 0] = True
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, torch.finfo(torch.float64).min)
    weight = torch.randn(2, heads[0], 7, 8, dtype=torch.float64)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return [output, *torch.autograd.grad((output * weight).sum(), (query, key, value))]

    ours = gradients(GroupedAttention.apply(query, key, value, bias, 0.3))
    expected = gradients(
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_not_short_bfloat16_with_gradients_takes_the_fused_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(GroupedAttention, "apply", lambda q, *rest: taken.append(q.dtype) or q)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    for dtype, grad in [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]:
        query, key = torch.randn(1, 4, 5, 8, dtype=dtype), torch.randn(1, 2, 5, 8, dtype=dtype, requires_grad=grad)
        mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        assert grouped_attention(module, query, key, key, mask)[0].shape == (1, 5, 4, 8)
    assert taken == [torch.bfloat16]


@pytest.mark.parametrize("family", tiny.LANGUAGE_FAMILIES)
def test_a_language_model_attends_the_same_and_gets_its_own_way_back(family: str) -> None:
    language = tiny.language(family).to(torch.bfloat16)
    before = language.config._attn_implementation
    tokens = torch.randint(0, 250, (3, 40))
    mask = torch.ones_like(tokens)
    mask[0, 25:] = 0

    def gradient() -> torch.Tensor:
        language.zero_grad()
        logits = language(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].float().square().mean().backward()
        return language.get_input_embeddings().weight.grad.float()

    expected = gradient()
    with fast_attention(language, torch.bfloat16):
        assert language.config._attn_implementation == (NAME if before == "sdpa" else before)
        ours = gradient()
    assert language.config._attn_implementation == before == "sdpa"
    assert torch.linalg.norm(ours - expected) < 0.02 * torch.linalg.norm(expected)
    with fast_attention(language, torch.float32):
        assert language.config._attn_implementation == before
