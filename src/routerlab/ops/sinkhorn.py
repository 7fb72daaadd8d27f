"""Entropic optimal transport between tokens and experts (Sinkhorn; Cuturi, arXiv 1306.0895)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

SAFE_EXPONENT = 30.0  # exp(30) squared, times T and E, is far from the limits of float32


def sinkhorn_bias(
    scores: Float[Tensor, "T E"], max_iter: int = 100, tol: float = 1e-4, stop: str = "columns"
) -> Float[Tensor, "E"]:
    r"""The expert biases :math:`\log v` under which the soft choices of T tokens are balanced.

    The plan :math:`\Pi` maximises :math:`\langle\Pi, S\rangle - \langle\Pi, \log\Pi\rangle` over
    rows that sum to 1 and columns that sum to T/E. It is :math:`\mathrm{diag}(u)\,K\,
    \mathrm{diag}(v)` with :math:`K = e^S`. One iteration is :math:`v \leftarrow (T/E) / K^T u`,
    then :math:`u \leftarrow 1 / K v`, from :math:`u = 1`. Since it ends on the rows,
    :math:`\Pi = \mathrm{softmax}_E(S + \log v)` after any number of iterations: ``u`` cancels.

    Works on two scaling vectors where all of K fits float32, and on the plan itself elsewhere:
    the same iterates, finite for any finite scores. (An expert whose whole column underflows gains
    the largest representable factor instead, and catches up over several iterations.)
    Differentiable through the iterations; call it under ``no_grad`` for the bias alone.

    Args:
        scores: S, compatibility over the entropy weight (higher is better), of valid tokens only.
        max_iter: the most iterations.
        tol: 0 never stops early, and so saves a GPU one wait an iteration.
        stop: ``columns``: when the 2-norm of (column sums - T/E) is below ``tol`` or the rounding
            error of such sums; ``change``: when the mean of :math:`|\Delta v|` is below ``tol``.

    Returns:
        :math:`\log v`; zeros where there are no tokens.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return scores.new_zeros(num_experts)
    share = num_tokens / num_experts
    low, high = torch.stack(scores.detach().aminmax()).tolist()
    limits = torch.finfo(scores.dtype)
    rounding = 32 * limits.eps * share * math.sqrt(num_experts)
    fits = max(high, 0.0) - min(low, 0.0) <= SAFE_EXPONENT
    kernel = scores.exp() if fits else None
    first = (scores - high).exp() if kernel is None else kernel * math.exp(-high)
    log_v = math.log(share) - high - first.sum(0).clamp(min=limits.tiny).log()
    for _ in range(max_iter - 1):
        columns = _column_sums(scores, kernel, log_v)
        if tol and stop == "columns" and (columns.detach() - share).norm() < max(tol, rounding):
            break
        before, log_v = log_v, log_v - (columns / share).clamp(min=limits.tiny).log()
        if tol and stop == "change" and (log_v.exp() - before.exp()).abs().mean() < tol:
            break
    return log_v


def _column_sums(scores: Tensor, kernel: Tensor | None, log_v: Tensor) -> Tensor:
    """Of the plan after its row update."""
    if kernel is None:
        return (scores + log_v).softmax(-1).sum(0)
    v = log_v.exp()
    u = 1 / (kernel @ v)
    return v * (kernel.T @ u)
