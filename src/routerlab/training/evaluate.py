"""Models on held-out data, outside of training: a finished run's, and the base of a new one."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError
from routerlab.training import assemble, rerouted
from routerlab.training.checks import check_trainer
from routerlab.training.initial import started
from routerlab.training.run_directory import RunDirectory


def load_objective(
    run: RunDirectory, checkpoint: str | None = None, cfg: DictConfig | None = None
) -> tuple[Any, Any, Path]:
    """The objective with a checkpoint's weights, its data, and which checkpoint it was."""
    cfg = started(run.config if cfg is None else cfg, run)
    path = Path(checkpoint) if checkpoint else run.newest_checkpoint()[0]
    if path is None or not path.is_file():
        raise ConfigError(f"checkpoint {checkpoint or 'of ' + str(run.path)!r}: there is none")
    data = assemble.build_data(cfg)
    objective = assemble.build_objective(cfg, data)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    objective.load_state_dict(saved["state_dict"])
    objective.loaded_step = saved["global_step"]
    objective.schedules.apply(min(1.0, saved["global_step"] / cfg.trainer.max_steps))
    return objective, data, path


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Validates the run ``cfg.run``; the metrics, also written to ``evaluation.json`` there.

    Text: ``cfg.max_val_windows`` held-out windows. Tasks: the items of the run's last evaluation,
    or the first ``cfg.max_items`` of their split. With ``cfg.test_time`` it is validated twice, and
    ``test_time`` holds the metrics under changed routing and their cost; of windows of text only
    what follows the first ``cfg.prompt_share`` counts, both times.
    """
    assemble.quiet()
    run = RunDirectory.existing(cfg.run)
    own = run.config
    OmegaConf.set_struct(own, False)
    own.trainer.update(devices=1, num_nodes=1, strategy="auto")  # however it was trained
    if "max_val_windows" in own.data:
        own.data.max_val_windows = cfg.max_val_windows
    if "final_val_items" in own.data and cfg.max_items is not None:
        own.data.final_val_items = cfg.max_items
    plug_in = rerouted.plug_in_of(cfg)
    if plug_in is not None:
        own.trainer.inference_mode = False  # whose tensors know no gradients
        if "keep_trunk" in own.backbone:
            own.backbone.keep_trunk = False  # it would make the second evaluation the cheaper one
    objective, data, path = load_objective(run, cfg.checkpoint, own)
    if assemble.has_tasks(data):
        assemble.use_final(data)
    check_trainer(own)
    trainer = assemble.build_trainer(own, run.path, [], [])
    held_out: dict[str, Any] = {"datamodule": data}
    if plug_in is not None:
        held_out = rerouted.with_prompts(cfg, data, trainer)

    def validate() -> float:
        return rerouted.timed(lambda: trainer.validate(objective, **held_out, verbose=False))

    seconds = validate()
    metrics, distributions = objective.validation_result
    result = {"checkpoint": str(path), "metrics": metrics, "distributions": distributions}
    if plug_in is not None:
        changed = rerouted.validate_rerouted(cfg, plug_in, run, objective, data, validate)
        result |= {"seconds": seconds, "test_time": changed}
    file = run.path / "evaluation.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return result | {"file": str(file)}


def evaluate_base(cfg: DictConfig, run: RunDirectory, data: Any, objective: Any) -> None:
    """The last evaluation of the run ``cfg``, before its first step, to ``base.json``. An adapter
    is off: one that starts from trained experts is not the base model. A resumed run has the file.
    """
    if run.read_json("base.json") is not None:
        return
    held_out = copy.copy(data)  # training goes on with the items of its own validations
    assemble.use_final(held_out)
    trainer = assemble.build_trainer(cfg, run.path, [], [])
    adapted = getattr(objective.backbone, "model", None)
    with getattr(adapted, "disable_adapter", nullcontext)():
        trainer.validate(objective, datamodule=held_out, verbose=False)
    if trainer.is_global_zero:
        run.write_json("base.json", objective.validation_result[0])
