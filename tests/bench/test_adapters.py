"""`routerlab bench adapters`: methods and their LoRAs are what they say, and rows what was done."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from routerlab.bench.adapter_contestants import (
    LORA,
    SOFT,
    activated_rank,
    build_lora,
    build_method,
    method_names,
    random_base,
)
from routerlab.bench.adapter_report import adapters_table
from routerlab.bench.adapter_sizes import BASES, AdapterSizes, sizes_of
from routerlab.bench.adapters import (
    EVALUATION_GOAL,
    SOFT_GOAL,
    AdapterRow,
    AdaptersFound,
    bench_adapters,
    sample_goal,
)
from routerlab.bench.command import main
from routerlab.bench.fine_tuning import Batches
from routerlab.bench.layer import Settings
from routerlab.bench.memory import live_saved_mib, saved_mib
from routerlab.bench.timing import Ratio
from routerlab.core.config import ConfigError, available

CPU = torch.device("cpu")
SMALL = AdapterSizes(1, 16, 24, 2, 1, 32, batch_size=3, sequence_length=8, num_experts=4, r=2)
SETTINGS = Settings(seconds=1e-3, device=CPU)
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NEED_A_SAVED_ONE = {"mhr_full", "mhr_mu", "mhr_z"}
METHODS = [SOFT, *sorted({*available("adapter")} - {LORA, *NEED_A_SAVED_ONE})]
# The linears, and the rank of a LoRA with as many parameters as a token uses; E, K, r are 4, 2, 2.
RANKS = {
    SOFT: (FEED_FORWARD, 4),
    "remix": (FEED_FORWARD, 4),
    "mixlora": (FEED_FORWARD | ATTENTION, 4),
    "hydralora": (FEED_FORWARD, 5),
    "lora_mixer": ({"q_proj", "k_proj", "v_proj"}, 8),
    "comol": (ATTENTION | {"down_proj"}, 2),
    "poly": (FEED_FORWARD | ATTENTION, 2),
    "mhr": (FEED_FORWARD | ATTENTION, 2),
}


@pytest.fixture(scope="module")
def base():
    with random_base(SMALL) as folder:
        yield folder


def method(name, base, **knobs):
    torch.manual_seed(0)
    return build_method(name, SMALL, base, Batches(SMALL, CPU, 0), **knobs)


# -- contestants -----------------------------------------------------------------------------------


def test_all_is_every_adapter_but_plain_lora_and_those_that_go_on_from_another():
    assert method_names() == METHODS
    assert method_names("poly, remix,poly") == [SOFT, "poly", "remix"]
    with pytest.raises(ConfigError, match="adapters='mixlore': no such method; .*'mixlora'"):
        method_names("mixlore")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_and_the_lora_beside_it_train(name, base):
    contestant = method(name, base)
    picks = contestant.picks()
    rank = activated_rank(contestant, picks)
    lora = build_lora(contestant, rank, base)
    for each in (contestant, lora):
        before = [p.detach().clone() for p in each.parameters]
        each.step()
        moved = {not torch.equal(a, b) for a, b in zip(each.parameters, before, strict=True)}
        learns = {p.requires_grad for p in each.parameters}
        assert moved == learns == {True, False}
    config = lora.backbone.model.peft_config["default"]
    if name in RANKS:
        assert (config.target_modules, rank) == RANKS[name]
    assert config.r == rank
    theirs = contestant.backbone.model.peft_config["default"]
    assert config.lora_dropout == theirs.lora_dropout
    assert config.rank_pattern == dict.fromkeys(theirs.plain_modules or [], 2)


def test_the_activated_rank_has_the_parameters_that_a_token_uses(base):
    for name in (SOFT, "mixlora", "remix"):
        contestant = method(name, base)
        lora = build_lora(contestant, activated_rank(contestant, contestant.picks()), base)
        counts = contestant.backbone.count_parameters()
        routers = [layer.router for layer in contestant.backbone.moe_layers.values()]
        gates = sum(p.numel() for router in routers for p in router.parameters())
        assert counts["active"] - gates == lora.backbone.count_parameters()["active"]


def test_the_soft_mixture_picks_k_with_a_loss_and_without(base):
    contestant = method(SOFT, base)
    assert contestant.picks() == 2
    assert list(contestant.objective.losses.by_name) == ["load_balancing"]
    assert not method(SOFT, base, losses=False).objective.losses.by_name
    router = contestant.backbone.moe_layers["layers.00.mlp.up_proj"].router
    assert (router.order, router.top_k, router.num_experts) == ("top_k_first", 2, 4)


def test_batches_are_new_padded_on_the_left_and_end_in_answers():
    batches, seen, real = Batches(SMALL, CPU, 0), set(), []
    for _ in range(8):
        batch = batches.batch
        valid, prompt, labels = batch["valid"], batch["prompt"], batch["labels"]
        assert torch.equal(valid, valid.sort(1).values)
        assert torch.equal(valid, prompt | (labels != -100))
        assert not (prompt & (labels != -100)).any()
        assert torch.equal((labels != -100).sum(1), torch.tensor([2, 2, 2]))
        real += valid.sum(1).tolist()
        seen.add(int(batch["input_ids"].sum()))
        batches.draw()
    assert set(real) == {6, 7, 8}
    assert len(seen) == 8


def test_forms_of_samples_are_told_to_the_objective(base):
    objective = method("remix", base, num_samples=3, sample_form="cheap").objective
    assert (objective.num_samples, objective.sample_form) == (3, "cheap")


# -- memory ----------------------------------------------------------------------------------------


def test_what_autograd_keeps_is_counted_as_long_as_it_is_kept():
    mib = 2**18  # entries of one MiB
    weight = nn.Parameter(torch.ones(mib))

    def once() -> torch.Tensor:
        return (weight * torch.ones(mib)).square().sum()  # keeps the ones, and their product

    assert live_saved_mib(once, [weight]) == saved_mib(once, [weight]) == 2
    assert live_saved_mib(lambda: [once().backward() for _ in range(3)], [weight]) == 2
    assert live_saved_mib(lambda: (once() + once()).backward(), [weight]) == 4
    torch.testing.assert_close(weight.grad, torch.full((mib,), 10.0))
    shared = torch.ones(mib, requires_grad=True)
    assert live_saved_mib(lambda: (shared.exp() * shared).sum(), [weight]) == 2


# -- rows ------------------------------------------------------------------------------------------


def test_goals():
    assert (SOFT_GOAL, EVALUATION_GOAL) == (1.35, 1.05)
    assert sample_goal("replicated", 4) == pytest.approx(4.2)
    assert sample_goal("cheap", 4) == pytest.approx(2.75)
    assert sample_goal("looped", 4) is None


def test_a_row_meets_its_goal_or_not():
    ratio = Ratio(1.3, 1.2, 1.4, 10.0, 5, 1)
    assert AdapterRow("method", SOFT, 1.3).timed(ratio).met is True
    assert AdapterRow("method", SOFT, 1.2).timed(ratio).met is False
    assert AdapterRow("method", "poly").timed(ratio).met is None


def test_heads_that_do_not_divide_are_not_supported():
    odd = AdapterSizes(1, 12, 24, 2, 1, 32, batch_size=2, sequence_length=8, num_experts=4, r=2)
    found = bench_adapters(odd, ["mhr"], [], SETTINGS)
    row = found.rows[0]
    assert row.status.startswith("not supported: num_heads=8")
    assert row.ratio is row.met is row.peak_mib is None
    assert "mhr: not supported" in adapters_table(found).caption
    with pytest.raises(ValueError, match="samples=2,1: each must be at least 2"):
        bench_adapters(SMALL, [], [2, 1], SETTINGS)


def test_the_table_has_80_columns():
    row = AdapterRow("samples", "replicated M=8", 8.4, picks=2.0, lora_rank=128, trainable=10)
    row = row.timed(Ratio(12.34, 11.11, 13.33, 1234.5, 3, 2))
    console = Console(width=80, record=True, file=StringIO())
    console.print(adapters_table(AdaptersFound("sizes", [row])))
    text = console.export_text()
    assert "replicated M=8" in text
    assert "…" not in text
    assert "2 of 5 samples dropped" in text


# -- command ---------------------------------------------------------------------------------------


def test_a_run_writes_what_was_asked_for(tmp_path, capsys):
    file = tmp_path / "adapters.json"
    sizes = "--num-layers 1 --d-model 16 --d-ff 24 --num-heads 2 --num-kv-heads 1 --vocab-size 32"
    more = "--batch-size 2 --sequence-length 8 --num-experts 4 --r 2 --threads 1 --seconds 0.001"
    asked = ["--adapters", "hydralora", "--samples", "2", "--json", str(file)]
    assert main(["adapters", *sizes.split(), *more.split(), *asked]) == 0
    found = json.loads(file.read_text())
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    forms = [("samples", f"{form} M=2") for form in ("replicated", "looped", "cheap")]
    methods = [("method", SOFT), ("method", "hydralora")]
    assert list(rows) == [*methods, ("samples", SOFT), *forms, ("evaluation", "remix")]
    assert all(row["ratio"] > 0 for row in rows.values())
    assert all(rows[key]["saved_mib"] > 0 for key in [*methods, *forms])
    replicated, _, cheap = (rows[key] for key in forms)
    assert cheap["saved_mib"] < replicated["saved_mib"]
    assert found["environment"]["threads"] == 1
    assert "1 layers, D=16" in found["sizes"]
    assert "x plain LoRA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "mixlore"], "adapters='mixlore': no such method; did you mean 'mixlora'"),
        (["--samples", "2,x"], "--samples='2,x': must be whole numbers from 2"),
        (["--adapters", "soft", "--samples", "1"], "samples=1: each must be at least 2"),
        (["--top-k", "9"], "top_k=9: must be from 2"),
        (["--top-k", "1"], "top_k=1: must be from 2"),
        (["--num-layers", "0"], "num_layers=0: must be at least 1"),
        (["--num-heads", "3"], "num_heads=3: must cut d_model=256"),
        (["--num-kv-heads", "3"], "num_kv_heads=3: must divide num_heads=4"),
        (["--sequence-length", "2"], "sequence_length=2: must be at least 4"),
        (["--base", "gpt"], "invalid choice: 'gpt'"),
        (["--seconds", "0"], "--seconds=0.0: must be above 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["adapters", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_sizes_of_a_base_with_changes():
    assert sizes_of("smollm2", {"num_layers": 2}).num_layers == 2
    assert sizes_of("smollm2", {}) == BASES["smollm2"]
    with pytest.raises(ValueError, match="base='gpt': must be among small, smollm2"):
        sizes_of("gpt", {})
