"""What the tests of several routers check alike."""

from typing import Any

import torch
from torch import Tensor, nn

from routerlab.core.routing import RouterOutput, RoutingContext


def of_logits(router: Any) -> Any:
    """A float64 router (with D = E) whose logits are its input."""
    router = router.double()
    router.gate.weight.data = torch.eye(router.num_experts, dtype=torch.float64)
    return router


def dense_weights(output: RouterOutput) -> Tensor:
    """[T, E]."""
    dense = torch.zeros_like(output.router_probs)
    place = (output.token_indices, output.expert_indices)
    return dense.index_put(place, output.combine_weights, accumulate=True)


def assert_rows_equal(output: RouterOutput, expected: RouterOutput, rows: Any) -> None:
    """The record equals ``rows`` (an index or a mask of tokens) of the other."""
    assert torch.equal(output.dispatch_mask, expected.dispatch_mask[rows])
    torch.testing.assert_close(dense_weights(output), dense_weights(expected)[rows])
    torch.testing.assert_close(output.router_probs, expected.router_probs[rows])


def assert_tokens_permute(router: nn.Module) -> None:
    """Permuting tokens permutes the record, in evaluation."""
    router = router.eval().double()
    x, order = torch.randn(9, 8, dtype=torch.float64), torch.randperm(9)
    assert_rows_equal(
        router(x[order], RoutingContext(1, 9)), router(x, RoutingContext(1, 9)), order
    )


def assert_padding_is_nothing(router: nn.Module) -> None:
    """Padding is not dispatched, and removing it changes nothing for real tokens, in evaluation."""
    router = router.eval().double()
    valid = torch.tensor([True, False, True, True, False, True, False, False])
    x = torch.randn(8, 8, dtype=torch.float64)
    padded = router(x, RoutingContext(2, 4, valid=valid))
    assert padded.valid is valid
    assert valid[padded.token_indices].all()
    assert_rows_equal(router(x[valid], RoutingContext(1, 4)), padded, valid)


def assert_finite(router: nn.Module) -> None:
    """A finite record, distributions, and finite gradients at logits of up to 1e4."""
    router = of_logits(router).float()
    size = router.num_experts
    hard = torch.randn(6, size) * 1e4
    hard[0], hard[1], hard[2] = 0.0, 1e4, -1e4
    hard[3] = torch.linspace(-1e4, 1e4, size)
    for training in (True, False):
        x = hard.clone().requires_grad_()
        output = router.train(training)(x, RoutingContext(2, 3))
        values = [output.router_logits, output.router_probs, output.combine_weights]
        values += [] if output.log_prob is None else [output.log_prob]
        assert all(value.isfinite().all() for value in values)
        assert (output.combine_weights >= 0).all()
        torch.testing.assert_close(output.router_probs.sum(-1), torch.ones(6))
        router.zero_grad()
        learns = [value.square().sum() for value in values if value.requires_grad]
        torch.stack(learns).sum().backward()
        assert router.gate.weight.grad.isfinite().all()
        assert x.grad is None or x.grad.isfinite().all()
