"""`write_report`: one self-contained HTML page about one run, from the files of its directory."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from routerlab.reports import figures, fine_tuning, tables
from routerlab.reports.run_files import RunFiles, curve, number, read_run, section
from routerlab.reports.sections import (
    Section,
    aux_section,
    figure_section,
    nothing,
    router_sections,
    training_sections,
)

# The browser itself then refuses any request that a future plotly might want to make.
INLINE = "'unsafe-inline'"
POLICY = f"default-src 'none'; script-src {INLINE}; style-src {INLINE}; img-src data: blob:"


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
    if fine_tuning.is_fine_tuning(run):
        head, sections = fine_tuning.tiles(run), [*fine_tuning.sections(run)]
    else:
        head, sections = tables.tiles(run), [*_number_sections(run), *_figure_sections(run)]
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
        f"{head}{cards}{_details(run)}</main></body></html>\n"
    )


def _number_sections(run: RunFiles) -> Iterator[Section]:
    yield Section(
        "bits",
        "Bits",
        "Bits per byte",
        tables.bits_tables(run) or nothing("bits per byte"),
        "Lower is better; the n-grams were counted on the same training data, and the third column "
        "is how many bits per byte each row lies above (+) or below (−) this model's average.",
    )


def _figure_sections(run: RunFiles) -> Iterator[Section]:
    found = section(run.summary, "baselines")
    baselines = {name: x for name in found if (x := number(found, name)) is not None}
    key = "train/bits_per_byte" if "train/bits_per_byte" in run.metrics else "train/loss"
    window = figures.smoothing_window(curve(run.metrics, key))
    yield figure_section(
        "fig-loss",
        "Loss",
        "Loss",
        figures.loss_figure(run.metrics, baselines),
        f"The faint line is each logged step, the bold one its running mean (window: {window}); "
        "a model that learned more than local statistics ends below the trigram line.",
    )
    yield from router_sections(run)
    yield aux_section(run)
    yield from training_sections(run)


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
    config = f"<pre>{escape(run.config)}</pre>" if run.config else nothing("config.yaml")
    environment = (
        tables.nested_table(run.environment) if run.environment else nothing("environment.json")
    )
    return (
        f'<details id="config"><summary>Configuration</summary>{config}</details>'
        f'<details id="environment"><summary>Environment</summary>{environment}</details>'
    )
