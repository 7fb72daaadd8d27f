"""A validation that a crash cut off."""

import lightning.pytorch as pl

from routerlab.training.loggers import MetricsFiles


class MissedValidation(pl.Callback):
    """Validates at the start of a resumed run whose checkpoint was saved just before a validation.

    Lightning saves first and validates then; killed in between, a resumed run would skip it.
    """

    def __init__(self, files: MetricsFiles) -> None:
        self.files = files

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs the validation loop once, if its row is missing."""
        step, every = trainer.global_step, trainer.val_check_interval
        if not step or not isinstance(every, int) or step % every or self._is_there(trainer, step):
            return
        trainer.validating = True
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # from its first batch
        loop.run()
        trainer.training = True

    def _is_there(self, trainer: pl.Trainer, step: int) -> bool:
        there = trainer.is_global_zero and self.files.has(step, "val/loss")
        return trainer.strategy.reduce_boolean_decision(there, all=False)
