"""Losses against their definitions; the chunked language modelling loss is the plain one, at less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kosmosg.condition import Condition
from kosmosg.losses import (
    IGNORED_LABEL,
    diffusion_loss,
    language_modelling_loss,
    reconstruction_loss,
    text_losses,
    timestep_weights,
)

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
    """Hidden states, the embedding matrix, and labels of which some do not count."""
    labels = torch.randint(WORDS, (ROWS, LENGTH))
    labels[0, 3:7] = IGNORED_LABEL
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    return hidden, torch.randn(WORDS, WIDTH, requires_grad=True), labels


def with_gradients(inputs: tuple[Tensor, Tensor, Tensor], chunk: int | None) -> list[Tensor]:
    hidden, matrix, labels = inputs
    # The loss is scaled, as weights and half precision's scaler do.
    loss = 3 * language_modelling_loss(hidden, matrix, labels, chunk=chunk)
    return [loss, *torch.autograd.grad(loss, (hidden, matrix))]


@pytest.mark.parametrize("chunk", [None, 1, 7, 34, 1000])
def test_language_modelling_loss_is_the_cross_entropy_of_all_logits(inputs, chunk):
    hidden, matrix, labels = inputs
    full = 3 * F.cross_entropy((hidden @ matrix.T).flatten(0, 1), labels.flatten())
    expected = [full, *torch.autograd.grad(full, (hidden, matrix))]
    for ours, theirs in zip(with_gradients(inputs, chunk), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_chunks_equal_the_plain_loss_under_autocast(inputs):
    with torch.autocast("cpu", torch.bfloat16):
        found = [with_gradients(inputs, chunk) for chunk in (5, None)]
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-3)


def test_logits_of_chunks_never_stand_whole_in_memory(inputs):
    found = {}
    for chunk in (4, None):
        with LargestTensor() as largest:
            with_gradients(inputs, chunk)
        found[chunk] = largest.elements
    assert found[None] >= int((inputs[2] != IGNORED_LABEL).sum()) * WORDS
    assert found[4] <= max(4 * WORDS, WORDS * WIDTH)  # a chunk's logits, or the matrix and its gradient


def test_chunks_train_what_asks_for_it_alone(inputs):
    hidden, matrix, labels = inputs
    expected = with_gradients(inputs, None)
    (gradient,) = torch.autograd.grad(language_modelling_loss(hidden, matrix.detach(), labels, chunk=5) * 3, hidden)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert language_modelling_loss(hidden, matrix, labels, chunk=5).item() == pytest.approx(expected[0].item() / 3)
    with pytest.raises(ValueError, match="chunk=0"):
        language_modelling_loss(*inputs, chunk=0)


@pytest.mark.parametrize("chunk", [None, 5])
def test_no_labels_give_no_loss_but_a_gradient(inputs, chunk):
    hidden, matrix, labels = inputs
    loss = language_modelling_loss(hidden, matrix, torch.full_like(labels, IGNORED_LABEL), chunk=chunk)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_alignment_variants():
    condition, target = Condition(torch.zeros(2, 6, 4)), Condition(torch.ones(2, 6, 4))
    hidden, reconstruction = torch.zeros(2, 3, 5), torch.full((2, 3, 5), 2.0)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    for variant, mse, rec, with_pooled in (
        ("released", 1, 4 * 6 / 3, 1 + 9),
        ("masked", 1, 4, 1 + 9),
        ("paper", 6 * 4, 4 * 5 * (2 + 3) / 2, 6 * 4 + 10 * 9),
    ):
        assert text_losses(condition, target, variant).tolist() == [mse, mse]
        assert reconstruction_loss(hidden, reconstruction, 6, padding, variant).item() == rec
        ours, theirs = condition._replace(pooled=torch.zeros(2, 10)), target._replace(pooled=torch.full((2, 10), 3.0))
        assert text_losses(ours, theirs, variant).tolist() == [with_pooled, with_pooled]


def test_a_target_with_a_mask_is_spread_over_all_queries():
    """Attention over spread states is that over those that count, whose places in between do not matter."""
    states = torch.randn(3, 6, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]]).bool()
    spread = Condition(states, mask).spread(6)
    assert spread.mask is None and Condition(states).spread(6).states is states
    for row, places in enumerate(([0, 0, 0, 1, 1, 1], [0, 0, 2, 2, 5, 5], [0, 0, 1, 2, 2, 3])):
        assert torch.equal(spread.states[row], states[row, places])
    assert torch.equal(Condition(states, mask).spread(3).states[1], states[1, [0, 2, 5]])
    query = torch.randn(3, 2, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(query, states, states, attn_mask=mask[:, None])
    torch.testing.assert_close(attention(query, spread.states, spread.states)[:2], expected[:2])
    condition = torch.randn(3, 6, 4)
    for variant in ("released", "masked", "paper"):
        losses = text_losses(Condition(condition), Condition(states, mask), variant)
        assert torch.equal(losses, text_losses(Condition(condition), spread, variant))


def test_alignment_errors():
    condition = Condition(torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match="released, masked, paper"):
        text_losses(condition, condition, variant="paperr")
    with pytest.raises(ValueError, match=r"\(1, 6, 4\) but the text target \(1, 7, 4\)"):
        text_losses(condition, Condition(torch.zeros(1, 7, 4)))


def test_diffusion_loss():
    prediction, noise = torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2) * torch.tensor([1.0, 2, 3])[:, None, None, None]
    assert diffusion_loss(prediction, noise, reduction="none").tolist() == [1, 4, 9]
    assert diffusion_loss(prediction, noise).item() == pytest.approx(14 / 3)
    assert diffusion_loss(prediction, noise, weights=torch.tensor([0.0, 1.0, 0.0])).item() == pytest.approx(4 / 3)


def test_timestep_weights():
    alphas = torch.tensor([0.5, 0.001])
    assert timestep_weights(alphas, "uniform").tolist() == [1, 1]
    assert timestep_weights(alphas, "sds").tolist() == pytest.approx([0.5, 0.999])
    assert timestep_weights(alphas, "velocity").tolist() == [2, 25]
    with pytest.raises(ValueError, match="'snr' is unknown; allowed: 'uniform', 'sds', 'velocity'"):
        timestep_weights(alphas, "snr")
