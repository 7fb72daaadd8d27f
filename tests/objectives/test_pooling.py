"""All layers as one record: what is in it, and what losses make of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from routerlab.core.routing import RouterOutput, RoutingContext, StepTotals
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_entropy import RouterEntropyLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.losses.soft_load_balancing import SoftLoadBalancingLoss
from routerlab.objectives.auxiliary import AuxiliaryLosses
from routerlab.objectives.pooling import pooled
from routerlab.objectives.step import split_batch, step_totals, sum_over_step
from tests.helpers.models import tiny_batch, tiny_decoder
from tests.helpers.records import random_record, record
from tests.helpers.step import top_k_output

CONTEXT = RoutingContext(2, 3)


def layers(valid: Tensor | None = None, count: int = 3) -> dict[str, RouterOutput]:
    return {f"layers.{i:02d}": random_record(6, 4, 2, i, valid) for i in range(count)}


def collapsed() -> dict[str, RouterOutput]:
    """Two layers that send all they have to one expert each, not the same."""
    rows = [[[0.99, 0.01]] * 6, [[0.01, 0.99]] * 6]
    return {str(expert): record(p, [[expert]] * 6) for expert, p in enumerate(rows)}


def values(losses: dict, records: dict[str, RouterOutput], context: RoutingContext = CONTEXT):
    """Of a step of one micro-batch."""
    auxiliary = AuxiliaryLosses(losses)
    whole = StepTotals.of(next(iter(records.values())), context)
    sums = sum_over_step([auxiliary.step_sums(records, context)])
    return {k: float(v) for k, v in auxiliary.shares(records, context, whole, sums).items()}


# -- the record -----------------------------------------------------------------------------------


def test_tokens_come_layer_by_layer() -> None:
    records = layers()
    output, context = pooled(records, CONTEXT)
    assert output.top_k == 2
    assert output.valid is None
    assert (context.batch_size, context.sequence_length) == (6, 3)
    for i, alone in enumerate(records.values()):
        rows, picks = slice(6 * i, 6 * i + 6), slice(12 * i, 12 * i + 12)
        assert torch.equal(output.router_probs[rows], alone.router_probs)
        assert torch.equal(output.router_logits[rows], alone.router_logits)
        assert torch.equal(output.token_indices[picks] - 6 * i, alone.token_indices)
        assert torch.equal(output.expert_indices[picks], alone.expert_indices)
        assert torch.equal(output.combine_weights[picks], alone.combine_weights)
    assert output.tokens_per_expert.sum() == 36


def test_one_layer_is_itself() -> None:
    (alone,) = layers(count=1).values()
    output, context = pooled({"only": alone}, CONTEXT)
    assert torch.equal(output.dispatch_mask, alone.dispatch_mask)
    assert context.batch_size == 2


def test_the_context_is_told_once_a_layer() -> None:
    valid = torch.tensor([True, True, False, True, False, False])
    context = replace(
        CONTEXT,
        valid=valid,
        task_ids=torch.tensor([4, 7]),
        domain_ids=torch.tensor([0, 1]),
        num_domains=2,
        sequence_embedding=torch.randn(2, 5),
        seed=3,
    )
    output, told = pooled(layers(valid), context)
    assert told.task_ids.tolist() == [4, 7] * 3
    assert told.domain_ids.tolist() == [0, 1] * 3
    assert torch.equal(told.valid, valid.repeat(3))
    assert torch.equal(output.valid, told.valid)
    assert told.sequence_embedding.shape == (6, 5)
    assert (told.num_domains, told.seed, told.noise_level) == (2, 3, None)


def test_what_only_some_layers_have() -> None:
    one, two = layers(count=2).values()
    valid = torch.tensor([True] * 5 + [False])
    padded = random_record(6, 4, 2, 5, valid)
    sampled = replace(two, log_prob=torch.zeros(6), proposal=torch.ones(1))
    output, _ = pooled({"a": one, "b": padded, "c": sampled}, CONTEXT)
    assert output.log_prob is None
    assert output.proposal is None
    assert output.top_k is None  # a padded record has none
    assert output.valid.tolist() == [True] * 6 + valid.tolist() + [True] * 6


def test_layers_of_different_sizes_are_refused() -> None:
    records = {"layers.00": random_record(6, 4, 2), "layers.01": random_record(6, 8, 2)}
    message = r"pool_layers=True: .*layers.00 has 4 and layers.01 has 8; set pool_layers=false"
    with pytest.raises(ValueError, match=message):
        pooled(records, CONTEXT)
    with pytest.raises(ValueError, match=message):
        values({"balance": SoftLoadBalancingLoss()}, records)
    assert values({"balance": SoftLoadBalancingLoss(pool_layers=False)}, records)


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [LoadBalancingLoss, SoftLoadBalancingLoss])
def test_pooled_layers_cancel(loss: type) -> None:
    # 2 (.5 * .5 + .5 * .5) = 1 for counts; weights are .99: .99 of it for the soft loss
    full = {LoadBalancingLoss: 1.0, SoftLoadBalancingLoss: 0.99}[loss]
    alone = {LoadBalancingLoss: 1.98, SoftLoadBalancingLoss: 2 * 0.99**2}[loss]
    found = values(
        {"pooled": loss(pool_layers=True), "alone": loss(pool_layers=False)}, collapsed()
    )
    assert found == pytest.approx({"loss/pooled": full, "loss/alone": alone})


def test_each_loss_sees_what_it_asks_for() -> None:
    records = layers()
    whole, context = pooled(records, CONTEXT)
    losses = {
        "z": RouterZLoss(),
        "soft": SoftLoadBalancingLoss(),
        "batch": LoadBalancingLoss(scope="micro_batch", pool_layers=True),
        "entropy": RouterEntropyLoss(),
    }
    found = values(losses, records)
    assert found["loss/soft"] == pytest.approx(float(losses["soft"](whole, context)))
    assert found["loss/batch"] == pytest.approx(float(losses["batch"](whole, context)))
    for name in ("z", "entropy"):  # means over tokens: pooled or not is one
        alone = [float(losses[name](output, CONTEXT)) for output in records.values()]
        assert found[f"loss/{name}"] == pytest.approx(sum(alone) / 3)
        assert found[f"loss/{name}"] == pytest.approx(float(losses[name](whole, context)))


@pytest.mark.parametrize("ragged", [False, True])
def test_steps_do_not_depend_on_micro_batches(ragged: bool) -> None:
    losses = {
        "soft": SoftLoadBalancingLoss(),
        "counts": LoadBalancingLoss(pool_layers=True),
        "alone": SoftLoadBalancingLoss(pool_layers=False),
    }
    auxiliary, model, batch = AuxiliaryLosses(losses), tiny_decoder(), tiny_batch(6, ragged)
    found = []
    for micro_batches in (1, 3):
        parts = split_batch(batch, micro_batches)
        contexts = [of_batch(part) for part in parts]
        ids = [part["input_ids"] for part in parts]
        pairs = zip(ids, contexts, strict=True)
        both = [(model(i, context).router_outputs, context) for i, context in pairs]
        totals, _ = step_totals(contexts, torch.tensor(1))
        sums = sum_over_step([auxiliary.step_sums(r, c) for r, c in both])
        shares = [auxiliary.shares(r, c, totals, sums) for r, c in both]
        terms = {key: torch.stack([share[key] for share in shares]).sum() for key in shares[0]}
        model.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(({key: value.detach() for key, value in terms.items()}, grads))
    assert found[0][0]["loss/soft"] > 0
    assert found[0][0]["loss/soft"] != found[0][0]["loss/alone"]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)  # totals are float32


def of_batch(batch: dict[str, Tensor]) -> RoutingContext:
    valid = batch.get("valid")
    return RoutingContext(*batch["input_ids"].shape, None if valid is None else valid.flatten())


def test_gradient_reaches_all_layers() -> None:
    logits = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    records = {str(i): top_k_output(z) for i, z in enumerate(logits)}
    auxiliary = AuxiliaryLosses({"soft": SoftLoadBalancingLoss()})
    sums = sum_over_step([auxiliary.step_sums(records, CONTEXT)])
    totals = StepTotals.of(records["0"], CONTEXT)
    auxiliary.shares(records, CONTEXT, totals, sums)["loss/soft"].backward()
    whole = torch.cat([z.detach() for z in logits]).requires_grad_()
    SoftLoadBalancingLoss()(top_k_output(whole)).backward()
    torch.testing.assert_close(torch.cat([z.grad for z in logits]), whole.grad)


def test_a_model_without_routers_has_no_losses_on_them() -> None:
    with pytest.raises(ValueError, match=r"loss balance, z: reads the records.*use loss=\[\]"):
        values_of_nothing({"balance": LoadBalancingLoss(), "z": RouterZLoss()})
    assert values_of_nothing({}) == {}


def values_of_nothing(losses: dict) -> dict:
    totals = StepTotals(torch.tensor(6.0), torch.tensor(2.0))
    return AuxiliaryLosses(losses).shares({}, CONTEXT, totals, {})
