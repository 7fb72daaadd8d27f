"""`routerlab bench routers`: every contestant really works, and its row says what it cost."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from routerlab.bench import routers
from routerlab.bench.arguments import ROUTERS_SHAPE
from routerlab.bench.command import main
from routerlab.bench.contestants import Shape
from routerlab.bench.layer import Settings
from routerlab.bench.report import routers_table
from routerlab.bench.router_contestants import (
    GOALS,
    REFERENCE,
    build_contestant,
    contestant_names,
    goal_of,
    layer_losses,
)
from routerlab.bench.routers import RouterRow, RoutersFound, bench_routers
from routerlab.bench.step import StepSize
from routerlab.bench.timing import Ratio
from routerlab.core.config import ConfigError, available, compose
from routerlab.core.routing import RoutingContext

CPU = torch.device("cpu")
SHAPE = Shape(64, 16, 8, 8, 2)  # 64 tokens, 8 experts in groups of 2, 2 picks
SETTINGS = Settings(seconds=1e-3, device=CPU)
SMALL_STEP = StepSize(32, 16, 2, 2, 4, 2, 16, batch_size=2, sequence_length=8)
ERC = "expert_router_coupling"


def context(seed: int = 0) -> RoutingContext:
    ids, tasks = torch.arange(64) % 7, torch.arange(4)
    return RoutingContext(4, 16, token_ids=ids, task_ids=tasks, seed=seed, step_seed=seed)


def step(name: str, x: torch.Tensor | None = None):
    torch.manual_seed(0)
    contestant = build_contestant(name, SHAPE, CPU)
    if x is None:
        x = torch.randn(64, 16, requires_grad=True)
    noise = torch.randn(64 * 8)
    return contestant, x, noise, contestant.step(x, context(), noise)


# -- contestants -----------------------------------------------------------------------------------


def test_all_is_every_router_balancer_and_loss_on_weights():
    names = contestant_names()
    assert names[0] == REFERENCE == "token_choice"
    assert len(set(names)) == len(names)
    assert set(available("router")) <= set(names)
    balanced = {f"token_choice+{name}" for name in available("balancer") if name != "none"}
    assert balanced | {"token_choice+bip_once"} <= set(names)
    assert ERC in names
    assert set(layer_losses(available("loss"))) == set(names) & set(available("loss"))
    assert "load_balancing" not in names  # it looks at records: it is in the routers' rows


def test_the_reference_is_always_measured_and_first():
    assert contestant_names("hash, top_p,hash") == [REFERENCE, "hash", "top_p"]
    assert contestant_names("top_p,token_choice") == [REFERENCE, "top_p"]
    with pytest.raises(ConfigError, match="routers='top_q': no such contestant; .*'top_p'"):
        contestant_names("top_q")


@pytest.mark.parametrize("name", available("router"))
def test_every_router_runs_forward_and_backward(name):
    contestant, x, _, output = step(name)
    assert output.router_logits.shape == (64, 8)
    weights = list(contestant.router.parameters())
    grads = [leaf.grad for leaf in (x, *weights) if leaf.grad is not None]
    assert any(grad.any() for grad in grads) is bool(weights)
    assert all(grad.isfinite().all() for grad in grads)


def test_the_gradient_is_that_of_random_weights_and_the_weighted_losses():
    contestant, x, noise, _ = step("token_choice")
    assert list(contestant.losses) == ["load_balancing", "router_z"]
    leaves = (x, contestant.router.gate.weight)
    found = [leaf.grad.clone() for leaf in leaves]
    output = contestant.router(x, context())
    value = (output.combine_weights * noise[:128]).sum()
    for loss in contestant.losses.values():
        assert loss.weight > 0
        value = value + loss.weight * loss(output, context())
    expected = torch.autograd.grad(value, leaves)
    torch.testing.assert_close(found, list(expected))
    contestant.step(x, context(), noise)  # starts from no gradient: nothing adds up
    torch.testing.assert_close([leaf.grad for leaf in leaves], found)


def test_a_sampled_choice_learns_by_its_log_probability():
    contestant, x, noise, output = step("subset_sampling")
    assert not output.combine_weights.requires_grad
    weight = contestant.router.gate.weight
    value = (contestant.router(x, context()).log_prob * noise[:64]).sum()
    for loss in contestant.losses.values():
        value = value + loss.weight * loss(contestant.router(x, context()), context())
    torch.testing.assert_close(weight.grad, torch.autograd.grad(value, weight)[0])


@pytest.mark.parametrize("name", ["token_choice+expert_bias", "deepseek_v3"])
def test_a_step_ends_with_the_routers_update(name):
    contestant, _, _, output = step(name)
    counts = output.requests_per_expert.float()
    moved = contestant.router.balancer.bias.sign()
    assert moved.any()
    assert torch.equal(moved, (counts.mean() - counts).sign())


def test_sizes_and_knobs_of_contestants():
    assert build_contestant("switch", SHAPE, CPU).router.top_k == 2
    assert build_contestant("base", SHAPE, CPU).router.top_k == 1  # it knows no other
    chosen = step("expert_choice")[3]
    assert len(chosen.token_indices) == 64 * 2  # as many assignments as top-2
    bip = build_contestant("token_choice+bip", SHAPE, CPU).router.balancer
    once = build_contestant("token_choice+bip_once", SHAPE, CPU).router.balancer
    assert (bip.iterations, once.iterations) == (4, 1)
    assert build_contestant("token_choice", SHAPE, CPU).router.training
    x = torch.randn(4096, 16)
    wide = build_contestant("token_choice", replace(SHAPE, num_experts=64), CPU)
    assert wide.router(x).router_logits.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("token_choice", 8),
        ("deepseek_v3", 8),
        ("token_choice+expert_bias", 8),
        ("expert_choice", 4),
        ("expert_choice_capped", None),
        ("base", None),
        ("sinkhorn", 5),
        ("selective_sinkhorn", 5),
        ("token_choice+bip", 17),
        ("token_choice+bip_once", 8),
    ],
)
def test_goals(name, goal):
    assert goal_of(name) == goal


def test_every_goal_is_of_a_contestant():
    assert set(GOALS) <= set(contestant_names())


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> RoutersFound:
    names = contestant_names(f"hash,threshold,{ERC},token_choice+expert_bias,expert_choice")
    return bench_routers(SHAPE, names, SETTINGS, step_size=SMALL_STEP)


def test_rows_of_a_run(found):
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [
        "token_choice", "hash", "threshold", ERC, "token_choice+expert_bias", "expert_choice",
    ]  # fmt: skip
    assert found.shape == "64,16,8,8,2"
    assert found.layer_milliseconds > 0
    assert found.step_milliseconds > 0
    own = rows[REFERENCE].percent
    for name, row in rows.items():
        assert row.status == "ok"
        assert row.percent > 0
        assert row.lower <= row.percent <= row.upper
        assert row.milliseconds > 0
        assert row.samples >= 3
        assert row.met is (row.percent <= row.goal)
        assert row.learns is (name != "hash")
        if name == ERC:
            assert (row.share_of, row.goal, row.to_token_choice) == ("step", 2, None)
            assert row.losses == [ERC]
        else:
            assert row.share_of == "layer"
            assert row.to_token_choice == pytest.approx(row.percent / own)
            router = name.partition("+")[0]
            assert row.losses == list(compose(f"router={router}").get("loss", {}))
    assert rows[REFERENCE].losses == ["load_balancing", "router_z"]
    for name in ("token_choice", "hash", "expert_choice"):
        assert rows[name].assignments_per_token == 2
    assert rows["threshold"].assignments_per_token > 0


def test_figures_of_a_row():
    ratio = Ratio(0.07, 0.06, 0.09, milliseconds=3.0, samples=4, busy=1)
    row = RouterRow("a", goal=7.5).timed(ratio)
    assert (row.percent, row.lower, row.upper) == pytest.approx((7, 6, 9))
    assert (row.milliseconds, row.samples, row.busy) == (3.0, 4, 1)
    assert row.met is True
    assert RouterRow("a", goal=6.5).timed(ratio).met is False
    assert RouterRow("a", goal=None).timed(ratio).met is None


def test_the_table_fits_a_terminal_and_shows_every_row(found):
    long = replace(found.rows[-1], name="latent_and_token_collaboration", percent=123.45)
    console = Console(width=80, record=True)
    console.print(routers_table(replace(found, rows=[*found.rows, long])))
    shown = console.export_text()
    assert "…" not in shown
    for row in (*found.rows, long):
        assert row.name[:20] in shown  # a longer one goes on in the next line
        assert f"{row.percent:.2f}" in shown or f"{row.percent:.1f}" in shown
        assert ("yes" if row.met else "no") in shown
    assert f"{ERC}*" in shown
    assert f"* of a training step, {found.step_milliseconds:.0f} ms" in shown


def test_what_a_router_cannot_do_is_said():
    odd = Shape(12, 16, 8, 6, 2)  # 6 experts do not make 4 groups
    found = bench_routers(odd, [REFERENCE, "deepseek_v3"], SETTINGS)
    ours, theirs = found.rows
    assert ours.status == "ok"
    assert found.step_milliseconds is None
    assert theirs.status.startswith("not supported: ")
    assert "num_groups" in theirs.status
    assert theirs.percent is theirs.met is theirs.to_token_choice is None
    assert "deepseek_v3: not supported" in routers_table(found).caption


def test_every_sample_has_new_tokens_and_a_new_context():
    cell = routers._Cell(SHAPE, SETTINGS)
    seen = []
    for _ in range(3):
        cell.draw()
        told = cell.context
        assert told.batch_size * told.sequence_length == 64
        seen.append((cell.tokens.x.sum().item(), told.token_ids.sum().item(), told.seed))
    assert all(len(set(values)) == 3 for values in zip(*seen, strict=True))
    long = routers._Cell(replace(SHAPE, tokens=4096), SETTINGS).context
    assert (long.batch_size, long.sequence_length) == (32, 128)


# -- command ---------------------------------------------------------------------------------------


def test_a_run_writes_what_was_asked_for(tmp_path, capsys):
    file = tmp_path / "routers.json"
    arguments = ["--routers", "hash", "--shape", "64,16,8,8,2", "--seconds", "0.001"]
    assert main(["routers", *arguments, "--threads", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == ["token_choice", "hash"]
    assert all(row["percent"] > 0 for row in found["rows"])
    assert found["shape"] == "64,16,8,8,2"
    assert found["environment"]["threads"] == 1
    assert found["step_milliseconds"] is None
    out = capsys.readouterr().out
    assert "hash" in out
    assert "x token" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routers", "token_choise"], "routers='token_choise': no such contestant; did you mean"),
        (["--routers", "token_choice+magic"], "no such contestant"),
        (["--routers", ""], "routers='': no such contestant"),
        (["--shape", "1,2,3"], "shape='1,2,3': must be five whole numbers T,D,F,E,K"),
        (["--shape", "8,8,8,4,1"], "K=1 must be from 2"),
        (["--seconds", "0"], "--seconds=0.0: must be above 0"),
        (["--threads", "0"], "--threads=0: must be at least 1"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
        (["--clock", "sun"], "invalid choice: 'sun'"),
        (["--paths", "all"], "unrecognized arguments: --paths"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["routers", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_default_shape_is_a_shape():
    assert str(Shape.parse(ROUTERS_SHAPE)) == ROUTERS_SHAPE == "4096,256,256,64,8"
