"""The search tree: the probability that the model assigns to each concept it could name after k thoughts.

The paper's figures 7 to 9 (arXiv v1; 5 to 7 in v3). After k thoughts, the next step is started, and the value of a
concept is the product of the probabilities of its tokens as the first concept of the step: raw, not renormalized.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from analysis.findings import Findings
from analysis.graphs import Graph
from analysis.report import WIDTH, Figure
from analysis.statistics import compare
from analysis.style import GREEN, GREY, ORANGE, in_percent, integer_ticks, name_lines
from analysis.thoughts import NOISE, Subject, extended, log_probabilities, noise, read_thoughts

PERCENTILES = range(0, 101, 5)
HEIGHTS = {"longest": True, "shortest": False}  # the paper's caption and its text


def analyze(subject: Subject, baselines: list[Subject], chosen: int) -> Findings:
    """Compute values at every level the thoughts reach; after the first and second step also those of controls.

    Controls: noise in place of the thoughts, and baselines with thoughts or pause tokens.
    """
    graphs, lead = subject.graphs, subject.forms[0].lead
    reached = range(1, subject.thoughts // subject.per_stage + lead + 1)
    levels = [level for level in reached if any(graph.level(level) for graph in graphs)]
    found = {level: values(subject, level, level - lead) for level in levels}
    first_two = [level for level in levels if level - lead <= 2]  # steps replaced by thoughts
    compared = {level: {subject.name: found[level]} for level in first_two}
    for level in first_two:
        if subject.thinks and level > lead:
            compared[level][NOISE] = values(subject, level, level - lead, noise)
        for other in (other for other in baselines if other.has_placeholders):
            compared[level][other.name] = values(other, level, level - lead)
    figures = [tree(graphs[chosen], {level: found[level][chosen] for level in levels}, chosen)]
    figures += [heights(graphs, compared), parallelism(compared), controls(graphs, compared)]
    problems = {
        index: {"search": {level: found[level][index] for level in levels}} for index in range(len(subject.problems))
    }
    return Findings(figures, problems, [summary(row) for row in figures[-1].rows])


def values(subject: Subject, level: int, steps: int, replaced=None) -> list[dict[str, float]]:
    """Compute the value of each concept `level` edges from the root, after `steps` steps of thoughts, per problem.

    replaced: function of the thoughts (problems, thoughts, hidden) that returns replacements.
    """
    at = subject.with_thoughts(steps * subject.per_stage)
    items, scored, places = [], [], []
    for index, (prompt, form, graph) in enumerate(zip(at.prompts, at.forms, at.graphs, strict=True)):
        opening = at.tokenize(form.opening) if form.opening else []
        for node in sorted(graph.level(level)):
            tokens = at.tokenize(form.opening + form.written(node))[len(opening) :]
            items.append(extended(prompt, opening + tokens))
            scored.append(len(tokens))
            places.append((index, node))
    given = replaced(read_thoughts(at))[[index for index, _ in places]] if replaced else None
    found = [{} for _ in at.graphs]
    scores = log_probabilities(at, items, scored, f"level {level}", given)
    for (index, node), score in zip(places, scores, strict=True):
        found[index][node] = math.exp(score)
    return found


def controls(graphs: list[Graph], compared: dict[int, dict[str, list[dict]]]) -> Figure:
    """Tabulate per level, for model and controls: mean values, and how often the best concept leads to the target."""
    rows = []
    for level, cells in compared.items():
        best = {name: best_leads(graphs, found) for name, found in cells.items()}
        for row in compare(best, next(iter(best))):
            groups = {True: [], False: []}  # by whether a concept leads to the target
            for graph, own in zip(graphs, cells[row["cell"]], strict=True):
                for node, value in own.items():
                    groups[graph.leads_to_target(node)].append(value)
            means = {"mean value, leads to target": mean(groups[True]), "mean value, does not": mean(groups[False])}
            rows.append({"level": level} | row | {"concepts": sum(map(len, groups.values()))} | means)
    caption = (
        "Rate: how often the concept with the highest value leads to the target, in n problems, compared with the "
        "model itself (levels with a single concept included). Means are over all concepts of the level."
    )
    return Figure("search_controls", "Search, with controls", caption, rows)


def best_leads(graphs: list[Graph], found: list[dict]) -> dict[int, bool]:
    """Return whether the concept with the highest value leads to the target, for each problem with concepts."""
    best = {index: max(own, key=own.get) for index, own in enumerate(found) if own}
    return {index: graphs[index].leads_to_target(node) for index, node in best.items()}


def summary(row: dict) -> str:
    """Format a row of `controls` for the terminal."""
    right, wrong = row["mean value, leads to target"], row["mean value, does not"]
    caption = (
        f"the best concept leads to the target in {row['rate']:.1%}; mean value {right:.2g}, of others {wrong:.2g}"
    )
    return f"level {row['level']}, {row['cell']}: {caption}"


def mean(numbers: list[float]) -> float:
    """Return the mean, or NaN for an empty list."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def tree(graph: Graph, levels: dict[int, dict], chosen: int) -> Figure:
    """Tabulate and draw the search tree of one problem."""
    rows = []
    for level, own in levels.items():
        for node, value in sorted(own.items(), key=lambda pair: -pair[1]):
            row = {"level": level, "concept": node, "value": value, "height": graph.height(node, longest=True)}
            rows.append(row | {"leads to target": graph.leads_to_target(node), "role": graph.role(node)})
    caption = (
        "Concepts in the column of their distance from the root, with their values in % and h, their longest distance "
        "to a leaf. The value at a level is that after its thoughts; a concept that is reached in several ways has "
        "one per level."
    )
    title = f"Search tree of problem {chosen}"
    return Figure("search_tree", title, caption, rows, lambda canvas: draw_tree(canvas, graph, levels, title))


