"""k thoughts, then language: what the same weights write after fewer or more thoughts than they were trained with.

The paper's figure 6 (arXiv v1; figure 4 in v3): accuracy, and six classes of what is written, for each k.
"""

from __future__ import annotations

from collections import Counter

from matplotlib.figure import Figure as Canvas

from analysis.findings import Findings
from analysis.graphs import CLASSES, Verdict, classify
from analysis.report import COLOURS, Figure, draw_rates
from analysis.statistics import compare, wilson
from analysis.thoughts import Subject, write_answers

WORDS = (
    "Rows are models and k, the number of steps that thoughts (or pauses) take the place of; trained: the most of "
    "them in training. Every row has the same problems. Correct Path: what is written is, or can be completed to, a "
    "shortest path; Longer Path: a valid one; Wrong Target: a valid path elsewhere; Hallucination: an edge that is "
    "not there, or no path at all; Correct and Incorrect Label: an answer alone. Two more counts: the path reaches "
    "the target, and path and answer disagree."
)


def analyze(subject: Subject, beside: list[Subject]) -> Findings:
    """k = 0 .. twice the steps trained, for the subject and for the models beside it that have placeholders."""
    findings, rows, cells = Findings(), [], {}
    for model in [subject, *beside]:
        for k, at in sweep(model):
            label = f"{model.name}, k = {k}" if model.has_placeholders else model.name
            answers = write_answers(at, label)
            verdicts = judge(at, answers)
            rows.append({"cell": label, "model": model.name, "k": k, "trained": at.thoughts == model.thoughts})
            rows[-1] |= row(answers, verdicts)
            cells[label] = {index: answer["correct"] for index, answer in enumerate(answers)}
            for index, (answer, verdict) in enumerate(zip(answers, verdicts, strict=True)):
                own = {"generated": answer["generated"], "correct": answer["correct"]}
                own |= {"class": verdict.kind} if verdict else {}
                findings.problems.setdefault(index, {"k_sweep": {}})["k_sweep"][label] = own
    title = "k thoughts, then language"
    findings.figures.append(Figure("k_sweep", title, WORDS, rows, lambda canvas: draw(canvas, rows)))
    first = rows[0]["cell"]
    words = f"Accuracy of every row of the figure above, against {first}; paired, the same problems in all."
    findings.figures.append(Figure("k_sweep_tests", f"{title}: differences", words, compare(cells, first)))
    for model in [subject, *beside]:
        own = [row for row in rows if row["model"] == model.name]
        rates = [f"{row['accuracy']:.1%}" + ("" if row["k"] is None else f" at k = {row['k']}") for row in own]
        findings.summary.append(f"{model.name}: accuracy {', '.join(rates)}")
        if model.has_placeholders and own[-1]["k"] < 2 * model.opened.config.max_latent_stage:
            findings.summary[-1] += f"; k ends there, since the model takes {model.positions} positions"
    return findings


def sweep(model: Subject) -> list[tuple[int | None, Subject]]:
    """Each k that the model has positions for, with the model that has so many thoughts; None for one without any."""
    if not model.has_placeholders:
        return [(None, model)]
    each = ((k, model.with_thoughts(k * model.per_stage)) for k in range(2 * model.opened.config.max_latent_stage + 1))
    longest = max(len(prompt["input_ids"]) for prompt in model.with_thoughts(0).prompts)
    return [(k, at) for k, at in each if not model.positions or longest + at.thoughts <= model.positions]


def judge(model: Subject, answers: list[dict]) -> list[Verdict | None]:
    """The class of each answer; None for a problem without a graph."""
    steps = model.thoughts // model.per_stage
    return [
        form and classify(answer["generated"], form, graph, steps)
        for form, graph, answer in zip(model.forms, model.graphs, answers, strict=True)
    ]


def row(answers: list[dict], verdicts: list[Verdict | None]) -> dict:
    """Accuracy with its interval, tokens, and the counts of the classes."""
    n, right = len(answers), sum(answer["correct"] for answer in answers)
    low, high = wilson(right, n)
    found = {"n": n, "accuracy": right / n, "low": low, "high": high}
    found["tokens"] = sum(answer["new_tokens"] for answer in answers) / n
    known = [verdict for verdict in verdicts if verdict]
    if known:
        counts = Counter(verdict.kind for verdict in known)
        found |= {name: counts[name] for name in CLASSES}
        found["path reaches target"] = sum(verdict.path_right is True for verdict in known)
        found["path and answer disagree"] = sum(verdict.agree is False for verdict in known)
    return found


def draw(canvas: Canvas, rows: list[dict]) -> None:
    """Horizontal stacked bars of the classes, and accuracy with its interval beside them."""
    canvas.set_size_inches(10, 1.6 + 0.32 * len(rows))
    bars, accuracy = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = range(len(rows))
    if CLASSES[0] in rows[0]:
        left = [0] * len(rows)
        for colour, name in zip(COLOURS, CLASSES, strict=False):
            counts = [row[name] for row in rows]
            bars.barh(places, counts, left=left, color=colour, label=name)
            left = [start + count for start, count in zip(left, counts, strict=True)]
        canvas.legend(loc="outside lower center", ncols=3)
    bars.set(xlabel=f"problems (n = {rows[0]['n']} in every row)", yticks=places)
    bars.set_yticklabels([row["cell"] for row in rows])
    bars.invert_yaxis()
    draw_rates(accuracy, rows, "accuracy")
    accuracy.set(xlabel="accuracy %, 95 % interval")
