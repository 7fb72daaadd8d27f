"""Weights & Biases: one run of ours as one of its runs, without prompts and without waiting."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha1
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from routerlab.core.checks import within
from routerlab.training.heat_map import heat_map
from routerlab.training.tracking import BEST, LOAD_MAP, STEP, wandb_mode

Distributions = Mapping[str, list]

# The server's limits, in characters. The client lets longer ones pass while it is offline, and such
# a run could not be uploaded later.
_NAME, _GROUP, _JOB_TYPE, _TAG = 128, 128, 64, 64
_MOST_TAGS = 20
_HEADLINE = (
    "steps", "tokens", "train_seconds", "tokens_per_second", "parameters", "flops_per_token",
    "looks_ahead",
)  # fmt: skip


class Wandb(WandbLogger):
    """Weights & Biases, offline unless a key is set and the server answers; never a prompt.

    Scalars keep their path-like keys. Training sends means over layers, and single layers only
    while ``max_keys`` allows it, so that a deep model does not flood the page; the CSV always has
    all. Expert loads become histograms; at validation there is also a layer-by-expert heat map, and
    a domain-by-expert one for each layer.

    Args:
        directory: of the run; the id is a hash of its path, so that a restart continues the run.
        project, entity: where the run goes; without an entity, to the default one of the key.
        tags: beside those that the command line gives.
        notes: free text on the run's page.
        max_keys: scalars of one call; beyond it single layers are left out.
        config: nested, and so its keys are found as ``router.top_k``. (W&B does not find a key that
            holds a dot itself.)
        group: of the sweep.
        job_type: the router.
    """

    def __init__(
        self,
        directory: Path,
        project: str = "routerlab",
        entity: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        max_keys: int = 200,
        config: dict[str, Any] | None = None,
        group: str | None = None,
        job_type: str | None = None,
    ) -> None:
        check_settings(project, entity, group, max_keys)
        import wandb

        self.max_keys = max_keys
        self._lost = False
        data = (config or {}).get("data") or {}
        self._domains = [str(name) for name in data.get("domains") or data.get("tasks") or ()]
        super().__init__(
            project=project,
            entity=entity,
            name=directory.name[:_NAME],
            id=sha1(str(directory).encode()).hexdigest()[:8],
            save_dir=str(directory),
            mode=wandb_mode(),
            resume="allow",
            config=config,
            group=group,
            job_type=None if job_type is None else job_type[:_JOB_TYPE],
            tags=list(dict.fromkeys(tag[:_TAG] for tag in tags or [] if tag))[:_MOST_TAGS],
            notes=notes,
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                disable_git=True,
                save_code=False,
                init_timeout=30,
                x_transaction_log_flush_interval=1.0,  # kill -9 loses a second, not a run
            ),
        )
        self._wandb_init.pop("anonymous", None)  # lightning passes it, wandb warns of it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of the client. Where the server refuses it or stops answering, it is an offline
        one: training goes on.
        """
        if self._experiment is not None:
            return self._experiment
        import wandb

        try:
            run = super().experiment
        except wandb.Error as error:
            print(f"warning: W&B goes on offline: {error}", file=sys.stderr)
            wandb.teardown()  # else the id counts as in use
            self._wandb_init["mode"] = "offline"
            run = super().experiment
        for key, best in BEST.items():
            run.define_metric(key, step_metric=STEP, summary=best)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends scalars, single layers only up to ``max_keys``."""
        with self._surviving():
            super().log_metrics(capped(metrics, self.max_keys), step)

    @rank_zero_only
    def log_distributions(self, distributions: Distributions, step: int) -> None:
        """Sends histograms of expert loads; of a validation also heat maps."""
        import numpy as np
        import wandb

        loads = {k: v for k, v in distributions.items() if k.endswith("/expert_load")}
        row: dict[str, Any] = {STEP: step}
        for name, load in list(loads.items())[: self.max_keys]:
            edges = np.arange(len(load) + 1)
            row[name] = wandb.Histogram(np_histogram=(np.asarray(load), edges))
        val_loads = {name.split("/")[-2]: v for name, v in loads.items() if name.startswith("val/")}
        if val_loads:
            image = heat_map(list(val_loads.values()), list(val_loads))
            row[LOAD_MAP] = _captioned(image, "layer")
        for name, table in distributions.items():
            of_validation = name.startswith("val/") and name.endswith("/expert_by_domain")
            if of_validation and len(row) < self.max_keys:
                row[name] = _captioned(heat_map(table, self._domains), "domain")
        if len(row) > 1:
            with self._surviving():
                self.experiment.log(row)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Training goes on without W&B's process. SLURM, for one, ends that while the run has yet
        to save.
        """
        try:
            yield
        except ConnectionError as error:
            if not self._lost:
                print(f"warning: W&B's process has ended ({error})", file=sys.stderr)
            self._lost = True

    @rank_zero_only
    def log_headline(self, summary: Mapping[str, Any], best: Mapping[str, float]) -> None:
        """Puts the headline of ``summary.json`` into the summary of the run: ``final/...`` of the
        last evaluation, parameters, cost; and the ``best`` value of each key of `BEST` over all
        restarts, where W&B knows of the last one alone.
        """
        final = {f"final/{k}": v for k, v in summary["val"].items() if isinstance(v, int | float)}
        cost = {key: summary[key] for key in _HEADLINE if summary.get(key) is not None}
        values = {key: {BEST[key]: value} for key, value in best.items()}
        self.experiment.summary.update(final | cost | values)


def check_settings(project: str, entity: str | None, group: str | None, max_keys: int) -> None:
    """Raises ValueError for what W&B would refuse, some of it only when an offline run is uploaded;
    the message begins with the name of what is wrong.
    """
    within("max_keys", max_keys, 1)
    for name, value in (("project", project), ("entity", entity)):
        wrong = sorted({char for char in value or "" if char in "/\\#?%:"})
        if wrong:
            raise ValueError(f"{name}={value!r}: must not contain {' '.join(wrong)}")
    for name, value, most in (
        ("project", project, _NAME), ("entity", entity, _NAME), ("group", group, _GROUP),
    ):  # fmt: skip
        if value is not None and not 1 <= len(value) <= most:
            raise ValueError(f"{name}={value!r}: must have 1 to {most} characters")


def capped(metrics: Mapping[str, float], max_keys: int) -> dict[str, float]:
    """``metrics``, without those of single layers if there are more than ``max_keys``."""
    if len(metrics) <= max_keys:
        return dict(metrics)
    return {key: value for key, value in metrics.items() if "/layers." not in key}


def _captioned(image: Any, rows: str) -> Any:
    import wandb

    words = f"a row a {rows}, a column an expert; white: an even share, red: twice or more, blue: 0"
    return wandb.Image(image, caption=words)
