"""Write the report of an analysis: a self-contained HTML page, with CSV, SVG and JSON lines files.

Text from data or models (questions, tokens, names) is untrusted and always escaped.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from analysis.graphs import ROLES
from analysis.style import CATEGORIES, GREEN, GREY, ORANGE, STYLE, in_percent
from components.files import write_atomic
from config import UserError

ROLE_COLOURS = dict(zip(ROLES, (GREEN, ORANGE, GREY), strict=True))
WIDTH = 5.8  # inches of a figure: on a phone it shrinks to two thirds, which is still readable
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # invalid in HTML and XML
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Cell:
    """Table text coloured by a role: one of graphs.ROLES, or ""."""

    text: str
    role: str = ""

    def __str__(self) -> str:
        """Return the text, which the CSV contains."""
        return self.text


@dataclass(frozen=True)
class Figure:
    """A section of the report.

    name: of its files; caption: how to read it; rows: dicts with the same keys; draw: function that draws them into a
    matplotlib figure. In the page, black and white follow the reader's colour scheme; text in other colours keeps them
    ("white" on dark bars, "#111111" on light ones).
    """

    name: str
    title: str
    caption: str
    rows: list[dict]
    draw: Callable | None = None


def refuse_existing(folder: Path) -> None:
    """Raise UserError if a folder already contains a report; call this before the analysis."""
    if (folder / "report.html").exists():
        raise UserError(f"{folder}: already contains a report; remove or rename it")


def write(
    folder: Path, title: str, facts: dict, summary: list[str], figures: list[Figure], problems: list[dict]
) -> None:
    """Write report.html, problems.jsonl, and per figure a CSV and (if it draws) an SVG.

    title: names the run, in drawings too; facts: what was analyzed; summary: results in sentences, the verdict first;
    problems: a JSON object per problem, with "correct" if it was answered. The page is written last: a folder without
    it is incomplete and may be overwritten.
    """
    refuse_existing(folder)
    drawings = {figure.name: drawing(figure, title) for figure in figures if figure.draw}
    lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    files = {f"{figure.name}.csv": csv_text(figure.rows) for figure in figures}
    files |= {f"{name}.svg": svg for name, svg in drawings.items()}
    files |= {"problems.jsonl": lines, "report.html": page(title, facts, summary, figures, drawings, problems)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot write the report: {error.strerror}") from error


def csv_text(rows: list[dict]) -> str:
    """Format rows as CSV, numbers in full precision."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# Drawings


def drawing(figure: Figure, title: str) -> str:
    """Render a figure with the run's title as SVG, black on white; the same values give the same file."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed; pip install -r requirements.txt") from error
    style = STYLE | {"svg.hashsalt": figure.name, "axes.prop_cycle": matplotlib.cycler(color=CATEGORIES)}
    file = io.StringIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the SVG keeps the text
        canvas = Canvas(figsize=(WIDTH, 3.5), layout="constrained")
        figure.draw(canvas)
        canvas.suptitle(title, x=0.01, ha="left", fontsize=9, color=GREY)
        canvas.savefig(file, format="svg", bbox_inches="tight", metadata=NO_METADATA)
    return CONTROL.sub("\ufffd", file.getvalue())


def draw_rates(axes, rows: list[dict], key: str, names: list[str], chance: float | None = None) -> None:
    """Plot rates in % with intervals (low, high), one row below the other; chance is a rate."""
    rates = [100 * row[key] for row in rows]
    below = [100 * (row[key] - row["low"]) for row in rows]
    above = [100 * (row["high"] - row[key]) for row in rows]
    axes.errorbar(rates, range(len(rows)), xerr=[below, above], fmt="o", color="black", markersize=4, capsize=2)
    for place, rate in enumerate(rates):
        axes.annotate(f"{rate:.1f}", (rate, place), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    draw_chance(axes.axvline, chance)
    in_percent(axes.xaxis)


def draw_chance(line: Callable, chance: float | None) -> None:
    """Draw the accuracy of guessing, a rate, with axhline or axvline, unless it is unknown."""
    if chance is not None:
        line(100 * chance, color=GREY, linestyle="--", linewidth=0.8, zorder=0)


def inlined(svg: str, name: str) -> str:
    """Embed an SVG in the page: prefix its ids, and map black and white to the page's colours."""

    def adapt(tag: re.Match) -> str:
        """Change tags only; in text, < and > are escaped."""
        named = re.sub(r"""(\bid="|url\(#|href="#)""", rf"\g<1>{name}-", tag[0])
        if named.startswith("<text"):  # text colours are kept
            return named
        return named.replace("#000000", "var(--ink)").replace("#ffffff", "var(--paper)")

    return re.sub(r"<[^>]+>", adapt, svg[svg.index("<svg") :])


# The page


