"""How a step is cut changes neither loss, gradient nor diagnostics.

The same 8 ragged sequences as 1, 2, 4 and 8 micro-batches, with and without recomputation, and on
two processes. Unequal numbers of valid tokens in the pieces tell a sum over the step from a mean
of means.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from routerlab.balancers.expert_bias import ExpertBias
from routerlab.diagnostics.collection import flatten
from routerlab.losses.expert_router_coupling import ExpertRouterCouplingLoss
from routerlab.losses.importance import ImportanceLoss
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.mutual_information import MutualInformationLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.losses.sequence_balance import SequenceBalanceLoss
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.step import all_reduce, rank, split_batch, world_size
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.distributed import run_distributed
from tests.helpers.models import objective, tiny_batch, tiny_decoder

Result = dict[str, Any]  # terms, gradients, scalars, distributions


def losses(scope: str) -> dict[str, Any]:
    """Those of a scope; ``hard``: not linear in sums over tokens, or on weights with noise."""
    if scope == "hard":
        return {
            "importance": ImportanceLoss(0.5),
            "mutual_information": MutualInformationLoss(0.5),
            "sequence_balance": SequenceBalanceLoss(0.5),
            "coupling": ExpertRouterCouplingLoss(0.5, alpha=0.5),
        }
    return {"balance": LoadBalancingLoss(0.5, scope), "router_z": RouterZLoss(0.1)}


def take_step(
    scope: str, micro_batches: int, recompute: bool = False, ragged: bool = True
) -> Result:
    """One step on this rank's share of the 8 sequences; gradients averaged as DDP does."""
    model = objective(tiny_decoder(activation_checkpointing=recompute), losses(scope))
    batch = {k: v.tensor_split(world_size())[rank()] for k, v in tiny_batch(8, ragged).items()}
    parts = split_batch(batch, micro_batches)
    contexts = [model.context(part, 0, i) for i, part in enumerate(parts)]
    terms, sums, _ = model.accumulate(parts, contexts, due=True)
    gradients = {name: all_reduce(p.grad) / world_size() for name, p in model.named_parameters()}
    scalars, distributions = flatten(sums.values(all_reduce), "router")
    return {
        "terms": terms,
        "gradients": gradients,
        "scalars": scalars,
        "distributions": distributions,
    }


def check_same(got: Result, expected: Result) -> None:
    for kind in ("terms", "scalars"):
        assert got[kind] == pytest.approx(expected[kind], rel=1e-10, abs=1e-12)
    for name, gradient in expected["gradients"].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            got["gradients"][name], gradient, rtol=1e-10, atol=1e-10 * scale, msg=name
        )
    assert list(got["distributions"]) == list(expected["distributions"])
    for name, values in expected["distributions"].items():
        torch.testing.assert_close(
            torch.tensor(got["distributions"][name]), torch.tensor(values), msg=name
        )


def by_the_formula(scope: str) -> tuple[dict[str, float], Tensor]:
    """The step's loss and the first gate's gradient, written down directly for the whole batch."""
    decoder, batch = tiny_decoder(), tiny_batch(8)
    model: CausalLM = objective(decoder, {})
    context = model.context(batch, 0, 0)
    out, valid = decoder(batch["input_ids"], context), batch["valid"]
    log_probs = out.logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])
    terms = {"task": -log_probs[..., 0][valid].mean()}
    balance, z_loss = [], []
    for record in out.router_outputs.values():
        probs = record.router_logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
        pieces = valid if scope == "sequence" else valid.view(1, -1)
        values = []
        for rows in pieces:
            at = rows.nonzero()[:, 0] + len(values) * len(rows)
            values.append(4 * (chosen[at].mean(0) / 2 * probs[at].mean(0)).sum())
        balance.append(torch.stack(values).mean())
        z_loss.append(record.router_logits.logsumexp(-1)[valid.flatten()].square().mean())
    terms["loss/balance"] = torch.stack(balance).mean()
    terms["loss/router_z"] = torch.stack(z_loss).mean()
    terms["loss"] = terms["task"] + 0.5 * terms["loss/balance"] + 0.1 * terms["loss/router_z"]
    terms["loss"].backward()
    gradient = decoder.layers[0].moe.router.gate.weight.grad
    return {name: value.item() for name, value in terms.items()}, gradient


