"""One run, from a composed config to its report."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, compose, user_dirs
from routerlab.core.instantiate import build_all
from routerlab.objectives.rehearsal import rehearse
from routerlab.objectives.routed import RoutedObjective
from routerlab.training import alignment, assemble, baselines
from routerlab.training.callbacks.checkpoint import Checkpoint, KeepConfig
from routerlab.training.callbacks.metrics import Metrics
from routerlab.training.callbacks.preemption import Preemption
from routerlab.training.callbacks.reseed import Reseed
from routerlab.training.callbacks.traces import validation_traces
from routerlab.training.callbacks.validation import MissedValidation
from routerlab.training.checks import (
    check_strategy,
    check_trainable,
    check_trainer,
    differences,
    num_processes,
)
from routerlab.training.environment import environment
from routerlab.training.evaluate import evaluate_base
from routerlab.training.initial import PRETRAIN, check_fit, started
from routerlab.training.loggers import MetricsFiles, build_loggers, check_loggers, log_headline
from routerlab.training.preemption import Notice, Preempted, noticed
from routerlab.training.processes import is_main_process
from routerlab.training.recording import record
from routerlab.training.run_directory import RunDirectory
from routerlab.training.summary import summarize

_RUN_DIR = "ROUTERLAB_RUN_DIR"  # tells the other processes of a run where it lies
_PATIENCE = 600  # seconds that they wait for the first one to begin it


def train(cfg: DictConfig, overrides: Sequence[str] = ()) -> RunDirectory:
    """Trains (or resumes) the run that ``cfg`` describes; returns its directory.

    Everything that can be known to be wrong raises `ConfigError` or ``ValueError`` before the run
    directory is made. A run that fails later says why in ``status.json`` and keeps its checkpoints.
    Its pretraining and its baselines are trained first, each as a run of its own in ``pretrain/``
    and ``baselines/<name>/``. SIGTERM, SIGUSR1 and SIGUSR2 save the run and raise `Preempted`; the
    latter two also put its SLURM job back into the queue.
    """
    assemble.quiet()
    with noticed() as notice, contextlib.ExitStack() as held:
        return _train(cfg, overrides, notice, held)


def _train(
    cfg: DictConfig, overrides: Sequence[str], notice: Notice, held: contextlib.ExitStack
) -> RunDirectory:
    run = None
    if cfg.resume:
        run, cfg, overrides = _resumed(cfg, overrides)
        _hold(run, held)
    plans = baselines.planned(cfg, overrides)
    data, objective = _checked(cfg, plans)
    if run is not None:
        _check_corpus(run, data)
    callbacks = build_all(cfg.get("callback"))
    if run is None:
        run = _new_run(cfg, overrides)
        _hold(run, held)
        if is_main_process():  # of its other processes, some may come after it has written
            run.refuse_a_second()
    if is_main_process():
        run.write_config(cfg, overrides)
        run.write_json("environment.json", environment())
        run.set_status("running")
    try:
        if plans:
            del objective  # two models at once may be one too many
            baselines.train_each(plans, run, train)
            objective = _prepared(started(cfg, run), data)[1]
        _fit(cfg, run, data, objective, callbacks, notice)
    except SIGTERMException as error:  # its exit code would be 0
        stop = Preempted(signal.SIGTERM)
        _close(run, stop)
        raise stop from error
    except BaseException as error:
        _close(run, error)
        raise
    finally:
        _finish_wandb(run)
    return run


def _checked(cfg: DictConfig, plans: Sequence[baselines.Beside]) -> tuple[Any, RoutedObjective]:
    """The data and the objective of a run, after those of each run beside it were checked."""
    weights: dict[str, torch.Tensor] = {}  # that the pretraining will have
    for plan in plans:
        try:
            weights |= _planned_weights(plan, weights)
        except ValueError as error:
            raise ConfigError(f"{plan.key}: {error}") from error
    data, objective = _prepared(cfg)
    check_fit(PRETRAIN, weights, objective.backbone)
    return data, objective


def _planned_weights(
    plan: baselines.Beside, pretrained: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Names and shapes (without memory) of what a pretraining will have learned; nothing of a
    baseline, which must have room for them if it starts from there.
    """
    backbone = _prepared(plan.cfg)[1].backbone
    if plan.after_pretraining:
        check_fit(PRETRAIN, pretrained, backbone)
    learned = backbone.state_dict() if plan.place == PRETRAIN else {}
    return {name: tensor.to("meta") for name, tensor in learned.items()}


