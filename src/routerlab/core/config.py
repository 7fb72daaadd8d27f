"""Where the configs are, what they offer, and clear words for a wrong name.

Importing this module imports neither hydra nor torch, so that the command line answers at once.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

_NO_ROUTER = "native"  # leaves a pretrained model its own: a choice, and no router of ours
_user_dirs: list[Path] = []


class ConfigError(ValueError):
    """A wrong name or value in a config: its message is for the user, no traceback needed."""


def config_dir() -> Path:
    """The config root: ``configs/`` of the repository, or the copy inside an installed wheel."""
    repository = Path(__file__).resolve().parents[3] / "configs"
    if (repository / "train.yaml").is_file():
        return repository
    return Path(__file__).resolve().parents[1] / "configs"


def user_dirs() -> tuple[Path, ...]:
    """Directories that the user added with `use_directory`."""
    return tuple(_user_dirs)


def use_directory(directory: str | Path) -> None:
    """Adds a directory of the user's: its groups (``router/mine.yaml``) join ours, and python files
    in it can be named in ``_target_``.
    """
    path = Path(directory).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"config directory {str(directory)!r}: no such directory")
    if path not in _user_dirs:
        _user_dirs.append(path)
        sys.path.insert(0, str(path))


def available(group: str) -> list[str]:
    """Names in a config group, for example of every router of ours."""
    return sorted(_names(group) - ({_NO_ROUTER} if group == "router" else set()))


def _names(group: str) -> set[str]:
    roots = [config_dir(), *_user_dirs]
    if not any((root / group).is_dir() for root in roots):
        groups = {p.name for root in roots for p in root.iterdir() if p.is_dir()}
        raise ConfigError(f"no config group {group!r}; {nearest(group, groups)}")
    names = {p.stem for root in roots for p in (root / group).glob("*.yaml")}
    return {name for name in names if not name.startswith("_")}


def describe(group: str, name: str) -> str:
    """The first comment line of a config file: what it is, in one sentence."""
    for root in (*_user_dirs, config_dir()):
        path = root / group / f"{name}.yaml"
        if path.is_file():
            comments = (line for line in path.read_text().splitlines() if line.startswith("#"))
            return next((c.lstrip("# ") for c in comments if "@package" not in c), "")
    raise ConfigError(f"no {group} {name!r}; {nearest(name, available(group))}")


def nearest(name: str, names: Iterable[str]) -> str:
    """``did you mean ...`` with close matches, or the list of names where none is close."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"available: {', '.join(names)}"


def compose(*overrides: str, config_name: str = "train") -> "DictConfig":
    """The same config as the command line makes of these overrides."""
    try:
        return _compose(config_name, overrides)
    except Exception as error:
        if (message := explain(error, overrides)) is not None:
            raise ConfigError(message) from error
        raise


def quoted(text: str) -> str:
    """Text as the value of an override, whatever is in it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """The file that these overrides choose from each config group: ``{"router": "hash", ...}``;
    groups of several files (losses) and of none are left out.
    """
    cfg = _compose("train", overrides, return_hydra_config=True)
    found = {str(group): name for group, name in cfg.hydra.runtime.choices.items()}
    ours = {group for group in found if "/" not in group and "@" not in group} - {"hydra", "local"}
    return {group: found[group] for group in sorted(ours) if isinstance(found[group], str)}


def explain(error: Exception, overrides: Sequence[str]) -> str | None:
    """What a hydra error means, with the nearest right names; None if it is not hydra's."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group:
            return f"{group}={name}: no such config; {nearest(name, _names(group))}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    wrong = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", str(error))
    if wrong is None:
        return str(error) or str(error.__cause__)
    key = wrong[1] or wrong[2]
    last = key.rsplit(".", 1)[-1]
    keys = _known_keys(overrides)
    if key in keys and "append to your config" in str(error):  # a mapping without that name
        return f"{key}: takes new names only as +{key}.NAME=VALUE"
    close = [k for k in keys if k.rsplit(".", 1)[-1] == last and k != key]
    hint = f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else nearest(key, keys)
    if hint.startswith("available"):
        siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
        hint = nearest(key, siblings or [k for k in keys if "." not in k])
    return f"{key}: no such key; {hint}"


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """Dotted keys of the config with the group choices among ``overrides`` that compose."""
    from omegaconf import OmegaConf

    choices = [word for word in overrides if re.match(r"^[a-z_]+=[\w\[\],]+$", word)]
    for words in (choices, []):
        try:
            plain = OmegaConf.to_container(_compose("train", words), resolve=False)
            return [*_dotted(plain), *_groups()]
        except Exception:  # one of the choices is itself wrong: describe the default config
            continue
    return _groups()


def _compose(
    config_name: str, overrides: Sequence[str], return_hydra_config: bool = False
) -> "DictConfig":
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():  # inside a running job
        return hydra_compose(config_name, list(overrides), return_hydra_config)
    search = ",".join(f"file://{path}" for path in _user_dirs)
    more = [f"hydra.searchpath=[{search}]"] if search else []
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return hydra_compose(config_name, [*overrides, *more], return_hydra_config)


def _groups() -> list[str]:
    return [path.name for path in config_dir().iterdir() if path.is_dir()]


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        keys += [f"{prefix}{key}", *_dotted(value, f"{prefix}{key}.")]
    return keys
