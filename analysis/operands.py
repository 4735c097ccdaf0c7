"""GSM8k: change a number of the question, and see whether what the thoughts decode to follows.

The paper's figure 4 (arXiv v1) shows a thought that decodes to the first step's intermediate results. Here the first
step's first operand, where it stands once in the question, is raised by one, and the first step's result is looked for
among the top tokens of every thought, before and after.
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
    """The question with the first step's first operand raised by one, and the step's results before and after.

    None where the first step is no such sum, the operand does not stand once in the question, or a result stands there.
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
    """The problems that can be changed so, each with its change; those with a result of several tokens are left out,
    since no thought can project to it."""
    found = [(problem, new) for problem in subject.problems if (new := change(problem))]
    return [(problem, new) for problem, new in found if all(len(subject.tokenize(text)) == 1 for text in new[1:])]


def analyze(subject: Subject) -> Findings:
    """How often the old and the new result stand among the top tokens of any thought, before and after the change."""
    pairs = changeable(subject)
    asked = replace(subject, problems=[problem for problem, _ in pairs])
    changed = replace(subject, problems=[problem | {"question": new[0]} for problem, new in pairs])
    thoughts = read_thoughts(asked)  # (problems, thoughts, hidden)
    found = {"before the change": decoded(asked, thoughts), "after the change": decoded(asked, read_thoughts(changed))}
    found[NOISE] = decoded(asked, noise(thoughts))
    cells = {}
    for name, texts in found.items():
        for which, place in (("old", 1), ("new", 2)):
            cells[f"{which} result, {name}"] = {
                index: new[place] in own for index, ((_, new), own) in enumerate(zip(pairs, texts, strict=True))
            }
    rows = [row for which in ("old", "new") for row in compared(cells, which)]
    words = (
        f"Whether the first step's result is among the {TOP} top tokens of any thought, for the problems whose "
        "first operand can be raised by one in the question. If thoughts hold the intermediate, the new result "
        "takes the old one's place after the change. Noise is the control."
    )
    summary = [f"{row['cell']}: decoded in {row['rate']:.1%} of {row['n']}" for row in rows]
    return Findings([Figure("operands", "Do the thoughts follow a changed operand?", words, rows)], {}, summary)


def compared(cells: dict[str, dict[int, bool]], which: str) -> list[dict]:
    """The old or the new result after the change, and in noise, against before."""
    return compare(
        {name: cell for name, cell in cells.items() if name.startswith(which)}, f"{which} result, before the change"
    )


def decoded(subject: Subject, thoughts: Tensor) -> list[set[str]]:
    """For each problem the texts, without blanks, of the top tokens of its thoughts (problems, thoughts, hidden)."""
    _, tokens = top_tokens(subject, thoughts)  # (problems, thoughts, TOP)
    decode = subject.opened.pretrained.tokenizer.decode
    return [{decode(id).strip() for id in own.flatten().tolist()} for own in tokens]
