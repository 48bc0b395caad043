"""Cross-entropy over a large vocabulary without holding all logits in memory.

Notable: the forward pass also computes the gradients, chunk by chunk, and discards the logits of each chunk; the
backward pass only scales the gradients. No logits are computed twice, unlike with activation checkpointing.

Shapes: `N` positions, `D` width, `V` vocabulary, `n` positions per chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(hidden: Tensor, output_matrix: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Return the sum over positions of the cross-entropy of logits hidden · output_matrixᵀ, in float32.

    Args:
        hidden: N×D.
        output_matrix: V×D.
        labels: N int64, none of them ignored.
        chunk: n; n·V logits are in memory at once.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; allowed: at least 1.")
    return _ChunkedCrossEntropy.apply(hidden, output_matrix, labels, chunk)  # type: ignore[return-value]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output_matrix: Tensor, labels: Tensor, chunk: int) -> Tensor:
        needs_hidden, needs_matrix = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in float32, because bfloat16 would lose small contributions.
        matrix_gradient = torch.zeros_like(output_matrix, dtype=torch.float32) if needs_matrix else None
        for start in range(0, len(hidden), chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = F.linear(rows, output_matrix)  # in the precision of autocast, if enabled
            log_probabilities = logits.float().log_softmax(dim=-1)
            total -= log_probabilities.gather(1, target).sum()
            if not (needs_hidden or needs_matrix):
                continue
            gradient = log_probabilities.exp_()  # with respect to the logits: softmax − one-hot
            gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
            gradient = gradient.to(logits.dtype)
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk] = gradient @ output_matrix.to(gradient.dtype)
            if matrix_gradient is not None:
                matrix_gradient += gradient.T @ rows.to(gradient.dtype)
        ctx.save_for_backward(hidden_gradient, matrix_gradient)
        ctx.matrix_dtype = output_matrix.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, matrix = ctx.saved_tensors
        return (
            None if hidden is None else hidden * scale.to(hidden.dtype),
            None if matrix is None else (matrix * scale).to(ctx.matrix_dtype),
            None,
            None,
        )
