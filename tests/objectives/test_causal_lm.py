"""Next-token prediction, and routers that would cheat at it."""

from functools import partial
from typing import Any

import pytest
import torch

from routerlab.routers.token_choice import TokenChoice
from tests.helpers.models import objective, tiny_decoder


def test_task_loss_by_hand() -> None:
    model = objective(tiny_decoder(), {})
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[4, -100, 0], [1, 2, -100]])
    losses = model.task_loss(logits, {"labels": labels})
    p = logits.softmax(-1)
    expected = [
        [-p[0, 0, 4].log(), 0, -p[0, 2, 0].log()],
        [-p[1, 0, 1].log(), -p[1, 1, 2].log(), 0],
    ]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    assert model.num_targets({"labels": labels}).tolist() == [2, 2]


def test_half_precision_logits_are_judged_in_float32() -> None:
    logits = torch.randn(1, 4, 5).bfloat16()
    model, labels = objective(tiny_decoder(), {}), torch.tensor([[0, 1, 2, 3]])
    losses = model.task_loss(logits, {"labels": labels})
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, model.task_loss(logits.float(), {"labels": labels}))


class LooksAround(TokenChoice):
    causal = False


@pytest.mark.parametrize("router", [LooksAround, partial(TokenChoice, eval_capacity_factor=1.0)])
def test_noncausal_routers_are_refused(router: Any) -> None:
    decoder = tiny_decoder(router=router)
    with pytest.raises(ValueError, match=r"layers\.0\.moe\.router .*allow_noncausal=true"):
        objective(decoder, {})
    objective(decoder, {}, allow_noncausal=True)


def test_causal_routers_are_accepted() -> None:
    top_1 = partial(TokenChoice, top_k=1, normalize_weights=False, capacity_factor=1.0)
    for router in (TokenChoice, top_1):
        assert objective(tiny_decoder(router=router), {}).losses.by_name == {}
