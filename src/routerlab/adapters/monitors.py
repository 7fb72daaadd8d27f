"""What MHR looks at: how decided its tables of tasks are, and whether tasks pull one way."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def table_monitors(task_logits: Float[Tensor, "T h S"]) -> dict[str, Tensor]:
    r"""How one table of `adapters.skills.TaskTable` uses its skills, with
    :math:`P = \sigma(Z)` (Caccia et al., arXiv 2211.03831, their code's names and numbers):

    - ``discreteness``: the mean entropy of the gates over ln 2: 1 where all are undecided, 0 where
      all are on or off (in spite of the name);
    - ``sparsity``: the share of gates that are on, :math:`P \ge 1/2` (again in spite of it);
    - ``effective_skills``: the entropy of the mean over tasks of P, over its largest value
      :math:`\ln(hS)`: 1 where the tasks together use all skills equally.

    All in [0, 1], without gradient. A model's values are means over its tables.
    """
    logits = task_logits.detach().flatten(1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    on, off = logits.sigmoid(), (-logits).sigmoid()
    entropy = torch.special.entr(on) + torch.special.entr(off)
    use = on.mean(0)
    share = use / use.sum().clamp(min=torch.finfo(use.dtype).tiny)
    num_skills = len(share)
    effective = torch.special.entr(share).sum() / math.log(max(num_skills, 2))
    if num_skills == 1:
        effective = torch.ones_like(effective)
    return {
        "discreteness": entropy.mean() / math.log(2),
        "sparsity": (on >= 0.5).to(on.dtype).mean(),
        "effective_skills": effective,
    }


def gradient_alignment(gradients: Sequence[Float[Tensor, "P"]]) -> float:
    r"""The mean over pairs of tasks of the cosine of their gradients,
    :math:`\langle g_a, g_b \rangle / (\|g_a\| \|g_b\|)`, in [-1, 1] [reconstructed].

    Args:
        gradients: of each task's loss, on a batch of its own, with respect to what tasks share
            (the inventory A and B, not the table), as one vector. A vector of zeros counts 0.

    Raises:
        ValueError: fewer than two tasks.
    """
    if len(gradients) < 2:
        raise ValueError(f"gradients of {len(gradients)} task: alignment is of at least 2")
    vectors = torch.stack(list(gradients)).detach().double()
    norms = vectors.norm(dim=1, keepdim=True)
    unit = vectors / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    pairs = len(unit) * (len(unit) - 1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / pairs)
