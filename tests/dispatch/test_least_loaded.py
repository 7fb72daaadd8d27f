"""Lent experts: the same layer, and the loads that were planned."""

import pytest
import torch
from torch import Tensor

from routerlab.dispatch.expert_parallel import ExpertParallel, Placement
from routerlab.dispatch.least_loaded import LeastLoaded
from routerlab.ops.least_loaded import plan_llep, send_matrix
from tests.dispatch.parallel_cases import Case, check, crowded, on_one_process, run_cases, top_k
from tests.helpers.distributed import run_distributed
from tests.helpers.records import record

TOKENS = (50, 0, 30, 20)
CASES = {
    "crowded": Case(TOKENS, crowded(100, 0.95, 8), num_experts=8),
    "one expert takes all": Case(TOKENS, torch.full((100, 1), 6), num_experts=8),
    "one process owns all": Case(TOKENS, torch.tensor([[2, 3]]).expand(100, 2), num_experts=8),
    "even": Case((25, 25, 25, 25), top_k(100, 2, 8), num_experts=8),
    "few tokens": Case((1, 0, 0, 1), torch.tensor([[5], [5]]), num_experts=8),
    "float32": Case(TOKENS, crowded(100, 0.95, 8), num_experts=8, dtype=torch.float32),
}
KINDS: dict[str, ExpertParallel] = {
    "plain": ExpertParallel(),
    "lending": LeastLoaded(min_tokens=1, threshold=None),
    "lending, large pieces": LeastLoaded(min_tokens=40, alpha=1.2),
    "two replicas": ExpertParallel(size=2),
    "two replicas, lending": LeastLoaded(size=2, min_tokens=1, threshold=None),
    "four replicas": ExpertParallel(size=1),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list:
    return run_distributed(
        run_cases, CASES, KINDS, world_size=4, tmp_path=tmp_path_factory.mktemp("four")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(answers: list, name: str, kind: str) -> None:
    ours = [answer[kind, name][0] for answer in answers]
    tolerance = 1e-5 if name == "float32" else 1e-10
    check(CASES[name], ours, tolerance, on_one_process(CASES[name]))


def rows(answers: list, kind: str, name: str) -> list[int]:
    return [answer[kind, name][1] for answer in answers]


def loads(name: str) -> list[int]:
    picks = CASES[name].picks
    assert picks is not None
    return picks.flatten().bincount(minlength=8).tolist()


def test_every_process_computes_what_was_planned(answers: list) -> None:
    # 95 of 100 tokens go to expert 1, of process 0, the others to all in turn
    assert rows(answers, "plain", "crowded") == [
        sum(loads("crowded")[p : p + 2]) for p in (0, 2, 4, 6)
    ]
    assert max(rows(answers, "plain", "crowded")) >= 95
    assert rows(answers, "lending", "crowded") == [25, 25, 25, 25]
    assert rows(answers, "lending", "one expert takes all") == [25, 25, 25, 25]
    # processes 0 and 1 share what their 50 tokens ask for, and so do 2 and 3
    assert rows(answers, "two replicas, lending", "one expert takes all") == [25, 25, 25, 25]
    assert rows(answers, "two replicas", "one expert takes all") == [0, 50, 0, 50]
    for name in CASES:
        wanted = plan_llep(loads(name), 4, alpha=1.2, min_tokens=40)
        assert rows(answers, "lending, large pieces", name) == list(wanted.device_load)


def place(dispatch: ExpertParallel, picks: list[Tensor], num_experts: int) -> list[Placement]:
    """What each process makes of its picks [T, 1]."""
    uniform = torch.full((len(torch.cat(picks)), num_experts), 1 / num_experts)
    outputs = [record(uniform[: len(of)], of) for of in picks]
    counts = torch.stack([output.tokens_per_expert for output in outputs])
    return [dispatch.place(output, counts, rank) for rank, output in enumerate(outputs)]


def test_a_plan_by_hand() -> None:
    # counts [[3, 1], [5, 1]]: of the 8 tokens of expert 0, the first 5 stay on process 0
    picks = [torch.tensor([0, 1, 0, 0])[:, None], torch.tensor([0, 0, 1, 0, 0, 0])[:, None]]
    first, second = place(LeastLoaded(min_tokens=1), picks, 2)
    # copies: 0 is expert 0 on process 0, 1 is expert 1 on process 1, 2 is expert 0 lent to 1
    assert first.held == second.held == [1, 2]
    assert first.copies.tolist() == [0, 1, 0, 0]
    assert second.copies.tolist() == [0, 0, 1, 2, 2, 2]
    assert first.splits(0) == ([3, 1], [3, 2])
    assert first.splits(1) == ([2, 4], [1, 4])
    assert first.arriving(1).tolist() == [0, 0, 1, 1, 1]
    assert [tuple(t) for t in first.transfers] == [(0, 0, 1)]


def test_a_balanced_load_is_not_planned() -> None:
    picks = [torch.tensor([0, 1, 2, 3])[:, None]] * 2
    lending, plain = (place(d, picks, 4)[1] for d in (LeastLoaded(), ExpertParallel()))
    assert lending.transfers == ()
    assert lending.copies.tolist() == plain.copies.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_splits_are_those_of_the_plan(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    processes, owned = 2 + seed % 4, 1 + seed % 3
    num_experts = processes * owned
    favour = torch.rand(num_experts, generator=generator).pow(8) + 1e-3
    sizes = torch.randint(0, 60, (processes,), generator=generator).tolist()
    picks = [
        favour.multinomial(size, True, generator=generator)[:, None]
        if size else torch.empty(0, 1, dtype=torch.long)
        for size in sizes
    ]  # fmt: skip
    options = {"alpha": 1.0 + seed % 2, "min_tokens": 1 + seed % 5, "threshold": None}
    placements = place(LeastLoaded(**options), picks, num_experts)
    counts = [of.flatten().bincount(minlength=num_experts).tolist() for of in picks]
    loads = torch.tensor(counts).sum(0).tolist()
    plan = plan_llep(loads, processes, **options)
    sends = send_matrix(counts, plan)
    for rank, placement in enumerate(placements):
        send, receive = placement.splits(rank)
        assert send == sends[rank]
        assert receive == [row[rank] for row in sends]
        assert sum(receive) == plan.device_load[rank] == len(placement.arriving(rank))
        assert placement.copies.bincount(minlength=sum(placement.held)).tolist() == (
            placement.counts[rank].tolist()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha=0"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"threshold": -1}, "threshold=-1"),
        ({"trigger": "token"}, "trigger='token'.*device.*expert"),
        ({"size": 0}, "dispatch.size=0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeastLoaded(**options)
