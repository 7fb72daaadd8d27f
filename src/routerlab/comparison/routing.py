"""Two runs, or two moments of one, compared by what their routers decided on the same tokens.

Experts have no names that two runs share: expert 3 here may do the work of expert 7 there. So the
experts of each layer are matched first (as hidden units are in Li et al. 2016, Convergent Learning,
https://arxiv.org/abs/1511.07543), on one half of the sequences, and judged on the other half: found
and judged on the same tokens, noise would look like agreement.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from routerlab.comparison.matching import best_matching

if TYPE_CHECKING:
    from routerlab.analysis.trace import Trace

_PERMUTATIONS = 3


@dataclass(frozen=True)
class LayerAgreement:
    """How far two routers agree, in [0, 1], and how far they would by chance.

    ``partners`` [E1]: the expert of the other layer that each expert was matched with, or -1.
    """

    layer: str
    agreement: float
    chance: float
    partners: np.ndarray

    @property
    def above_chance(self) -> float:
        """(agreement - chance) / (1 - chance): 1 is the same routing, 0 is chance; NaN where chance
        agrees, too (a layer of one expert, or one that sends all tokens to all experts).
        """
        rest = 1 - self.chance
        return (self.agreement - self.chance) / rest if rest > 1e-9 else float("nan")


@dataclass(frozen=True)
class RoutingHistory:
    """How the routing of the same tokens changed over the S validations of a run with L layers.

    ``churn`` [S-1, L]: 1 - the mean `overlap` of a token's experts with those a validation before.
    ``changed`` [S-1, L]: the share of tokens whose experts are not all the same.
    ``saturation`` [S, L]: the mean overlap with the last validation, where it is 1 (router
    saturation in Muennighoff et al. 2024, OLMoE, https://arxiv.org/abs/2409.02060).
    """

    steps: list[int]
    layers: list[str]
    churn: np.ndarray
    changed: np.ndarray
    saturation: np.ndarray


def routing_agreement(one: str | Path, other: str | Path) -> list[LayerAgreement]:
    """`agreement` of what two runs' routers decided at their ends, from their directories.

    Raises ``ValueError`` that says why they cannot be compared: no trace, other tokens, another
    number of layers.
    """
    from routerlab.analysis import trace

    return agreement(trace.load(one), trace.load(other))


def agreement(one: "Trace", other: "Trace", seed: int = 0) -> list[LayerAgreement]:
    """How far the routers of two models agree on the same tokens, layer by layer (by depth).

    The matching comes from the first, third, ... sequence; agreement is the mean `overlap` on the
    second, fourth, ... under it. Chance is the same procedure with the tokens of ``other`` in
    random order (the mean of three): it knows how unevenly both use their experts, and no token.

    With different numbers of experts, or of experts a token, agreement cannot reach 1.

    Args:
        one, other: of the same tokens and as many layers, else ``ValueError``.
        seed: of the random orders.
    """
    _check_comparable(one, other)
    rng = np.random.default_rng(seed)
    sequences, length = one.input_ids.shape
    if sequences < 2:
        raise ValueError("their routing was recorded on one sequence, and it takes two")
    found = np.arange(sequences * length) // length % 2 == 0
    layers = []
    with _one_thread():
        for name, a, b in zip(one.layers, selections(one), selections(other), strict=True):
            value, partners = _matched_overlap(a, b, found)
            orders = [rng.permutation(sequences * length) for _ in range(_PERMUTATIONS)]
            chance = np.mean([_matched_overlap(a, b[order], found)[0] for order in orders])
            layers.append(LayerAgreement(name, value, float(chance), partners))
    return layers


def routing_history(run: str | Path, most: int | None = None) -> RoutingHistory:
    """How routing changed from validation to validation, from ``traces/step_*.safetensors``; of
    more than ``most`` validations every second (third, ...) up to the last.

    Raises ``ValueError`` that says why there is nothing to tell: fewer than two such traces, or of
    other tokens.
    """
    from routerlab.analysis import trace

    found = (Path(run) / "traces").glob("step_*.safetensors")
    files = {int(path.stem.removeprefix("step_")): path for path in found}
    steps = sorted(files, reverse=True)
    steps = steps[:: 1 if most is None else math.ceil(len(steps) / most) or 1]
    return history({step: trace.load(files[step]) for step in reversed(steps)})


def history(traces: dict[int, "Trace"]) -> RoutingHistory:
    """The same from traces by step, in order."""
    if len(traces) < 2:
        raise ValueError(
            f"{len(traces)} traces at validations, and it takes two (trace_validations=true keeps "
            "them)"
        )
    steps, kept = list(traces), list(traces.values())
    for trace in kept[1:]:
        _check_comparable(kept[0], trace)
    chosen = [selections(trace) for trace in kept]  # [S][L] of [T, E]
    pairs = list(zip(chosen, chosen[1:], strict=False))
    return RoutingHistory(
        steps=steps,
        layers=list(kept[0].layers),
        churn=np.array([[1 - overlap(a, b) for a, b in zip(*p, strict=True)] for p in pairs]),
        changed=np.array([[_changed(a, b) for a, b in zip(*p, strict=True)] for p in pairs]),
        saturation=np.array(
            [[overlap(a, b) for a, b in zip(now, chosen[-1], strict=True)] for now in chosen]
        ),
    )


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    r"""The mean over tokens of :math:`2 |S \cap S'| / (|S| + |S'|)`, for selections [T, E]: with k
    experts a token in both, the share of them that is common.

    A token that uses no expert in either is left out; one that uses some in one of them alone
    counts 0. NaN where no token uses any.
    """
    return _overlap(one & other, one, other)


def selections(trace: "Trace") -> list[np.ndarray]:
    """Which experts each token uses: a [T, E] table of booleans for each layer, by depth."""
    tables = []
    for layer in trace.layers.values():
        table = np.zeros((trace.input_ids.numel(), layer.num_experts), dtype=bool)
        table[layer.token_indices.numpy(), layer.expert_indices.numpy()] = True
        tables.append(table)
    return tables


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tables this small only wait for further threads of torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _matched_overlap(
    one: np.ndarray, other: np.ndarray, found: np.ndarray
) -> tuple[float, np.ndarray]:
    """The overlap on the tokens that are not ``found``, under the matching of those that are."""
    co_use = one[found].astype(np.float32).T @ other[found].astype(np.float32)
    partners = best_matching(co_use)
    one, other = one[~found], other[~found]
    matched = partners >= 0
    common = one[:, matched] & other[:, partners[matched]]
    return _overlap(common, one, other), partners


def _overlap(common: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    shared, sizes = _counts(common), _counts(one) + _counts(other)
    used = sizes > 0
    return float((2 * shared[used] / sizes[used]).mean()) if used.any() else float("nan")


def _counts(table: np.ndarray) -> np.ndarray:
    """The row sums of booleans; a product is several times as fast as numpy's sum of them."""
    return (table.astype(np.float32) @ np.ones(table.shape[1], np.float32)).astype(np.float64)


def _changed(one: np.ndarray, other: np.ndarray) -> float:
    used = _counts(one | other) > 0
    return float((_counts(one ^ other)[used] > 0).mean()) if used.any() else float("nan")


def _check_comparable(one: "Trace", other: "Trace") -> None:
    """Raises ``ValueError`` unless both are about the same tokens and as many layers."""
    shapes = [tuple(trace.input_ids.shape) for trace in (one, other)]
    if shapes[0] != shapes[1] or not one.input_ids.equal(other.input_ids):
        raise ValueError("their routing was recorded on different tokens")
    counts = [len(trace.layers) for trace in (one, other)]
    if counts[0] != counts[1]:
        raise ValueError(f"they have {counts[0]} and {counts[1]} layers with routers")
