"""Small real text and small runs, for every test that trains."""

import os
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["WANDB_MODE"] = "offline"

TINY = (
    "data=files",
    "data.seq_len=32",
    "data.batch_size=8",
    "data.val_batch_size=8",
    "data.max_val_windows=16",
    "backbone.d_model=32",
    "backbone.num_layers=2",
    "backbone.num_heads=2",
    "backbone.num_kv_heads=1",
    "backbone.d_ff=32",
    "backbone.num_experts=4",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "callback.checkpoint.every_n_steps=2",
    "objective.log_every=1",
    "trainer.accelerator=cpu",
    "trace_sequences=4",
)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two domains of real text that every python brings: prose about python, and python."""
    folder = tmp_path_factory.mktemp("text")
    prose, code = folder / "prose.txt", folder / "code.txt"
    prose.write_text("\n\n".join(pydoc_data.topics.topics.values())[:60_000])
    code.write_text(Path(os.__file__).read_text()[:60_000])
    return {"prose": prose, "code": code}


@pytest.fixture(scope="session")
def tiny_words(
    text_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Command-line words of a run of seconds, with any others added."""
    cache, outputs = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("outputs")
    domains = ", ".join(f"{name}: {path}" for name, path in text_files.items())
    where = [
        f"data.domains={{{domains}}}",
        f"paths.cache_dir={cache}",
        f"paths.output_dir={outputs}",
    ]

    def words(*more: str, logger: str = "logger=[]") -> list[str]:
        return [*TINY, *where, logger, *more]

    return words


@pytest.fixture(scope="session")
def train(tiny_words: Callable[..., list[str]]) -> Callable[..., Path]:
    """Trains a tiny run in this process; returns its directory."""

    def run(*more: str, words: Sequence[str] | None = None, logger: str = "logger=[]") -> Path:
        from routerlab.core.config import compose
        from routerlab.training.train import train as start

        overrides = tiny_words(*more, logger=logger) if words is None else list(words)
        return start(compose(*overrides), overrides).path

    return run


@pytest.fixture(scope="session")
def finished_run(train: Callable[..., Path]) -> Path:
    """One finished run with everything switched on, to look at and not to change."""
    return train("name=finished", logger="logger=[wandb]")
