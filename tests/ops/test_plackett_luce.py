"""Ordered draws without replacement: their law by hand, by counting, and against a loop."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from routerlab.ops.plackett_luce import ordered_log_prob, sample_ordered

Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PAIRS = list(permutations(range(3), 2))
# Q(0, 1) = .5 * .3 / .5, Q(1, 0) = .3 * .5 / .7, ...
CHANCES = {
    (0, 1): 0.3,
    (1, 0): 0.2142857,
    (0, 2): 0.2,
    (2, 0): 0.125,
    (1, 2): 0.0857143,
    (2, 1): 0.075,
}


def log_probs(logits: Tensor, tuples: list[tuple[int, ...]]) -> Tensor:
    return ordered_log_prob(logits.expand(len(tuples), -1), torch.tensor(tuples))


def test_log_probabilities() -> None:
    got = log_probs(Q.log(), PAIRS).exp()
    expected = torch.tensor([CHANCES[pair] for pair in PAIRS], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(got.sum(), torch.ones_like(got[0]))
    # not ln .15 = -1.897120, the draw with replacement
    assert log_probs(Q.log(), [(0, 1)]).item() == pytest.approx(-1.203973, abs=1e-6)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [((0, 1), [0.5, 0.1, -0.6]), ((1, 0), [-0.2142857, 0.7, -0.4857143])],
)
def test_gradients(pair: tuple[int, int], expected: list[float]) -> None:
    # d/dz of z_i - logsumexp(left): e_0 - q + e_1 - (0, .6, .4)
    logits = Q.log().requires_grad_()
    log_probs(logits, [pair]).sum().backward()
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(logits.grad, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("num_experts", "top_k"), [(3, 2), (5, 3), (4, 4), (6, 1)])
def test_laws_of_all_tuples(num_experts: int, top_k: int) -> None:
    logits = torch.randn(num_experts, dtype=torch.float64, requires_grad=True)
    tuples = list(permutations(range(num_experts), top_k))
    got = log_probs(logits, tuples)
    torch.testing.assert_close(got.exp().sum(), torch.ones_like(got[0]))
    torch.testing.assert_close(log_probs(logits + 7.5, tuples), got)  # a constant changes nothing
    q = logits.softmax(-1)
    for chosen, value in zip(tuples[:20], got, strict=False):
        left, expected = torch.ones_like(q[0]), torch.ones_like(q[0])
        for expert in chosen:  # the definition
            expected, left = expected * q[expert] / left, left - q[expert]
        torch.testing.assert_close(value.exp(), expected)
    grads = torch.stack([torch.autograd.grad(v, logits, retain_graph=True)[0] for v in got[:20]])
    torch.testing.assert_close(grads.sum(-1), torch.zeros(len(grads), dtype=torch.float64))


def test_the_best_set_is_the_likeliest() -> None:
    # q = (.6, .3, .1): P{0,1} = .6 * .3/.4 + .3 * .6/.7; above one half, and it is the top 2
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    chance = dict(zip(PAIRS, log_probs(q.log(), PAIRS).exp().tolist(), strict=True))
    sets = {pair: chance[pair] + chance[pair[::-1]] for pair in ((0, 1), (0, 2), (1, 2))}
    assert sets[0, 1] == pytest.approx(0.7071429, abs=1e-7)
    assert sets[0, 2] == pytest.approx(0.2166667, abs=1e-7)
    assert sets[1, 2] == pytest.approx(0.0761905, abs=1e-7)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_frequencies(shift: float) -> None:
    # standard deviations of at most .0015: .01 is more than 6 of them
    logits = (Q.log() + shift).expand(100_000, 3)
    picks = sample_ordered(logits, 2, torch.Generator().manual_seed(0))
    for pair, chance in CHANCES.items():
        share = (picks == torch.tensor(pair)).all(-1).double().mean().item()
        assert share == pytest.approx(chance, abs=0.01)


def test_draws_are_distinct_and_a_function_of_the_generator() -> None:
    logits = torch.randn(50, 6)
    one, again, other = (
        sample_ordered(logits, 6, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort(-1).values, torch.arange(6).expand(50, 6))


def test_peaked_distributions_stay_finite() -> None:
    # 1 - q_0 is 0 in float32: a sum of what is left, not one minus what was drawn
    logits = torch.tensor([[1e4, 0.0, -1e4], [50.0, 1.0, 0.0]], requires_grad=True)
    picks = torch.tensor([[2, 1, 0], [0, 2, 1]])
    got = ordered_log_prob(logits, picks)
    # row 0: -2e4 - 1e4; row 1: 0 + (0 - log(e + 1)) + 0
    torch.testing.assert_close(got, torch.tensor([-3e4, -1.3132617]))
    got.sum().backward()
    assert logits.grad.isfinite().all()
    assert sample_ordered(logits.detach(), 3, torch.Generator().manual_seed(0))[0].tolist() == [
        0,
        1,
        2,
    ]
