"""The same weights in transformers' blocks: the same outputs and the same gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from routerlab.moe.layer import MoE
from routerlab.routers.token_choice import TokenChoice

D, F, E, K = 16, 8, 6, 2
SHARED: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_local_experts": E,
    "num_experts_per_tok": K,
}


def mixtral() -> nn.Module:
    return MixtralSparseMoeBlock(MixtralConfig(**SHARED))


def olmoe(norm_topk_prob: bool) -> nn.Module:
    return OlmoeSparseMoeBlock(OlmoeConfig(**SHARED, norm_topk_prob=norm_topk_prob))


@pytest.mark.parametrize(
    ("make", "normalize_weights"),
    [(mixtral, True), (partial(olmoe, True), True), (partial(olmoe, False), False)],
    ids=["mixtral", "olmoe renormalised", "olmoe"],
)
def test_block(make: Any, normalize_weights: bool) -> None:
    theirs = make()
    router = partial(TokenChoice, top_k=K, normalize_weights=normalize_weights)
    ours = MoE(D, F, E, router)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    renamed = {
        name.replace("gate.weight", "router.gate.weight"): value
        for name, value in theirs.state_dict().items()
    }
    assert ours.load_state_dict(renamed).missing_keys == []
    x = torch.randn(2, 9, D)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(a)
    expected = theirs(b)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    y.cos().sum().backward()
    expected.cos().sum().backward()
    pairs = [(a.grad, b.grad), (ours.router.gate.weight.grad, theirs.gate.weight.grad)]
    pairs += [
        (getattr(ours.experts, name).grad, getattr(theirs.experts, name).grad)
        for name in ("gate_up_proj", "down_proj")
    ]
    for got, wanted in pairs:
        assert wanted.abs().max() > 1e-2
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got / scale, wanted / scale, rtol=1e-4, atol=1e-5)
