"""Round robin: the sequence of experts by hand, and perfect balance."""

import pytest
import torch

from routerlab.core.protocols import Router
from routerlab.core.routing import RoutingContext
from routerlab.routers.round_robin import RoundRobin


def test_turns() -> None:
    router = RoundRobin(8, 5)
    assert isinstance(router, Router)
    assert router.order_dependent
    assert not list(router.parameters())
    output = router(torch.randn(4, 8))
    assert output.expert_indices.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert output.combine_weights.tolist() == [0.5] * 8
    assert output.top_k == router.top_k == 2
    torch.testing.assert_close(output.router_probs, torch.full((4, 5), 0.2))
    assert not output.router_logits.any()
    shifted = router(torch.randn(4, 8), RoutingContext(1, 4, layer=3))
    assert shifted.expert_indices.tolist() == [3, 4, 0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
@pytest.mark.parametrize("num_tokens", [1, 6, 7, 50])
def test_balance(top_k: int, num_tokens: int) -> None:
    valid = torch.arange(num_tokens) % 3 != 1
    for mask in (None, valid):
        context = RoutingContext(1, num_tokens, valid=mask, layer=2)
        output = RoundRobin(4, 7, top_k)(torch.randn(num_tokens, 4), context)
        counts = output.requests_per_expert
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == top_k * (num_tokens if mask is None else int(mask.sum()))
        assert (output.dispatch_mask.sum(-1) == (top_k if mask is None else top_k * mask)).all()


def test_padding_is_skipped_in_the_numbering() -> None:
    valid = torch.tensor([False, True, False, True, True, False])
    router, x = RoundRobin(4, 5), torch.randn(6, 4)
    padded = router(x, RoutingContext(2, 3, valid=valid))
    assert padded.token_indices.tolist() == [1, 1, 3, 3, 4, 4]
    assert torch.equal(padded.expert_indices, router(x[valid]).expert_indices)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="top_k=6: must be at least 1 and at most 5"):
        RoundRobin(8, 5, top_k=6)