def draw_tree(canvas: Canvas, graph: Graph, levels: dict[int, dict], title: str) -> None:
    """Draw each node once, at its distance from the root, and the edges between the nodes drawn."""
    columns = {0: [graph.root]}  # distance: nodes
    for level, own in levels.items():
        drawn = [node for nodes in columns.values() for node in nodes]
        columns |= {level: new} if (new := [node for node in sorted(own) if node not in drawn]) else {}
    canvas.set_size_inches(WIDTH, 1.6 + 0.7 * max(map(len, columns.values())))
    axes = canvas.subplots()
    places = {}
    for level, nodes in columns.items():
        places |= {node: (level, (number + 0.5) / len(nodes)) for number, node in enumerate(nodes)}
    boxes = {}
    for node, place in places.items():
        values = [(level, own[node]) for level, own in levels.items() if node in own]
        lines = [f"{node} (h {graph.height(node, longest=True)})" if values else node]
        lines += [f"{value:.1%}" + (f" at {level}" if len(values) > 1 else "") for level, value in values]
        filling = ORANGE if graph.leads_to_target(node) else "white"
        box = {"boxstyle": "round", "facecolor": filling, "edgecolor": GREY}
        box["linewidth"] = 3 if node == graph.target else 1
        style = {"color": "#111111" if filling == ORANGE else "black", "fontsize": 9, "bbox": box}
        boxes[node] = axes.text(*place, "\n".join(lines), ha="center", va="center", **style).get_bbox_patch()
    for parent, child in graph.edges:
        if parent in places and child in places:
            line = {"arrowstyle": "-|>", "color": GREY, "patchA": boxes[parent], "patchB": boxes[child]}
            line["connectionstyle"] = f"arc3,rad={0.3 if places[child][0] <= places[parent][0] else 0}"
            axes.annotate("", places[child], places[parent], arrowprops=line, zorder=0)
    axes.set(xlim=(-0.4, max(columns) + 0.5), ylim=(0, 1))
    axes.set_title(f"{title}: from {graph.root} to {graph.target} or {graph.other}?")
    axes.set_xticks(list(columns), ["root", *(f"level {level}" for level in list(columns)[1:])])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    kinds = [(ORANGE, 1, "leads to the target"), (ORANGE, 3, "the target"), ("white", 1, "does not lead there")]
    handles = [Patch(facecolor=colour, edgecolor=GREY, linewidth=width, label=label) for colour, width, label in kinds]
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)


def heights(graphs: list[Graph], compared: dict[int, dict[str, list[dict]]]) -> Figure:
    """Tabulate and plot mean value against height, by both definitions, for concepts that lead to the target or not."""
    rows = []
    for level, cells in compared.items():
        for model, found in cells.items():
            for name, longest in HEIGHTS.items():
                row = {"level": level, "model": model, "height is": name}
                rows += [row | group for group in by_height(graphs, found, longest)]
    caption = (
        "Mean value of a concept by its height, the longest or shortest distance to a leaf; n counts concepts. A model "
        "that searches assigns low values to low concepts that do not lead to the target. The plot shows the model "
        "itself, the table also the controls."
    )
    drawn = of_the_model(rows)
    return Figure("value_by_height", "Value against height", caption, rows, lambda canvas: draw_heights(canvas, drawn))


