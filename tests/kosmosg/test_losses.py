import math

import pytest
import torch
import torch.nn.functional as F

from kosmosg.condition import Condition
from kosmosg.losses import (
    diffusion_loss,
    language_modelling_loss,
    reconstruction_loss,
    text_losses,
    timestep_weights,
)


def test_language_modelling_loss_equals_the_full_computation():
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    matrix = torch.randn(11, 8)
    labels = torch.tensor([[3, 4, -100, 1, -100], [-100, 10, 0, -100, 2]])
    loss = language_modelling_loss(hidden, matrix, labels)
    expected = F.cross_entropy((hidden @ matrix.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert hidden.grad[labels == -100].abs().max() == 0 < hidden.grad[labels != -100].abs().min()


def test_no_labels_give_no_loss_but_a_gradient():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss = language_modelling_loss(hidden, torch.randn(5, 4), torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0


def test_uniform_prediction_costs_log_of_the_vocabulary():
    loss = language_modelling_loss(torch.zeros(1, 2, 4), torch.randn(7, 4), torch.tensor([[1, 2]]))
    assert loss.item() == pytest.approx(math.log(7))


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
