"""Two processes of lightning compute the run of one, with whole models (DDP) and split (FSDP2).

The same 8 ragged sequences a step, in float64, where rounding hides nothing: gradients, losses,
counts, what routers keep, weights and checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from routerlab.backbones.frozen import train_part
from routerlab.balancers.bip import BIP
from routerlab.balancers.expert_bias import ExpertBias
from routerlab.core.routing import RouterOutput
from routerlab.dispatch.expert_parallel import ExpertParallel
from routerlab.losses.expert_orthogonality import ExpertOrthogonalityLoss
from routerlab.losses.expert_router_coupling import ExpertRouterCouplingLoss
from routerlab.losses.load_balancing import LoadBalancingLoss
from routerlab.losses.router_z import RouterZLoss
from routerlab.objectives.optimizer import OptimizerRecipe
from routerlab.objectives.step import rank, world_size
from routerlab.ops.sharded import whole
from routerlab.routers.token_choice import TokenChoice
from routerlab.training.callbacks.checkpoint import AtomicCheckpointIO
from routerlab.training.parallel import FullySharded
from tests.helpers.distributed import as_torchrun, run_distributed
from tests.helpers.models import objective, tiny_batch, tiny_decoder

STEPS, SAVED = 3, 2
BALANCERS = {
    "expert_bias": partial(ExpertBias, rate=0.125),
    "bip": partial(BIP, mode="causal"),
}


@dataclass(frozen=True)
class Case:
    """How a run is cut and what is in it."""

    strategy: str = "auto"
    micro_batches: int = 1
    recompute: bool = False
    balancer: str = "expert_bias"
    expert_parallel: bool = False
    trainable: str = "all"
    precision: str = "64"

    def trained(self, folder: Path, resumed: Path | None = None) -> dict[str, Any]:
        """The run: what each step left behind, the last state, and dtypes met on the way."""
        mixed = self.precision == "bf16-mixed"
        decoder = tiny_decoder(
            router=partial(TokenChoice, init_std=1.0, balancer=BALANCERS[self.balancer]),
            num_experts=[0, 4, 4],
            num_layers=3,
            num_shared_experts=1,
            tie_embeddings=True,
            activation_checkpointing=self.recompute,
            dispatch=ExpertParallel() if self.expert_parallel else "autograd",
        )
        train_part(decoder, self.trainable)
        losses = {
            "balance": LoadBalancingLoss(0.5),
            "router_z": RouterZLoss(0.1),
            "coupling": ExpertRouterCouplingLoss(0.5, alpha=0.5),
            "rows": ExpertOrthogonalityLoss(0.5),
            "outputs": ExpertOrthogonalityLoss(0.5, of="outputs"),
        }
        model = objective(
            decoder.float() if mixed else decoder,
            losses,
            optimizer=OptimizerRecipe(partial(torch.optim.AdamW, lr=0.01), warmup_steps=1),
            micro_batches=self.micro_batches,
            gradient_clip_norm=0.5,
            log_every=1,
        )
        seen = Seen(folder)
        trainer = pl.Trainer(
            accelerator="cpu", devices=world_size(), precision="bf16-mixed" if mixed else None,
            strategy=FullySharded() if self.strategy == "fsdp" else self.strategy,
            callbacks=[seen], plugins=[AtomicCheckpointIO()], max_steps=STEPS, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, Steps(), ckpt_path=resumed, weights_only=True)
        state = {name: whole(value) for name, value in model.state_dict().items()}
        return {
            "steps": seen.steps,
            "state": {name: value.detach().clone() for name, value in state.items()},
            "dtypes": seen.dtypes,
            "split": sum(isinstance(p, DTensor) for p in model.parameters()),
        }


class Steps(pl.LightningDataModule):
    """This process's share of the 8 sequences of each step."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(_From(self.trainer.global_step), batch_size=None)


class _From(IterableDataset):
    def __init__(self, step: int) -> None:
        self.step = step

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.step, STEPS):
            batch = tiny_batch(8, seed=step)
            yield {k: v.tensor_split(world_size())[rank()] for k, v in batch.items()}


