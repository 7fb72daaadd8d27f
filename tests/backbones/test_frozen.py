"""Decoders of which a part learns: gradients, what is kept, what comes back."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.backbones.decoder import Decoder
from routerlab.backbones.frozen import train_part
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.objectives.finetune import FineTune
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.models import tiny_decoder
from tests.helpers.questions import training_batch

GATES = [f"layers.{i}.moe.router.gate.weight" for i in (0, 1, 3)]


def decoder(**changes: Any) -> Decoder:
    """Four layers, of which the third is dense."""
    sizes = {"num_layers": 4, "num_experts": [4, 4, 0, 4], "vocab_size": 64, "d_model": 16}
    return tiny_decoder(**sizes | changes)


def learning(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Of the answers' loss, by parameter."""
    recipe = OptimizerRecipe(partial(torch.optim.SGD, lr=0.1))
    tuning = FineTune(model, optimizer=recipe, losses={}, diagnostics={})
    batch = training_batch()
    context = tuning.context(batch, 0, 0)
    tuning.accumulate([batch], [context], due=False)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [None, 2, 1, [0], [1, 3]])
def test_routers_of_these_layers_learn(layers: Any) -> None:
    model = decoder()
    train_part(model, "routers", layers)
    expected = {None: GATES, 2: GATES[1:], 1: GATES[2:]}
    names = [GATES[0]] if layers == [0] else GATES[1:] if layers == [1, 3] else expected[layers]
    assert learning(model) == names
    found = gradients(model)
    assert list(found) == names
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    whole = gradients(decoder())  # with every parameter learning
    torch.testing.assert_close(found, {name: whole[name] for name in names}, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trainable", "pieces"),
    [("moe", ("router", "experts")), ("experts", ("experts",)), ("none", ())],
)
def test_other_parts(trainable: str, pieces: tuple[str, ...]) -> None:
    model = decoder(num_shared_experts=1)
    names = [name for name, _ in model.named_parameters()]
    train_part(model, trainable, [3])
    found = [n for n in names if n.startswith(tuple(f"layers.3.moe.{piece}." for piece in pieces))]
    assert learning(model) == found
    assert model.count_parameters()["trainable"] == sum(
        model.state_dict()[n].numel() for n in found
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_below_the_first_that_learns_have_no_graph(recompute: bool) -> None:
    model = decoder(activation_checkpointing=recompute)
    train_part(model, "routers", 2)
    seen: list[bool] = []
    starts: list[int] = []
    for number, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda *_, number=number: starts.append(number))
        block.register_forward_hook(lambda *args: seen.append(args[2][0].requires_grad))
    found = gradients(model)
    assert seen[:4] == [False, True, True, True]
    assert starts == [0, 1, 2, 3, *([3, 2, 1] if recompute else [])]  # where there is a graph
    wrapped = decoder()
    train_part(wrapped, "routers", 2)
    first: Any = wrapped.layers[0]
    first.forward = torch.no_grad()(first.forward)
    expected = gradients(wrapped)
    assert list(found) == list(expected) == GATES[1:]
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])


def test_the_state_is_what_learns_and_all_routers() -> None:
    router = partial(TokenChoice, top_k=2, init_std=1.0, balancer=ExpertBias)
    model = decoder(router=router)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    train_part(model, "routers", 1)
    biases = [f"layers.{i}.moe.router.balancer.bias" for i in (0, 1, 3)]
    assert sorted(model.state_dict()) == sorted([*GATES, *biases])
    other = decoder(router=router, seed=1)
    train_part(other, "experts", 1)
    assert {k for k in other.state_dict() if "router" not in k} == {
        "layers.3.moe.experts.gate_up_proj", "layers.3.moe.experts.down_proj",
    }  # fmt: skip
    saved = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(saved)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), whole[name] + (name in saved))


def test_a_state_that_is_not_that_of_the_part() -> None:
    model = decoder()
    whole = model.state_dict()
    train_part(model, "routers", 1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.3\.moe\.experts"):
        model.load_state_dict(whole)
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.moe\.router\.gate\.weight"):
        model.load_state_dict({name: whole[name] for name in GATES[1:]})


def test_the_optimizer_sees_what_learns() -> None:
    model = decoder()
    train_part(model, "routers", 2)
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, lr=0.1))
    optimizer, _ = recipe.build(model, max_steps=10)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(dict(model.named_parameters())[name]) for name in GATES[1:]}


def test_all_leaves_the_model_as_it_is() -> None:
    model = decoder()
    names = list(model.state_dict())
    train_part(model, "all")
    assert list(model.state_dict()) == names
    assert len(learning(model)) == len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"trainable_layers=2: goes with trainable=routers"):
        train_part(model, "all", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gates", None), r"trainable='gates': must be one of 'all', 'moe', 'experts', 'routers'"),
        (("routers", [2]), r"trainable_layers=\[2\]: must be different layers, of \[0, 1, 3\]"),
        (("moe", 4), r"trainable_layers=4: must be from 1 to the 3 layers"),
    ],
)
def test_what_is_not_there(words: tuple[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_part(decoder(), *words)
