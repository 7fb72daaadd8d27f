"""`routerlab bench tuning`: ways that learn what they say, rows, the file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from routerlab.bench.command import main
from routerlab.bench.layer import Settings
from routerlab.bench.moe_sizes import MoeSizes, names
from routerlab.bench.timing import Ratio
from routerlab.bench.tuning import (
    FORWARD,
    FULL,
    GOAL,
    NUM_SAMPLES,
    SampleBatches,
    TuningRow,
    Way,
    all_ways,
    bench_tuning,
    routers_of,
    tuning_table,
)
from routerlab.objectives.routing_alignment import RoutingAlignment

CPU = torch.device("cpu")
SMALL = MoeSizes(3, 16, 8, 4, 2, 2, 32, batch_size=4, sequence_length=8)
GATE = SMALL.num_experts * SMALL.d_model
ALIGNED = "last 2, aligned"
LAYERS = {FULL: 3, "all routers": 3, "last 2": 2, ALIGNED: 2, "last 1": 1, FORWARD: 0}


@pytest.fixture(scope="module")
def ways() -> dict[str, Way]:
    torch.manual_seed(0)
    return all_ways(SMALL, 2, SampleBatches(SMALL, CPU, 0))


def changes(way: Way) -> set[str]:
    """Parameters that are others after the way's work."""
    model = way.contestant.backbone
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    way.work()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def graphs(way: Way) -> list[bool]:
    """Whether the output of each layer belongs to a graph during the way's work."""
    seen: list[bool] = []
    hooks = [
        layer.register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
        for layer in way.contestant.backbone.model.model.layers
    ]
    way.work()
    for hook in hooks:
        hook.remove()
    return seen


def test_each_way_moves_what_it_trains(ways: dict[str, Way]) -> None:
    gates = [f"model.model.layers.{layer}.mlp.gate.weight" for layer in range(3)]
    everything = {name for name, _ in ways[FULL].contestant.backbone.named_parameters()}
    moved = {name: changes(way) for name, way in ways.items()}
    assert len(moved.pop(FULL)) > 0.9 * len(everything)  # rows of unused experts may stay
    assert moved == {
        "all routers": set(gates),
        "last 2": set(gates[1:]),
        ALIGNED: set(gates[1:]),
        "last 1": {gates[2]},
        FORWARD: set(),
    }


def test_layers_below_the_first_that_learns_run_without_autograd(ways: dict[str, Way]) -> None:
    for name, way in ways.items():
        assert graphs(way) == [False] * (3 - LAYERS[name]) + [True] * LAYERS[name], name
        assert way.layers() == LAYERS[name]


def test_alignment_is_of_the_same_model_and_has_a_gradient(ways: dict[str, Way]) -> None:
    plain, aligned = ways["last 2"].contestant, ways[ALIGNED].contestant
    assert plain.backbone is aligned.backbone is ways[FORWARD].contestant.backbone
    objective, batch = aligned.objective, aligned.batches.batch
    assert isinstance(objective, RoutingAlignment)
    assert objective.alignment is not None
    assert objective.bank is not None
    assert len(objective.bank.correct) == NUM_SAMPLES
    context = objective.context(batch, 0, 0)
    loss = objective.alignment.of_records(objective.run(batch, context).router_outputs, context)
    gates = [p for p in aligned.parameters if p.requires_grad]
    assert loss > 0
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, gates))


def test_nothing_of_the_last_step_is_there_when_memory_is_measured(ways: dict[str, Way]) -> None:
    contestant = ways["all routers"].contestant
    contestant.step()
    assert len(contestant.backbone.records) == 3
    contestant.forget()
    assert contestant.backbone.records == {}
    assert all(p.grad is None for p in contestant.parameters)


def test_rows_of_every_batch_are_samples_of_the_bank() -> None:
    batches = SampleBatches(SMALL, CPU, 0)
    first = batches.batch["sample"]
    batches.draw()
    second = batches.batch["sample"]
    assert not torch.equal(first, second)
    for drawn in (first, second):
        assert drawn.shape == (4,)
        assert ((drawn >= 0) & (drawn < NUM_SAMPLES)).all()


def test_rows_of_a_run() -> None:
    said: list[str] = []
    rows = bench_tuning(SMALL, 2, Settings(1e-3, CPU), said.append)
    assert [(row.part, row.name) for row in rows] == [
        *(("step", name) for name in LAYERS),
        ("alignment", ALIGNED),
    ]
    assert [row.layers for row in rows] == [*LAYERS.values(), 2]
    assert [row.trainable for row in rows[1:]] == [3 * GATE, 2 * GATE, 2 * GATE, GATE, 0, 2 * GATE]
    assert (rows[0].ratio, rows[0].lower) == (1.0, None)
    for row in rows[1:]:
        assert row.lower is not None
        assert row.upper is not None
        assert row.lower <= row.ratio <= row.upper
    saved = [row.saved_mib for row in rows[:6]]
    assert saved[0] > saved[1] > saved[2] > saved[4] > saved[5] == 0
    assert all(row.peak_mib > row.saved_mib for row in rows)
    assert [row.goal for row in rows] == [None] * 6 + [GOAL]
    assert rows[-1].met is (rows[-1].ratio <= GOAL)
    assert said == [f"timing {', '.join(list(LAYERS)[1:])}", f"timing {ALIGNED}"]


@pytest.mark.parametrize(
    ("last_layers", "found"),
    [
        (1, ["all routers", "last 1", "last 1, aligned"]),
        (3, ["all routers", "all routers, aligned", "last 1"]),
    ],
)
def test_no_way_is_there_twice(last_layers: int, found: list[str]) -> None:
    ways = all_ways(SMALL, last_layers, SampleBatches(SMALL, CPU, 0))
    assert list(ways) == [FULL, *found, FORWARD]
    assert f"{routers_of(last_layers, SMALL)}, aligned" in ways


def test_the_table_fits_a_terminal() -> None:
    row = TuningRow("step", "all routers, aligned", 15_000_000, 8, 1234.5, 1123.4, goal=GOAL)
    timed = row.timed(Ratio(10.25, 10.15, 10.35, milliseconds=1234.0, samples=9, busy=1))
    console = Console(width=80, record=True)
    console.print(tuning_table(SMALL, [timed, replace(timed, part="alignment")]))
    shown = console.export_text()
    assert "…" not in shown
    for text in ("all routers, aligned", "10.2-10.3", "1123", "1.1", "no", "2 of 20 samples"):
        assert text in shown


def test_the_command_writes_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    sizes = [f"--{n.replace('_', '-')}={getattr(SMALL, n)}" for n in names()]
    options = ["--last-layers", "2", "--seconds", "0.001", "--json", str(file)]
    assert main(["tuning", *sizes, *options]) == 0
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == [*LAYERS, ALIGNED]
    assert found["sizes"]["num_experts"] == 4
    assert found["environment"]["seconds"] == 0.001
    assert ALIGNED in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--last-layers", "9"], "last_layers=9: must be"),
        (["--last-layers", "0"], "last_layers=0: must be"),
        (["--top-k", "17"], "top_k=17: must be at most num_experts=16"),
        (["--num-heads", "3"], "num_heads=3: must cut d_model=256 into even widths"),
        (["--num-layers", "0"], "num_layers=0: must be at least 1"),
        (["--sequence-length", "3"], "sequence_length=3: must be at least 4"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tuning", *arguments]) == 2
    assert message in capsys.readouterr().err
