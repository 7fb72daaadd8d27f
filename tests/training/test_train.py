"""A whole run, small."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import routerlab as rl
from routerlab.core.config import ConfigError

PER_LAYER = (
    "load_cv", "max_violation", "min_violation", "load_entropy", "effective_experts",
    "dead_experts", "dropped_share", "mean_entropy", "entropy_of_mean", "mutual_information",
    "top1_prob", "boundary_margin", "logit_norm",
)  # fmt: skip


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").open()))


def test_a_run_leaves_everything_behind(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "config.yaml", "overrides.yaml", "environment.json", "status.json", "summary.json",
        "metrics.csv", "distributions.jsonl", "checkpoints", "traces", "wandb", "report.html",
    }  # fmt: skip
    assert json.loads((finished_run / "status.json").read_text())["state"] == "done"
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert yaml.safe_load((finished_run / "config.yaml").read_text())["backbone"]["d_model"] == 32


def test_training_and_validation_log_every_diagnostic_by_layer_and_mean(finished_run: Path) -> None:
    columns = rows(finished_run)[0].keys()
    for prefix in ("router", "val/router"):
        for place in ("layers.00", "layers.01", "mean"):
            missing = {f"{prefix}/{place}/{name}" for name in PER_LAYER} - set(columns)
            assert not missing
    assert {"loss/load_balancing", "loss/load_balancing/weighted", "loss/router_z"} <= set(columns)
    assert {"val/bits_per_byte/prose", "val/bits_per_byte/code"} <= set(columns)


def test_the_mean_over_layers_is_that(finished_run: Path) -> None:
    row = next(r for r in rows(finished_run) if r["val/loss"])
    layers = [float(row[f"val/router/layers.0{i}/load_entropy"]) for i in (0, 1)]
    assert float(row["val/router/mean/load_entropy"]) == pytest.approx(sum(layers) / 2, rel=1e-12)


def test_the_total_is_the_task_loss_plus_the_weighted_losses(finished_run: Path) -> None:
    for row in rows(finished_run):
        if row["train/loss"]:
            weighted = float(row["loss/load_balancing/weighted"]) + float(
                row["loss/router_z/weighted"]
            )
            assert float(row["loss/load_balancing/weighted"]) == pytest.approx(
                0.01 * float(row["loss/load_balancing"])
            )
            total = float(row["train/loss"]) + weighted
            assert float(row["train/total_loss"]) == pytest.approx(total, rel=1e-5)


def test_bits_per_byte_of_bytes_is_the_loss_in_bits(finished_run: Path) -> None:
    row = next(r for r in rows(finished_run) if r["val/loss"])
    assert float(row["val/bits_per_byte"]) == pytest.approx(float(row["val/loss"]) / math.log(2))


def test_distributions_hold_loads_and_the_table_by_domain(finished_run: Path) -> None:
    lines = map(json.loads, (finished_run / "distributions.jsonl").read_text().splitlines())
    found = {line["name"]: line["value"] for line in lines}
    assert sum(found["router/layers.01/expert_load"]) == pytest.approx(1)
    table = found["val/router/layers.00/expert_by_domain"]
    assert [len(table), len(table[0])] == [2, 4]
    assert [sum(row) for row in table] == pytest.approx([2, 2])  # top_k


def test_the_summary_stands_beside_the_baselines(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert set(summary["baselines"]) == {"unigram", "bigram", "trigram"}
    assert summary["steps"] == 4
    assert summary["tokens"] == 4 * 8 * 32
    assert [layer["layer"] for layer in summary["layers"]] == ["layers.00", "layers.01"]
    assert summary["val"]["bits_per_byte_by_domain"].keys() == {"prose", "code"}


def test_checkpoints_hold_plain_things_only(finished_run: Path) -> None:
    paths = sorted((finished_run / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step_000002.ckpt", "step_000004.ckpt"]
    for path in paths:
        assert "state_dict" in torch.load(path, weights_only=True)


def test_no_secret_reaches_a_run(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "0123456789abcdef" * 2 + "deadbeef"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    run = train("name=secret", "trainer.max_steps=2", logger="logger=[wandb]")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_the_last_step_is_validated_and_saved_whatever_the_intervals(
    train: Callable[..., Path],
) -> None:
    run = train("trainer.max_steps=3", "trainer.val_check_interval=2", "name=odd")
    assert [row["step"] for row in rows(run) if row["val/loss"]] == ["2", "3"]
    assert (run / "checkpoints" / "step_000003.ckpt").is_file()


def test_micro_batches_and_checkpointing_change_no_result(train: Callable[..., Path]) -> None:
    whole = rows(train("name=whole"))
    cut = rows(
        train("name=cut", "objective.micro_batches=4", "backbone.activation_checkpointing=true")
    )
    for a, b in zip(whole, cut, strict=True):
        for key in ("train/loss", "val/loss", "loss/load_balancing", "router/mean/load_cv"):
            if a[key]:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_diagnostics_come_every_nth_step(train: Callable[..., Path]) -> None:
    run = train("objective.log_every=3", "trainer.max_steps=7", "name=sparse")
    assert [row["step"] for row in rows(run) if row["train/loss"]] == ["3", "6"]


def test_a_router_that_drops_says_how_much(train: Callable[..., Path]) -> None:
    run = train("router.capacity_factor=0.5", "objective.allow_noncausal=true", "name=drops")
    # half the slots: at least half of the assignments are lost
    assert float(rows(run)[0]["router/mean/dropped_share"]) >= 0.5


def test_a_trace_tells_what_the_routers_decided(finished_run: Path) -> None:
    found = rl.trace.load(finished_run)
    assert found.domains == ["prose", "code"]
    assert found.input_ids.shape == (4, 32)
    assert set(found.domain_ids.tolist()) == {0, 1}
    layer = found.layers["layers.01.moe"]
    assert len(layer.expert_indices) == 4 * 32 * 2
    assert layer.num_experts == 4
    state = torch.load(finished_run / "checkpoints" / "step_000004.ckpt", weights_only=True)
    model = rl.build_backbone(rl.compose(*_words(finished_run)))
    weights = state["state_dict"].items()
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in weights})
    again = model.eval()(found.input_ids).router_outputs["layers.01.moe"]
    assert torch.equal(again.expert_indices, layer.expert_indices)
    torch.testing.assert_close(again.combine_weights.detach(), layer.combine_weights)


def test_runs_are_compared(finished_run: Path, train: Callable[..., Path]) -> None:
    other = train("name=other", "router.score_fn=sigmoid")
    table = rl.compare([finished_run, other])
    assert list(table["router.score_fn"]) == ["softmax", "sigmoid"]
    assert (table["state"] == "done").all()
    assert table.loc[other.name, "val/bits_per_byte"] > 0
    assert "backbone.d_model" not in table.columns  # the same in both
    with pytest.raises(ValueError, match="holds no run"):
        rl.compare([finished_run.parent])


def test_a_failing_step_is_kept_in_the_status(train: Callable[..., Path], tmp_path: Path) -> None:
    from routerlab.core.errors import NonFiniteLossError

    words = ["optimizer.optimizer.lr=1e30", "optimizer.warmup_steps=0"]
    words += ["callback.checkpoint.every_n_steps=1", f"run_dir={tmp_path / 'nan'}"]
    with pytest.raises(NonFiniteLossError, match=r"router logits .*layers\.0\d\.moe") as caught:
        train(*words)
    status = json.loads((tmp_path / "nan" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "NonFiniteLossError" in status["error"]
    kept = next((tmp_path / "nan" / "checkpoints").glob("*.ckpt"))
    assert any(kept.name in note for note in caught.value.__notes__)


def test_a_device_that_is_absent_is_refused(train: Callable[..., Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu"):
        train("trainer.accelerator=gpu")


def _words(run: Path) -> list[str]:
    return list(yaml.safe_load((run / "overrides.yaml").read_text()))
