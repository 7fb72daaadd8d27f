"""Runs a task function as a hydra application, with errors in words for users."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from routerlab.core.config import ConfigError, config_dir, explain


def run(
    command: str, config_name: str, words: Sequence[str], task: Callable[[Any, list[str]], Any]
) -> Any:
    """Calls ``task(cfg, overrides)`` for the job that ``words`` compose (``-m``: for each job).

    A job is one process of its own for lightning's DDP launcher, which starts the others by
    ``sys.argv``: each job therefore sees the words that lead to it alone.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    program = sys.argv[0]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise, instead of printing and exiting

    def job(cfg: Any) -> Any:
        overrides = list(HydraConfig.get().overrides.task)
        folders = [w for d in _config_dirs() for w in ("--config-dir", d)]
        sys.argv = [program, command, *folders, *overrides, "hydra.mode=RUN"]
        return task(cfg, overrides)

    sys.argv = [f"routerlab {command}", *words]
    decorate = hydra.main(
        version_base="1.3", config_path=str(config_dir()), config_name=config_name
    )
    try:
        return decorate(job)()
    except ConfigError:
        raise
    except Exception as error:
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        if (message := explain(error, overrides)) is not None:
            raise ConfigError(message) from error
        raise
    finally:
        sys.argv = [program, command, *words]


def _config_dirs() -> list[str]:
    from routerlab.core.config import user_dirs

    return [str(path) for path in user_dirs()]
