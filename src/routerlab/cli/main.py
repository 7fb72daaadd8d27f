"""``routerlab <command>``: finds the command and hands over."""

import importlib
import os
import sys
from collections.abc import Sequence

from routerlab.core.config import ConfigError, nearest, use_directory
from routerlab.core.errors import NonFiniteLossError

# word -> (module with main(argv) -> exit code, one line)
COMMANDS = {
    "train": ("routerlab.cli.train", "train a run, go on with one (resume=DIR), or many (-m)"),
    "eval": ("routerlab.cli.evaluate", "validate the newest checkpoint of a run (run=DIR)"),
    "compare": ("routerlab.cli.compare", "runs side by side, and whether that is fair (PATH...)"),
    "routers": ("routerlab.cli.routers", "list the routers"),
    "adapters": ("routerlab.cli.adapters", "list what a pretrained model is fine-tuned with"),
    "certify": ("routerlab.certify.command", "check a router against its contract (router=NAME)"),
    "import": ("routerlab.cli.import_model", "turn a MoE of transformers into a decoder of ours"),
    "export": ("routerlab.cli.export", "turn a decoder of ours into a model of transformers"),
    "upcycle": ("routerlab.cli.upcycle", "turn a dense model of transformers into a MoE of ours"),
    "audit-loss": (
        "routerlab.cli.audit_loss",
        "what other frameworks' balancing losses say of a routing",
    ),
    "simulate": ("routerlab.cli.simulate", "what expert parallelism would cost (layer or model)"),
    "wandb-view": ("routerlab.cli.wandb_view", "a view of W&B for routers (ENTITY/PROJECT)"),
    "bench": ("routerlab.bench.command", "measure the MoE layer, routers, adapters, training"),
    "doctor": ("routerlab.cli.doctor", "look at this machine and run a self-test"),
}

_HELP = """\
routerlab: a laboratory for mixture-of-experts routers

usage: routerlab COMMAND [OPTION ...]

{commands}

  routerlab train experiment=quickstart            train on real text and write a report
  routerlab train experiment=quickstart router.top_k=1 router.normalize_weights=false
  routerlab train experiment=remix_quickstart      fine-tune a language model with LoRA experts
  routerlab train experiment=roma_quickstart       tune the routers of a pretrained model
  routerlab train -m router=hash,switch seed=0,1   train all of them; the same command goes on
  routerlab train sweep=routers --dry-run          the jobs of a sweep file, and their cost
  routerlab train -m --help                        sweeps: --trials, --search, launcher=slurm
  routerlab train --cfg job                        show the whole config
  routerlab train --config-dir my_lab router=mine  use your own router
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command named by the first word; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)), end="")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        print(f"routerlab: no command {command!r}; {nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        for directory in _config_dirs(rest):
            use_directory(directory)
        return importlib.import_module(COMMANDS[command][0]).main(rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        return _fail(1, f"error: {error}", error)
    except KeyboardInterrupt as error:
        return _fail(130, "interrupted", error)
    except (ValueError, OSError) as error:  # a constructor or a file refused
        if os.environ.get("ROUTERLAB_TRACEBACK"):
            raise
        error.add_note("(set ROUTERLAB_TRACEBACK=1 to see where)")
        return _fail(2, f"error: {error}", error)


def _fail(code: int, message: str, error: BaseException) -> int:
    """Prints the message and what the run added to the error; returns the code."""
    print("\n  ".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr)
    return code


def _config_dirs(words: Sequence[str]) -> list[str]:
    """Values of ``--config-dir``, of which hydra knows but our imports must know too."""
    found = [w.split("=", 1)[1] for w in words if w.startswith("--config-dir=")]
    for name, value in zip(words, words[1:], strict=False):
        if name in ("--config-dir", "-cd"):
            found.append(value)
    return found


if __name__ == "__main__":
    sys.exit(main())
