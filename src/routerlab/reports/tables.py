"""HTML fragments of numbers: headline tiles, bits-per-byte tables, the table of layers."""

from html import escape
from typing import Any

from routerlab.reports.run_files import RunFiles, last, number, section

NOTHING = "–"
LAYER_COLUMNS = {
    "load_entropy": "Load entropy",
    "max_violation": "Max violation",
    "mean_entropy": "Mean token entropy",
    "entropy_of_mean": "Entropy of the mean",
    "mutual_information": "Mutual information",
    "dead_experts": "Dead experts",
}
SUPPORT_COLUMNS = {  # shown where they were measured
    "ess_mean": "ESS, mean",
    "ess_p05": "ESS, 5th percentile",
    "ess_min": "ESS, minimum",
    "probs_ess_mean": "Softmax ESS, mean",
}


def digits(value: float | None, figures: int = 4) -> str:
    """A number to some significant figures with its trailing zeros: 2.100, 1024, 3.2e-05."""
    if value is None:
        return NOTHING
    if float(value).is_integer() and abs(value) < 10**figures:
        return f"{value:.0f}"
    return f"{value:#.{figures}g}".rstrip(".")


def amount(value: float | None) -> str:
    """A large count with a unit letter: 1.234M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if value is not None and abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.3g}{unit}"
    return NOTHING if value is None else f"{value:,.4g}"


def duration(seconds: float | None) -> str:
    """A time in its two largest units: 2h 05m, 3m 20s, 4.2s."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    if minutes[0] < 60:
        return f"{minutes[0]}m {minutes[1]:02d}s"
    return f"{hours[0]:,}h {hours[1]:02d}m"


def model_bits(run: RunFiles) -> float | None:
    """Validation bits per byte: the summary's, else the last one logged."""
    value = number(run.summary, "val", "bits_per_byte")
    return last(run.metrics, "val/bits_per_byte") if value is None else value


def tiles(run: RunFiles) -> str:
    """The row of headline numbers."""
    speed = number(run.summary, "tokens_per_second")
    speed = last(run.metrics, "train/tokens_per_second") if speed is None else speed
    active = number(run.summary, "parameters", "active")
    flops = number(run.summary, "flops_per_token")
    seconds = number(run.summary, "train_seconds")
    loss = number(run.summary, "val", "loss")
    loss = last(run.metrics, "val/loss") if loss is None else loss
    parts = [
        tile("Validation", digits(model_bits(run)), *_honest("bits per byte", run)),
        _against_trigram(run),
        tile("Validation loss", digits(loss), "nats per token"),
        tile("Speed", amount(speed), "tokens per second"),
        tile(
            "Parameters",
            amount(number(run.summary, "parameters", "total")),
            f"{amount(active)} active, {amount(flops)} FLOPs per token",
        ),
        _dead_experts(run),
        tile("Training time", duration(seconds), f"{steps(run)} steps, {tokens(run)} tokens"),
    ]
    return f'<div class="tiles">{"".join(parts)}</div>'


def bits_tables(run: RunFiles) -> str | None:
    """Bits per byte of the n-grams, this model and each domain; None when there are none."""
    model = model_bits(run)
    baselines = section(run.summary, "baselines")
    rows: dict[str, float | None] = {name: number(baselines, name) for name in baselines}
    domains = section(run.summary, "val", "bits_per_byte_by_domain")
    by_domain = {name: number(domains, name) for name in domains} or _logged_domains(run)
    if model is None and not rows and not by_domain:
        return None
    tables = [_bits_table("Model", rows | {"this model": model}, model)]
    if by_domain:
        tables.append(_bits_table("Domain", by_domain, model))
    return f'<div class="columns">{"".join(tables)}</div>'


