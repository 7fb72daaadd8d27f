"""`write_report`: one self-contained HTML page about one run, from the files of its directory."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from routerlab.reports import figures, heat_maps, tables
from routerlab.reports.run_files import RunFiles, curve, number, read_run, section

# The browser itself then refuses any request that a future plotly might want to make.
INLINE = "'unsafe-inline'"
POLICY = f"default-src 'none'; script-src {INLINE}; style-src {INLINE}; img-src data: blob:"
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


def write_report(run_dir: Path) -> Path:
    """The path of `<run_dir>/report.html`, freshly written from the other files there."""
    page = render(read_run(run_dir))
    path = run_dir / "report.html"
    # A reader who reloads the page never meets half of it.
    unfinished = run_dir / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    return unfinished.replace(path)


def render(run: RunFiles) -> str:
    """The whole page as text."""
    sections = [*_number_sections(run), *_figure_sections(run)]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    cards = "".join(map(_card, sections))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · routerlab</title><style>{style}</style>"
        f"<script>{get_plotlyjs()}</script></head>"
        f"<body>{_header(run, sections)}<main>{_overrides(run)}{_error(run)}{_leak(run)}"
        f"{_notes(run)}"
        f"{tables.tiles(run)}{cards}{_details(run)}</main></body></html>\n"
    )


def _number_sections(run: RunFiles) -> Iterator[Section]:
    yield Section(
        "bits",
        "Bits",
        "Bits per byte",
        tables.bits_tables(run) or _nothing("bits per byte"),
        "Lower is better; the n-grams were counted on the same training data, and the third column "
        "is how many bits per byte each row lies above (+) or below (−) this model's average.",
    )


def _figure_sections(run: RunFiles) -> Iterator[Section]:
    found = section(run.summary, "baselines")
    baselines = {name: x for name in found if (x := number(found, name)) is not None}
    key = "train/bits_per_byte" if "train/bits_per_byte" in run.metrics else "train/loss"
    window = figures.smoothing_window(curve(run.metrics, key))
    yield _figure(
        "fig-loss",
        "Loss",
        "Loss",
        figures.loss_figure(run.metrics, baselines),
        f"The faint line is each logged step, the bold one its running mean (window: {window}); "
        "a model that learned more than local statistics ends below the trigram line.",
    )
    yield from _router_sections(run)
    yield _figure(
        "fig-aux",
        "Auxiliary",
        "Auxiliary losses",
        figures.aux_figure(run.metrics),
        "Raw values tell whether a term does its work; the panel with weights shows, in nats per "
        "token, what each term adds to the training loss.",
    )
    yield _figure(
        "fig-diagnostics",
        "Diagnostics",
        "Other router diagnostics",
        figures.diagnostics_figure(run.metrics),
        "Thin lines are layers from first (dark) to last (light), the black line their mean, "
        "diamonds the mean at validation; a layer that leaves the others deserves a look.",
    )
    yield _figure(
        "fig-training",
        "Optimization",
        "Optimization",
        figures.training_figure(run.metrics),
        "Spikes of the gradient norm point at unstable steps; steps of the speed at a changed "
        "machine or a restart.",
    )


def _router_sections(run: RunFiles) -> Iterator[Section]:
    domains = run.summary.get("domains")
    names = [str(name) for name in domains] if isinstance(domains, list) else []
    yield Section(
        "layers",
        "Layers",
        "Routers at the end",
        tables.layer_table(run) or _nothing("router metrics"),
        "Entropies and mutual information are shares of their maximum ln E; a good router has load "
        "entropy near 1, max violation near 0, high mutual information and no dead expert.",
    )
    yield _figure(
        "fig-entropy",
        "Entropy",
        "Entropy over training",
        figures.entropy_figure(run.metrics),
        "Load entropy near 1 is balance; low token entropy is confidence; entropy of the mean less "
        "token entropy is mutual information, which is high only when a router is both.",
    )
    yield _figure(
        "fig-load",
        "Load",
        "Load over time",
        heat_maps.load_figure(run.distributions),
        "White is an even share 1/E, red more, blue less; a row that stays dark blue is a dead "
        "expert, a row that stays red is an overloaded one.",
    )
    step = heat_maps.domain_step(run.distributions)
    yield _figure(
        "fig-domains",
        "Domains",
        "Experts by domain" + ("" if step is None else f", validation at step {step:,}"),
        heat_maps.domain_figure(run.distributions, names, number(run.summary, "top_k")),
        "A cell is the share of a domain's tokens that chose an expert, divided by the even share "
        "top_k/E: 2 is twice as often as chance, and equal rows mean no specialisation by domain.",
    )


def _figure(anchor: str, nav: str, title: str, figure: go.Figure | None, caption: str) -> Section:
    """A card around a figure; the plot keeps the stable id, so its card is `<id>-card`."""
    if figure is None:
        return Section(f"{anchor}-card", nav, title, _nothing(title.lower()), "")
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=anchor,
        config=PLOT_CONFIG,
        default_height=f"{figure.layout.height}px",
    )
    return Section(f"{anchor}-card", nav, title, f'<div class="scroll">{plot}</div>', caption)


def _nothing(what: str) -> str:
    return f'<p class="nothing">This run recorded no data for this: {escape(what)}.</p>'


def _card(part: Section) -> str:
    caption = f'<p class="caption">{escape(part.caption)}</p>' if part.caption else ""
    head = f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>'
    return f"{head}{part.body}{caption}</section>"


def _header(run: RunFiles, sections: list[Section]) -> str:
    state = escape(str(run.status.get("state") or "unknown state"))
    kind = state if state in ("running", "failed", "preempted", "done") else "unknown"
    links = "".join(f'<a href="#{part.anchor}">{part.nav}</a>' for part in sections)
    return (
        f'<header><div class="bar-inner"><span class="run" title="{escape(run.name)}">'
        f'{escape(run.name)}</span><span id="state" class="badge {kind}">{state}</span>'
        f"<nav>{links}</nav></div></header>"
    )


def _overrides(run: RunFiles) -> str:
    """What this run changed on the command line, as chips."""
    lines = [line.strip() for line in run.overrides.splitlines()]
    values = [line[2:].strip().strip("'\"") for line in lines if line.startswith("- ")]
    chips = "".join(f"<code>{escape(value)}</code>" for value in values)
    return f'<div class="chips">{chips}</div>' if chips else ""


def _error(run: RunFiles) -> str:
    error = run.status.get("error")
    if not error:
        return ""
    return (
        '<div id="error" class="box error" role="alert"><strong>This run failed.</strong>'
        f"<pre>{escape(str(error))}</pre></div>"
    )


def _leak(run: RunFiles) -> str:
    ahead = run.summary.get("looks_ahead")
    if ahead not in ("in training", "in evaluation"):
        return ""
    meaning = (
        "a token's routing depended on later tokens while the model was trained; the evaluation on "
        "this page is clean."
        if ahead == "in training"
        else "a token's routing depends on later tokens, in evaluation too: the numbers on this "
        "page are not those of a language model."
    )
    kind = "notes" if ahead == "in training" else "error"
    return (
        f'<div id="leak" class="box {kind}" role="alert"><strong>This run looks ahead {ahead}'
        f"</strong>: {meaning}</div>"
    )


def _notes(run: RunFiles) -> str:
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return (
        '<div id="notes" class="box notes"><strong>What this page could not show</strong>'
        f"<ul>{items}</ul></div>"
    )


def _details(run: RunFiles) -> str:
    """The collapsed configuration and environment."""
    config = f"<pre>{escape(run.config)}</pre>" if run.config else _nothing("config.yaml")
    environment = (
        tables.nested_table(run.environment) if run.environment else _nothing("environment.json")
    )
    return (
        f'<details id="config"><summary>Configuration</summary>{config}</details>'
        f'<details id="environment"><summary>Environment</summary>{environment}</details>'
    )
