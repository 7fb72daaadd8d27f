"""Where numbers go: plain files in the run directory, and Weights & Biases."""

import csv
import json
import os
import socket
from collections.abc import Mapping
from hashlib import sha1
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from routerlab.core.instantiate import partial
from routerlab.training.run_directory import RunDirectory

Distributions = Mapping[str, list]


def build_loggers(cfg: DictConfig, run: RunDirectory, ahead: str) -> list[Any]:
    """The loggers of a config; ``ahead``: whether its routing looks at later tokens, and when."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    router = cfg.router["_target_"].rsplit(".", 1)[-1] if cfg.get("router") else "no router"
    tags = run.overrides if ahead == "no" else [f"looks ahead {ahead}", *run.overrides]
    shared = {"directory": run.path, "config": settings, "job_type": router, "tags": tags}
    return [partial(node)(**shared) for node in (cfg.get("logger") or {}).values()]


class MetricsFiles(Logger):
    """``metrics.csv`` (a row a step, a column a scalar) and ``distributions.jsonl`` (the rest).

    Every row is written when the call returns. A resumed run first forgets what came after its
    checkpoint (`rewind`), so that recomputed steps appear once.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.metrics, self.distributions = (
            directory / "metrics.csv",
            directory / "distributions.jsonl",
        )
        self._columns: list[str] = []
        if self.metrics.is_file():
            with self.metrics.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def name(self) -> str:
        """``files``."""
        return "files"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the whole config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row; a scalar not seen before adds a column to the whole file."""
        new = [key for key in metrics if key not in self._columns]
        if new:
            rows = self.rows()
            self._columns = [*(self._columns or ["step"]), *new]
            self._rewrite(rows)
        with self.metrics.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({"step": step} | {k: repr(float(v)) for k, v in metrics.items()})

    @rank_zero_only
    def log_distributions(self, distributions: Distributions, step: int) -> None:
        """Appends one JSON object a line: step, name, value (nested lists)."""
        with self.distributions.open("a") as file:
            for name, value in distributions.items():
                file.write(json.dumps({"step": step, "name": name, "value": value}) + "\n")

    def rows(self) -> list[dict[str, str]]:
        """The whole rows of ``metrics.csv``; a line torn by a crash is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return [row for row in csv.DictReader(whole) if None not in row.values()]

    def has(self, step: int, key: str) -> bool:
        """Whether ``key`` has a value at ``step``."""
        return any(row["step"] == str(step) and row.get(key) for row in self.rows())

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forgets everything after optimizer step ``step``."""
        if not self.metrics.is_file():
            return
        self._rewrite([row for row in self.rows() if int(row["step"]) <= step])
        if self.distributions.is_file():
            lines = self.distributions.read_text().splitlines(keepends=True)
            kept = [ln for ln in lines if ln.endswith("\n") and json.loads(ln)["step"] <= step]
            _replace(self.distributions, "".join(kept))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        scratch = self.metrics.with_suffix(".tmp")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        scratch.replace(self.metrics)


class Wandb(WandbLogger):
    """Weights & Biases, offline unless a key is set and the server answers; never a prompt.

    Scalars keep their path-like keys. Training sends means over layers, and single layers only
    while ``max_keys`` allows it, so that a deep model does not flood the page; the CSV always has
    all. Distributions over experts become histograms, and at validation a layer-by-expert heat map
    and an expert-by-domain table.
    """

    def __init__(
        self,
        directory: Path,
        project: str = "routerlab",
        max_keys: int = 200,
        config: dict[str, Any] | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        if max_keys < 1:
            raise ValueError(f"max_keys={max_keys}: must be at least 1")
        import wandb

        self.max_keys = max_keys
        super().__init__(
            project=project,
            name=directory.name[:200],
            id=sha1(str(directory).encode()).hexdigest()[:8],  # a restart continues the run
            save_dir=str(directory),
            mode=wandb_mode(),
            resume="allow",
            config=config,
            job_type=job_type,
            tags=[tag[:64] for tag in tags or []],
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

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends scalars, single layers only up to ``max_keys``."""
        super().log_metrics(capped(metrics, self.max_keys), step)

    @rank_zero_only
    def log_distributions(self, distributions: Distributions, step: int) -> None:
        """Sends histograms of expert loads; at validation also heat maps."""
        import numpy as np
        import wandb

        loads = {k: v for k, v in distributions.items() if k.endswith("/expert_load")}
        row: dict[str, Any] = {"trainer/global_step": step}
        for name, load in list(loads.items())[: self.max_keys]:
            edges = np.arange(len(load) + 1)
            row[name] = wandb.Histogram(np_histogram=(np.asarray(load), edges))
        if any(name.startswith("val/") for name in loads) and _same_length(loads):
            image = heat_map(np.asarray(list(loads.values())))
            row["val/router/load_by_layer_and_expert"] = wandb.Image(image)
        for name, table in distributions.items():
            if name.endswith("/expert_by_domain") and len(row) < self.max_keys:
                row[name] = wandb.Image(heat_map(np.asarray(table)))
        if len(row) > 1:
            self.experiment.log(row)


def capped(metrics: Mapping[str, float], max_keys: int) -> dict[str, float]:
    """``metrics``, without those of single layers if there are more than ``max_keys``."""
    if len(metrics) <= max_keys:
        return dict(metrics)
    return {key: value for key, value in metrics.items() if "/layers." not in key}


def wandb_mode() -> str:
    """``WANDB_MODE`` if it is not online; else online if there is a key and the server answers in
    3 s; else offline. W&B itself would prompt without a key and wait without a network.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return mode
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not (os.environ.get("WANDB_API_KEY") or _netrc_has(address.hostname)):
        return "offline"
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


def _netrc_has(host: str | None) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc(path).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False


def heat_map(table: Any) -> Any:
    """A [rows, experts] table as an RGB image: white is an even share, red more, blue less."""
    import numpy as np
    from PIL import Image

    share = table / np.clip(table.mean(axis=1, keepdims=True), 1e-12, None)
    above, below = np.clip(share - 1, 0, 1), np.clip(1 - share, 0, 1)
    rgb = np.stack([1 - below, 1 - np.maximum(above, below), 1 - above], axis=-1)
    image = Image.fromarray((255 * rgb).astype(np.uint8))
    return image.resize((24 * table.shape[1], 24 * table.shape[0]), Image.Resampling.NEAREST)


def _same_length(loads: Distributions) -> bool:
    return len({len(load) for load in loads.values()}) == 1


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)