class Seen(pl.Callback):
    """Whole gradients as the optimizer meets them, scalars, distributions, dtypes; saves once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.dtypes: set[tuple[str, torch.dtype]] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        moe: Any = pl_module.backbone.layers[1].moe  # type: ignore[union-attr]

        def look(router: Any, args: Any, output: RouterOutput) -> None:  # with weights gathered
            self.dtypes |= {
                ("logits", output.router_logits.dtype),
                ("gate", router.gate.weight.dtype),
                ("experts", moe.experts.down_proj.dtype),
            }

        moe.router.register_forward_hook(look, prepend=True)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        named = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append({"gradients": {n: whole(g).clone() for n, g in named.items()}})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *rest: Any, **_: Any
    ) -> None:
        self.steps[-1] |= {key: outputs[key] for key in ("scalars", "distributions")}
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.folder / "saved.ckpt")


LIKE_ONE = {
    "ddp": Case("ddp", 2),
    "fsdp": Case("fsdp"),
    "fsdp in micro-batches": Case("fsdp", 2),
    "fsdp, recomputed": Case("fsdp", 2, recompute=True),
    "expert parallel": Case("fsdp", 2, recompute=True, expert_parallel=True),
}
OTHERS = {
    "ddp with prices": Case("ddp", balancer="bip"),
    "fsdp with prices": Case("fsdp", recompute=True, balancer="bip"),
    "fsdp of routers": Case("fsdp", trainable="routers"),
    "ddp in bfloat16": Case("ddp", precision="bf16-mixed"),
    "fsdp in bfloat16": Case("fsdp", precision="bf16-mixed"),
}
Found = dict[str, dict[str, Any]]


def on_each_rank(cases: dict[str, Case], folder: Path, resumed: Path | None) -> Found:
    as_torchrun()
    torch.manual_seed(rank())  # nothing may hang on the generator
    return {name: case.trained(folder / name, resumed) for name, case in cases.items()}


def on_two(cases: dict[str, Case], folder: Path, resumed: Path | None = None) -> Found:
    """What two processes find, which must be the same in both."""
    first, second = run_distributed(
        on_each_rank, cases, folder, resumed, world_size=2, tmp_path=folder, timeout=240
    )
    for name, found in first.items():
        check_same(found, second[name], rtol=0.0, atol=0.0)
    return first


def check_same(
    got: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    close = partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    close(got["state"], expected["state"])
    for mine, theirs in zip(got["steps"], expected["steps"], strict=True):
        close(mine["gradients"], theirs["gradients"])
        assert mine["scalars"] == pytest.approx(theirs["scalars"], rel=rtol, abs=atol)
        for name, values in theirs["distributions"].items():
            close(torch.tensor(mine["distributions"][name]), torch.tensor(values), msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return Case().trained(folder), folder / "saved.ckpt"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    folder = tmp_path_factory.mktemp("two")
    return on_two(LIKE_ONE | OTHERS, folder), folder


@pytest.mark.parametrize("name", LIKE_ONE)
def test_two_processes_are_one(
    one: tuple[dict[str, Any], Path], two: tuple[Found, Path], name: str
) -> None:
    expected, got = one[0], two[0][name]
    assert any(key.endswith("balancer.bias") and v.any() for key, v in expected["state"].items())
    norms = [step["scalars"]["train/grad_norm"] for step in expected["steps"]]
    assert len(norms) == STEPS
    assert min(norms) > 0.5  # so they were clipped
    check_same(got, expected)
    assert bool(got["split"]) == (name != "ddp")


def test_prices_of_two_processes(two: tuple[Found, Path], tmp_path: Path) -> None:
    # solved for each micro-batch, so these must be the same: two processes, or two of them in one
    expected = Case(micro_batches=2, balancer="bip").trained(tmp_path)
    assert any(key.endswith("prices") and v.any() for key, v in expected["state"].items())
    for name in ("ddp with prices", "fsdp with prices"):
        check_same(two[0][name], expected)


def test_a_frozen_model_is_split_too(two: tuple[Found, Path], tmp_path: Path) -> None:
    case, got = Case(trainable="routers"), two[0]["fsdp of routers"]
    expected = case.trained(tmp_path)
    assert got["split"] > len(expected["steps"][0]["gradients"]) == 2
    check_same(got, expected)
    saved = two[1] / "fsdp of routers" / "saved.ckpt"
    assert set(torch.load(saved, weights_only=True)["state_dict"]) == set(expected["state"])
    check_same(case.trained(tmp_path, saved), {**expected, "steps": expected["steps"][SAVED:]})


def test_bfloat16_leaves_routers_alone(two: tuple[Found, Path]) -> None:
    ddp, fsdp = two[0]["ddp in bfloat16"], two[0]["fsdp in bfloat16"]
    check_same(fsdp, ddp, rtol=1e-5, atol=1e-6)
    routers = {("logits", torch.float32), ("gate", torch.float32)}
    assert ddp["dtypes"] == routers | {("experts", torch.float32)}  # autocast does the rest
    assert fsdp["dtypes"] == routers | {("experts", torch.bfloat16)}
    assert {value.dtype for value in fsdp["state"].values()} == {torch.float32}


def test_checkpoints_move_between_one_process_and_two(
    one: tuple[dict[str, Any], Path], two: tuple[Found, Path], tmp_path: Path
) -> None:
    (expected, saved), (_, folder) = one, two
    there = torch.load(saved, weights_only=True)
    for name in LIKE_ONE:
        here = torch.load(folder / name / "saved.ckpt", weights_only=True)
        assert list(here["state_dict"]) == list(there["state_dict"])
        torch.testing.assert_close(here["state_dict"], there["state_dict"], rtol=1e-9, atol=1e-11)
        (mine,), (theirs,) = here["optimizer_states"], there["optimizer_states"]
        assert mine["param_groups"] == theirs["param_groups"]
        torch.testing.assert_close(mine["state"], theirs["state"], rtol=1e-9, atol=1e-11)
    last = {**expected, "steps": expected["steps"][SAVED:]}
    for name in ("fsdp", "expert parallel"):
        check_same(Case().trained(tmp_path, folder / name / "saved.ckpt"), last)
    cases = {name: LIKE_ONE[name] for name in ("ddp", "fsdp", "expert parallel")}
    for got in on_two(cases, tmp_path, saved).values():
        check_same(got, last)
