"""Runs as Weights & Biases keeps them."""

from functools import cache
from typing import Any

import pandas as pd

from routerlab.comparison.runs import BrokenRunError, Run
from routerlab.core.config import ConfigError
from routerlab.core.identity import flat

_TIMEOUT = 30  # seconds, of one request
_STEP = "trainer/global_step"
_STATES = {"finished": "done", "crashed": "cut", "killed": "cut", "preempting": "preempted"}


def load_wandb(path: str, group: str | None) -> tuple[list[Run], list[str]]:
    """The runs of ``entity/project`` on the server, of one group if given, and one sentence for
    each that cannot be read.

    Raises `ConfigError` without a key, without a network, and for what the server refuses.
    """
    if path.count("/") != 1 or not all(path.split("/")):
        raise ConfigError(f"--wandb {path}: must be entity/project")
    from routerlab.training.weights_and_biases import wandb_mode

    if wandb_mode() != "online":
        raise ConfigError(
            f"--wandb {path}: needs a key (wandb login, or WANDB_API_KEY), a server that answers, "
            "and WANDB_MODE unset or online; run directories can be compared without"
        )
    import wandb

    runs, warnings = [], []
    try:
        api = wandb.Api(timeout=_TIMEOUT)
        for found in api.runs(path, filters={"group": group} if group else {}, lazy=False):
            try:
                runs.append(from_wandb(found))
            except BrokenRunError as error:
                warnings.append(f"{path}/{found.name} is skipped: {error}")
    except (wandb.Error, ValueError, OSError) as error:
        raise ConfigError(f"--wandb {path}: {' '.join(str(error).split())}") from error
    if not runs:
        where = f"{path}, group {group}" if group else path
        raise ConfigError(f"--wandb {where}: no runs of routerlab there")
    return runs, warnings


def from_wandb(run: Any) -> Run:
    """A run of the W&B client's ``Api`` as ours; its history is fetched when it is asked for."""
    config = {key: value for key, value in run.config.items() if key != "choices"}
    config = flat(config)
    if not isinstance(config.get("seed"), int):
        raise BrokenRunError("its config gives no seed, so it is not a run of routerlab")
    summary = run.summary_metrics
    final = {k.removeprefix("final/"): v for k, v in summary.items() if k.startswith("final/")}
    return Run(
        name=run.name,
        path=None,
        config=config,
        choices=dict(run.config.get("choices") or {}),
        state=_STATES.get(str(run.state), str(run.state)),
        summary={k: v for k, v in summary.items() if "/" not in k} | {"val": final},
        environment={},
        at=str(getattr(run, "created_at", "")),
        history=cache(lambda: _history(run)),
    )


def _history(run: Any) -> pd.DataFrame:
    """A row a call of the logger, as in metrics.csv: all rows, for the server would sample."""
    rows = [
        {key: value for key, value in row.items() if isinstance(value, int | float)}
        for row in run.scan_history()
    ]
    frame = pd.DataFrame([row for row in rows if _STEP in row], dtype=float)
    if frame.empty:
        return pd.DataFrame({"step": pd.Series(dtype=float)})
    frame = frame.rename(columns={_STEP: "step"})
    return frame.filter(["step", *(c for c in frame if c != "step" and str(c)[0] != "_")])
