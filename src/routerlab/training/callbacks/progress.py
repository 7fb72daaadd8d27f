"""Progress in a terminal, or as plain lines in a log."""

import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from routerlab.objectives.routed import RoutedObjective


class ProgressDisplay(pl.Callback):
    """Step, loss, bits per byte or accuracy, tokens per second, load, entropy and the time left.

    A bar in a terminal; elsewhere one line every ``seconds``.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds={seconds}: must be above 0")
        self.seconds = seconds
        self.console = Console()
        self._bar: Progress | None = None
        self._loss, self._text = "", ""
        self._printed, self._seen = 0.0, (0.0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar at the step where training begins."""
        self._seen = (time.perf_counter(), trainer.global_step)
        if trainer.is_global_zero and self.console.file.isatty():  # FORCE_COLOR is no terminal
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(
                "train", total=trainer.max_steps, completed=trainer.global_step, text=""
            )
            self._bar.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Shows the step."""
        if not trainer.is_global_zero:
            return
        now, last = time.perf_counter(), trainer.global_step == trainer.max_steps
        line = self._bar is None and (now - self._printed >= self.seconds or last)
        if outputs["due"]:
            speed = outputs["scalars"].get("train/tokens_per_second", 0.0)
            self._text = f"  {speed:,.0f} tok/s" + _routing(outputs["scalars"])
        if outputs["due"] or line:  # not every step: this waits for the device
            self._loss = f"loss {float(outputs['loss']):.3f}"
        text = self._loss + self._text
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, text=text)
        if line:
            self._printed = now
            then, first = self._seen
            pace = (now - then) / max(1, trainer.global_step - first)
            left = pace * (trainer.max_steps - trainer.global_step)
            print(
                f"step {trainer.global_step}/{trainer.max_steps}  {text}  {left:.0f} s left",
                flush=True,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the validation result on a line of its own."""
        assert isinstance(pl_module, RoutedObjective)
        scalars, _ = pl_module.validation_result
        if trainer.is_global_zero and trainer.state.fn == "fit":  # the headline comes after it
            line = f"step {trainer.global_step}  validation {_score(scalars)}"
            line += _routing(scalars, "val/router")
            self.console.print(line, highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error can be read."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _score(scalars: dict[str, float]) -> str:
    if "val/accuracy" in scalars:
        return f"accuracy {scalars['val/accuracy']:.1%}, loss {scalars['val/loss']:.3f}"
    return f"{scalars['val/bits_per_byte']:.3f} bits per byte"


def _routing(scalars: dict[str, float], prefix: str = "router") -> str:
    shown = {"max_violation": "max violation", "mean_entropy": "entropy"}
    parts = [
        f"  {word} {scalars[f'{prefix}/mean/{name}']:.2f}"
        for name, word in shown.items()
        if f"{prefix}/mean/{name}" in scalars
    ]
    return "".join(parts)