def layer_table(run: RunFiles) -> str | None:
    """The routers' final numbers, one row a layer; None when no layer was logged."""
    layers = run.summary.get("layers")
    rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    rows = rows or _logged_layers(run)
    if not rows:
        return None
    measured = {name: title for name, title in SUPPORT_COLUMNS.items() if name in rows[0]}
    columns = LAYER_COLUMNS | measured
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    body = "".join(
        f"<tr><th>{escape(str(row.get('layer', NOTHING)))}</th>"
        + "".join(_layer_cell(name, number(row, name)) for name in columns)
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr><th>Layer</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="tall">{table}</div>'


def nested_table(tree: dict[str, Any]) -> str:
    """Nested dicts as rows of dotted name and value."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in _flat(tree)
    )
    return f'<table class="plain"><tbody>{rows}</tbody></table>'


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    dot = f"{prefix}." if prefix else ""
    return [row for key, value in tree.items() for row in _flat(value, f"{dot}{key}")]


def tile(label: str, value: str, detail: str, mood: str = "") -> str:
    """One headline number; ``mood`` is good, bad or nothing."""
    return (
        f'<div class="tile {mood}"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="detail">{escape(detail)}</div></div>'
    )


def _honest(detail: str, run: RunFiles) -> tuple[str, str]:
    """The detail of a tile, marked where evaluation leaks the future, and its mood."""
    leaks = run.summary.get("looks_ahead") == "in evaluation"
    return (f"{detail}, leaking the future", "bad") if leaks else (detail, "")


def _against_trigram(run: RunFiles) -> str:
    model, trigram = model_bits(run), number(run.summary, "baselines", "trigram")
    if model is None or not trigram:
        return tile("Against trigram", NOTHING, "no baseline was recorded")
    change = model - trigram
    word, mood = ("better", "good") if change < 0 else ("worse", "bad")
    value = f"{change:+.3f}".replace("-", "−")
    return tile("Against trigram", value, f"{abs(change / trigram):.1%} {word}", mood)


def _dead_experts(run: RunFiles) -> str:
    layers = run.summary.get("layers")
    rows = layers if isinstance(layers, list) and layers else _logged_layers(run)
    dead = [number(row, "dead_experts") for row in rows]
    known = [count for count in dead if count is not None]
    if not known:
        return tile("Dead experts", NOTHING, "not recorded")
    experts = number(run.summary, "parameters", "experts")
    total = f"of {experts:.0f} in {len(rows)} layers" if experts else "in all layers"
    return tile("Dead experts", digits(sum(known)), total, "bad" if sum(known) else "good")


def steps(run: RunFiles) -> str:
    """Optimizer steps taken."""
    count = number(run.summary, "steps")
    if count is None and len(run.metrics):
        count = float(run.metrics["step"].to_numpy().max())
    return NOTHING if count is None else f"{count:,.0f}"


def tokens(run: RunFiles) -> str:
    """Tokens trained on."""
    return amount(number(run.summary, "tokens"))


def _bits_table(head: str, rows: dict[str, float | None], model: float | None) -> str:
    top = max((value for value in rows.values() if value), default=1.0)
    body = "".join(_bits_row(name, value, model, top) for name, value in rows.items())
    return (
        f"<table><thead><tr><th>{head}</th><th>bits per byte</th><th>difference</th>"
        f'<th class="bar-column"></th></tr></thead><tbody>{body}</tbody></table>'
    )


def _bits_row(name: str, value: float | None, model: float | None, top: float) -> str:
    own = ' class="own"' if name == "this model" else ""
    gap = NOTHING
    if value is not None and model is not None and not own:
        gap = f"{value - model:+.3f}".replace("-", "−")
    width = 100 * max(0.0, value or 0.0) / top
    bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
    return (
        f"<tr{own}><th>{escape(name)}</th><td>{digits(value)}</td><td>{gap}</td>"
        f'<td class="bar-column">{bar}</td></tr>'
    )


def _layer_cell(name: str, value: float | None) -> str:
    warn = ' class="warn"' if name == "dead_experts" and value else ""
    return f"<td{warn}>{digits(value)}</td>"


def _logged_domains(run: RunFiles) -> dict[str, float | None]:
    prefix = "val/bits_per_byte/"
    keys = [key for key in run.metrics.columns if key.startswith(prefix)]
    return {key.removeprefix(prefix): last(run.metrics, key) for key in keys}


def _logged_layers(run: RunFiles) -> list[dict[str, Any]]:
    """The rows of the layer table from the last logged values, validation before training."""
    rows: dict[str, dict[str, Any]] = {}
    for prefix in ("router/", "val/router/"):
        for key in (key for key in run.metrics.columns if key.startswith(prefix)):
            layer, _, metric = key.removeprefix(prefix).rpartition("/")
            value = last(run.metrics, key)
            if layer != "mean" and value is not None:
                rows.setdefault(layer, {"layer": layer})[metric] = value
    return [rows[layer] for layer in sorted(rows)]
