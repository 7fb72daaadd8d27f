"""One optimizer step: what it costs, what it refuses and what it reports."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routerlab.core.errors import NonFiniteLossError
from routerlab.core.protocols import AuxLoss
from routerlab.core.routing import RoutingContext, StepTotals
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.objectives.blame import blame
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.routed import RoutedObjective
from routerlab.objectives.sample_forms import Pass
from routerlab.objectives.step import split_batch
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.models import objective, tiny_batch, tiny_decoder
from tests.helpers.records import record
from tests.helpers.training import Remember, fit


def accumulate(model: RoutedObjective, micro_batches: int) -> dict[str, float]:
    parts = split_batch(tiny_batch(8), micro_batches)
    contexts = [model.context(part, 0, i) for i, part in enumerate(parts)]
    return model.accumulate(parts, contexts, due=False)[0]


# -- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "micro_batches", "calls"),
    [
        ({}, 4, 4),
        ({"z": RouterZLoss()}, 4, 4),
        ({"a": LoadBalancingLoss(scope="sequence")}, 4, 4),
        ({"a": LoadBalancingLoss(scope="micro_batch")}, 4, 4),
        ({"a": LoadBalancingLoss(scope="global")}, 4, 8),  # counts first
        ({"a": LoadBalancingLoss(scope="global")}, 1, 1),  # its own records tell
    ],
)
def test_counting_pass_only_where_a_loss_asks(
    losses: dict[str, AuxLoss], micro_batches: int, calls: int
) -> None:
    model, seen = objective(tiny_decoder(), losses), []
    model.backbone.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    accumulate(model, micro_batches)
    assert len(seen) == calls
    assert seen[-micro_batches:] == [True] * micro_batches
    assert not any(seen[:-micro_batches])  # counting builds no graph


def test_counting_pass_draws_what_the_step_draws() -> None:
    router = partial(TokenChoice, top_k=2, init_std=1.0, jitter_eps=0.5)
    model, picks = objective(tiny_decoder(router=router), {"a": LoadBalancingLoss()}), []
    model.backbone.register_forward_hook(
        lambda _, args, out: picks.append(out.router_outputs["layers.01.moe"].expert_indices)
    )
    accumulate(model, 4)
    for counted, taken in zip(picks[:4], picks[4:], strict=True):
        assert torch.equal(counted, taken)


# -- auxiliary losses -----------------------------------------------------------------------------


class Silent(CausalLM):
    """Its task loss is multiplied by zero."""

    def task_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return super().task_loss(logits, batch) * 0


@pytest.mark.parametrize(
    ("losses", "moves"),
    [
        ({}, False),
        ({"a": LoadBalancingLoss(0.0)}, False),
        ({"a": LoadBalancingLoss(0.1)}, True),
        ({"a": LoadBalancingLoss(0.1, "sequence")}, True),
        ({"z": RouterZLoss(0.1)}, True),
    ],
)
def test_without_a_task_only_auxiliary_losses_move_the_router(
    losses: dict[str, AuxLoss], moves: bool
) -> None:
    model = objective(tiny_decoder(), losses)
    model.__class__ = Silent
    terms = accumulate(model, 2)
    assert terms["task"] == 0
    for block in model.backbone.layers:
        gradient = block.moe.router.gate.weight.grad
        assert bool(gradient.any()) is moves
    assert not model.backbone.lm_head.weight.grad.any()


def test_layers_collapsed_on_different_experts_are_not_pooled() -> None:
    eye, context = torch.eye(4, dtype=torch.float64), RoutingContext(1, 6)
    records = {f"layers.{e:02d}.moe": record(eye[[e] * 6], [[e]] * 6) for e in range(4)}
    model = objective(tiny_decoder(), {"a": LoadBalancingLoss()})
    counts = {
        ("a", layer): output.requests_per_expert.double() for layer, output in records.items()
    }
    totals = StepTotals(torch.tensor(6.0), torch.tensor(1.0))
    values = model.losses.shares(records, context, totals, counts)
    assert values["loss/a"].item() == pytest.approx(4)  # E/K in each layer; pooled: 1.0


def test_terms_add_up() -> None:
    model = objective(tiny_decoder(), {"a": LoadBalancingLoss(0.5), "z": RouterZLoss(0.25)})
    terms = accumulate(model, 2)
    total = terms["task"] + 0.5 * terms["loss/a"] + 0.25 * terms["loss/z"]
    assert terms["loss"] == pytest.approx(total)
    assert terms["loss/a/weighted"] == pytest.approx(0.5 * terms["loss/a"])


# -- the training step ----------------------------------------------------------------------------


def test_steps_are_taken_and_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    weights, logs = [], []
    for micro_batches in (1, 4):
        model = objective(
            tiny_decoder(), {"a": LoadBalancingLoss(0.1)}, micro_batches=micro_batches, log_every=2
        )
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        remember = Remember()
        batches = [tiny_batch(8, seed=seed) for seed in range(4)]
        fit(model, batches, tmp_path, callbacks=[remember])
        assert model.global_step == 4
        assert all(not torch.equal(start[name], p) for name, p in model.named_parameters())
        weights.append({name: p.detach() for name, p in model.named_parameters()})
        logs.append(remember.results)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-11)
    assert [result["due"] for result in logs[0]] == [False, True, False, True]
    first, second = (log[1]["scalars"] for log in logs)
    assert first == pytest.approx(second, rel=1e-8, abs=1e-10)
    assert first["train/bits_per_byte"] == pytest.approx(first["train/loss"] / math.log(2))
    assert "router/layers.01/load_entropy" in first
    assert "scalars" not in logs[0][0]


def test_gradient_is_clipped(tmp_path: Path) -> None:
    # SGD with learning rate 0.1 moves the weights by 0.1 times the clipped norm at most
    model = objective(tiny_decoder(), {}, gradient_clip_norm=1e-3)
    model.recipe.warmup_steps = 0
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fit(model, [tiny_batch(4)], tmp_path)
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((end - start).norm()) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_poisoned_gate_is_named_and_no_step_taken(layer: int, tmp_path: Path) -> None:
    model = objective(tiny_decoder(), {"a": LoadBalancingLoss()}, micro_batches=2)
    model.backbone.layers[layer].moe.router.gate.weight.data[1, 2] = torch.nan
    before = model.backbone.embed_tokens.weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match=rf"step 1: loss nan.*layers\.0{layer}\.moe are"):
        fit(model, [tiny_batch(8)], tmp_path)
    assert torch.equal(before, model.backbone.embed_tokens.weight)


def test_blame_when_the_routers_are_fine() -> None:
    model = objective(tiny_decoder(), {})
    model.backbone.layers[1].moe.router.gate.weight.data *= 1e4
    model.backbone.lm_head.weight.data[0, 0] = torch.inf
    batch = tiny_batch(4)
    message = blame(model.run, [Pass(batch, model.context(batch, 0, 0))])
    assert "all router logits are finite, the largest" in message
    assert "layers.01.moe" in message


def test_blame_survives_a_micro_batch_of_padding() -> None:
    model, batch = objective(tiny_decoder(), {}), tiny_batch(2)
    batch["valid"][1] = False
    parts = split_batch(batch, 2)
    contexts = [model.context(part, 0, i) for i, part in enumerate(parts)]
    passes = [Pass(*both) for both in zip(parts, contexts, strict=True)]
    assert "layers." in blame(model.run, passes)


# -- context --------------------------------------------------------------------------------------


def test_context() -> None:
    model, batch = objective(tiny_decoder(), {}, seed=3), tiny_batch(4)
    context = model.context(batch, 5, 1)
    assert (context.batch_size, context.sequence_length, context.num_domains) == (4, 6, 2)
    assert torch.equal(context.valid, batch["valid"].flatten())
    assert torch.equal(context.domain_ids, batch["domain"])
    assert context.progress == 0  # no Trainer, no end
    seeds = {model.context(batch, step, part).seed for step in range(3) for part in range(3)}
    assert len(seeds) == 9
    assert context.seed == model.context(batch, 5, 1).seed
    assert context.seed != objective(tiny_decoder(), {}, seed=4).context(batch, 5, 1).seed


# -- validation -----------------------------------------------------------------------------------


def test_validation_weighs_by_tokens_and_knows_the_progress(tmp_path: Path) -> None:
    model = objective(tiny_decoder(), {}, bytes_per_token=[2.0, 4.0])
    seen: list[RoutingContext] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    batches = [tiny_batch(3, seed=5), tiny_batch(2, seed=6)]
    fit(model, [tiny_batch(8)] * 2, tmp_path, validation=batches)
    hook.remove()
    scalars, distributions = model.validation_result
    assert [context.progress for context in seen] == [0, 0.5, 1, 1]  # two steps, two val batches

    nats, tokens = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        with torch.no_grad():
            log_probs = model.backbone(batch["input_ids"]).logits.log_softmax(-1)
        for row, domain in enumerate(batch["domain"].tolist()):
            for place, label in enumerate(batch["labels"][row].tolist()):
                if label >= 0:
                    nats[domain] -= log_probs[row, place, label]
                    tokens[domain] += 1
    bits, size = nats / math.log(2), tokens * torch.tensor([2.0, 4.0])
    assert scalars["val/loss"] == pytest.approx(float(nats.sum() / tokens.sum()))
    assert scalars["val/bits_per_byte"] == pytest.approx(float(bits.sum() / size.sum()))
    assert scalars["val/bits_per_byte/a"] == pytest.approx(float(bits[0] / size[0]))
    assert scalars["val/bits_per_byte/b"] == pytest.approx(float(bits[1] / size[1]))
    table = torch.tensor(distributions["val/router/layers.00/expert_by_domain"])
    torch.testing.assert_close(table.sum(1), torch.full((2,), 2.0))  # K picks a token


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 0}, r"micro_batches=0: must be at least 1"),
        ({"log_every": 0}, r"log_every=0: must be at least 1"),
        ({"gradient_clip_norm": 0.0}, r"gradient_clip_norm=0.0: must be above 0, or null"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(nn.Identity(), {}, **changes)
