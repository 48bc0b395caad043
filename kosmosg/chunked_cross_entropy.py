"""Cross-entropy over a large vocabulary whose logits never stand whole in memory.

Notable: forward computes the gradients too, chunk by chunk, and throws each chunk's logits away; backward only scales
them. So no logits are computed twice, as recomputation would, and the arithmetic is that of the plain loss.

Shapes: `N` positions, `D` width, `V` vocabulary, `n` positions of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(hidden: Tensor, output_matrix: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum of the cross-entropies of hidden N×D under logits hidden · output_matrixᵀ, in float32.

    Args:
        output_matrix: V×D.
        labels: N int64, none of them ignored.
        chunk: n; memory for n·V logits is needed at a time.

    Raises:
        ValueError: `chunk` below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; a chunk has at least 1 position.")
    return _ChunkedCrossEntropy.apply(hidden, output_matrix, labels, chunk)  # type: ignore[return-value]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output_matrix: Tensor, labels: Tensor, chunk: int) -> Tensor:
        train_hidden, train_matrix = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if train_hidden else None
        # Summed over chunks in float32: in bfloat16 small chunks' shares would be lost.
        matrix_gradient = torch.zeros_like(output_matrix, dtype=torch.float32) if train_matrix else None
        for start in range(0, len(hidden), chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = F.linear(rows, output_matrix)  # under autocast in its precision
            log_probabilities = logits.float().log_softmax(dim=-1)
            total -= log_probabilities.gather(1, target).sum()
            if not (train_hidden or train_matrix):
                continue
            slope = log_probabilities.exp_()  # softmax − one-hot, the gradient of the sum by the logits
            slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
            slope = slope.to(logits.dtype)
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk] = slope @ output_matrix.to(slope.dtype)
            if matrix_gradient is not None:
                matrix_gradient += slope.T @ rows.to(slope.dtype)
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
