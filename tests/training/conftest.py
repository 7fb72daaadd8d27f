"""Small fine-tuning runs: a tiny base model in a folder and two tasks of a few items."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.language_models import save_tiny

TINY_TASKS = (
    "experiment=finetune",
    "data=jsonl",
    "data.max_length=48",
    "data.batch_size=4",
    "data.val_batch_size=8",
    "data.val_items=6",
    "data.test_items=8",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "callback.checkpoint.every_n_steps=2",
    "objective.log_every=1",
    "optimizer.warmup_steps=0",
    "trainer.accelerator=cpu",
    "trace_sequences=4",
    "logger=[]",
)
REMIX = ("adapter=remix", "adapter.r=2", "adapter.num_experts=4", "adapter.top_k=2")
LORA = "+baselines.lora=['adapter=lora','adapter.r=4','adapter.lora_alpha=8']"


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One task of choosing, one of generating."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [f"{a}{b}" for a in "abcdefgh" for b in "aeiou"]
    vowel = [
        {"prompt": f"{w}: begins with a vowel?", "answer": "yes" if w[0] in "ae" else "no",
         "options": ["yes", "no"]} for w in words
    ]  # fmt: skip
    double = [{"prompt": f"twice {i} =", "answer": str(2 * i)} for i in range(40)]
    files = {"vowel": folder / "vowel.jsonl", "double": folder / "double.jsonl"}
    for path, items in zip(files.values(), (vowel, double), strict=True):
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return files


@pytest.fixture(scope="session")
def task_words(
    task_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Command-line words of a fine-tuning run of seconds, with any others added."""
    base = save_tiny(tmp_path_factory.mktemp("base"))
    cache, outputs = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("tuned")
    tasks = ", ".join(f"{name}: {path}" for name, path in task_files.items())
    where = [
        f"backbone.path={base}",
        f"data.tasks={{{tasks}}}",
        f"paths.cache_dir={cache}",
        f"paths.output_dir={outputs}",
    ]

    def words(*more: str) -> list[str]:
        return [*TINY_TASKS, *where, *more]

    return words


@pytest.fixture(scope="session")
def tune(task_words: Callable[..., list[str]]) -> Callable[..., Path]:
    """Fine-tunes a tiny base model in this process; returns the run directory."""

    def run(*more: str) -> Path:
        from routerlab.core.config import compose
        from routerlab.training.train import train

        overrides = task_words(*more)
        return train(compose(*overrides), overrides).path

    return run


@pytest.fixture(scope="session")
def tuned_run(tune: Callable[..., Path]) -> Path:
    """ReMix beside a LoRA, finished, to look at and not to change."""
    return tune("name=tuned", *REMIX, LORA)
