"""Experts that live on different processes: tokens travel to them and back."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from routerlab.core.config import ConfigError
from routerlab.core.protocols import Dispatch, Experts
from routerlab.core.routing import RouterOutput
from routerlab.dispatch.fused import Fused
from routerlab.ops.all_to_all import (
    all_to_all,
    average_gradients,
    gather_counts,
    recompute_from_here,
)
from routerlab.ops.least_loaded import Transfer
from routerlab.ops.permute import combine, gather, sort_by_expert


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Which process of a group of P computes which assignments of a batch.

    A copy is an expert on a process. Process p has ``held[p]`` of the C copies, numbered after
    those of earlier processes: first the experts that it owns, then those whose weights
    ``transfers`` bring, by rising number of the expert.
    """

    copies: Int[Tensor, "N"]  # where this process's assignments go
    counts: Int[Tensor, "P C"]  # assignments of each process to each copy, on the CPU
    held: list[int]
    transfers: tuple[Transfer, ...] = ()

    def splits(self, rank: int) -> tuple[list[int], list[int]]:
        """Rows that process ``rank`` sends to each process, and those that it receives."""
        by_process = torch.stack([part.sum(1) for part in self.counts.split(self.held, 1)], 1)
        return by_process[rank].tolist(), by_process[:, rank].tolist()

    def arriving(self, rank: int) -> Int[Tensor, "R"]:
        """Which of its copies each row is for that process ``rank`` receives."""
        counts, device = self.counts.split(self.held, 1)[rank], self.copies.device
        copies = torch.arange(self.held[rank], device=device).repeat(len(counts))
        total = int(counts.sum())  # given, so that no device is waited for
        repeats = counts.flatten().to(device, non_blocking=True)
        return copies.repeat_interleave(repeats, output_size=total)


