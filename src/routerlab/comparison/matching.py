"""Which expert of one model plays the part of which expert of another."""

import numpy as np


def best_matching(co_use: np.ndarray) -> np.ndarray:
    """The one-to-one matching of experts that shares the most tokens: the partner [E1] of each
    expert, -1 where it has none because there are fewer experts on the other side.

    Exact (`ops.assignment.balanced_assignment` of a square table, padded with zeros).

    Args:
        co_use: [E1, E2], the number of tokens that use an expert here and an expert there.
    """
    import torch

    from routerlab.ops.assignment import balanced_assignment

    rows, columns = co_use.shape
    square = np.zeros((max(rows, columns),) * 2)
    square[:rows, :columns] = co_use
    partners = balanced_assignment(torch.from_numpy(square)).numpy()[:rows]
    return np.where(partners < columns, partners, -1)