@pytest.fixture(scope="module")
def whole() -> dict[str, Result]:
    return {scope: take_step(scope, 1) for scope in ("global", "sequence", "hard")}


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_one_micro_batch_is_the_formula(whole: dict[str, Result], scope: str) -> None:
    terms, gradient = by_the_formula(scope)
    got = whole[scope]
    # float32 holds the loads: their rounding, 1e-8, is the same however the step is cut
    assert {name: got["terms"][name] for name in terms} == pytest.approx(terms, rel=1e-7)
    name = "backbone.layers.0.moe.router.gate.weight"
    torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-6, atol=1e-8)
    for loss, weight in (("balance", 0.5), ("router_z", 0.1)):
        value = got["terms"][f"loss/{loss}"]
        assert got["terms"][f"loss/{loss}/weighted"] == pytest.approx(weight * value)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
@pytest.mark.parametrize("scope", ["global", "sequence", "hard"])
def test_micro_batches(
    whole: dict[str, Result], scope: str, micro_batches: int, recompute: bool
) -> None:
    check_same(take_step(scope, micro_batches, recompute), whole[scope])


def test_unequal_micro_batches(whole: dict[str, Result]) -> None:
    check_same(take_step("global", 3), whole["global"])  # 3, 3 and 2 sequences


def test_without_padding() -> None:
    check_same(take_step("global", 4, ragged=False), take_step("global", 1, ragged=False))


def test_the_ladder_can_fail() -> None:
    # the micro-batch scope depends on the cut by definition: the tests above would see it
    one, four = (take_step("micro_batch", n)["terms"] for n in (1, 4))
    assert one["task"] == pytest.approx(four["task"], rel=1e-10)
    assert abs(one["loss/balance"] - four["loss/balance"]) > 1e-3


def train(micro_batches: int, path: Path) -> dict[str, Tensor]:
    """Two steps by a Trainer with a balancer and all losses; the whole state afterwards."""
    router = partial(TokenChoice, init_std=1.0, balancer=partial(ExpertBias, rate=0.125))
    model = objective(
        tiny_decoder(router=router), losses("global") | losses("hard"), micro_batches=micro_batches
    )
    batches = [
        {k: v.tensor_split(world_size())[rank()] for k, v in tiny_batch(8, seed=seed).items()}
        for seed in (1, 2)
    ]
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp" if world_size() > 1 else "auto", devices=world_size(),
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches, batch_size=None))
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    assert any("balancer.bias" in name and value.any() for name, value in state.items())
    return state


def _train_on_each_rank(path: Path) -> list[dict[str, Tensor]]:
    # as torchrun would say it, so that Lightning starts no processes of its own
    place = {"RANK": rank(), "LOCAL_RANK": rank(), "GROUP_RANK": 0, "WORLD_SIZE": world_size()}
    place |= {"LOCAL_WORLD_SIZE": world_size(), "TORCHELASTIC_RUN_ID": "test"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in place.items()})
    return [train(micro_batches, path) for micro_batches in (1, 4)]


def test_two_processes_of_lightning(tmp_path: Path) -> None:
    # real DDP: gradients are averaged by the wrapper, once a step
    expected = train(1, tmp_path)
    answers = run_distributed(_train_on_each_rank, tmp_path, world_size=2, tmp_path=tmp_path)
    for weights in [each for answer in answers for each in answer]:
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11)


def _on_each_rank() -> list[Result]:
    results = []
    for scope in ("global", "sequence", "hard"):
        for micro_batches, recompute in ((1, False), (4, True)):
            results.append(take_step(scope, micro_batches, recompute))
    dist.barrier()
    return results


def test_two_processes(whole: dict[str, Result], tmp_path: Path) -> None:
    first, second = run_distributed(_on_each_rank, world_size=2, tmp_path=tmp_path)
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a["terms"] == b["terms"]
        assert a["scalars"] == b["scalars"]
        for result in (a, b):
            check_same(result, whole[("global", "sequence", "hard")[index // 2]])