def by_height(graphs: list[Graph], found: list[dict], longest: bool) -> list[dict]:
    """Average the values by height and by whether a concept leads to the target."""
    groups = {}
    for graph, own in zip(graphs, found, strict=True):
        for node, value in own.items():
            groups.setdefault((graph.height(node, longest), graph.leads_to_target(node)), []).append(value)
    groups = {key: group for key, group in groups.items() if key[0] is not None}  # cycles have no height
    return [
        {"height": height, "leads to target": leads, "n": len(group)}
        | {"mean value": mean(group), "standard deviation": float(np.std(group))}
        for (height, leads), group in sorted(groups.items())
    ]


def of_the_model(rows: list[dict]) -> list[dict]:
    """Return the rows of the model itself (the first one), without controls."""
    return [row for row in rows if row["model"] == rows[0]["model"]]


def draw_heights(canvas: Canvas, rows: list[dict]) -> None:
    """Draw a panel per level and definition of height."""
    levels = sorted({row["level"] for row in rows})
    canvas.set_size_inches(WIDTH, 2.4 * len(levels) + 0.5)
    panels = canvas.subplots(len(levels), len(HEIGHTS), sharex=True, sharey=True, squeeze=False)
    for level, across in zip(levels, panels, strict=True):
        for name, axes in zip(HEIGHTS, across, strict=True):
            ends, n = [], 0
            for leads, colour, marker in ((True, ORANGE, "o-"), (False, GREY, "s--")):
                own = [r for r in rows if (r["level"], r["height is"], r["leads to target"]) == (level, name, leads)]
                values, n = [100 * r["mean value"] for r in own], n + sum(r["n"] for r in own)
                axes.plot([r["height"] for r in own], values, marker, markersize=4, color=colour)
                if own:
                    ends.append((own[-1]["height"], values[-1], "leads to target" if leads else "does not", colour))
            axes.set_title(f"level {level} (n = {n})")
            axes.set_xlim(-0.2, max(r["height"] for r in rows) + 0.2)
            in_percent(axes.yaxis)
            integer_ticks(axes.xaxis)
        name_lines(axes, ends)
    for name, axes in zip(HEIGHTS, panels[-1], strict=True):
        axes.set_xlabel(f"{name} distance to a leaf")
    panels[0, 0].set_ylabel("mean value")


def parallelism(compared: dict[int, dict[str, list[dict]]]) -> Figure:
    """Compute the cumulative value of the top 1, 2 and 3 concepts, each curve sorted independently."""
    rows = []
    for level, cells in compared.items():
        for model, found in cells.items():
            best = [np.cumsum([*sorted(own.values(), reverse=True), 0, 0, 0][:3]) for own in found if own]
            ranked = np.array(best)  # (problems, 3)
            for percentile in PERCENTILES:
                top = np.percentile(ranked, percentile, axis=0)  # (3,)
                row = {"level": level, "model": model, "percentile": percentile, "n": len(ranked)}
                rows.append(row | {f"top {i + 1}": float(value) for i, value in enumerate(top)})
    caption = (
        "Cumulative value of the top 1, 2 and 3 concepts of a level, each against its own percentiles over problems. "
        "Wide gaps: several concepts are considered in parallel. The plot shows the model itself, the table also the "
        "controls."
    )
    drawn = of_the_model(rows)
    return Figure("parallelism", "Parallelism", caption, rows, lambda canvas: draw_parallelism(canvas, drawn))


def draw_parallelism(canvas: Canvas, rows: list[dict]) -> None:
    """Draw a panel per level."""
    levels = sorted({row["level"] for row in rows})
    canvas.set_size_inches(WIDTH, 2.4 * len(levels) + 0.5)
    for level, axes in zip(levels, canvas.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0], strict=True):
        own, ends = [row for row in rows if row["level"] == level], []
        for number, style in enumerate(("-", "--", ":"), 1):
            values = [100 * row[f"top {number}"] for row in own]
            axes.plot([row["percentile"] for row in own], values, style, color=GREEN)
            ends.append((100, values[-1], f"top {number}", GREEN))
        axes.set_title(f"cumulative value at level {level} (n = {own[0]['n']})")
        axes.set_xlim(0, 100)
        in_percent(axes.yaxis)
        name_lines(axes, ends)
    axes.set_xlabel("percentile of problems")