class ExpertParallel:
    """Each process owns E/P experts and sends every token to the owners of its experts.

    The processes of an expert-parallel group see different tokens: for the rest of the model they
    are data-parallel. Output and gradients are those of one process that sees all the tokens; the
    gradients of experts are averaged over all processes, as DDP and FSDP average the others.
    Nothing is dropped or padded, and a process or an expert may have no tokens (GShard, arXiv
    2006.16668, section 3.2, without its capacity).

    Call `shard` on the experts of a layer before training, and let all processes call the layer
    together. Experts that are not sharded are computed where they are: on a process alone, or
    without gradients, by which those of several processes would part.

    Args:
        size: P, processes of a group, neighbours by rank. It must divide the number of processes;
            each expert then has ``processes / P`` replicas. null: all processes.
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ConfigError(
                f"dispatch.size={size}: must be at least 1, or null for all processes"
            )
        self.size = size
        self._local: Dispatch = Fused()
        self._meshes: tuple[DeviceMesh, DeviceMesh] | None = None

    def shard(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        """Replaces each stacked parameter [E, ...] of ``experts`` by a `DTensor` parameter, sharded
        by expert within a group; the values are those of the first process.

        Args:
            experts: of one layer; the same module on all processes.
            mesh: of one dimension: all data-parallel processes.

        Raises:
            ConfigError: ``size`` does not divide the processes, P does not divide E, or a parameter
                is not stacked by expert or is sharded already.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        mesh = self._expert_mesh(mesh)
        num_experts, size = cast(Experts, experts).num_experts, mesh.size(mesh.ndim - 1)
        if num_experts % size:
            raise ConfigError(
                f"num_experts={num_experts}: the {size} processes of an expert-parallel group must "
                "own equally many; choose a dispatch.size that divides num_experts"
            )
        parameters = dict(experts.named_parameters())
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                raise ConfigError(f"experts.{name}: is sharded already")
            if parameter.ndim == 0 or len(parameter) != num_experts:
                raise ConfigError(
                    f"experts.{name}: shape {list(parameter.shape)}; expert parallelism needs the "
                    f"{num_experts} experts stacked along the first dimension"
                )
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            sharded = distribute_tensor(parameter.detach(), mesh, placements)
            sharded = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            setattr(experts.get_submodule(owner), leaf, sharded)

    def _expert_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """``mesh``, or its processes as [replicas, P], which is made once: it starts new groups."""
        if mesh.ndim != 1:
            raise ConfigError(f"{mesh}: must have one dimension, the data-parallel processes")
        size = mesh.size() if self.size is None else self.size
        if mesh.size() % size:
            raise ConfigError(f"dispatch.size={size}: must divide the {mesh.size()} processes")
        if size == mesh.size():
            return mesh
        if self._meshes is None or self._meshes[0] != mesh:
            names = ("replica", "expert")
            split = DeviceMesh(mesh.device_type, mesh.mesh.view(-1, size), mesh_dim_names=names)
            self._meshes = (mesh, split)
        return self._meshes[1]

    def __call__(
        self, x: Float[Tensor, "T D"], output: RouterOutput, experts: Any
    ) -> Float[Tensor, "T D"]:
        mesh, weights = _own_weights(experts)
        if mesh is None:
            if torch.is_grad_enabled() and _several_processes():
                raise ConfigError(
                    "dispatch: the experts are not sharded over the processes; use trainer=fsdp, "
                    "or call dispatch.shard(experts, mesh)"
                )
            return self._local(x, output, experts)
        _check_dtypes(x, weights)
        group = mesh.get_group(mesh.ndim - 1)
        rank = dist.get_rank(group)
        placement = self.place(output, gather_counts(output.tokens_per_expert, group), rank)
        if placement.transfers:
            weights = _add_transferred(weights, placement.transfers, group)
        send, receive = placement.splits(rank)
        leaving = _record(
            output.token_indices, placement.copies, output.combine_weights,
            len(x), sum(placement.held), output.top_k,
        )  # fmt: skip
        by = sort_by_expert(leaving)
        rows = all_to_all(gather(x, by), send, receive, group)
        combine_weights = all_to_all(by.sort(output.combine_weights), send, receive, group)
        copies = placement.arriving(rank)
        arrived = _record(
            torch.arange(len(rows), device=x.device), copies, combine_weights,
            len(rows), placement.held[rank], 1,
        )  # fmt: skip
        here = _Local(self._local, experts)
        named = {f"experts.{name}": weight for name, weight in weights.items()}
        y = recompute_from_here(torch.func.functional_call(here, named, (rows, arrived)))
        return combine(all_to_all(y, receive, send, group), by)

    def place(self, output: RouterOutput, counts: Int[Tensor, "P E"], rank: int) -> Placement:
        """Every assignment to the owner of its expert.

        Args:
            output: of this process's tokens.
            counts: assignments of each process of the group to each expert, on the CPU.
            rank: of this process in the group.
        """
        num_processes, num_experts = counts.shape
        held = [num_experts // num_processes] * num_processes
        return Placement(output.expert_indices, counts, held)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Local(nn.Module):
    """A dispatch within one process and its experts, as the one module of a `functional_call`."""

    def __init__(self, dispatch: Dispatch, experts: Any) -> None:
        super().__init__()
        self.dispatch, self.experts = dispatch, experts

    def forward(self, x: Tensor, output: RouterOutput) -> Tensor:
        return self.dispatch(x, output, self.experts)


def _own_weights(experts: Any) -> tuple[DeviceMesh | None, dict[str, Tensor]]:
    """The mesh over which experts are sharded and the weights that this process owns, by name; None
    and nothing where they are not sharded.
    """
    from torch.distributed.tensor import DTensor  # 0.6 s, which other runs need not wait for

    sharded = {n: p for n, p in experts.named_parameters() if isinstance(p, DTensor)}
    if not sharded:
        return None, {}
    mesh = next(iter(sharded.values())).device_mesh
    replicas = mesh.get_group(0) if mesh.ndim == 2 else None
    own = average_gradients([p.to_local() for p in sharded.values()], replicas, mesh.size())
    return mesh, dict(zip(sharded, own, strict=True))


def _check_dtypes(x: Tensor, weights: dict[str, Tensor]) -> None:
    """Refuses what would fail in the middle of an exchange, and only on processes with rows."""
    found = {weight.dtype for weight in weights.values()}
    if not torch.is_autocast_enabled(x.device.type) and found != {x.dtype}:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(
            f"tokens are {x.dtype} and the experts' weights {names}: must be the same, or run "
            "under autocast (trainer.precision=bf16-mixed)"
        )


def _add_transferred(
    weights: dict[str, Tensor], transfers: tuple[Transfer, ...], group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """This process's weights and, behind them, those that others lend it for this batch; their
    gradients go back to the owners, which add them up.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    leaving = sorted((t.target, t.expert) for t in transfers if t.source == rank)
    send, receive = [0] * size, [0] * size
    for target, _ in leaving:
        send[target] += 1
    for transfer in transfers:
        receive[transfer.source] += transfer.target == rank
    both = {}
    for name, weight in weights.items():
        rows = [expert - rank * len(weight) for _, expert in leaving]
        chosen = torch.tensor(rows, dtype=torch.long).to(weight.device, non_blocking=True)
        lent = all_to_all(weight.index_select(0, chosen), send, receive, group)
        both[name] = torch.cat([weight, lent])
    return both


def _record(
    token_indices: Tensor, expert_indices: Tensor, combine_weights: Tensor,
    num_tokens: int, num_experts: int, top_k: int | None,
) -> RouterOutput:  # fmt: skip
    """A record without scores, which no dispatch reads."""
    scores = combine_weights.new_empty(()).expand(num_tokens, num_experts)
    dropped = expert_indices.new_zeros(num_experts)
    return RouterOutput(
        scores, scores, token_indices, expert_indices, combine_weights, dropped, top_k
    )
