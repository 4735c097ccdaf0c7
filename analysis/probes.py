"""Linear probes: which node of the path can be read from the hidden state at a thought, by layer.

Ridge regression onto node names, cross-validated, so that each problem is tested once. The control task (Hewitt and
Liang 2019) assigns a random node to each root's name: accuracy on it comes from recognizing the root; selectivity is
the difference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, product

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analysis.findings import Findings
from analysis.graphs import Graph
from analysis.report import WIDTH, Figure
from analysis.statistics import wilson
from analysis.style import CATEGORIES, in_percent, integer_ticks, name_lines
from analysis.thoughts import SEED, Subject, look

FOLDS, RIDGE = 5, 1.0


def obstacle(subject: Subject) -> str | None:
    """Return why probes are not possible (too few problems, steps that are not a path), or None."""
    if len(subject.problems) < 2 * FOLDS:
        return f"at least {2 * FOLDS} problems are needed"
    return None if all(gold_paths(subject)) else "not all problems have steps that form a path from the root"


def analyze(subject: Subject, baselines: list[Subject]) -> Findings:
    """Train a probe per model, layer, thought and step (the steps that all problems have)."""
    paths, rows = gold_paths(subject), []
    nodes = list(zip(*(path[: min(map(len, paths))] for path in paths), strict=True))  # [step][problem]
    tasks = [labels(names) for names in nodes] + [labels(control(subject.graphs, names)) for names in nodes]
    for model in (model for model in [subject, *baselines] if model.thoughts):
        states = hidden_states(model)  # (problems, layers, thoughts, hidden)
        places = list(product(range(states.shape[1]), range(states.shape[2])))
        for layer, thought in tqdm(places, desc=f"{model.name}: probes", leave=False, disable=None):
            right = cross_validate(states[:, layer, thought], tasks)  # for each task
            for step, (own, by_control) in enumerate(zip(right[: len(nodes)], right[len(nodes) :], strict=True)):
                place = {"model": model.name, "step": step + 1, "layer": layer, "thought": thought + 1}
                rows.append(place | row(own, by_control, most_common(tasks[step]), len(paths)))
    caption = (
        "Accuracy of a linear probe of the hidden state at a thought (or pause token) after a layer (0: the input), "
        "for the node that a step leads to. control: random nodes assigned to root names; selectivity: the difference; "
        "most common: accuracy of always predicting the most frequent node. Five-fold cross-validation."
    )
    lines = [summary(rows, step + 1, subject.name) for step in range(len(nodes))]
    own = [row for row in rows if row["model"] == subject.name]
    return Findings([Figure("probes", "Linear probes", caption, rows, lambda canvas: draw(canvas, own))], {}, lines)


def summary(rows: list[dict], step: int, model: str) -> str:
    """Format the best probe for a step."""
    best = max((r for r in rows if (r["step"], r["model"]) == (step, model)), key=lambda r: r["accuracy"])
    place = f"layer {best['layer']}, thought {best['thought']}"
    return f"best probe for step {step}: {best['accuracy']:.1%} ({place}), control {best['control']:.1%}"


def row(right: int, by_control: int, common: float, n: int) -> dict:
    """Compute accuracy, interval, control and selectivity of a probe."""
    low, high = wilson(right, n)
    result = {"n": n, "accuracy": right / n, "low": low, "high": high, "control": by_control / n}
    return result | {"selectivity": (right - by_control) / n, "most common": common}


def gold_paths(subject: Subject) -> list[list[str]]:
    """Return the nodes after the root on the reference path of each problem; [] if its steps are not a path."""
    pairs = zip(subject.forms, subject.graphs, subject.problems, strict=True)
    return [(form.chain("\n".join(problem["steps"]), 0, graph) or [])[1:] for form, graph, problem in pairs]


def control(graphs: list[Graph], nodes: Sequence[str]) -> list[str]:
    """Assign a random node to each root name (distinct if there are enough); return the node of each problem."""
    drawn, roots = sorted(set(nodes)), sorted({graph.root for graph in graphs})
    random.Random(SEED).shuffle(drawn)
    belongs = dict(zip(roots, cycle(drawn), strict=False))
    return [belongs[graph.root] for graph in graphs]


def labels(names: Sequence[str]) -> Tensor:
    """Map names to label ids (problems,)."""
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return torch.tensor([places[name] for name in names])


def most_common(truth: Tensor) -> float:
    """Return the share of the most frequent label of (problems,)."""
    return truth.bincount().max().item() / len(truth)


def cross_validate(features: Tensor, tasks: list[Tensor]) -> list[int]:
    """Count the problems that held-out probes predict correctly, for each task of (problems,) labels.

    features: (problems, hidden).
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))
    targets = [F.one_hot(truth).double() for truth in tasks]  # (problems, labels) each
    right = [0] * len(tasks)
    for fold in order.chunk(FOLDS):
        train = torch.ones(len(features), dtype=torch.bool)  # (problems,)
        train[fold] = False
        own = features[train].double()
        mean, scale = own.mean(0), own.std(0) + 1e-6
        x = (own - mean) / scale  # (train, hidden)
        gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)  # (hidden, hidden)
        bases = [target[train].mean(0) for target in targets]  # (labels,) each
        centred = torch.cat([target[train] - base for target, base in zip(targets, bases, strict=True)], dim=1)
        weights = torch.linalg.solve(gram, x.T @ centred)  # (hidden, labels of all tasks)
        scores = (features[fold].double() - mean) / scale @ weights  # (fold, labels of all tasks)
        for task, part in enumerate(scores.split([len(base) for base in bases], dim=1)):
            right[task] += ((part + bases[task]).argmax(1) == tasks[task][fold]).sum().item()
    return right