def page(
    title: str, facts: dict, summary: list[str], figures: list[Figure], drawings: dict[str, str], problems: list[dict]
) -> str:
    """Render the page."""
    links = "".join(f'<li><a href="#{figure.name}">{text(figure.title)}</a></li>' for figure in figures)
    verdict, *details = summary or [""]
    body = [
        f'<p class="verdict">{text(verdict)}</p>',
        f"<details><summary>Results in brief</summary><ul>{''.join(f'<li>{text(line)}</li>' for line in details)}</ul>"
        "</details>",
        f"<details><summary>Setup</summary>{definition_table(facts)}</details>",
        f'<nav><ul>{links}<li><a href="#problems">Problems</a></li></ul></nav>',
        *(section(figure, drawings.get(figure.name)) for figure in figures),
        problem_list(problems),
    ]
    roles = "\n".join(f'[data-role="{role}"] {{ background: {colour}60; }}' for role, colour in ROLE_COLOURS.items())
    template = Template(PAGE.read_text(encoding="utf-8"))
    return template.substitute(title=text(title), roles=roles, body="\n".join(body))


def text(value) -> str:
    """Escape any value for HTML."""
    return escape(CONTROL.sub("\ufffd", str(value)))


def section(figure: Figure, svg: str | None) -> str:
    """Render a figure: caption, drawing, table (folded if there is a drawing) and links to the files."""
    names = [f"{figure.name}.csv", *([f"{figure.name}.svg"] if svg else [])]
    files = ", ".join(f'<a href="{name}">{name}</a>' for name in names)
    return f"""<section id="{figure.name}">
<h2>{text(figure.title)}</h2>
<p>{text(figure.caption)}</p>
{f'<div class="wide">{inlined(svg, figure.name)}</div>' if svg else ""}
<details{"" if svg else " open"}><summary>Table, rows: {len(figure.rows)}</summary>{table(figure.rows)}</details>
<p class="files">{files}</p>
</section>"""


def table(rows: list[dict]) -> str:
    """Render rows as an HTML table, with a legend if cells are coloured."""
    names = list(rows[0]) if rows else []
    heads = "".join(head(name, [row[name] for row in rows]) for name in names)
    lines = "".join(f"<tr>{''.join(cell(row[name]) for name in names)}</tr>\n" for row in rows)
    roles = "".join(f'<span data-role="{role}">{role}</span>' for role in ROLES)
    legend = f'<p class="legend">{roles}</p>' if "<td data-role" in lines else ""
    body = f'<table class="values"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    return f'{legend}<div class="wide">{body}</div>'


def head(name: str, values: list) -> str:
    """Render a column header, a button that sorts the table."""
    kind = ' class="number"' if any(map(is_number, values)) else ""
    return f'<th{kind}><button type="button">{text(name)}</button></th>'


def cell(value) -> str:
    """Render a table cell, floats with three decimals."""
    if isinstance(value, Cell):
        return f'<td data-role="{text(value.role)}">{text(value)}</td>' if value.role else f"<td>{text(value)}</td>"
    if isinstance(value, float):
        value = f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3f}"
        return f'<td class="number">{value}</td>'
    kind = ' class="number"' if is_number(value) else ""
    return f"<td{kind}>{'' if value is None else text(value)}</td>"


def is_number(value) -> bool:
    """Return whether a value is right-aligned."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def definition_table(values: dict) -> str:
    """Render names and values as a two-column table; lists and dicts as JSON."""

    def shown(value) -> str:
        nested = isinstance(value, dict | list)
        return f"<pre>{text(json.dumps(value, ensure_ascii=False, indent=1) if nested else value)}</pre>"

    lines = "".join(f"<tr><th>{text(name)}</th><td>{shown(value)}</td></tr>" for name, value in values.items())
    return f'<div class="wide"><table>{lines}</table></div>'


def problem_list(problems: list[dict]) -> str:
    """Render the problems with a filter, each folded to a mark (right or wrong) and its first two values."""
    folded = "".join(
        f'<details class="problem"><summary>{mark(problem)}{text(" · ".join(map(str, list(problem.values())[:2])))}'
        f"</summary>{definition_table(problem)}</details>\n"
        for problem in problems
    )
    return f"""<section id="problems">
<h2>Problems</h2>
<p><label>Filter: <input id="filter" type="search" placeholder="words, such as wrong"></label>
<span id="shown">{len(problems)} of {len(problems)}</span></p>
{folded}
<p class="files"><a href="problems.jsonl">problems.jsonl</a></p>
</section>"""


def mark(problem: dict) -> str:
    """Render whether a problem was answered correctly, if that is known."""
    if "correct" not in problem:
        return ""
    return '<b class="right">✓ right</b> ' if problem["correct"] else '<b class="wrong">✗ wrong</b> '
