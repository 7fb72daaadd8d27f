"""Many run directories from one: other routers and seeds, and curves as long as wanted."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from routerlab.core.config import compose

_CURVES = 4  # different ones; runs share their files, as the reader does not know


def generate(
    template: Path, folder: Path, runs: int, steps: int, routers: Sequence[str], seed: int
) -> None:
    """``runs`` directories below ``folder`` that look like the finished run ``template``, of each
    router about the same number. Each has logged ``steps`` rows of training in the columns of
    ``template``, and about a hundred validations.
    """
    generator = np.random.default_rng(seed)
    files = [folder / f"curves_{number}.csv" for number in range(_CURVES)]
    folder.mkdir(parents=True)
    columns = list(pd.read_csv(template / "metrics.csv", nrows=0).columns)
    for file in files:
        _curves(columns, steps, generator).to_csv(file, index=False)
    summary = json.loads((template / "summary.json").read_text())
    config: Any = OmegaConf.load(template / "config.yaml")
    choices: Any = OmegaConf.load(template / "choices.yaml")
    for number in range(runs):
        router, run = routers[number % len(routers)], folder / f"run_{number:04d}"
        run.mkdir()
        config.seed, choices.router = number // len(routers), router
        config.router = compose(f"router={router}").router
        OmegaConf.save(config, run / "config.yaml")
        OmegaConf.save(choices, run / "choices.yaml")
        val = summary["val"] | {"bits_per_byte": float(generator.normal(2.0, 0.1))}
        (run / "summary.json").write_text(json.dumps(summary | {"name": run.name, "val": val}))
        for name in ("status.json", "environment.json", "overrides.yaml"):
            shutil.copy(template / name, run / name)
        os.link(files[number % _CURVES], run / "metrics.csv")
        (run / "traces").mkdir()
        for trace in (template / "traces").iterdir():
            os.link(trace, run / "traces" / trace.name)
    for file in files:
        file.unlink()


def _curves(columns: Sequence[str], steps: int, generator: np.random.Generator) -> pd.DataFrame:
    """Falling noise in every column but ``step``; validations in rows of their own, as in a run."""
    of_val = [name for name in columns if name.startswith("val/")]
    of_train = [name for name in columns if name not in (*of_val, "step")]
    fall = np.exp(-np.arange(steps) / steps)[:, None]
    train = fall + 0.01 * generator.standard_normal((steps, len(of_train)))
    every = slice(None, None, max(1, steps // 100))
    val = fall[every] + 0.01 * generator.standard_normal((len(fall[every]), len(of_val)))
    step = np.arange(1, steps + 1)
    rows = [
        pd.DataFrame(train, columns=of_train).assign(step=step),
        pd.DataFrame(val, columns=of_val).assign(step=step[every]),
    ]
    found = pd.concat(rows).sort_values("step", kind="stable")
    return found.reindex(columns=list(columns))