def hidden_states(subject: Subject) -> Tensor:
    """Collect the hidden states at thoughts or pause tokens, before the first block and after each.

    Returns: (problems, layers + 1, thoughts, hidden) on the CPU.
    """
    result = {}
    for part, batch in subject.batches(subject.prompts, "hidden states"):
        outputs = look(subject, batch, output_hidden_states=True).hidden_states  # (batch, length, hidden) each
        places = (batch["input_ids"] == subject.placeholder_id).to(outputs[0].device)  # (batch, length)
        layers = [layer[places].view(len(part), subject.thoughts, -1) for layer in outputs]
        states = torch.stack(layers, dim=1).cpu().float()  # (batch, layers + 1, thoughts, hidden)
        result |= dict(zip(part, states, strict=True))
    return torch.stack([result[index] for index in range(len(result))])


def draw(canvas: Canvas, rows: list[dict]) -> None:
    """Draw accuracy over layers: a panel per step, a line per thought, the control dotted."""
    steps = sorted({row["step"] for row in rows})
    canvas.set_size_inches(WIDTH, 0.5 + 2.2 * len(steps))
    for step, axes in zip(steps, canvas.subplots(len(steps), 1, sharex=True, squeeze=False)[:, 0], strict=True):
        ends = []
        for thought in sorted({row["thought"] for row in rows}):
            own = [row for row in rows if (row["step"], row["thought"]) == (step, thought)]
            colour, layers = CATEGORIES[(thought - 1) % len(CATEGORIES)], [row["layer"] for row in own]
            axes.plot(layers, [100 * row["accuracy"] for row in own], "o-", markersize=4, color=colour)
            axes.plot(layers, [100 * row["control"] for row in own], ":", color=colour)
            ends.append((layers[-1], 100 * own[-1]["accuracy"], f"thought {thought}", colour))
        axes.set_title(f"node of step {step} (n = {own[0]['n']}; dotted: control)")
        axes.set_xlim(-0.1, layers[-1])
        in_percent(axes.yaxis)
        name_lines(axes, ends)
    axes.set_xlabel("layer")
    integer_ticks(axes.xaxis)
