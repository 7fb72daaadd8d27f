"""`write_report`: one self-contained HTML page about one run, from the files of its directory."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from routerlab.reports import figures, fine_tuning, tables
from routerlab.reports.document import box, card, document, write
from routerlab.reports.run_files import RunFiles, curve, number, read_run, section
from routerlab.reports.sections import (
    Section,
    aux_section,
    figure_section,
    nothing,
    router_sections,
    training_sections,
)


def write_report(run_dir: Path) -> Path:
    """The path of `<run_dir>/report.html`, freshly written from the other files there."""
    return write(run_dir / "report.html", render(read_run(run_dir)))


def render(run: RunFiles) -> str:
    """The whole page as text."""
    if fine_tuning.is_fine_tuning(run):
        head, sections = fine_tuning.tiles(run), [*fine_tuning.sections(run)]
    else:
        head, sections = tables.tiles(run), [*_number_sections(run), *_figure_sections(run)]
    missing = box("notes", "notes", "What this page could not show", run.notes)
    cards = "".join(map(card, sections))
    main = f"{_overrides(run)}{_error(run)}{_leak(run)}{missing}{head}{cards}{_details(run)}"
    return document(run.name, _heading(run), sections, main)


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


def _heading(run: RunFiles) -> str:
    state = escape(str(run.status.get("state") or "unknown state"))
    kind = state if state in ("running", "failed", "preempted", "done") else "unknown"
    return (
        f'<span class="run" title="{escape(run.name)}">{escape(run.name)}</span>'
        f'<span id="state" class="badge {kind}">{state}</span>'
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
