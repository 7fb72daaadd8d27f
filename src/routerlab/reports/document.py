"""What all pages share: a self-contained HTML document of cards."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from routerlab.reports.sections import Section

# The browser itself then refuses any request that a future plotly might want to make.
INLINE = "'unsafe-inline'"
POLICY = f"default-src 'none'; script-src {INLINE}; style-src {INLINE}; img-src data: blob:"


def document(title: str, heading: str, sections: Sequence[Section], main: str) -> str:
    """The whole page as text: ``heading`` (HTML) and links to the sections, then ``main``."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{part.anchor}">{part.nav}</a>' for part in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · routerlab</title><style>{style}</style>"
        f"<script>{get_plotlyjs()}</script></head>"
        f'<body><header><div class="bar-inner">{heading}<nav>{links}</nav></div></header>'
        f"<main>{main}</main></body></html>\n"
    )


def card(part: Section) -> str:
    """A section as HTML."""
    caption = f'<p class="caption">{escape(part.caption)}</p>' if part.caption else ""
    head = f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>'
    return f"{head}{part.body}{caption}</section>"


def box(anchor: str, kind: str, title: str, items: Sequence[str]) -> str:
    """A list of plain sentences in a coloured box (``error`` or ``notes``), if there are any."""
    if not items:
        return ""
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return (
        f'<div id="{anchor}" class="box {kind}"><strong>{escape(title)}</strong>'
        f"<ul>{found}</ul></div>"
    )


def write(path: Path, page: str) -> Path:
    """Writes a page at once: a reader who reloads it never meets half of it."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
    except OSError:  # half a page would keep a full disk full
        unfinished.unlink(missing_ok=True)
        raise
    return unfinished.replace(path)
