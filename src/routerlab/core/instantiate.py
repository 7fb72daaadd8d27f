"""From config nodes to objects: the only caller of hydra's instantiate."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from routerlab.core.config import ConfigError, nearest, user_dirs

LIBRARIES = ("routerlab", "torch", "lightning", "transformers", "peft")


def build(node: DictConfig, **objects: Any) -> Any:
    """The object that a ``_target_`` node describes, from its own keys and ``objects``."""
    for key in node:
        if OmegaConf.is_missing(node, key) and key not in objects:
            raise ConfigError(f"{node._get_full_key(key)}: must be given a value")
    return partial(node)(**objects)


def partial(node: DictConfig) -> Callable[..., Any]:
    """The target with the node's keys filled in, still to be called with the rest."""
    import hydra.utils

    check_targets(node)
    plain = OmegaConf.create(OmegaConf.to_container(node, resolve=True))  # free of its parents
    made = hydra.utils.instantiate(plain, _partial_=True, _convert_="all")
    return functools.partial(made.func, *made.args, **made.keywords)  # hydra's re-checks per call


def build_all(nodes: DictConfig | None) -> dict[str, Any]:
    """Every object of a list group (losses, diagnostics, callbacks ...), by name."""
    return {str(name): build(node) for name, node in (nodes or {}).items()}


def check_targets(node: Any) -> None:
    """Refuses targets from elsewhere than the known libraries and the user's own directories, keys
    that the target does not take, and values of another type than it says.
    """
    if not isinstance(node, DictConfig):
        return
    for key in node:
        if not OmegaConf.is_missing(node, key):
            check_targets(node[key])
    if "_target_" not in node:
        return
    name = node["_target_"]
    top = name.split(".")[0]
    if top not in LIBRARIES and not _is_users(top):
        raise ConfigError(
            f"{node._get_full_key('_target_')}={name!r}: must come from {', '.join(LIBRARIES)}, "
            "or from a python file in a directory given with --config-dir"
        )
    accepted = parameters(locate(name))
    for key in map(str, node):
        if key.startswith("_"):
            continue
        place = node._get_full_key(key)
        if key not in accepted:
            hint = nearest(key, accepted)
            raise ConfigError(f"{place}: {name} has no such argument; {hint}")
        if not OmegaConf.is_missing(node, key) and not _fits(node[key], accepted[key]):
            wanted = getattr(accepted[key], "__name__", str(accepted[key]))
            raise ConfigError(f"{place}={node[key]!r}: must be {wanted}")


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a plain value has the annotated type; annotations other than plain types fit all."""
    options = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    plain = {int, float, bool, str, NoneType}
    if not plain.issuperset(options):
        return True
    if isinstance(value, bool):
        return bool in options
    return isinstance(value, options) or (isinstance(value, int) and float in options)


def locate(name: str) -> Any:
    import hydra.utils

    try:
        return hydra.utils.get_object(name)
    except Exception as error:
        raise ConfigError(f"_target_={name!r}: cannot be imported ({error})") from error


def _is_users(top: str) -> bool:
    spec = importlib.util.find_spec(top)
    origin = Path(spec.origin) if spec and spec.origin else None
    return origin is not None and any(d in origin.resolve().parents for d in user_dirs())


def parameters(target: Any) -> dict[str, Any]:
    """Names that a call accepts and their annotations; ``**shared`` stands for the parent's."""
    classes = inspect.getmro(target) if inspect.isclass(target) else (target,)
    found: dict[str, Any] = {}
    for part in classes:
        signature = inspect.signature(part.__init__ if inspect.isclass(part) else part)
        for parameter in signature.parameters.values():
            found.setdefault(parameter.name, parameter.annotation)
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return {name: annotation for name, annotation in found.items() if name != "self"}
