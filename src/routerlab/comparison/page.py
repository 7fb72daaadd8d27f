"""`write_page`: a comparison as one self-contained HTML page, from the files of its runs."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from routerlab.comparison import figures
from routerlab.comparison.curves import Band, bands, final_loads
from routerlab.comparison.figures import MAX_GROUPS, Panel
from routerlab.comparison.formats import html_table
from routerlab.comparison.group_routing import MOST_SEEDS, Reasons, agreements, histories
from routerlab.comparison.groups import Group, text
from routerlab.comparison.table import Comparison
from routerlab.reports.document import box, card, document, write
from routerlab.reports.sections import Section, figure_section

_TRAIN = "train/loss"
_PREFIXES = ("router", "val/router")
_ROUTER = {
    "load_entropy": "Load entropy",
    "max_violation": "Max violation",
    "mean_entropy": "Mean token entropy",
    "mutual_information": "Mutual information",
}
_MOST_NAMES = 6  # in a sentence

Curves = dict[str, dict[str, Band]]  # key -> label of a group -> its band


def write_page(comparison: Comparison, path: Path, command: str = "") -> Path:
    """Writes the page; returns ``path``. It reads the metrics, loads and traces of the groups that
    are drawn: the best `MAX_GROUPS`, the baseline among them. ``command``: that made the page.
    """
    return write(path, render(comparison, path.parent, command))


def render(comparison: Comparison, folder: Path, command: str = "") -> str:
    """The page as text, to lie in ``folder``."""
    drawn = _drawn(comparison)
    keys = [comparison.metric, _TRAIN, *(f"{p}/mean/{name}" for p in _PREFIXES for name in _ROUTER)]
    curves = bands(drawn, keys)
    sections = [
        _table_section(comparison, drawn),
        _curves_section(comparison, drawn, curves),
        _router_section(drawn, curves),
        _loads_section(drawn),
        _agreement_section(drawn),
        _history_section(drawn),
    ]
    title = f"{comparison.metric} by {', '.join(comparison.by)}"
    runs = sum(len(group.runs) for group in comparison.groups)
    heading = (
        f'<span class="run" title="{escape(title)}">{escape(title)}</span>'
        f'<span class="badge">{len(comparison.groups)} groups, {runs} runs</span>'
    )
    chip = f'<div class="chips"><code>{escape(command)}</code></div>' if command else ""
    main = (
        chip
        + box("warnings", "notes", "Unfair or incomplete", comparison.warnings)
        + card(sections[0])
        + _differences(comparison)
        + "".join(map(card, sections[1:]))
        + _runs(comparison.groups, folder)
    )
    return document(title, heading, sections, main)


def _drawn(comparison: Comparison) -> list[Group]:
    """The first groups, which are the best, with the baseline among them."""
    drawn = comparison.groups[:MAX_GROUPS]
    base = [group for group in comparison.groups if group.label == comparison.baseline]
    return drawn if not base or base[0] in drawn else [*drawn[:-1], *base]


def _table_section(comparison: Comparison, drawn: Sequence[Group]) -> Section:
    notes = [*comparison.notes]
    if len(drawn) < len(comparison.groups):
        order = "best" if comparison.better else "first"
        which = (
            f"the {order} ones"
            if drawn[-1] is comparison.groups[len(drawn) - 1]
            else (f"the {order} ones and the baseline, {comparison.baseline}")
        )
        notes.append(f"The figures show {len(drawn)} of {len(comparison.groups)} groups: {which}.")
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    tall = " tall" if len(comparison.groups) > 2 * MAX_GROUPS else ""
    body = f'<div class="scroll{tall}">{html_table(comparison)}</div>'
    body += f'<ul id="notes">{listed}</ul>' if notes else ""
    return Section("table", "Table", "Comparison", body, "")


def _curves_section(comparison: Comparison, drawn: Sequence[Group], curves: Curves) -> Section:
    metric = comparison.metric
    panels = [Panel(_TRAIN, "nats", curves[_TRAIN], hides_start=True)]
    if metric != _TRAIN:
        unit = metric.rsplit("/", 1)[-1].replace("_", " ")
        panels.insert(0, Panel(metric, unit, curves[metric], hides_start=True))
    return _figure(
        "fig-curves",
        "Curves",
        "Learning curves",
        figures.panels_figure(panels, _labels(drawn), columns=1, height=300),
        "Lines are means over the seeds of a group (of running means, in training), shades their "
        "95% t-intervals (none for a single seed). The frame fits the last nine tenths of training "
        "and cuts very wide intervals; a double click shows all. A click on a name hides its "
        "group, a double click all others.",
        f"{metric} or {_TRAIN} over training",
    )


def _router_section(drawn: Sequence[Group], curves: Curves) -> Section:
    """Training values, or those of validations where more groups logged these."""
    panels = []
    for name, title in _ROUTER.items():
        train, val = (curves[f"{prefix}/mean/{name}"] for prefix in _PREFIXES)
        panels.append(Panel(title, "", train if len(train) >= len(val) else val))
    return _figure(
        "fig-router",
        "Routers",
        "Load and entropy over training",
        figures.panels_figure(panels, _labels(drawn), columns=2, height=220),
        "Means over layers, then over seeds. Load entropy near 1 and max violation near 0 are "
        "balance, a low token entropy is confidence; mutual information is high only when a router "
        "is both. All but max violation are shares of their maximum ln E.",
        "load entropy, max violation or token entropy",
    )


def _loads_section(drawn: Sequence[Group]) -> Section:
    paths = {group.label: group.runs[0].path for group in drawn}
    loads = {label: final_loads(path) for label, path in paths.items() if path is not None}
    return _figure(
        "fig-loads",
        "Loads",
        "Load of each expert at the end",
        figures.loads_figure(loads),
        "Of the first seed of each group, at its last validation: the share of a layer's "
        "assignments that an expert got, divided by the even share 1/E. White is even, red more, "
        "blue less; dark blue is a dead expert.",
        "the loads of experts",
    )


def _agreement_section(drawn: Sequence[Group]) -> Section:
    found = agreements(drawn)
    some = ""
    if found.most_layers is not None:
        some = f" Of each model {found.most_layers} evenly spaced layers were compared."
    part = _figure(
        "fig-agreement",
        "Agreement",
        "Do the routers agree?",
        figures.agreement_figure(found, _labels(drawn)),
        "How far two models send the same tokens to the same experts, above chance, mean over "
        "layers: 1 is the same routing, 0 is chance. Experts are first matched one to one on half "
        "of the recorded sequences, and judged on the other half; chance is the same with the "
        "tokens of one model in random order. Off the diagonal: two groups, at the first seed that "
        "both have. On it: the seeds of one group among themselves (the first "
        f"{MOST_SEEDS}), where there are several. Empty cells have nothing to compare.{some}",
        "the routing of the same tokens",
    )
    return _with_reasons(part, found.missing)


def _history_section(drawn: Sequence[Group]) -> Section:
    found, missing = histories(drawn)
    panels = [
        Panel("Churn since the validation before", "", found["churn"]),
        Panel("Saturation: overlap with the last", "", found["saturation"]),
    ]
    part = _figure(
        "fig-churn",
        "Churn",
        "How routing settles",
        figures.panels_figure(panels, _labels(drawn), columns=2, height=260),
        "On the same held-out tokens at every validation, means over layers and the first "
        f"{MOST_SEEDS} seeds. Churn is 1 less the mean overlap of a token's experts with those at "
        "the validation before, 2 |S ∩ S'| / (|S| + |S'|), and depends on how many steps lie "
        "between; saturation is the overlap with those at the last validation.",
        "routing at validations; trace_validations=true keeps it",
    )
    return _with_reasons(part, missing)


def _figure(
    anchor: str, nav: str, title: str, figure: go.Figure | None, caption: str, what: str
) -> Section:
    if figure is not None:
        return figure_section(anchor, nav, title, figure, caption)
    body = f'<p class="nothing">None of these runs recorded {escape(what)}.</p>'
    return Section(f"{anchor}-card", nav, title, body, "")


def _with_reasons(part: Section, missing: Reasons) -> Section:
    """A section that also says what is missing in it, and why."""
    lines = []
    for reason, names in missing.items():
        shown = ", ".join(names[:_MOST_NAMES])
        shown += f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        lines.append(f"<li>{escape(shown)}: {escape(reason)}.</li>")
    if not lines:
        return part
    body = f'{part.body}<p class="caption">Left out:</p><ul class="caption">{"".join(lines)}</ul>'
    return Section(part.anchor, part.nav, part.title, body, part.caption)


def _differences(comparison: Comparison) -> str:
    """The config keys that vary, group by group."""
    if not comparison.varying:
        return ""
    labels = _labels(comparison.groups)
    head = "".join(f"<th>{escape(label)}</th>" for label in ["", *labels])
    rows = []
    for key, values in comparison.varying.items():
        cells = "".join(f"<td>{escape(text(values.get(label)))}</td>" for label in labels)
        rows.append(f"<tr><th>{escape(key)}</th>{cells}</tr>")
    title = f"What differs in the config: {len(rows)} {'key' if len(rows) == 1 else 'keys'}"
    return (
        f'<details id="differences"><summary>{title}</summary><div class="scroll tall"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _runs(groups: Sequence[Group], folder: Path) -> str:
    """All runs, with links to their reports."""
    rows = ""
    for group in groups:
        for run in group.runs:
            name = escape(run.name)
            report = None if run.path is None else run.path / "report.html"
            if report is not None and report.is_file():
                link = Path(os.path.relpath(report, folder.resolve())).as_posix()
                name = f'<a href="{escape(link)}">{name}</a>'
            rows += f"<tr><th>{escape(group.label)}</th><td>{run.seed}</td><td>{name}</td></tr>"
    return (
        '<details id="runs"><summary>Runs</summary><div class="scroll tall"><table><thead><tr>'
        f"<th>group</th><th>seed</th><th>run</th></tr></thead><tbody>{rows}</tbody></table></div>"
        "</details>"
    )


def _labels(groups: Sequence[Group]) -> list[str]:
    return [group.label for group in groups]
