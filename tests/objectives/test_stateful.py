"""State, schedules, sampled choices and losses on weights, through whole optimizer steps."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.balancers.bip import BIP
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.routing import RoutingContext
from routerlab.losses.expert_router_coupling import ExpertRouterCouplingLoss
from routerlab.losses.importance import ImportanceLoss
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.load_cv import LoadCVLoss
from routerlab.losses.mutual_information import MutualInformationLoss
from routerlab.objectives import sampling
from routerlab.objectives.lookahead import looks_ahead
from routerlab.objectives.rehearsal import rehearse
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.router_state import update_routers
from routerlab.objectives.step import split_batch
from routerlab.routers.subset_sampling import SubsetSampling
from routerlab.routers.token_choice import TokenChoice
from routerlab.schedules.progress import Linear, Step
from tests.helpers.models import objective, tiny_batch, tiny_decoder
from tests.helpers.records import random_record


def with_router(router: Any, losses: dict[str, Any] | None = None, **changes: Any) -> Any:
    return objective(tiny_decoder(router=router), losses or {}, **changes)


def run(model: RoutedObjective, micro_batches: int = 1, step: int = 0) -> tuple[dict, Any]:
    parts = split_batch(tiny_batch(), micro_batches)
    contexts = [model.context(part, step, i) for i, part in enumerate(parts)]
    terms, _, states = model.accumulate(parts, contexts, due=False)
    return terms, states


def gradients(model: nn.Module) -> Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in found])


# -- state ----------------------------------------------------------------------------------------


def test_bias_moves_once_by_the_counts_of_all_micro_batches() -> None:
    biased = partial(TokenChoice, init_std=1.0, balancer=partial(ExpertBias, rate=0.25))
    found = []
    for micro_batches in (1, 4):
        model = with_router(biased)
        _, states = run(model, micro_batches)
        before = [b.bias.clone() for b in (m.router.balancer for m in model._layers().values())]
        assert not torch.stack(before).any()  # forward and backward move nothing
        update_routers(model._routers(), states)
        found.append(torch.stack([m.router.balancer.bias for m in model._layers().values()]))
    assert torch.equal(*found)
    assert set(found[0].flatten().tolist()) <= {-0.25, 0.0, 0.25}
    assert found[0].any()


def test_prices_are_the_mean_over_micro_batches() -> None:
    model = with_router(partial(TokenChoice, init_std=1.0, balancer=partial(BIP, iterations=8)))
    _, states = run(model, 2)
    update_routers(model._routers(), states)
    for name, layer in model._layers().items():
        halves = [state["proposal", name] for state in states]
        expected = torch.stack(halves).mean(0).to(layer.router.balancer.prices.dtype)
        torch.testing.assert_close(layer.router.balancer.prices, expected)
        assert expected.any()


def test_validation_moves_nothing() -> None:
    model = with_router(partial(TokenChoice, init_std=1.0, balancer=BIP)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.on_validation_epoch_start()
    model._trainer = None
    batch = tiny_batch()
    out = model.backbone(batch["input_ids"], model.context(batch, 0, 0))
    assert all(record.proposal is not None for record in out.router_outputs.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# -- losses that are not linear in the sums of the step --------------------------------------------


@pytest.mark.parametrize("loss", [ImportanceLoss(0.7), MutualInformationLoss(0.7)])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_nonlinear_losses_do_not_depend_on_the_cut(loss: Any, micro_batches: int) -> None:
    found = []
    for pieces in (1, micro_batches):
        model = with_router(partial(TokenChoice, init_std=1.0), {"a": loss})
        terms, _ = run(model, pieces)
        found.append((terms["loss/a"], gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)


def test_loss_on_weights_is_taken_once_a_step() -> None:
    found = []
    for pieces in (1, 4):
        model = with_router(
            partial(TokenChoice, init_std=1.0), {"erc": ExpertRouterCouplingLoss(alpha=0.5)}
        )
        terms, _ = run(model, pieces)
        found.append((terms["loss/erc"], gradients(model)))
        probes = model.losses.probes(model._layers())
        assert probes["loss/erc/radius_mean"] > 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][0] > 0
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)


# -- schedules ------------------------------------------------------------------------------------


def test_schedules_set_losses_routers_and_balancers() -> None:
    loss = LoadBalancingLoss()
    schedules = {
        "a": Linear("loss.lbl.weight", 1.0, 0.0),
        "b": Linear("router.top_k", 4.0, 1.0),
        "c": Linear("balancer.rate", 0.0, 2.0),
    }
    biased = partial(TokenChoice, balancer=ExpertBias)
    model = with_router(biased, {"lbl": loss}, schedules=schedules)
    routers = list(model._routers().values())
    for progress, weight, top_k, rate in ((0.0, 1.0, 4, 0.0), (0.5, 0.5, 3, 1.0), (1.0, 0, 1, 2)):
        model.schedules.apply(progress)
        assert loss.weight == weight
        assert [r.top_k for r in routers] == [top_k] * 2  # 2.5 is rounded up, and stays whole
        assert isinstance(routers[0].top_k, int)
        assert [r.balancer.rate for r in routers] == [rate] * 2


@pytest.mark.parametrize(
    "target",
    [
        "loss.other.weight",
        "router.capacity_factor",
        "router.num_experts",
        "balancer.rate",
        "optimizer.lr",
        "router",
    ],
)
def test_targets_that_this_run_does_not_have_are_refused(target: str) -> None:
    schedules = {"a": Linear(target, 1.0, 0.0)}
    with pytest.raises(ValueError, match=f"schedule target='{target}'.*loss.<one of lbl>"):
        with_router(TokenChoice, {"lbl": LoadBalancingLoss()}, schedules=schedules)


# -- sampled choices ------------------------------------------------------------------------------


def sampled(**changes: Any) -> Any:
    return with_router(partial(SubsetSampling, top_k=2, init_std=1.0), **changes)


def test_sampled_routers_learn_by_policy_gradient_alone() -> None:
    model = sampled(num_samples=3)
    assert len(model.policy) == 2
    run(model)
    assert all(p.grad.any() for p in model.policy)


def test_equal_losses_give_the_router_no_gradient() -> None:
    model = sampled()
    for layer in model.backbone.layers:
        layer.moe.experts.down_proj.data.zero_()  # no choice matters
    run(model)
    assert not any(p.grad.any() for p in model.policy)
    assert model.backbone.embed_tokens.weight.grad.any()


@pytest.mark.parametrize("credit", ["sequence", "reward_to_go"])
def test_surrogate_by_hand(credit: str) -> None:
    # one sequence of two tokens, two samples with token losses [1, 3] and [2, 1]
    losses = torch.tensor([[1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    log_probs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    records = {"l": replace(random_record(4, 3, 1), log_prob=log_probs)}
    samples = sampling.Samples.of([losses], [records], torch.tensor([2]))
    value = samples.surrogates(torch.tensor(4.0), credit).sum()
    (slope,) = torch.autograd.grad(value, log_probs)
    # mean losses 2 and 1.5: advantages +-.25 (divisor M - 1 = 1), for both tokens; the sequence's
    # weight is 4 / 4. To go: [2, 1.5], [1.5, .5]: differences from their means +-.25, +-.5
    expected = [0.25, 0.25, -0.25, -0.25] if credit == "sequence" else [0.25, 0.5, -0.25, -0.5]
    torch.testing.assert_close(slope, torch.tensor(expected).double())


def test_the_policy_gradient_is_clipped_on_its_own() -> None:
    model = sampled(gradient_clip_norm=0.1)
    run(model)
    for parameter in model.policy:
        parameter.grad.mul_(1e6)
    rest = [p for p in model.parameters() if all(p is not q for q in model.policy)]
    before = torch.cat([p.grad.flatten() for p in rest]).norm().item()
    model._clip()
    after = torch.cat([p.grad.flatten() for p in rest]).norm().item()
    policy = torch.cat([p.grad.flatten() for p in model.policy]).norm().item()
    assert after == pytest.approx(min(0.1, before), rel=1e-4)
    assert policy == pytest.approx(0.1, rel=1e-4)


def test_number_of_samples() -> None:
    assert sampled().num_samples == 4
    assert with_router(TokenChoice).num_samples == 1
    with pytest.raises(ValueError, match="num_samples=1.*at least 2"):
        sampled(num_samples=1)
    with pytest.raises(ValueError, match="num_samples=4: no router samples"):
        with_router(TokenChoice, num_samples=4)
    with pytest.raises(ValueError, match="credit='token'.*'sequence', 'reward_to_go'"):
        sampled(credit="token")


# -- rehearsal, marks -----------------------------------------------------------------------------


def test_rehearsal_refuses_what_does_not_go_together() -> None:
    rehearse(with_router(TokenChoice, {"a": ImportanceLoss()}))
    with pytest.raises(ValueError, match="noisy_top_k"):
        rehearse(with_router(TokenChoice, {"a": LoadCVLoss()}))


def test_marks() -> None:
    marks = {
        "no": TokenChoice,
        "in training": partial(TokenChoice, balancer=BIP),
        "in evaluation": partial(TokenChoice, eval_capacity_factor=1.0),
    }
    assert {mark: looks_ahead(tiny_decoder(router=r)) for mark, r in marks.items()} == {
        mark: mark for mark in marks
    }


def test_routers_that_read_the_prompt_alone_are_causal_where_prompts_are_told() -> None:
    decoder = tiny_decoder(router=partial(SubsetSampling, granularity="sequence"))
    assert looks_ahead(decoder) == "in evaluation"
    assert looks_ahead(decoder, gives_prompt=True) == "no"
    with pytest.raises(ValueError, match="allow_noncausal=true"):
        objective(decoder, {})
    other = tiny_decoder(router=partial(TokenChoice, eval_capacity_factor=1.0))
    assert looks_ahead(other, gives_prompt=True) == "in evaluation"


def test_contexts_of_a_step_share_one_seed() -> None:
    model, batch = with_router(TokenChoice), tiny_batch()
    contexts = [model.context(batch, 3, part) for part in range(2)]
    assert contexts[0].seed != contexts[1].seed
    assert contexts[0].step_seed == contexts[1].step_seed != model.context(batch, 4, 0).step_seed
    draws = [c.at_layer(1).step_generator(torch.device("cpu")).initial_seed() for c in contexts]
    assert draws[0] == draws[1] != contexts[0].step_generator(torch.device("cpu")).initial_seed()
    assert isinstance(RoutingContext(1, 1).step_generator(torch.device("cpu")), torch.Generator)
    assert math.isfinite(run(model)[0]["loss"])


# -- schedules, looked at closely -----------------------------------------------------------------


def test_a_knob_stays_a_float_whatever_whole_number_it_starts_from() -> None:
    loss = LoadBalancingLoss(weight=1.0)
    loss.weight = 0  # as a yaml may say
    schedules = {"a": Step("loss.lbl.weight", [0, 0.01], [0.5])}
    model = with_router(TokenChoice, {"lbl": loss}, schedules=schedules)
    model.schedules.apply(0.0)
    model.schedules.apply(0.6)
    assert loss.weight == 0.01


def test_a_leak_that_comes_with_a_schedule_is_seen() -> None:
    # one choice a token queues in order; two look ahead
    router = partial(TokenChoice, top_k=1, normalize_weights=False, eval_capacity_factor=1.0)
    schedules = {"a": Linear("router.top_k", 1, 2)}
    assert with_router(router).looks_ahead == "no"
    with pytest.raises(ValueError, match="allow_noncausal=true"):
        with_router(router, schedules=schedules)
    model = with_router(router, schedules=schedules, allow_noncausal=True)
    assert model.looks_ahead == "in evaluation"
    assert [r.top_k for r in model._routers().values()] == [1, 1]  # back at the start


def test_constant_weights_follow_a_scheduled_top_k() -> None:
    model = sampled(schedules={"a": Linear("router.top_k", 4, 1)})
    model.schedules.apply(1.0)
    batch = tiny_batch()
    out = model.eval().backbone(batch["input_ids"], model.context(batch, 0, 0))
    assert all((r.combine_weights == 1).all() for r in out.router_outputs.values())
