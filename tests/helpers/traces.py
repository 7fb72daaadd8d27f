"""Routings that can be worked out by hand, and random ones."""

from collections.abc import Sequence

import numpy as np
import torch

from routerlab.analysis.trace import LayerTrace, Trace


def table(sets: Sequence[set[int]], num_experts: int) -> np.ndarray:
    """Selections [T, E] of sets of experts."""
    return np.array([[e in chosen for e in range(num_experts)] for chosen in sets])


def layer(selected: np.ndarray) -> LayerTrace:
    tokens, experts = map(torch.from_numpy, np.nonzero(selected))
    return LayerTrace(tokens, experts, torch.ones(len(tokens)), selected.shape[1])


def traced(*layers: np.ndarray, sequences: int = 4, first_token: int = 0) -> Trace:
    """A trace of ``layers`` of [T, E] selections."""
    ids = (torch.arange(len(layers[0])) + first_token).view(sequences, -1)
    named = {f"layers.{i:02d}": layer(selected) for i, selected in enumerate(layers)}
    return Trace(ids, torch.zeros(sequences, dtype=torch.long), ["all"], named)


def random_sets(tokens: int, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    """Selections [T, E] of ``top_k`` experts a token, each as likely as the others."""
    rng = np.random.default_rng(seed)
    scores = rng.random((tokens, num_experts))
    return scores >= np.sort(scores, axis=1)[:, -top_k, None]
