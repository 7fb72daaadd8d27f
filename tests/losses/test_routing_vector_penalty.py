"""Norms of routing vectors by hand."""

import math

import pytest
import torch

from routerlab.core.config import compose
from routerlab.core.instantiate import build_all
from routerlab.core.protocols import RecordsLoss
from routerlab.core.routing import RoutingContext, StepTotals
from routerlab.losses.routing_vector_penalty import RoutingVectorPenalty
from tests.helpers.records import record

PROBS = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.25, 0.5, 0.25], [0.6, 0.3, 0.1]]
PICKS = [[0, 1], [2, 1], [1, 0], [0, 1]]
RECORDS = {name: record(PROBS, PICKS) for name in ("layers.0", "layers.1", "layers.2")}
CONTEXT = RoutingContext(2, 2)  # last tokens: rows 1 and 3


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("l1", 2 * (0.9 + 0.9) / 2),
        ("l2", 2 * (0.7**2 + 0.2**2 + 0.6**2 + 0.3**2) / 2),
        ("entropy", (entropy(PROBS[1]) + entropy(PROBS[3])) / 2),
    ],
)
def test_norms_by_hand(norm: str, expected: float) -> None:
    loss = RoutingVectorPenalty(norm=norm, layers=2)
    assert isinstance(loss, RecordsLoss)
    assert float(loss.of_records(RECORDS, CONTEXT)) == pytest.approx(expected)
    totals = StepTotals(torch.tensor(8.0), torch.tensor(4.0))
    assert float(loss.of_records(RECORDS, CONTEXT, totals)) == pytest.approx(expected / 2)


def test_every_norm_has_a_gradient() -> None:
    for norm in ("l1", "l2", "entropy"):
        leaf = torch.randn(4, 3, requires_grad=True)
        found = {"layers.0": record(leaf.softmax(-1), leaf.topk(2).indices)}
        RoutingVectorPenalty(norm=norm, layers=None).of_records(found, CONTEXT).backward()
        assert leaf.grad[[1, 3]].ne(0).all()
        assert not leaf.grad[[0, 2]].any()


def test_config_and_mistakes() -> None:
    cfg = compose("loss=[routing_vector_penalty]", "loss.routing_vector_penalty.weight=-0.1")
    assert build_all(cfg.loss)["routing_vector_penalty"].weight == -0.1
    with pytest.raises(ValueError, match="norm='l3': must be one of 'l1', 'l2', 'entropy'"):
        RoutingVectorPenalty(norm="l3")
    with pytest.raises(ValueError, match="layers=5: must be from 1 to the 3"):
        RoutingVectorPenalty().of_records(RECORDS, CONTEXT)
    with pytest.raises(ValueError, match="needs the context"):
        RoutingVectorPenalty().of_records(RECORDS)
