"""Contestants are compared before they are timed; rows say what came out."""

import math

import pytest
import torch
from rich.console import Console

from routerlab.bench import contestants, layer
from routerlab.bench.contestants import (
    PATHS,
    Contestant,
    Shape,
    UnequalError,
    build_ours,
    check_equal,
    difference,
    reference_layer,
)
from routerlab.bench.layer import Row, Settings, Tokens, against_transformers, bench_shape
from routerlab.bench.report import table
from routerlab.bench.step import StepSize, bench_step
from routerlab.dispatch.loop import Loop

CPU = torch.device("cpu")
SHAPE = Shape(24, 8, 16, 4, 2)
SETTINGS = Settings(seconds=1e-3, device=CPU)


@pytest.fixture
def moe():
    torch.manual_seed(0)
    return reference_layer(SHAPE, CPU)


@pytest.fixture
def tokens():
    return Tokens(SHAPE, CPU, seed=0)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_the_loop(path, dtype, moe, tokens):
    found = check_equal(PATHS[path](moe), moe, tokens.x, tokens.dy, dtype)
    assert found <= contestants.TOLERANCE[dtype]


def test_all_experts_picked(tokens):
    everything = reference_layer(Shape(24, 8, 16, 2, 2), CPU)
    assert check_equal(PATHS["autograd"](everything), everything, tokens.x, tokens.dy, "float32")


def _wrong_output(moe):
    right = build_ours(moe, Loop)
    return Contestant(lambda x: right.forward(x) * 1.001, right.weights)


def _wrong_gradient(moe):
    right = build_ours(moe, Loop)
    return Contestant(lambda x: right.forward(x.detach()) + 0 * x, right.weights)


def _missing_gradient(moe):
    right = build_ours(moe, Loop)
    return Contestant(lambda x: right.forward(x.detach()), right.weights)


def _not_a_number(moe):
    right = build_ours(moe, Loop)
    return Contestant(lambda x: right.forward(x) * math.nan, right.weights)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_wrong_output, "differs from the float64 loop by 0.001 "),
        (_wrong_gradient, r"^x\.grad differs .* by 1 "),
        (_missing_gradient, "a gradient is missing"),
        (_not_a_number, "differs from the float64 loop by nan "),
    ],
)
def test_a_broken_contestant_is_refused_and_not_timed(broken, message, moe, tokens, monkeypatch):
    with pytest.raises(UnequalError, match=message):
        check_equal(broken(moe), moe, tokens.x, tokens.dy, "float32")
    monkeypatch.setitem(PATHS, "broken", broken)
    _, ours, refused = bench_shape(SHAPE, "float32", ["autograd", "broken"], SETTINGS)
    assert ours.status == "ok"
    assert refused.status.startswith("refused: ")
    assert refused.ratio is None


def test_difference_is_relative_to_the_largest_entry_and_names_the_place():
    reference = [torch.tensor([1.0, 10.0]).double(), torch.tensor([1.0, -2.0]).double()]
    found = [torch.tensor([1.0, 10.1]), torch.tensor([1.5, -2.0])]
    value, place = difference(found, reference)
    assert value == pytest.approx(0.25)
    assert place == "x.grad"


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_rows_of_a_shape(dtype):
    rows = bench_shape(SHAPE, dtype, list(PATHS), SETTINGS)
    assert [row.path for row in rows] == ["dense", *PATHS]
    for row in rows:
        assert row.status == "ok"
        assert row.shape == "24,8,16,4,2"
        assert row.dtype == dtype
        assert row.ratio > 0
        assert row.peak_mib > row.saved_mib > 0
    assert min(row.to_transformers for row in rows if row.path.startswith("hf_")) == 1
    console = Console(width=80, record=True)
    console.print(table(rows))
    shown = console.export_text()
    assert all(f"{row.ratio:.2f}" in shown or f"{row.ratio:.1f}" in shown for row in rows)
    assert "…" not in shown  # nothing is cut in a terminal of 80 columns


def test_what_a_path_cannot_do_is_said():
    odd = Shape(24, 6, 10, 4, 2)  # rows of 24 bytes
    _, ours, theirs = bench_shape(odd, "float32", ["autograd", "hf_grouped_mm"], SETTINGS)
    assert ours.status == "ok"
    assert theirs.status.startswith("not supported: ")
    assert len(theirs.status) > len("not supported: ")
    assert ours.to_transformers is None  # nothing to compare with
    assert table([ours, theirs]).caption.startswith("24,6,10,4,2 float32 hf_grouped_mm: not")


def test_ratio_to_transformers_is_to_their_fastest():
    rows = [
        Row("s", "float32", "autograd", ratio=1.5),
        Row("s", "float32", "hf_a", ratio=3.0),
        Row("s", "float32", "hf_b", ratio=2.0),
        Row("s", "float32", "hf_c", status="refused: unequal"),
    ]
    assert [row.to_transformers for row in against_transformers(rows)] == [0.75, 1.5, 1.0, None]


def test_every_draw_is_a_new_routing(moe, tokens):
    routes = set()
    for _ in range(5):
        tokens.draw()
        routes.add(tuple(moe(tokens.x)[1].expert_indices.tolist()))
    assert len(routes) == 5


def test_dense_has_the_active_parameters_of_the_layer(moe):
    dense = contestants.build_dense(SHAPE, CPU)
    active = SHAPE.top_k * sum(p[0].numel() for p in moe.experts.parameters())
    assert sum(weight.numel() for weight in dense.weights) == active


def test_the_shapes_that_have_names_are_shapes():
    for text in (*layer.QUICK, *layer.FULL):
        assert str(Shape.parse(text)) == text


def test_the_training_step_is_measured_and_nothing_is_left_out():
    size = StepSize(32, 16, 2, 2, 4, 2, 16, batch_size=2, sequence_length=8)
    found = bench_step(SETTINGS, size)
    assert found.milliseconds > 0
    losses, both = found.losses.median, found.losses_and_diagnostics.median
    assert found.losses_percent == pytest.approx(100 * (losses - 1))
    assert found.diagnostics_percent == pytest.approx(100 * (both - losses))
    expected = found.losses_percent + found.diagnostics_percent / 10
    assert found.promised_percent == pytest.approx(expected)
