"""GSM8k: change a number in the question and test whether decoded thoughts follow.

The paper's figure 4 (arXiv v1) shows a thought that decodes to intermediate results of the first step. Here the first
operand of the first step is incremented in the question (if it occurs only once), and the step's result is searched
among the top tokens of all thoughts, before and after.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from analysis.findings import Findings
from analysis.lens import TOP, top_tokens
from analysis.report import Figure
from analysis.statistics import compare
from analysis.thoughts import NOISE, Subject, noise, read_thoughts

STEP = re.compile(r"<<(\d+)([+*-])(\d+)=(\d+)>>")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def change(problem: dict) -> tuple[str, str, str] | None:
    """Increment the first operand of the first step in the question; return the question, and the old and new result.

    Returns None if the first step has another form, if the operand does not occur exactly once in the question, or if a
    result occurs there.
    """
    step = STEP.fullmatch(problem["steps"][0]) if problem["steps"] else None
    if not step:
        return None
    a, operation, b, result = step.groups()
    numbers = re.findall(r"\d+", problem["question"])
    after = str(OPERATIONS[operation](int(a) + 1, int(b)))
    if numbers.count(a) != 1 or result in numbers or after in numbers or after == result:
        return None
    return re.sub(rf"(?<!\d){a}(?!\d)", str(int(a) + 1), problem["question"]), result, after


def changeable(subject: Subject) -> list[tuple[dict, tuple[str, str, str]]]:
    """Return the problems that can be changed, with the change; both results must be single tokens to be decodable."""
    found = [(problem, new) for problem in subject.problems if (new := change(problem))]
    return [(problem, new) for problem, new in found if all(len(subject.tokenize(text)) == 1 for text in new[1:])]


def analyze(subject: Subject) -> Findings:
    """Measure how often the old and new result are among the top tokens of any thought, before and after the change."""
    pairs = changeable(subject)
    original = replace(subject, problems=[problem for problem, _ in pairs])
    changed = replace(subject, problems=[problem | {"question": new[0]} for problem, new in pairs])
    thoughts = read_thoughts(original)  # (problems, thoughts, hidden)
    found = {
        "before the change": decoded(original, thoughts),
        "after the change": decoded(original, read_thoughts(changed)),
    }
    found[NOISE] = decoded(original, noise(thoughts))
    cells = {}
    for name, texts in found.items():
        for which, place in (("old", 1), ("new", 2)):
            cells[f"{which} result, {name}"] = {
                index: new[place] in own for index, ((_, new), own) in enumerate(zip(pairs, texts, strict=True))
            }
    rows = [row for which in ("old", "new") for row in compared(cells, which)]
    caption = (
        f"Share of problems in which the result of the first step is among the {TOP} top tokens of any thought. Only "
        "problems whose first operand can be incremented in the question. If thoughts encode intermediate results, "
        "the new result replaces the old one after the change. Noise is the control."
    )
    summary = [f"{row['cell']}: decoded in {row['rate']:.1%} of {row['n']}" for row in rows]
    return Findings([Figure("operands", "Do the thoughts follow a changed operand?", caption, rows)], {}, summary)


def compared(cells: dict[str, dict[int, bool]], which: str) -> list[dict]:
    """Compare the old or new result, after the change and in noise, with before the change."""
    return compare(
        {name: cell for name, cell in cells.items() if name.startswith(which)}, f"{which} result, before the change"
    )


def decoded(subject: Subject, thoughts: Tensor) -> list[set[str]]:
    """Decode the top tokens of thoughts (problems, thoughts, hidden) to a set of stripped texts per problem."""
    _, tokens = top_tokens(subject, thoughts)  # (problems, thoughts, TOP)
    decode = subject.checkpoint.pretrained.tokenizer.decode
    return [{decode(id).strip() for id in own.flatten().tolist()} for own in tokens]
