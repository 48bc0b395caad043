"""The chunked loss is the plain one, gradients too, and its logits never stand whole in memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kosmosg.losses import IGNORED_LABEL, language_modelling_loss

ROWS, LENGTH, WIDTH, WORDS = 2, 19, 16, 301


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(WORDS, (ROWS, LENGTH))
    labels[0, 3:7] = IGNORED_LABEL
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    return hidden, torch.randn(WORDS, WIDTH, requires_grad=True), labels


def with_gradients(inputs: tuple[Tensor, Tensor, Tensor], chunk: int | None) -> list[Tensor]:
    hidden, matrix, labels = inputs
    # The loss is scaled, as weights and half precision's scaler do.
    loss = 3 * language_modelling_loss(hidden, matrix, labels, chunk=chunk)
    return [loss, *torch.autograd.grad(loss, (hidden, matrix))]


def test_equals_the_plain_loss(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    for chunk in [1, 7, 34, 1000]:
        for ours, plain in zip(with_gradients(inputs, chunk), with_gradients(inputs, None), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_equals_the_plain_loss_under_autocast(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = [with_gradients(inputs, chunk) for chunk in (5, None)]
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-3)


def test_logits_never_stand_whole_in_memory(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    found = {}
    for chunk in (4, None):
        with LargestTensor() as largest:
            with_gradients(inputs, chunk)
        found[chunk] = largest.elements
    counted = int((inputs[2] != IGNORED_LABEL).sum())
    assert found[None] >= counted * WORDS
    assert found[4] <= max(4 * WORDS, WORDS * WIDTH)  # a chunk's logits, or the matrix and its gradient


def test_trains_what_asks_for_it_alone(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, matrix, labels = inputs
    expected = with_gradients(inputs, None)
    (gradient,) = torch.autograd.grad(language_modelling_loss(hidden, matrix.detach(), labels, chunk=5) * 3, hidden)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert language_modelling_loss(hidden, matrix, labels, chunk=5).item() == pytest.approx(expected[0].item() / 3)


def test_without_any_label_the_loss_is_zero(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, matrix, labels = inputs
    loss = language_modelling_loss(hidden, matrix, torch.full_like(labels, IGNORED_LABEL), chunk=5)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_refuses_empty_chunks(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        language_modelling_loss(*inputs, chunk=0)
