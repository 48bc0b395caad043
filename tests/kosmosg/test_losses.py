import math

import pytest
import torch
import torch.nn.functional as F

from kosmosg.losses import alignment_losses, diffusion_loss, language_modelling_loss, timestep_weights


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
    condition, target = torch.zeros(2, 6, 4), torch.ones(2, 6, 4)
    hidden, reconstruction = torch.zeros(2, 3, 5), torch.full((2, 3, 5), 2.0)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    mse, rec = alignment_losses(condition, target, hidden, reconstruction)
    assert (mse.item(), rec.item()) == (1.0, 4.0 * 6 / 3)
    mse, rec = alignment_losses(condition, target, hidden, reconstruction, padding=padding, variant="paper")
    assert (mse.item(), rec.item()) == (6 * 4, 4.0 * 5 * (2 + 3) / 2)
    pooled = torch.zeros(2, 10), torch.full((2, 10), 3.0)
    for variant, expected in (("released", 1 + 9), ("masked", 1 + 9), ("paper", 6 * 4 + 10 * 9)):
        mse, _ = alignment_losses(
            condition, target, hidden, reconstruction, pooled=pooled, padding=padding, variant=variant
        )
        assert mse.item() == expected


def test_masked_states_of_the_target_do_not_count():
    """L_mse is each caption's own mean; all-true masks change nothing; masked states get no gradient."""
    condition, target = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 4)
    hidden = torch.zeros(2, 3, 5)
    padding = torch.zeros(2, 3, dtype=torch.bool)
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    errors = (condition - target).square()
    own = [errors[0, :2], errors[1, :5]]
    for variant in ("released", "masked", "paper"):
        options = {"padding": padding, "variant": variant}
        expected = torch.stack([part.sum() if variant == "paper" else part.mean() for part in own]).mean()
        mse, _ = alignment_losses(condition, target, hidden, hidden, mask=mask, **options)
        torch.testing.assert_close(mse, expected)
        (gradient,) = torch.autograd.grad(mse, condition, retain_graph=True)
        assert torch.equal(gradient.any(dim=2), mask)
        whole, _ = alignment_losses(condition, target, hidden, hidden, mask=torch.ones_like(mask), **options)
        plain, _ = alignment_losses(condition, target, hidden, hidden, **options)
        assert torch.equal(whole, plain)


def test_alignment_errors():
    tensors = torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match="'released', 'masked', 'paper'"):
        alignment_losses(*tensors, variant="paperr")
    for variant in ("masked", "paper"):
        with pytest.raises(ValueError, match="padding"):
            alignment_losses(*tensors, variant=variant)
    with pytest.raises(ValueError, match=r"\(1, 6, 4\) but the text target \(1, 7, 4\)"):
        alignment_losses(tensors[0], torch.zeros(1, 7, 4), *tensors[2:])


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
