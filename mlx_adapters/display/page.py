"""Reports as one HTML file: no script, no request, light and dark, for a phone as for a wide screen."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from mlx_adapters.display.layout import Chart
from mlx_adapters.display.svg import picture

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8;
  --warn: #8a5a00; --warn-page: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --ink: #e8ebef; --soft: #a0a9b5;
  --line: #2c323a; --warn: #f2c661; --warn-page: #2d2614; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: clamp(1.1rem, 2.4vw + .6rem, 1.4rem); line-height: 1.35; margin: 0; }
h2 { font-size: 1.05rem; margin: 0 0 10px; }
p, ul { margin: 0 0 8px; overflow-wrap: anywhere; }
ul { padding-left: 20px; } .soft { color: var(--soft); font-size: .9rem; }
section, .warn { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px;
  margin: 14px 0 0; }
.warn { background: var(--warn-page); color: var(--warn); border-color: transparent; padding: 10px 16px; }
.warn p:last-child { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 14px;
  margin-top: 14px; }
.plots section { margin: 0; } section .plots { margin-top: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: 6px 0 6px 14px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; text-align: left; position: sticky; left: 0;
  background: var(--card); } td:first-child { min-width: 7em; white-space: normal; overflow-wrap: anywhere; }
svg { display: block; width: 100%; max-width: 520px !important; height: auto; margin: 0 auto; }
svg, svg text { fill: var(--ink); }
pre { overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; font-weight: 600; }
details > :nth-child(2) { margin-top: 10px; }
"""


def html(title: str, verdict: str, *parts: str) -> str:
    """The whole page: the verdict in a sentence first, then parts made by the functions below."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>
<p class="soft">{escape(title)}</p>
<h1>{escape(verdict)}</h1>
{"".join(parts)}
</main></body></html>
"""


def section(title: str, *parts: str) -> str:
    """A card with a heading, "" if nothing is in it."""
    content = "".join(parts)
    return f"<section>{f'<h2>{escape(title)}</h2>' if title else ''}{content}</section>" if content else ""


def folded(title: str, *parts: str) -> str:
    """A card that opens when it is asked to."""
    content = "".join(parts)
    return f"<section><details><summary>{escape(title)}</summary>{content}</details></section>" if content else ""


def warning(lines: Iterable[str]) -> str:
    """What a reader must know before reading on."""
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="warn">{text}</div>' if text else ""


def paragraphs(lines: Iterable[str]) -> str:
    """Small print."""
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list of sentences."""
    text = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{text}</ul>" if text else ""


def table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, which scrolls where the screen is narrower."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def pictures(charts: Mapping[str, Chart], headed: bool = True) -> str:
    """Charts beside each other where there is room; `headed`: each in a card under its title."""
    drawn = [
        section(title, picture(chart)) if headed else f"<div>{picture(chart)}</div>" for title, chart in charts.items()
    ]
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def record(text: str) -> str:
    """Plain text as it is, such as JSON."""
    return f"<pre>{escape(text)}</pre>"
