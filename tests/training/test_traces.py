"""What routers decide at every validation, kept without touching the training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import routerlab as rl
from routerlab.analysis.trace import Trace
from tests.training.conftest import REMIX
from tests.training.test_resume import STATEFUL, interrupted, numbers, resume, weights


def step_traces(run: Path) -> dict[int, Trace]:
    files = sorted((run / "traces").glob("step_*.safetensors"))
    return {int(path.stem.removeprefix("step_")): rl.trace.load(path) for path in files}


def same(one: Trace, other: Trace) -> bool:
    """Equal tokens and equal decisions."""
    pairs = zip(one.layers.values(), other.layers.values(), strict=True)
    return one.input_ids.equal(other.input_ids) and all(
        a.token_indices.equal(b.token_indices)
        and a.expert_indices.equal(b.expert_indices)
        and a.combine_weights.equal(b.combine_weights)
        for a, b in pairs
    )


@pytest.fixture(scope="module")
def traced(train: Callable[..., Path]) -> Path:
    return train(*STATEFUL, "name=traced", "trace_validations=true")


@pytest.fixture(scope="module")
def untraced(train: Callable[..., Path]) -> Path:
    return train(*STATEFUL, "name=untraced")


def test_each_validation_keeps_the_same_sequences(traced: Path) -> None:
    found = step_traces(traced)
    assert list(found) == [4, 8, 12]
    assert list(found[4].layers) == ["layers.00.moe", "layers.01.moe"]
    assert found[4].input_ids.shape == (4, 32)
    assert all(trace.input_ids.equal(found[4].input_ids) for trace in found.values())
    assert not same(found[4], found[12])


def test_the_last_one_is_what_the_final_weights_decide(traced: Path) -> None:
    """The final evaluation has more windows, and its own trace of them."""
    final, last = rl.trace.load(traced), step_traces(traced)[12]
    common = [i for i, ids in enumerate(final.input_ids) if (last.input_ids == ids).all(1).any()]
    assert common, "the first window is in both"
    for name, layer in final.layers.items():
        other = last.layers[name]
        for i in common:
            j = int((last.input_ids == final.input_ids[i]).all(1).nonzero()[0])
            here = layer.expert_indices[layer.token_indices // 32 == i]
            assert here.equal(other.expert_indices[other.token_indices // 32 == j])


@pytest.mark.parametrize("more", [(), ("router=random",)])
def test_training_is_the_same_to_the_last_bit(
    train: Callable[..., Path], traced: Path, untraced: Path, more: tuple[str, ...]
) -> None:
    """Dropped tokens, router noise, moving biases, a schedule; and a router that only draws."""
    one, other = traced, untraced
    if more:
        one, other = (train(*more, f"trace_validations={on}") for on in ("true", "false"))
    assert numbers(one) == numbers(other)
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(a, b), name
    assert not step_traces(other)
    assert len(step_traces(one)) >= 2


def test_a_resumed_run_keeps_the_same_traces(
    train: Callable[..., Path], traced: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cut"
    run = interrupted(train, at=9, run_dir=f"run_dir={path}", on="trace_validations=true")
    kept = path / "traces" / "step_000008.safetensors"
    kept.unlink()  # as if killed in its making: the row that follows it is missing, too
    lines = (path / "metrics.csv").read_text().splitlines(keepends=True)
    column = lines[0].rstrip().split(",").index("val/loss")
    whole = [ln for ln in lines if not (ln.startswith("8,") and ln.split(",")[column])]
    (path / "metrics.csv").write_text("".join(whole))
    resume(run)
    found, expected = step_traces(run), step_traces(traced)
    assert list(found) == list(expected)
    assert all(same(found[step], expected[step]) for step in expected)


def test_a_finished_run_that_is_resumed_keeps_its_traces(traced: Path) -> None:
    before = step_traces(traced)
    resume(traced)
    after = step_traces(traced)
    assert list(after) == list(before)
    assert all(same(after[step], before[step]) for step in before)


def test_a_validation_after_the_last_step_is_kept(train: Callable[..., Path]) -> None:
    run = train("name=odd", "trace_validations=true", "trainer.max_steps=3")
    assert list(step_traces(run)) == [2, 3]


def test_fine_tuning_keeps_the_same_items(tune: Callable[..., Path]) -> None:
    run = tune("name=tuned_traces", *REMIX, "trace_validations=true")
    found = step_traces(run)
    assert list(found) == [2, 4]
    assert found[2].input_ids.equal(found[4].input_ids)
    assert found[2].domains == ["vowel", "double"]


def test_nothing_is_kept_without_being_asked_or_without_routers(
    train: Callable[..., Path], tune: Callable[..., Path], finished_run: Path
) -> None:
    assert not step_traces(finished_run)
    none = train("name=none", "trace_validations=true", "trace_sequences=0")
    assert not (none / "traces").exists()
    lora = tune("name=lora_traces", "adapter=lora", "adapter.r=2", "trace_validations=true")
    assert not (lora / "traces").exists()
