"""The parts of a report: a self-contained HTML file with its style, tables and pictures."""

import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --line: #d8dce1; --faint: #5f6872; --card: #f6f7f9; --text: #1c2229; --page: #fff;
  --shadow: #0005; }
@media (prefers-color-scheme: dark) {
  :root { --line: #353c45; --faint: #9aa5b1; --card: #1c2128; --text: #e3e8ee; --page: #13171c;
    --shadow: #fff6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; }
.facts b { display: block; font-size: 1.3rem; line-height: 1.3; white-space: nowrap; }
.facts span { color: var(--faint); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2rem; }
svg { display: block; width: 100%; max-width: 30rem; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
/* A shadow at the edge beyond which a table goes on. The covers hide it when the table is scrolled to that edge. */
.wide {
  overflow-x: auto;
  background:
    linear-gradient(to right, var(--page) 40%, transparent) left / 40px 100% no-repeat local,
    linear-gradient(to left, var(--page) 40%, transparent) right / 40px 100% no-repeat local,
    linear-gradient(to right, var(--shadow), transparent) left / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--shadow), transparent) right / 14px 100% no-repeat scroll;
}
.hint { display: none; font-size: .85rem; }
@media (max-width: 40rem) { .hint { display: block; } main { padding: 1.5rem 1rem 3rem; } }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
table.plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.plain td:first-child { width: 11.5rem; overflow-wrap: normal; color: var(--faint); }
"""


def page(title: str, subtitle: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    """Return the whole file: a heading, key figures (``facts``, figures by name), and the sections."""
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(subtitle)}</p>\n"
        f'<div class="facts">{cells}</div>\n' + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, body: str, caption: str = "") -> str:
    """Return a section: a heading, a caption, and pictures or a table."""
    words = f"<p>{caption}</p>\n" if caption else ""
    return f"<section>\n<h2>{heading}</h2>\n{words}{body}\n</section>"


def pictures(*svgs: str) -> str:
    """Return pictures side by side, or below each other if the window is narrow."""
    return f'<div class="pictures">{"".join(svgs)}</div>'


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], total: Iterable[str]) -> str:
    """Return a table of texts, which are escaped, with totals in the last line. It scrolls in a narrower window."""
    lines = [_line("th", heads), *(_line("td", cells) for cells in rows), _line("td", total, "total")]
    hint = '<p class="hint">Scroll the table sideways for more columns.</p>'
    return f'{hint}<div class="wide" tabindex="0"><table>{"".join(lines)}</table></div>'


def plain_table(values: Mapping[str, object]) -> str:
    """Return a table with two columns, names and values."""
    rows = (_line("td", (key, _text(value))) for key, value in values.items())
    return f'<table class="plain">{"".join(rows)}</table>'


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return "none" if value is None else str(value)


def _line(tag: str, cells: Iterable[str], kind: str = "") -> str:
    row = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{row}</tr>' if kind else f"<tr>{row}</tr>"
