"""M samples replicated, looped and cheap: the same choices, losses and router gradient."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from routerlab.core.routing import RoutingContext
from routerlab.losses.importance import ImportanceLoss
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.objectives.causal_lm import CausalLM
from routerlab.objectives.sample_forms import FORMS, cut, flat, repeat, replicate
from routerlab.objectives.sampling import Samples
from routerlab.objectives.step import rank, split_batch, world_size
from routerlab.routers.subset_sampling import SubsetSampling
from routerlab.routers.token_choice import TokenChoice
from tests.helpers.distributed import run_distributed
from tests.helpers.models import objective, tiny_batch, tiny_decoder

LOSSES = {"a": LoadBalancingLoss(0.3), "i": ImportanceLoss(0.2), "z": RouterZLoss(0.1)}


def model_of(form: str, recompute: bool = False, granularity: str = "token", **more: Any) -> Any:
    router = partial(SubsetSampling, top_k=2, init_std=1.0, granularity=granularity)
    decoder = tiny_decoder(router=router, activation_checkpointing=recompute)
    settings = {"sample_form": form, "num_samples": 3, "allow_noncausal": True} | more
    return objective(decoder, settings.pop("losses", {}), **settings)


def step(model: CausalLM, micro_batches: int = 1, due: bool = False) -> dict[str, float]:
    parts = split_batch(tiny_batch(), micro_batches)
    contexts = [model.context(part, 0, i) for i, part in enumerate(parts)]
    return model.accumulate(parts, contexts, due)[0]


def gradients(model: CausalLM) -> tuple[Tensor, Tensor]:
    """Of routers, and of everything else."""
    policy = {id(p) for p in model.policy}
    rest = [p for p in model.parameters() if id(p) not in policy]
    return tuple(torch.cat([p.grad.flatten() for p in ps]) for ps in (model.policy, rest))  # type: ignore[return-value]


# -- the forms agree ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batches", "changes"),
    [
        (1, {}),
        (1, {"granularity": "sequence", "num_samples": 4}),
        (3, {"credit": "reward_to_go", "num_samples": 2}),
        (1, {"losses": LOSSES}),
        (2, {"losses": LOSSES, "granularity": "sequence"}),
        (2, {"losses": LOSSES, "recompute": True}),
    ],
)
def test_all_forms_give_the_same_router_gradient(
    micro_batches: int, changes: dict[str, Any]
) -> None:
    found = {}
    for form in FORMS:
        model = model_of(form, **changes)
        found[form] = (step(model, micro_batches), *gradients(model))
    terms, policy, rest = found["replicated"]
    assert policy.any()
    for form in ("looped", "cheap"):
        assert found[form][0] == pytest.approx(terms, rel=1e-9)
        torch.testing.assert_close(found[form][1], policy, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found["looped"][2], rest, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found["cheap"][2], rest, rtol=1e-2)


def test_in_float32_too() -> None:
    found = {}
    for form in FORMS:
        model = model_of(form).float()
        step(model)
        found[form] = gradients(model)[0]
    for form in ("looped", "cheap"):
        torch.testing.assert_close(found[form], found["replicated"], rtol=1e-4, atol=1e-7)


def test_cheap_learns_everything_else_from_its_first_sample() -> None:
    model = model_of("cheap")
    step(model)
    _, rest = gradients(model)
    model.zero_grad()
    batch = tiny_batch()
    out = model.run(batch, model.context(batch, 0, 0))  # sample 0
    (model.task_loss(out.logits, batch).sum() / model.num_targets(batch).sum()).backward()
    policy = {id(p) for p in model.policy}
    expected = [p.grad.flatten() for p in model.parameters() if id(p) not in policy]
    torch.testing.assert_close(rest, torch.cat(expected), rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.policy)  # the task alone leaves routers without


def test_the_mean_over_samples_is_reported() -> None:
    model, batch = model_of("cheap"), tiny_batch()
    context, losses = model.context(batch, 0, 0), []
    for sample in range(3):
        out = model.run(batch, replace(context, replica=sample))
        losses.append(model.task_loss(out.logits, batch).sum() / model.num_targets(batch).sum())
    losses = torch.stack(losses).detach()
    assert len(losses.unique()) == 3
    assert step(model)["task"] == pytest.approx(float(losses.mean()))


def test_router_gradients_come_from_the_surrogate_alone_and_nothing_else_does() -> None:
    model, batch = model_of("replicated"), tiny_batch()
    (one,) = cut("replicated", batch, model.context(batch, 0, 0), 3)
    out = model.run(one.batch, one.context)
    losses = model.task_loss(out.logits, one.batch)
    samples = Samples.of([losses], [out.router_outputs], model.num_targets(batch))
    samples.surrogates(torch.tensor(1.0)).sum().backward()
    policy = {id(p) for p in model.policy}
    for parameter in model.parameters():
        assert (parameter.grad is not None) is (id(parameter) in policy)


@pytest.mark.parametrize("num_samples", [2, 5])
@pytest.mark.parametrize("form", FORMS)
def test_experts_that_add_nothing_give_routers_exactly_no_gradient(
    form: str, num_samples: int
) -> None:
    model = model_of(form, num_samples=num_samples)
    for layer in model.backbone.layers:
        layer.moe.experts.down_proj.data.zero_()
    step(model)
    policy, rest = gradients(model)
    if form == "cheap":  # its passes are of two sizes, whose sums may round apart
        policy[policy.abs() < 1e-15] = 0
    assert not policy.any()
    assert rest.any()


# -- what a form runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "losses", "micro_batches", "expected"),
    [
        ("replicated", {}, 1, [(24, True)]),
        ("looped", {}, 1, [(8, True)] * 3),
        ("cheap", {}, 1, [(16, False), (8, True)]),
        ("cheap", {}, 2, [(8, False), (4, True)] * 2),
        # one micro-batch: its own records tell, however many passes it takes
        ("looped", LOSSES, 1, [(8, True)] * 3),
        ("cheap", LOSSES, 2, [(8, False), (4, False)] * 2 + [(8, False), (4, True)] * 2),
    ],
)
def test_passes(form: str, losses: Any, micro_batches: int, expected: list[Any]) -> None:
    model, seen = model_of(form, losses=losses), []
    model.backbone.register_forward_hook(
        lambda _, args, out: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    step(model, micro_batches)
    assert seen == expected


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_sample_m_draws_the_same_in_every_form(granularity: str) -> None:
    drawn = {}
    for form in FORMS:
        model, batch = model_of(form, granularity=granularity), tiny_batch(ragged=False)
        picks: dict[int, Tensor] = {}
        for one in cut(form, batch, model.context(batch, 0, 0), 3):
            found = model.run(one.batch, one.context).router_outputs["layers.01.moe"]
            blocks = found.expert_indices.chunk(one.context.num_replicas)
            picks |= {one.context.replica + i: block for i, block in enumerate(blocks)}
        drawn[form] = torch.stack([picks[m] for m in range(3)])
    assert torch.equal(drawn["replicated"], drawn["looped"])
    assert torch.equal(drawn["replicated"], drawn["cheap"])
    assert not torch.equal(drawn["cheap"][0], drawn["cheap"][1])


def test_blocks() -> None:
    batch = {"input_ids": torch.arange(6).view(3, 2), "task": torch.tensor([5, 6, 7])}
    valid, domains = torch.tensor([True, True, False, True, True, False]), torch.tensor([0, 1, 2])
    context = RoutingContext(3, 2, valid=valid, domain_ids=domains, seed=9, layer=1)
    assert repeat(batch, 1) is batch
    assert repeat(batch, 2)["task"].tolist() == [5, 6, 7, 5, 6, 7]
    assert repeat(batch, 2)["input_ids"].tolist() == batch["input_ids"].tolist() * 2
    wide = replicate(context, 1, 2)
    assert (wide.batch_size, wide.replica, wide.num_replicas, wide.seed) == (6, 1, 2, 9)
    assert wide.valid.tolist() == valid.tolist() * 2
    assert wide.domain_ids.tolist() == [0, 1, 2, 0, 1, 2]
    for form in FORMS:
        passes = cut(form, batch, context, 3)
        assert sum(one.context.batch_size for one in flat([passes])) == 9
        assert passes[-1].learns
        assert sum(one.task_weight * one.context.num_replicas for one in passes) == 3


def test_casts_of_the_pass_without_gradients_are_not_reused() -> None:
    model = model_of("cheap").float()
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    assert model.backbone.layers[0].self_attn.q_proj.weight.grad.any()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -- refusals -------------------------------------------------------------------------------------


def test_forms_are_checked() -> None:
    with pytest.raises(ValueError, match="sample_form='serial'.*'replicated', 'looped', 'cheap'"):
        model_of("serial")
    decoder = tiny_decoder(router=SubsetSampling)
    decoder.layers[1].moe.router = TokenChoice(8, 4)
    objective(decoder, {})
    with pytest.raises(ValueError, match=r"sample_form='cheap': the router of layers\.01\.moe"):
        objective(decoder, {}, sample_form="cheap")


# -- several processes ----------------------------------------------------------------------------


def train(form: str, path: Path) -> dict[str, Tensor]:
    """Two steps of two micro-batches by a Trainer, and the weights afterwards."""
    model = model_of(form, losses=LOSSES, micro_batches=2, log_every=1)
    batches = [
        {k: v.tensor_split(world_size())[rank()] for k, v in tiny_batch(8, seed=seed).items()}
        for seed in (1, 2)
    ]
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp", devices=world_size(),
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _train_on_each_rank(path: Path) -> dict[str, dict[str, Tensor]]:
    # as torchrun would say it, so that Lightning starts no processes of its own
    place = {"RANK": rank(), "LOCAL_RANK": rank(), "GROUP_RANK": 0, "WORLD_SIZE": world_size()}
    place |= {"LOCAL_WORLD_SIZE": world_size(), "TORCHELASTIC_RUN_ID": "test"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in place.items()})
    return {form: train(form, path) for form in FORMS}


def test_ranks_exchange_all_gradients_of_all_forms(tmp_path: Path) -> None:
    first, second = run_distributed(_train_on_each_rank, tmp_path, world_size=2, tmp_path=tmp_path)
    start = model_of("replicated").state_dict()
    for form in FORMS:
        torch.testing.assert_close(first[form], second[form], rtol=0, atol=0)
        for name, value in first[form].items():
            if name.endswith("weight"):
                assert not torch.equal(value, start[name]), name
    torch.testing.assert_close(first["looped"], first["replicated"], rtol=1e-8, atol=1e-11)
