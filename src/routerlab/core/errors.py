"""Errors that end a run and that the command line tells in words."""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite; the optimizer step was not taken."""
