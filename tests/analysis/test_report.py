"""The report: self-contained, with all text from data and models escaped."""

import csv
import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from analysis import report
from analysis.graphs import ON_PATH, UNREACHABLE
from analysis.report import Cell, Figure, UserError, write

EVIL = "<script>alert('a')</script></svg></style>\"'&$x$\x00"
SHOWN = EVIL.replace("\x00", "\ufffd")


class Page(HTMLParser):
    """Tags of a page with their attributes, and text outside scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open[-1:] == [tag]:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.texts.append(data)

    def values(self, name):
        """Return the values of an attribute."""
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def draw(figure):
    axes = figure.subplots()
    axes.bar([EVIL, 'id="a"'], [1, 2], clip_on=True)
    axes.plot([0, 1], [0, 5], label=EVIL)
    axes.legend()


ROWS = [{"cell": EVIL, "rate": 1 / 3, "p": 0.00012345, "n": 500}, {"cell": "b", "rate": 0.5, "p": None, "n": 500}]
GRID = [{"thought": 1, "rank 1": Cell(EVIL, ON_PATH), "rank 2": Cell("=b", "")}]
FIGURES = [
    Figure("rates", f"Rates {EVIL}", EVIL, ROWS, draw),
    Figure("again", "The same", "", ROWS, draw),
    Figure("lens", "Grid", "", GRID),
]
PROBLEMS = [{"idx": 0, "question": EVIL, "thoughts": {"1": {"text": EVIL}}}, {"idx": 1, "question": "Ζεύς?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a full report."""
    folder = tmp_path_factory.mktemp("analysis") / "new" / "analysis_best"
    write(folder, f"Analysis {EVIL}", {"checkpoint": EVIL, EVIL: {"a": [EVIL]}}, [EVIL], FIGURES, PROBLEMS)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_report_files(folder):
    names = {"report.html", "problems.jsonl", "rates.csv", "rates.svg", "again.csv", "again.svg", "lens.csv"}
    assert {path.name for path in folder.iterdir()} == names
    lines = (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == PROBLEMS


def test_csv_has_full_precision(folder):
    with open(folder / "rates.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {name: str(value) for name, value in ROWS[0].items()} and float(first["rate"]) == 1 / 3
    assert second["p"] == ""
    assert (folder / "lens.csv").read_text(encoding="utf-8").startswith("thought,rank 1,rank 2\n1,")


def test_report_escapes_untrusted_text(folder, page):
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("svg") == 2 == tags.count("style") - 1
    texts = "".join(page.texts)
    assert f"Analysis {SHOWN}" in page.texts and f"Rates {SHOWN}" in page.texts
    assert page.texts.count(SHOWN) >= 9  # summary, fact and its name, caption, three cells, question, labels
    for name in ("rates", "again"):
        drawn = [
            text.text for text in ElementTree.parse(folder / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text")
        ]
        assert drawn.count(SHOWN) == 2 and 'id="a"' in drawn  # tick and legend, not parsed as math
    assert texts.count('id="a"') == 2


def test_report_is_self_contained(page):
    for name in ("src", "href", "xlink:href"):
        for value in page.values(name):
            assert value.startswith("#") or re.fullmatch(r"[a-z]+\.(csv|svg|jsonl)", value)
    assert not {"link", "img", "iframe", "base"} & {tag for tag, _ in page.tags}


def test_inlined_svg_ids_are_unique_and_resolve(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = [value[1:] for value in page.values("xlink:href")]
    used += re.findall(r"url\(#([^)]+)\)", " ".join(page.values("clip-path")))
    assert used and set(used) <= set(ids)


def test_inlined_svg_uses_page_colours(folder, page):
    styles = " ".join(page.values("style"))
    assert "var(--ink)" in styles and "var(--paper)" in styles and "#000000" not in styles
    svg = (folder / "rates.svg").read_text(encoding="utf-8")
    assert "#000000" in svg and "#ffffff" in svg and "var(" not in svg


def test_the_same_values_make_the_same_drawing(folder):
    assert (folder / "rates.svg").read_text(encoding="utf-8") == report.drawing(FIGURES[0], f"Analysis {EVIL}")


def test_tables_show_numbers_shortly_and_roles_as_colours(folder, page):
    for number in ("0.333", "1.2e-04", "0.500"):
        assert number in page.texts
    assert page.values("data-role") == [*report.ROLES, ON_PATH]  # the legend, then the cell
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert f'[data-role="{UNREACHABLE}"] {{ background: {report.ROLE_COLOURS[UNREACHABLE]}' in html
    assert "$" not in html.replace("$x$", "").replace("`${shown} of ${problems.length}`", "")


def test_report_opens_with_verdict_and_marks_problems(tmp_path):
    problems = [{"idx": 0, "correct": True}, {"idx": 1, "correct": False}, {"idx": 2}]
    write(tmp_path, "run", {}, ["the verdict", "more"], [], problems)
    html = (tmp_path / "report.html").read_text()
    assert html.index("<h1>run</h1>") < html.index('<p class="verdict">the verdict</p>') < html.index("<li>more</li>")
    marks = re.findall(r'<details class="problem"><summary>(?:<b class="(\w+)">)?', html)
    assert marks == ["right", "wrong", ""]


def test_report_never_overwrites_but_completes_partial_folder(tmp_path):
    (tmp_path / "rates.csv").write_text("left by a run that was stopped")
    write(tmp_path, "one", {}, [], FIGURES[2:], [])
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(UserError, match=f"{tmp_path}: already contains a report"):
        write(tmp_path, "two", {}, [], [], [])
    assert (tmp_path / "report.html").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the report"):
        write(tmp_path / "file", "three", {}, [], [], [])


def test_report_with_empty_table_and_no_problems(tmp_path):
    write(tmp_path, "empty", {}, [], [Figure("none", "None", "", [])], [])
    assert (tmp_path / "none.csv").read_text() == "\n"
    assert "0 of 0" in (tmp_path / "report.html").read_text()


def test_report_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"requirements\.txt"):
        write(tmp_path / "no", "title", {}, [], FIGURES, [])
    assert not (tmp_path / "no").exists()
