"""Wrong values: one clear message, before any training, and no run directory left behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from routerlab.cli.main import main

LIGHTNING = "lightning.pytorch.strategies"
CASES = {
    "router.top_k=5": ["top_k=5", "at least 1 and at most 4"],
    "router.top_k=0": ["top_k=0", "at least 1 and at most 4"],
    "router.top_k=1": ["top_k=1", "normalize_weights", "no gradient"],
    "router.top_k=two": ["router.top_k='two'", "must be int"],
    "router.top_k=2.5": ["router.top_k=2.5", "must be int"],
    "router.normalize_weights=1": ["router.normalize_weights=1", "must be bool"],
    "backbone.rope_theta=high": ["backbone.rope_theta='high'", "must be float"],
    "trace_sequences=-1": ["trace_sequences=-1", "0 or more"],
    "trace_validations=often": ["trace_validations=often", "true or false"],
    "router.capacity_factor=0.0": ["capacity_factor=0.0", "above 0"],
    "router.capacity_factor=-1.5": ["capacity_factor=-1.5", "above 0"],
    "router.score_fn=tanh": ["score_fn='tanh'", "'softmax', 'sigmoid'"],
    "router.jitter_eps=1.0": ["jitter_eps=1.0", "below 1"],
    "backbone.num_heads=3": ["d_model=32", "multiple of num_heads=3"],
    "backbone.num_kv_heads=3": ["num_kv_heads=3", "divide num_heads=2"],
    "backbone.num_heads=32": ["even width"],
    "backbone.d_ff=0": ["d_ff=0"],
    "dispatch=fast": ["dispatch", "fast", "auto"],
    "backbone.max_positions=16": ["data.seq_len=32", "backbone.max_positions=16"],
    "backbone.vocab_size=100": ["backbone.vocab_size=100", "256 symbols"],
    "data.tokenizer=nowhere.json": ["nowhere.json"],
    "data.domains={a: /nowhere/a.txt}": ["/nowhere/a.txt"],
    "data.val_fraction=1.5": ["val_fraction", "1.5"],
    "data.batch_size=0": ["batch_size", "0"],
    "objective.micro_batches=9": ["objective.micro_batches=9", "at most the 8"],
    "objective.micro_batches=0": ["micro_batches=0", "at least 1"],
    "objective.gradient_clip_norm=-1.0": ["gradient_clip_norm=-1.0", "above 0"],
    "loss.load_balancing.scope=batch": ["scope='batch'", "'global'"],
    "callback.checkpoint.keep=1": ["keep=1", "at least 2"],
    "optimizer.warmup_steps=-1": ["warmup_steps=-1"],
    "trainer.accelerator=mps": ["trainer.accelerator=mps", "float64"],
    "trainer.accelerator=abacus": ["trainer:", "abacus"],
    "trainer.devices=0": ["trainer.devices=0", "at least 1"],
    "trainer=ddp": ["trainer.devices=auto", "no GPUs", "trainer.devices=2"],
    "trainer.strategy=fsdp": ["trainer.strategy=fsdp", "FSDP1", "trainer=fsdp"],
    "trainer.strategy=deepspeed": ["trainer.strategy=deepspeed", "auto, ddp"],
    "trainer.precision=16-mixed": ["trainer.precision=16-mixed", "bf16-mixed"],
    "trainer.precision=bf16-true": ["trainer.precision=bf16-true", "bf16-mixed"],
    "trainer.precision=12": ["trainer:", "12"],
    "trainer.val_check_interval=0": ["trainer.val_check_interval=0", "whole number"],
    "optimizer.optimizer.lr=-1.0": ["optimizer:", "-1.0"],
    "backbone.num_layers=0": ["num_layers=0", "at least 1"],
    "backbone.rms_norm_eps=-1.0": ["rms_norm_eps=-1.0", "above 0"],
    "router.init_std=-1.0": ["init_std=-1.0"],
    "trainer.max_steps=0": ["trainer.max_steps=0", "at least 1"],
    "+trainer.accumulate_grad_batches=2": ["accumulate_grad_batches", "objective.micro_batches"],
    "resume=/nowhere": ["/nowhere", "holds no run"],
    "router.topk=1": ["router.topk", "router.top_k"],
    "router=token_chioce": ["token_choice"],
    "router=expert_choice": ["leak the future", "objective.allow_noncausal=true"],
    "router.drop_policy=last": ["drop_policy='last'", "'batch_priority'"],
    "router.num_groups=3": ["num_groups=3", "num_experts=4"],
    "balancer=expert_bais": ["balancer=expert_bais", "expert_bias"],
    "schedule=[descendig]": ["schedule=descendig", "descending"],
    "objective.num_samples=3": ["num_samples=3", "no router samples"],
    "objective.credit=token": ["credit='token'", "'reward_to_go'"],
    "data.final_val_windows=0": ["final_val_windows", "0"],
    "loss=[load_cv]": ["load_cv", "noisy_top_k"],
    "backbone.num_experts=[4,4,4]": ["num_experts=[4, 4, 4]", "num_layers=2"],
}
PAIRS: dict[tuple[str, ...], list[str]] = {
    ("router=expert_choice", "balancer=expert_bias"): ["balancer ExpertBias", "ExpertChoice"],
    ("router=sinkhorn", "balancer=bip"): ["balancer BIP", "Sinkhorn", "balancer=none"],
    ("router=sinkhorn", "+router.capacity_factor=1.0"): ["capacity_factor", "no such argument"],
    ("loss=[device_balance]", "loss.device_balance.num_devices=3"): ["num_devices=3", "4"],
    ("router=hash", "loss=[expert_router_coupling]"): ["expert_router_coupling", "HashRouter"],
    ("router=base", "router.top_k=2"): ["top_k=2"],
    ("router=sinkhorn", "router.xi=0.0"): ["xi=0.0", "above 0"],
    ("router=selective_sinkhorn", "router.p=1.5"): ["p=1.5", "at most 1"],
    ("router=dynamoe", "router.percentile=1.0"): ["percentile=1.0", "below 1"],
    ("router=top_p", "router.top_p=0.0"): ["top_p=0.0", "above 0"],
    ("router=threshold", "router.factor=-1.0"): ["factor=-1.0"],
    ("router=subset_sampling", "objective.num_samples=1"): ["num_samples=1", "at least 2"],
    ("router=expert_choice", "router.capacity_factor=9.0"): ["capacity_factor=9.0", "4"],
    ("balancer=expert_bias", "balancer.rate=-1.0"): ["rate=-1.0", "at least 0"],
    ("balancer=bip", "balancer.mode=online"): ["mode='online'", "iterations=1"],
    ("schedule=[linear]", "schedule.linear.start=1"): ["schedule.linear.target: must be given"],
    (
        "schedule=[linear]",
        "schedule.linear.target=router.top_p",
        "schedule.linear.start=1",
        "schedule.linear.end=2",
    ): ["schedule target='router.top_p'", "loss.<one of load_balancing, router_z>"],
    (
        "schedule=[linear]",
        "schedule.linear.target=router.top_k",
        "schedule.linear.start=2",
        "schedule.linear.end=9",
    ): ["schedule.linear", "top_k=9", "at most 4"],
    ("trainer=ddp", "trainer.devices=3"): ["data.batch_size=8", "3 processes"],
    ("trainer=ddp", f"trainer.strategy={{_target_: {LIGHTNING}.DeepSpeedStrategy}}"): [
        "DeepSpeedStrategy",
        "lightning's DDPStrategy",
    ],
    (
        "trainer.devices=2",
        f"trainer.strategy={{_target_: {LIGHTNING}.DDPStrategy, process_group_backend: nccl}}",
    ): ["process_group_backend=nccl", "CUDA"],
    ("trainer=fsdp", "trainer.devices=2", "router=subset_sampling"): [
        "trainer=fsdp",
        "layers.00.moe",
        "samples",
        "trainer=ddp",
    ],
    ("trainer=ddp", "trainer.devices=2", "dispatch=expert_parallel"): [
        "dispatch: ExpertParallel",
        "trainer.strategy=ddp",
        "trainer=fsdp",
    ],
    ("trainer=fsdp", "trainer.devices=8", "dispatch=expert_parallel"): [
        "dispatch.size=8",
        "num_experts=4",
    ],
    ("schedule=[descending]", "schedule.layerwise.low=9"): ["low=9", "high=8"],
    ("schedule=[descending]", "schedule.layerwise.total=1"): ["total=1"],
}


@pytest.mark.parametrize(
    ("wrong", "parts"), [*(((k,), v) for k, v in CASES.items()), *PAIRS.items()]
)
def test_a_wrong_value_is_refused_with_its_name_and_range(
    wrong: tuple[str, ...],
    parts: list[str],
    tiny_words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = {_key(word) for word in wrong}
    words = [w for w in tiny_words(f"paths.output_dir={tmp_path / 'out'}") if _key(w) not in keys]
    assert main(["train", *words, *wrong]) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_refused(
    tiny_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    words = [w for w in tiny_words() if not w.startswith("data.domains")]
    domain = f"data.domains={{mine: {tmp_path / 'empty.txt'}}}"
    assert main(["train", *words, domain]) == 2
    message = capsys.readouterr().err
    assert "empty.txt" in message
    assert "mine" in message


def test_a_directory_that_holds_a_run_is_refused(
    finished_run: Path,
    tiny_words: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (finished_run / "config.yaml").read_bytes()
    assert main(["train", *tiny_words(f"run_dir={finished_run}")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished_run / "config.yaml").read_bytes() == before


def test_a_directory_that_cannot_be_written_is_refused(
    tiny_words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", *tiny_words(f"run_dir={tmp_path / 'file' / 'run'}")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def _key(word: str) -> str:
    return word.split("=")[0]
