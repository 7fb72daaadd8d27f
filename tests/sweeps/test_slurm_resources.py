"""What a job of a cluster gets, without a cluster."""

from pathlib import Path

import pytest

from routerlab.core.config import ConfigError, available, compose
from routerlab.sweeps.resources import sbatch_options
from routerlab.sweeps.slurm import Slurm


@pytest.mark.parametrize("name", available("resources"))
def test_every_file_asks_for_a_process_a_device(name: str) -> None:
    cfg = compose("launcher=slurm", f"resources={name}")
    options = sbatch_options(cfg)
    processes = options["nodes"] * options["ntasks_per_node"]
    assert cfg.trainer.devices * cfg.trainer.num_nodes == processes
    assert options.get("gpus_per_node") in (None, options["ntasks_per_node"])
    assert (cfg.trainer.accelerator == "gpu") == ("gpus_per_node" in options)
    assert f"--cpus-per-task={cfg.resources.cpus_per_task}" in options["srun_args"]


def test_other_options_of_sbatch_pass() -> None:
    word = "+resources.extra={constraint: a100, mail-user: me, exclusive: true, hold: false}"
    options = sbatch_options(compose("launcher=slurm", "resources=gpu", word))
    more = options["additional_parameters"]
    assert (more["constraint"], more["mail-user"]) == ("a100", "me")
    assert more["exclusive"] is True
    assert "hold" not in more
    assert more["requeue"] is True


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("resources.nodes=0", "resources.nodes=0: must be a whole number, at least 1"),
        ("resources.minutes=1.5", "resources.minutes=1.5: must be a whole number, at least 1"),
        ("resources.minutes=4h", "resources.minutes=4h: must be a whole number"),
        ("resources.cpus_per_task=true", "resources.cpus_per_task=True: must be a whole"),
        ("resources.memory_gib=0", "resources.memory_gib=0: must be a whole number, at least 1"),
        ("resources.gpus_per_node=-1", "must be a whole number, at least 0"),
        ("resources.partition='a b'", "resources.partition='a b': must be a name, or null"),
        ("resources.minutes=2", "resources.signal_seconds=120: must be at most 60"),
        ("+resources.node=2", "resources.node: no such key; did you mean 'nodes'"),
        ("~resources.nodes", "resources.nodes: missing"),
        ("trainer.devices=2", "trainer.devices=2: must be that of resources.tasks_per_node=1"),
        ("trainer.num_nodes=3", "trainer.num_nodes=3: must be that of resources.nodes=1"),
        ("resources.extra=qos", "resources.extra='qos': must be a mapping"),
        ("+resources.extra.time=10", "resources.extra.time: use resources.minutes"),
        ("+resources.extra.ntasks_per_node=2", "use resources.tasks_per_node"),
        ("+resources.extra.array=1-9", "resources.extra.array: it is set by routerlab"),
        ("+resources.extra.QOS=a", "resources.extra.QOS: no option of sbatch"),
        ("+resources.extra.qos=[a]", "must be text, a number, or true"),
    ],
)
def test_what_makes_no_sense_is_refused(word: str, message: str) -> None:
    cfg = compose("launcher=slurm", word)
    with pytest.raises(ConfigError) as caught:
        sbatch_options(cfg)
    assert message in str(caught.value)


def test_resources_must_be_chosen() -> None:
    with pytest.raises(ConfigError, match=r"resources: not chosen; available: cpu, gpu"):
        sbatch_options(compose())


def test_a_machine_without_sbatch_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        Slurm(tmp_path, compose("launcher=slurm"))
    assert list(tmp_path.iterdir()) == []
