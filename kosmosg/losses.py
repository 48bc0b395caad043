"""The losses of the three training stages.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `V` vocabulary, `Q` queries, `C` condition width, `c×h×w` latents.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kosmosg.chunked_cross_entropy import chunked_cross_entropy
from kosmosg.condition import Condition

IGNORED_LABEL = -100
AlignmentVariant = Literal["released", "masked", "paper"]
ALIGNMENT_VARIANTS = get_args(AlignmentVariant)
LOSS_CHUNK = 1024
TimestepWeighting = Literal["uniform", "sds", "velocity"]
VELOCITY_CEILING = 25.0


def language_modelling_loss(
    hidden: Tensor, output_matrix: Tensor, labels: Tensor, chunk: int | None = LOSS_CHUNK
) -> Tensor:
    """Mean next-token cross-entropy over the labels (stage 1, paper section 2.1).

    Args:
        hidden: B×L×D.
        output_matrix: V×D.
        labels: B×L int64; `labels[b, l]` is the token that follows position l; -100 is ignored. Without any label the
            loss is 0, so that a rank without text does not fail.
        chunk: number of positions whose logits are in memory at once; None for all.
    """
    labelled = labels != IGNORED_LABEL
    # Image tokens and padding have no labels, so no logits are computed there.
    hidden, labels = hidden[labelled], labels[labelled]
    if chunk is None:
        total = F.cross_entropy(F.linear(hidden, output_matrix).float(), labels, reduction="sum")
    else:
        total = chunked_cross_entropy(hidden, output_matrix, labels, chunk)
    return total / labelled.sum().clamp(min=1)


def text_losses(condition: Condition, target: Condition, variant: AlignmentVariant = "released") -> Tensor:
    """‖t − M(s)‖² of each caption, B (stage 2); the mean over captions is L_mse of eq. 5.

    The error is averaged over elements, or summed for `paper`. The error of a pooled vector is a separate term, reduced
    over its own elements. The unmasked states of a masked target are spread over the queries (`Condition.spread`),
    because M predicts no mask.

    Args:
        condition: M(s), states B×Q×C.
        target: t, the condition that the image decoder's text model computes for the caption: states B×Q×C, with a
            mask any number of states.

    Raises:
        ValueError: the variant is unknown, or the shapes of condition and target differ.
    """
    target = target.spread(condition.states.shape[1])
    if condition.states.shape != target.states.shape:
        raise ValueError(
            f"the condition is {tuple(condition.states.shape)} but the text target {tuple(target.states.shape)}: "
            "num_queries and width of M must be those of the image decoder's text model."
        )
    if variant not in ALIGNMENT_VARIANTS:
        raise ValueError(f"alignment loss variant={variant!r} is unknown; allowed: {', '.join(ALIGNMENT_VARIANTS)}.")
    errors = [(condition.states.float() - target.states.float()).square().flatten(1)]
    if condition.pooled is not None and target.pooled is not None:
        errors.append((condition.pooled.float() - target.pooled.float()).square())
    return torch.stack([error.sum(dim=1) if variant == "paper" else error.mean(dim=1) for error in errors]).sum(dim=0)


def reconstruction_loss(
    hidden: Tensor, reconstruction: Tensor, queries: int, padding: Tensor, variant: AlignmentVariant = "released"
) -> Tensor:
    """L_rec = E‖s − N(M(s))‖² of eq. 6 (stage 2).

    - `released`: mean over all elements, padding included, times Q / L, where L is the padded length.
    - `masked`: mean over the elements of a caption's own tokens, then over captions. Q / L, which is near 1 at the
      released lengths, is omitted, so that a caption's loss does not depend on the batch.
    - `paper`: squared norm, that is the sum over a caption's tokens and channels, then the mean over captions.

    Args:
        hidden: s, B×L×D.
        reconstruction: N(M(s)), B×L×D.
        queries: `Q`.
        padding: bool B×L, True at padding.
    """
    error = (reconstruction.float() - hidden.float()).square()
    if variant == "released":
        return error.mean() * (queries / hidden.shape[1])
    real = error * ~padding[..., None]
    if variant == "paper":
        return real.sum(dim=(1, 2)).mean()
    return (real.mean(dim=2).sum(dim=1) / (~padding).sum(dim=1)).mean()


def diffusion_loss(
    prediction: Tensor, noise: Tensor, weights: Tensor | None = None, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """L_diff = E[w(t)‖ε_θ(z_t; C, t) − ε‖²] of eq. 8 (stage 3), averaged over the elements of each sample.

    Args:
        prediction: ε_θ, B×c×h×w.
        noise: ε, B×c×h×w.
        weights: w(t) of each sample, B; 1 by default, as in the released code.
        reduction: `mean` over samples, or `none` for B values.
    """
    per_sample = (prediction.float() - noise.float()).square().flatten(1).mean(dim=1)
    if weights is not None:
        per_sample = per_sample * weights
    return per_sample if reduction == "none" else torch.mean(per_sample)


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction: Literal["epsilon", "v_prediction"]) -> Tensor:
    """Min-SNR-γ weights (Hang et al. 2023, arXiv 2303.09556) for each ᾱ_t, with SNR = ᾱ_t / (1 − ᾱ_t).

    min(SNR, γ) / SNR for predictions of ε, min(SNR, γ) / (SNR + 1) for v. Both weight the error in z_0 by min(SNR, γ).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def timestep_weights(alphas_cumprod: Tensor, weighting: TimestepWeighting) -> Tensor:
    """w(t) of eq. 8 for each ᾱ_t, of the same shape.

    - `uniform`: 1, as in the released code.
    - `sds`: 1 − ᾱ_t, the σ_t² of DreamFusion.
    - `velocity`: min(1/ᾱ_t, 25), the weights of v-prediction (Salimans and Ho 2022, arXiv 2202.00512). Uniform weights
      give little weight to strong noise, where the error in ε is small but the subject's appearance is decided.
    """
    if weighting == "uniform":
        return torch.ones_like(alphas_cumprod)
    if weighting == "sds":
        return 1 - alphas_cumprod
    if weighting == "velocity":
        return (1 / alphas_cumprod).clamp(max=VELOCITY_CEILING)
    raise ValueError(f"timestep weighting {weighting!r} is unknown; allowed: 'uniform', 'sds', 'velocity'.")