def _prepared(cfg: DictConfig, data: Any = None) -> tuple[Any, RoutedObjective]:
    """The data and the objective of a run, checked against each other and against the machine."""
    check_trainer(cfg)
    check_loggers(cfg)
    torch.manual_seed(cfg.seed)  # initial weights
    data = assemble.build_data(cfg) if data is None else data
    objective = assemble.build_objective(cfg, data)
    check_trainable(cfg, objective.backbone)
    assemble.check_batch(cfg, num_processes(cfg))
    check_strategy(cfg, objective)
    alignment.check(cfg, objective)
    assemble.check_recipe(cfg, objective)
    assemble.check_schedules(cfg, objective)
    rehearse(objective)
    return data, objective


def _fit(
    cfg: DictConfig,
    run: RunDirectory,
    data: Any,
    objective: RoutedObjective,
    extra: dict[str, pl.Callback],
    notice: Notice,
) -> None:
    if cfg.get("evaluate_base"):
        evaluate_base(cfg, run, data, objective)
    files, metrics = MetricsFiles(run.path), Metrics()
    loggers = [files, *build_loggers(cfg, run, objective.looks_ahead)]
    traces = validation_traces(cfg, run, data, objective)  # before the row that says: validated
    first = [Reseed(cfg.seed), *traces, metrics, MissedValidation(files)]
    first.append(KeepConfig(cfg, assemble.corpus_identity(data)))
    callbacks = [*first, *extra.values()]
    if isinstance(checkpoint := extra.get("checkpoint"), Checkpoint):
        checkpoint.dirpath = str(run.path / "checkpoints")
        callbacks.append(Preemption(notice, checkpoint))
    trainer = assemble.build_trainer(cfg, run.path, callbacks, loggers)
    device = trainer.strategy.root_device
    alignment.prepare(cfg, run, data, objective, device)
    start = _start(run, files)
    objective.train()  # pretrained models come in evaluation mode, and lightning leaves them so
    try:
        trainer.fit(objective, datamodule=data, ckpt_path=start, weights_only=True)
    except SystemExit as stop:  # what lightning makes of Ctrl-C
        if trainer.interrupted and not isinstance(stop, SIGTERMException | Preempted):
            raise KeyboardInterrupt from stop
        raise
    if trainer.strategy.broadcast(not files.has(trainer.global_step, "val/loss")):
        trainer.validate(objective, datamodule=data, verbose=False)
    metrics.logs_validation = False  # the headline, and no point of a curve
    assemble.use_final(data)
    trainer.validate(objective, datamodule=data, verbose=False)
    summary = summarize(run, data, objective, metrics, trainer)
    if cfg.trace_sequences:
        record(cfg, run, data, objective)
    if trainer.is_global_zero:  # where no more runs of a model that processes share
        aligned = alignment.outcome(data, objective, device)
        run.write_json("summary.json", summary | aligned)
        log_headline(trainer.loggers, run)
        if hasattr(objective.backbone, "save_adapter"):
            objective.backbone.save_adapter(run.path / "adapter")  # type: ignore[operator]
        run.set_status("done")
        _report(run)


def _close(run: RunDirectory, error: BaseException) -> None:
    """Keeps the reason in the status and the report, and tells how to go on."""
    checkpoint, _ = run.newest_checkpoint()
    folders = "".join(f"--config-dir {path} " for path in user_dirs())
    error.add_note(f"last good checkpoint: {checkpoint or 'none yet'}")
    error.add_note(f"go on with: routerlab train {folders}resume={run.path}")
    if is_main_process():
        run.set_status("preempted" if isinstance(error, Preempted) else "failed", error)
        with contextlib.suppress(Exception):  # the error itself matters more than its report
            _report(run)


