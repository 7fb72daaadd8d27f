"""The processes of one run."""

from lightning.fabric.utilities.rank_zero import rank_zero_only


def is_main_process() -> bool:
    """Whether this process writes the files of its run: rank 0 does."""
    return getattr(rank_zero_only, "rank", 0) == 0
