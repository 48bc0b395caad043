"""The losses of the three stages.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `V` vocabulary, `Q` queries, `C` condition width.
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


def language_modelling_loss(
    hidden: Tensor, output_matrix: Tensor, labels: Tensor, chunk: int | None = LOSS_CHUNK
) -> Tensor:
    """Next-token cross-entropy, the mean over the labels that count (paper section 2.1).

    Args:
        hidden: B×L×D.
        output_matrix: V×D.
        labels: B×L int64; `labels[b, l]` is the token to be predicted *at* position l, that is the source's token
            l + 1; -100 is ignored. Without any label the loss is 0, so that a rank without text does not fail.
        chunk: counted positions whose logits stand in memory at once; None for all of them.
    """
    counted = labels != IGNORED_LABEL
    # Only counted positions meet the output matrix: image slots and padding cost no logits.
    hidden, labels = hidden[counted], labels[counted]
    if chunk is None:
        total = F.cross_entropy(F.linear(hidden, output_matrix).float(), labels, reduction="sum")
    else:
        total = chunked_cross_entropy(hidden, output_matrix, labels, chunk)
    return total / counted.sum().clamp(min=1)


def text_losses(condition: Condition, target: Condition, variant: AlignmentVariant = "released") -> Tensor:
    """‖t − M(s)‖² (eq. 5) of each caption, B; their mean is L_mse.

    A mean over elements; for `paper` the sum over them. A pooled vector's error is a further term, averaged or summed
    over its own elements. Of a target with a mask, M learns the states that count, spread over its queries
    (`Condition.spread`), since the image decoder reads all that M gives.

    Args:
        condition: M(s), states B×Q×C.
        target: t, what the image decoder's text model makes of the caption, states B×Q×C; with a mask any number.

    Raises:
        ValueError: an unknown variant, or a target unlike the condition in shape.
    """
    target = target.spread(condition.states.shape[1])
    if condition.states.shape != target.states.shape:
        raise ValueError(
            f"the condition is {tuple(condition.states.shape)} but the text target {tuple(target.states.shape)}: M's "
            "num_queries and width must be those of the image decoder's text model."
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
    """L_rec = E‖s − N(M(s))‖² (eq. 6).

    - `released`: the mean over all elements times Q / L with L the padded length; padding counts.
    - `masked`: a caption's is the mean over its own tokens' elements, and captions count alike. Q / L, near 1 at the
      released lengths, is left out: a caption's loss is its own, whatever batch it stands in.
    - `paper`: the squared norm: the sum over a caption's tokens and channels, the mean over captions.

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
    """L_diff = E[w(t)‖ε_θ(z_t; C, t) − ε‖²], eq. 8, a mean over elements of each sample.

    Args:
        prediction: ε_θ, B×4×h×w.
        noise: ε, B×4×h×w.
        weights: w(t) of each sample, B; 1 where not given, as in the released code.
        reduction: `mean` over samples, or `none` for B values.
    """
    per_sample = (prediction.float() - noise.float()).square().flatten(1).mean(dim=1)
    if weights is not None:
        per_sample = per_sample * weights
    return per_sample if reduction == "none" else torch.mean(per_sample)


TimestepWeighting = Literal["uniform", "sds", "velocity"]

VELOCITY_CEILING = 25.0


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction: Literal["epsilon", "v_prediction"]) -> Tensor:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556) for each ᾱ_t: min(SNR, γ) / SNR for the error in ε, / (SNR + 1)
    for that in v, with SNR = ᾱ_t / (1 − ᾱ_t). Both equal min(SNR, γ) times the error in z_0."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def timestep_weights(alphas_cumprod: Tensor, weighting: TimestepWeighting) -> Tensor:
    """w(t) of eq. 8 for each ᾱ_t, of the same shape.

    - `uniform`: 1, as the released code.
    - `sds`: 1 − ᾱ_t, DreamFusion's σ_t².
    - `velocity`: min(1/ᾱ_t, 25), under which an error in the noise counts as in v-prediction (Salimans and Ho 2022,
      arXiv 2202.00512). With 1, steps of strong noise, where a subject's kind and look are decided, hardly count, as
      the error in the noise is small there.
    """
    if weighting == "uniform":
        return torch.ones_like(alphas_cumprod)
    if weighting == "sds":
        return 1 - alphas_cumprod
    if weighting == "velocity":
        return (1 / alphas_cumprod).clamp(max=VELOCITY_CEILING)
    raise ValueError(f"timestep weighting {weighting!r} is unknown; allowed: 'uniform', 'sds', 'velocity'.")