def _report(run: RunDirectory) -> None:
    from routerlab.reports.html import write_report  # a second of imports, not at the start

    write_report(run.path)


def _start(run: RunDirectory, files: MetricsFiles) -> str | None:
    """The checkpoint to go on from; what was logged after it is forgotten."""
    checkpoint, broken = run.newest_checkpoint()
    if is_main_process():
        for scratch in (run.path / "checkpoints").glob("*.tmp"):
            scratch.unlink()
        for path in broken:
            print(f"warning: {path.name} is truncated; falling back to {checkpoint or 'the start'}")
            path.rename(path.with_suffix(".truncated"))
    files.rewind(0 if checkpoint is None else int(checkpoint.stem.removeprefix("step_")))
    return None if checkpoint is None else str(checkpoint)


def _resumed(
    cfg: DictConfig, overrides: Sequence[str]
) -> tuple[RunDirectory, DictConfig, list[str]]:
    """The run to go on with, under its own config and what the user may change."""
    run = RunDirectory.existing(cfg.resume)
    words = [word for word in overrides if not word.startswith("resume=")]
    wanted = compose(*run.overrides, *words) if words else run.config
    before = _saved_config(run)
    after: Any = OmegaConf.to_container(wanted, resolve=True)
    if changed := differences(before, after):
        raise ConfigError(
            f"resume={cfg.resume}: that run has another config; it would not be the same run:\n  "
            + "\n  ".join(changed)
        )
    wanted.resume = None
    return run, wanted, [*run.overrides, *words]


def _check_corpus(run: RunDirectory, data: Any) -> None:
    """Refuses to go on with other text than the newest checkpoint was trained on."""
    path, _ = run.newest_checkpoint()
    if path is None:
        return
    was = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["corpus"]
    if changed := differences(was, assemble.corpus_identity(data)):
        raise ConfigError(
            "data: not the text that the run was trained on:\n  " + "\n  ".join(changed)
        )


def _saved_config(run: RunDirectory) -> Any:
    """What the newest checkpoint was trained with; before there is one, what was asked for."""
    path, _ = run.newest_checkpoint()
    if path is None:
        return OmegaConf.to_container(run.config, resolve=True)
    return torch.load(path, weights_only=True, mmap=True, map_location="cpu")["config"]


def _hold(run: RunDirectory, held: contextlib.ExitStack) -> None:
    if is_main_process():
        held.enter_context(run.held())


def _new_run(cfg: DictConfig, overrides: Sequence[str]) -> RunDirectory:
    if not is_main_process():  # the first process makes it, and may have told us
        path = cfg.run_dir or os.environ.get(_RUN_DIR)
        if not path:
            raise ConfigError("run_dir: several processes were started at once; give run_dir=...")
        run, deadline = RunDirectory(Path(path).expanduser().resolve()), time.time() + _PATIENCE
        while not (run.path / "config.yaml").is_file():  # the last file that it writes at first
            if time.time() > deadline:
                raise ConfigError(f"run_dir={path}: the first process has not begun the run there")
            time.sleep(0.1)
        return run
    run = RunDirectory.new(Path(cfg.paths.output_dir), cfg.name, overrides, cfg.run_dir)
    if not cfg.run_dir:
        os.environ[_RUN_DIR] = str(run.path)
    return run


def _finish_wandb(run: RunDirectory) -> None:
    if "wandb" not in sys.modules:
        return
    import wandb

    state = (run.read_json("status.json") or {}).get("state")
    with contextlib.suppress(ConnectionError):  # SLURM may have ended its process
        if state == "preempted" and wandb.run is not None:
            wandb.run.mark_preempting()
        # else the next run of this process would write into this one's
        wandb.finish(exit_code=0 if state == "done" else 1)
        if state == "preempted":
            wandb.teardown()  # its process, which would keep the job from ending
