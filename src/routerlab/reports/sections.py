"""Cards of the page that every kind of run has: what its routers did, and how training went."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from routerlab.reports import figures, heat_maps, tables
from routerlab.reports.run_files import RunFiles, number

PLOT_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    # Plotly's default toolbar has a button that uploads the data to its company's cloud.
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}


@dataclass(frozen=True)
class Section:
    """One card of the page; `body` is HTML, `caption` plain text on how to read it."""

    anchor: str
    nav: str
    title: str
    body: str
    caption: str


def router_sections(run: RunFiles) -> Iterator[Section]:
    """Entropies and loads, over training and at its end."""
    domains = run.summary.get("domains")
    names = [str(name) for name in domains] if isinstance(domains, list) else []
    yield Section(
        "layers",
        "Layers",
        "Routers at the end",
        tables.layer_table(run) or nothing("router metrics"),
        "Entropies and mutual information are shares of their maximum ln E; a good router has load "
        "entropy near 1, max violation near 0, high mutual information and no dead expert.",
    )
    yield figure_section(
        "fig-entropy",
        "Entropy",
        "Entropy over training",
        figures.entropy_figure(run.metrics),
        "Load entropy near 1 is balance; low token entropy is confidence; entropy of the mean less "
        "token entropy is mutual information, which is high only when a router is both."
        + figures.thinning_note(run.metrics),
    )
    yield figure_section(
        "fig-load",
        "Load",
        "Load over time",
        heat_maps.load_figure(run.distributions),
        "White is an even share 1/E, red more, blue less; a row that stays dark blue is a dead "
        "expert, a row that stays red is an overloaded one.",
    )
    step = heat_maps.domain_step(run.distributions)
    yield figure_section(
        "fig-domains",
        "Domains",
        "Experts by domain" + ("" if step is None else f", validation at step {step:,}"),
        heat_maps.domain_figure(run.distributions, names, number(run.summary, "top_k")),
        "A cell is the share of a domain's tokens that chose an expert, divided by the even share "
        "top_k/E: 2 is twice as often as chance, and equal rows mean no specialisation by domain.",
    )


def aux_section(run: RunFiles) -> Section:
    """The auxiliary losses."""
    return figure_section(
        "fig-aux",
        "Auxiliary",
        "Auxiliary losses",
        figures.aux_figure(run.metrics),
        "Raw values tell whether a term does its work; the panel with weights shows, in nats per "
        "token, what each term adds to the training loss.",
    )


def training_sections(run: RunFiles) -> Iterator[Section]:
    """Diagnostics of no other card, and the optimizer."""
    yield figure_section(
        "fig-diagnostics",
        "Diagnostics",
        "Other router diagnostics",
        figures.diagnostics_figure(run.metrics),
        "Thin lines are layers from first (dark) to last (light), the black line their mean, "
        "diamonds the mean at validation; a layer that leaves the others deserves a look."
        + figures.thinning_note(run.metrics),
    )
    yield figure_section(
        "fig-training",
        "Optimization",
        "Optimization",
        figures.training_figure(run.metrics),
        "Spikes of the gradient norm point at unstable steps; steps of the speed at a changed "
        "machine or a restart.",
    )


def figure_section(
    anchor: str, nav: str, title: str, figure: go.Figure | None, caption: str
) -> Section:
    """A card around a figure; the plot keeps the stable id, so its card is `<id>-card`."""
    if figure is None:
        return Section(f"{anchor}-card", nav, title, nothing(title.lower()), "")
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=anchor,
        config=PLOT_CONFIG,
        default_height=f"{figure.layout.height}px",
    )
    return Section(f"{anchor}-card", nav, title, f'<div class="scroll">{plot}</div>', caption)


def nothing(what: str) -> str:
    """What a card says that has no data."""
    return f'<p class="nothing">This run recorded no data for this: {escape(what)}.</p>'
