"""Generate with fewer or more thoughts than trained: k thoughts, then language.

The paper's figure 6 (arXiv v1; figure 4 in v3): accuracy and six classes of output for each k.
"""

from __future__ import annotations

from collections import Counter

from matplotlib.figure import Figure as Canvas

from analysis.findings import Findings
from analysis.graphs import CLASSES, Verdict, classify
from analysis.report import WIDTH, Figure, draw_chance
from analysis.statistics import compare, wilson
from analysis.style import GREEN, GREY, ORANGE, PURPLE, SKY, in_percent, integer_ticks, model_colour, name_lines
from analysis.thoughts import Subject, write_answers

CLASS_COLOURS = dict(zip(CLASSES, (GREEN, SKY, PURPLE, ORANGE, "#9ad9c5", GREY), strict=True))
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
                problem = findings.problems.setdefault(index, {"k_sweep": {}})
                problem["k_sweep"][label] = own
                if model is subject and at.thoughts == model.thoughts:
                    problem["correct"] = answer["correct"]
    title = "k thoughts, then language"
    to_draw = any(row["k"] is not None for row in rows) or CLASSES[0] in rows[0]
    own_draw = (lambda canvas: draw(canvas, rows, subject.chance)) if to_draw else None
    findings.figures.append(Figure("k_sweep", title, CAPTION, rows, own_draw))
    first = rows[0]["cell"]
    tests_caption = f"Accuracy of each row of the figure above against {first}, paired by problem."
    findings.figures.append(Figure("k_sweep_tests", f"{title}: differences", tests_caption, compare(cells, first)))
    for model in [subject, *baselines]:
        own = [row for row in rows if row["model"] == model.name]
        rates = [f"{row['accuracy']:.1%}" + ("" if row["k"] is None else f" at k = {row['k']}") for row in own]
        findings.summary.append(f"{model.name}: accuracy {', '.join(rates)}")
        if model.has_placeholders and own[-1]["k"] < 2 * model.checkpoint.config.max_latent_stage:
            findings.summary[-1] += f"; larger k exceed the model's {model.positions} positions"
    for trained in as_trained(rows):
        findings.verdict = f"{subject.name} answers {trained['accuracy']:.1%} of {trained['n']} problems correctly."
    return findings


def sweep(model: Subject) -> list[tuple[int | None, Subject]]:
    """Return each k with the subject of that many thoughts, if positions suffice; k is None without placeholders."""
    if not model.has_placeholders:
        return [(None, model)]
    ks = range(2 * model.checkpoint.config.max_latent_stage + 1)
    each = ((k, model.with_thoughts(k * model.per_stage)) for k in ks)
    longest = max(len(prompt["input_ids"]) for prompt in model.with_thoughts(0).prompts)
    return [(k, at) for k, at in each if not model.positions or longest + at.thoughts <= model.positions]


def as_trained(rows: list[dict]) -> list[dict]:
    """Return the row of the model itself (the first one) with as many thoughts as trained; none if they do not fit."""
    return [row for row in rows if row["model"] == rows[0]["model"] and row["trained"]]


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


def draw(canvas: Canvas, rows: list[dict], chance: float | None) -> None:
    """Draw accuracy over k, and below, for problems with a graph, the classes as stacked bars."""
    sweeps, classified = any(row["k"] is not None for row in rows), CLASSES[0] in rows[0]
    heights = [3.0] * sweeps + [0.9 + 0.22 * len(rows)] * classified
    canvas.set_size_inches(WIDTH, sum(heights) + 0.6 * classified + 0.3)
    panels = list(canvas.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if sweeps:
        draw_accuracy(panels.pop(0), rows, chance)
    if classified:
        draw_classes(panels.pop(0), rows)
        canvas.legend(loc="outside lower center", ncols=3, fontsize=9)


def draw_accuracy(axes, rows: list[dict], chance: float | None) -> None:
    """Draw a line per model, with intervals; models without thoughts or pause tokens as a level."""
    ends, last = [], max(row["k"] or 0 for row in rows)
    axes.set(xlim=(-0.2, last + 0.2), title=f"accuracy after k thoughts (n = {rows[0]['n']})", xlabel="k")
    in_percent(axes.yaxis)
    integer_ticks(axes.xaxis)
    for model in dict.fromkeys(row["model"] for row in rows):
        own, colour = [row for row in rows if row["model"] == model], model_colour(model)
        ks, rates = [row["k"] for row in own], [100 * row["accuracy"] for row in own]
        if ks == [None]:
            ks = [-0.2]
        else:
            spread = [[100 * abs(row["accuracy"] - row[bound]) for row in own] for bound in ("low", "high")]
            axes.errorbar(ks, rates, spread, fmt="o-", markersize=4, capsize=2, color=colour)
        ends.append((ks[-1], rates[-1], model, colour))
    for k in (row["k"] for row in as_trained(rows) if row["k"] is not None):
        axes.axvline(k, color=GREY, linewidth=0.8, zorder=0)
        axes.annotate("as trained", (k, 0.02), (4, 0), ("data", "axes fraction"), "offset points", fontsize=9)
    draw_chance(axes.axhline, chance)
    name_lines(axes, ends + ([] if chance is None else [(last, 100 * chance, "chance", GREY)]))


def draw_classes(axes, rows: list[dict]) -> None:
    """Draw the share of each class in a row's outputs."""
    places, left = range(len(rows)), [0] * len(rows)
    for name, colour in CLASS_COLOURS.items():
        shares = [100 * row[name] / row["n"] for row in rows]
        axes.barh(places, shares, left=left, color=colour, label=name)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    in_percent(axes.xaxis)
    axes.set_yticks(places, [row["cell"] for row in rows], fontsize=9)
    axes.set(title=f"classes of output (n = {rows[0]['n']} in every row)", xlim=(0, 100))
    axes.invert_yaxis()
