"""The page of the demo: plain HTML, one file, its pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from effops.demo._section import Result, Row, Section

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem; }
img { max-width: 100%; height: auto; }
figure { margin: 1.5rem 0 2.5rem; }
figcaption { color: #444; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; border-bottom: 1px solid #e4e4e4;
         white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.wrong { color: #b00020; font-weight: bold; }
"""

COLUMNS = ("op", "case", "shape", "effops", "plain PyTorch", "ratio", "max error")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text, in the order of COLUMNS."""
    error = f"{row.error:.1e}" if row.is_correct else f"{row.error:.1e}, above {row.tolerance:.0e}"
    return (
        row.op,
        row.case,
        row.shape,
        f"{row.seconds * 1e3:.2f} ms",
        f"{row.plain_seconds * 1e3:.2f} ms",
        f"{row.ratio:.1f}x",
        error,
    )


def write(
    folder: Path, results: Sequence[tuple[Section, Result]], facts: Mapping[str, Mapping[str, str]], line: str
) -> Path:
    """Writes index.html; `line` says on what machine, `facts` is `effops.collect_env.collect()`."""
    rows = [row for _, result in results for row in result.rows]
    body = [
        "<h1>effops demo</h1>",
        "<p>Each op runs on photographs, is compared with its definition in float64 and timed against plain "
        f"PyTorch. This run: {escape(line)}.</p>",
        _table(rows),
        "<p>Times are the shortest of several runs, the two programs taking turns. Max error: the largest "
        "difference from <code>effops.reference</code> in float64, divided by the reference's largest value; "
        "for fwd + bwd over all gradients.</p>",
    ]
    for section, result in results:
        body += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(result.text)}</p>"]
        for figure in result.figures:
            body.append(
                f'<figure><h3>{escape(figure.title)}</h3><img src="{escape(figure.file)}" '
                f'alt="{escape(figure.title)}"><figcaption>{escape(figure.caption)}</figcaption></figure>'
            )
    body += ["<h2>Machine and versions</h2>", _facts(facts)]
    page = folder / "index.html"
    page.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>effops demo</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return page


def _table(rows: Sequence[Row]) -> str:
    def line(tag: str, texts: Sequence[str], wrong: bool = False) -> str:
        kinds = [" class=number" if column >= 3 else "" for column in range(len(texts))]
        if wrong:
            kinds[-1] = ' class="number wrong"'
        parts = (f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    lines = [line("th", COLUMNS), *(line("td", cells(row), not row.is_correct) for row in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _facts(facts: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        f"<tr><td>{escape(title)}</td><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for title, group in facts.items()
        for name, value in group.items()
    ]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
