"""The image tokenizer: codes and levels are one to one, its gradient passes the rounding, and it learns."""

import pytest
import torch

from chiasm.vision.image_tokenizer import FiniteScalarQuantizer, ImageTokenizer, ImageTokenizerConfig


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (7,)])
def test_every_number_is_one_combination(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    numbers = torch.arange(quantizer.size)
    values = quantizer.values(numbers)
    assert torch.equal(quantizer.numbers(values), numbers)
    assert len(values.unique(dim=0)) == quantizer.size
    wild = quantizer(100 * torch.randn(500, len(levels)))
    assert set(quantizer.numbers(wild).tolist()) <= set(range(quantizer.size))


def test_rounded_values_are_reached_and_gradients_pass() -> None:
    quantizer = FiniteScalarQuantizer((8, 5))
    states = torch.linspace(-4, 4, 2000)[:, None].expand(-1, 2).clone().requires_grad_()
    quantized = quantizer(states)
    assert [len(quantized[:, channel].unique()) for channel in range(2)] == [8, 5]
    quantized.sum().backward()
    assert (states.grad > 0).all()


def test_codes_come_back_as_the_forward_pass() -> None:
    tokenizer = ImageTokenizer(ImageTokenizerConfig(image_size=[24, 40], levels=[5, 4], width=8, depth=1)).eval()
    pixels = torch.rand(2, 3, 24, 40) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 15) and tokenizer.grid == (3, 5)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(codes), tokenizer(pixels).clamp(-1, 1))
    assert [picture.size for picture in tokenizer.pictures(codes)] == [(40, 24)] * 2


def test_it_learns_colours() -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(image_size=[16, 16], levels=[5, 5, 5], width=8, depth=1))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        pixels = (torch.rand(8, 3, 1, 1) * 2 - 1).expand(8, 3, 16, 16)
        loss = (tokenizer(pixels) - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="factor 6 of the image tokenizer must be a power of two from 4 on"):
        ImageTokenizerConfig(factor=6)
    with pytest.raises(ValueError, match=r"image_size \(30, 32\) is no multiple of the factor 8"):
        ImageTokenizerConfig(image_size=(30, 32))
