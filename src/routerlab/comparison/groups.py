"""Runs to groups: equal in some keys, members told apart by their seeds."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from routerlab.comparison.runs import Run
from routerlab.core.config import ConfigError, nearest
from routerlab.core.identity import PLACES, within

NONE = "none"
_NO_GROUPS = (*PLACES, "experiment")  # an experiment is a set of keys, which speak for themselves


@dataclass(frozen=True)
class Group:
    """Finished runs that are equal in some keys, in the order of their seeds, each seed once.

    ``label``: ``hash`` of a config group, ``top_k=2`` of the key router.top_k, joined by commas.
    """

    label: str
    runs: list[Run]


def choose_keys(runs: Sequence[Run], by: Sequence[str]) -> tuple[list[str], str | None]:
    """The keys that tell groups apart, and a note if they are not those that were asked for:
    ``by``; without any, the router; if that is the same in all runs, as few of the keys that vary
    as tell the same groups apart as all of them.
    """
    for key in by:
        if not any(_has(run, key) for run in runs):
            known = ((*run.choices, *run.sections, *run.config) for run in runs)
            names = {name for of_run in known for name in of_run}
            raise ConfigError(f"--by {key}: no run has such a key; {nearest(key, names)}")
    if by:
        return list(dict.fromkeys(by)), None
    varying = vary(runs, ["router"]) or _telling(runs)
    if varying in ([], ["router"]):
        return ["router"], None
    return varying, f"All runs have the same router: they are grouped by {', '.join(varying)}."


def by_label(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of each label."""
    # What is chosen speaks for itself (hash); a value needs the end of its key (top_k=2).
    chosen = {k for k in keys if any(k in r.choices for r in runs)}
    plain = chosen | {k for k in keys if not any(k in r.config for r in runs)}
    ends = Counter(key.rsplit(".", 1)[-1] for key in keys)
    shown = {k: end if ends[end := k.rsplit(".", 1)[-1]] == 1 else k for k in keys}
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        words = {key: text(value(run, key)) for key in keys}
        said = [k for k in keys if k in plain or words[k] != NONE] or keys
        label = ", ".join(words[k] if k in plain else f"{shown[k]}={words[k]}" for k in said)
        found[label].append(run)
    return dict(found)


def one_a_seed(label: str, runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """The newest run of each seed, in the order of seeds, and a sentence if some have more."""
    by_seed: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_seed[run.seed].append(run)
    newest = {seed: max(same, key=lambda run: run.at) for seed, same in sorted(by_seed.items())}
    older = [
        f"seed {seed} {run.name} (not {', '.join(r.name for r in by_seed[seed] if r is not run)})"
        for seed, run in newest.items()
        if len(by_seed[seed]) > 1
    ]
    said = [f"{label}: of several runs of a seed the newest counts: {'; '.join(older)}."]
    return list(newest.values()), said if older else []


def vary(runs: Sequence[Run], keys: Iterable[str] | None = None) -> list[str]:
    """Which of ``keys`` (of the scientific ones but for the seeds, without it) differ in value."""
    if keys is None:
        keys = sorted({key for run in runs for key in run.science})
    return [key for key in keys if len({text(value(run, key)) for run in runs}) > 1]


def value(run: Run, key: str) -> Any:
    """What a run says of a key: the file that it chose from a config group, the value of a config
    key, or the names below one (``loss``: the losses).
    """
    if key in run.choices:
        return run.choices[key]
    if key in run.science:
        return run.science[key]
    if key in run.config:
        return run.config[key]
    return "+".join(run.sections[key]) if key in run.sections else None


def text(found: Any) -> str:
    """A value as it is written in tables; two are the same if and only if these are equal."""
    if isinstance(found, str):
        return found
    return NONE if found is None else json.dumps(found, sort_keys=True, default=str)


def listed(labels: Sequence[str]) -> str:
    """Labels in one line, apart even where they have commas of their own."""
    return (" / " if any("," in label for label in labels) else ", ").join(labels)


def _has(run: Run, key: str) -> bool:
    return key in run.choices or key in run.config or key in run.sections


def _telling(runs: Sequence[Run]) -> list[str]:
    """Chosen files first, then lists of them (losses), then values, without those that can be left
    out.
    """
    varying = vary(runs)
    groups = sorted({group for run in runs for group in run.choices})
    heads = sorted({key.split(".", 1)[0] for key in varying if "." in key} - {*groups})
    last = sorted(varying, key=lambda key: key.endswith("_target_"))
    found = [
        k for k in [*vary(runs, groups), *vary(runs, heads), *last] if not within(k, _NO_GROUPS)
    ]
    words = {key: [text(value(run, key)) for run in runs] for key in found}

    def told(keys: Sequence[str]) -> int:
        return len(set(zip(*(words[key] for key in keys), strict=True))) if keys else 1

    keys: list[str] = []
    for key in found:
        keys += [key] if told([*keys, key]) > told(keys) else []
    for key in list(keys):
        rest = [other for other in keys if other != key]
        keys = rest if told(rest) == told(keys) else keys
    return keys
