"""Generate with fewer or more thoughts than trained: k thoughts, then language.

The paper's figure 6 (arXiv v1; figure 4 in v3): accuracy and six classes of output for each k.
"""

from __future__ import annotations

from collections import Counter

from matplotlib.figure import Figure as Canvas

from analysis.findings import Findings
from analysis.graphs import CLASSES, Verdict, classify
from analysis.report import Figure, draw_rates
from analysis.statistics import compare, wilson
from analysis.style import COLOURS
from analysis.thoughts import Subject, write_answers

CAPTION = (
    "Rows are models and k, the number of steps replaced by thoughts (or pause tokens); trained: as many as at most in "
    "training. All rows have the same problems. Correct Path: the output is a shortest path or the end of one; Longer "
    "Path: another valid path; Wrong Target: a valid path to another node; Hallucination: an edge that does not exist, "
    "or no path; Correct and Incorrect Label: only an answer. Further counts: the path reaches the target; path and "
    "answer disagree."
)


def analyze(subject: Subject, baselines: list[Subject]) -> Findings:
    """Sweep k from 0 to twice the trained steps, for the subject and for baselines with thoughts or pause tokens."""
    findings, rows, cells = Findings(), [], {}
    for model in [subject, *baselines]:
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
    findings.figures.append(Figure("k_sweep", title, CAPTION, rows, lambda canvas: draw(canvas, rows)))
    first = rows[0]["cell"]
    tests_caption = f"Accuracy of each row of the figure above against {first}, paired by problem."
    findings.figures.append(Figure("k_sweep_tests", f"{title}: differences", tests_caption, compare(cells, first)))
    for model in [subject, *baselines]:
        own = [row for row in rows if row["model"] == model.name]
        rates = [f"{row['accuracy']:.1%}" + ("" if row["k"] is None else f" at k = {row['k']}") for row in own]
        findings.summary.append(f"{model.name}: accuracy {', '.join(rates)}")
        if model.has_placeholders and own[-1]["k"] < 2 * model.checkpoint.config.max_latent_stage:
            findings.summary[-1] += f"; larger k exceed the model's {model.positions} positions"
    return findings


def sweep(model: Subject) -> list[tuple[int | None, Subject]]:
    """Return each k with the subject of that many thoughts, if positions suffice; k is None without placeholders."""
    if not model.has_placeholders:
        return [(None, model)]
    ks = range(2 * model.checkpoint.config.max_latent_stage + 1)
    each = ((k, model.with_thoughts(k * model.per_stage)) for k in ks)
    longest = max(len(prompt["input_ids"]) for prompt in model.with_thoughts(0).prompts)
    return [(k, at) for k, at in each if not model.positions or longest + at.thoughts <= model.positions]


def judge(model: Subject, answers: list[dict]) -> list[Verdict | None]:
    """Classify each answer; None for a problem without a graph."""
    steps = model.thoughts // model.per_stage
    return [
        form and classify(answer["generated"], form, graph, steps)
        for form, graph, answer in zip(model.forms, model.graphs, answers, strict=True)
    ]


def row(answers: list[dict], verdicts: list[Verdict | None]) -> dict:
    """Compute accuracy with interval, tokens, and counts of classes."""
    n, right = len(answers), sum(answer["correct"] for answer in answers)
    low, high = wilson(right, n)
    result = {"n": n, "accuracy": right / n, "low": low, "high": high}
    result["tokens"] = sum(answer["new_tokens"] for answer in answers) / n
    known = [verdict for verdict in verdicts if verdict]
    if known:
        counts = Counter(verdict.kind for verdict in known)
        result |= {name: counts[name] for name in CLASSES}
        result["path reaches target"] = sum(verdict.path_right is True for verdict in known)
        result["path and answer disagree"] = sum(verdict.agree is False for verdict in known)
    return result


def draw(canvas: Canvas, rows: list[dict]) -> None:
    """Draw stacked bars of the classes, with accuracy and interval next to them."""
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
