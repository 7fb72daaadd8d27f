"""The mean token entropy by hand, and its gradient where probabilities are exactly 0."""

import math

import pytest
import torch

from routerlab.losses.router_entropy import RouterEntropyLoss, entropy
from tests.helpers.records import EX_A_PROBS, ex_a, record
from tests.helpers.step import padded_against_cut, shares_against_whole, top_k_output


def test_values_of_the_running_example() -> None:
    assert float(RouterEntropyLoss(normalize=False)(ex_a())) == pytest.approx(1.141613, abs=1e-6)
    assert float(RouterEntropyLoss()(ex_a())) == pytest.approx(0.823499, abs=1e-6)


def test_one_when_uniform_and_zero_when_certain() -> None:
    assert float(RouterEntropyLoss()(record([[0.2] * 5] * 3, [[0]] * 3))) == pytest.approx(1)
    certain = torch.eye(3, dtype=torch.float64)
    assert float(RouterEntropyLoss()(record(certain, [[0]] * 3))) == 0
    assert float(RouterEntropyLoss()(record([[1.0]], [[0]]))) == 0  # one expert: ln 1 is 0 too


def test_entropy_is_that_of_torch() -> None:
    probs = torch.tensor(EX_A_PROBS)
    torch.testing.assert_close(entropy(probs), torch.special.entr(probs).sum(-1))


def test_gradient_in_closed_form() -> None:
    # dH/dz_i = -p_i (ln p_i + H), over T and ln E
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    RouterEntropyLoss()(top_k_output(logits)).backward()
    p = logits.detach().softmax(-1)
    expected = -p * (p.log() + entropy(p)[:, None]) / 5 / math.log(4)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_where_probabilities_are_zero(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    output = top_k_output(logits)
    assert (output.router_probs == 0).any()
    value = RouterEntropyLoss()(output)
    value.backward()
    assert value.item() == pytest.approx(math.log(2) / 2 / math.log(3), rel=1e-6)
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # certain, or even over two


@pytest.mark.parametrize("normalize", [True, False])
def test_shares_add_up_in_value_and_gradient(normalize: bool) -> None:
    (value, grad), (whole, whole_grad) = shares_against_whole(
        RouterEntropyLoss(normalize=normalize)
    )
    assert whole_grad.abs().max() > 1e-3
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(grad, whole_grad)


def test_padding_changes_nothing() -> None:
    padded, cut = padded_against_cut(RouterEntropyLoss())
    torch.testing.assert_close(padded, cut)


def test_the_sign_of_the_weight_says_which_way() -> None:
    logits = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    peaks = []
    for weight in (0.5, -0.5):
        z, loss = logits.clone().requires_grad_(), RouterEntropyLoss(weight)
        (loss.weight * loss(top_k_output(z))).backward()
        peaks.append(float((logits - z.grad).softmax(-1).max()))
    assert peaks[0] > float(logits.softmax(-1).max()) > peaks[1]


@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_a_weight_has_to_be_finite(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight=(inf|nan): must be finite"):
        RouterEntropyLoss(weight)
