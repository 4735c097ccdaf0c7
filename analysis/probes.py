"""Linear probes: which node of the path can be read off the hidden states at a thought, layer by layer.

Ridge regression to the nodes' names, cross-validated, so that every problem is tested once. The control task (Hewitt
and Liang 2019) gives each root's name a random node: what a probe reaches there it has by telling questions apart;
selectivity is what it reaches beyond.
"""

from __future__ import annotations

import random

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from analysis.findings import Findings
from analysis.graphs import Graph, find_form
from analysis.report import COLOURS, Figure
from analysis.statistics import wilson
from analysis.thoughts import SEED, Subject, think

FOLDS, RIDGE = 5, 1.0


def analyze(subject: Subject) -> Findings:
    """A probe for each layer, thought and step, over the problems that have so many steps."""
    graphs = [find_form(problem).graph(problem) for problem in subject.problems]
    paths = [gold_path(graph, problem) for graph, problem in zip(graphs, subject.problems, strict=True)]
    depth = min(map(len, paths))  # steps that every problem has, so that all cells have the same problems
    states = hidden_states(subject)  # (problems, layers, thoughts, hidden)
    rows = []
    for step in range(depth):
        truth, control = (
            labels([path[step] for path in paths]),
            labels(controls(graphs, [path[step] for path in paths])),
        )
        for layer in range(states.shape[1]):
            for thought in range(states.shape[2]):
                features = states[:, layer, thought]  # (problems, hidden)
                right, by_control = (sum(cross_validate(features, own)) for own in (truth, control))
                rows.append(row(layer, thought, step, right, by_control, most_common(truth), len(paths)))
    words = (
        "Accuracy of a linear probe of the hidden state at a thought's place, after a layer (0: the thought "
        "itself as it goes in), for the node that the step of the given number leads to. control: the same for "
        "random names tied to the root's name; selectivity: the difference; most common: always the same node. "
        "Every problem is tested once, by probes trained on four fifths of the others."
    )
    best = max(rows, key=lambda row: row["selectivity"])
    place = f"layer {best['layer']}, thought {best['thought']}, step {best['step']}"
    line = f"probes: highest selectivity {best['selectivity']:.1%} ({place})"
    return Findings([Figure("probes", "Linear probes", words, rows, lambda canvas: draw(canvas, rows))], {}, [line])


def row(layer: int, thought: int, step: int, right: int, by_control: int, common: float, n: int) -> dict:
    """A line of the table."""
    low, high = wilson(right, n)
    found = {"step": step + 1, "layer": layer, "thought": thought + 1, "n": n, "accuracy": right / n}
    found |= {"low": low, "high": high, "control": by_control / n, "most common": common}
    return found | {"selectivity": (right - by_control) / n}


def gold_path(graph: Graph, problem: dict) -> list[str]:
    """The nodes after the root on the path that the problem's steps write."""
    return find_form(problem).chain("\n".join(problem["steps"]) + "\n", 0, graph)[1:]


def controls(graphs: list[Graph], nodes: list[str]) -> list[str]:
    """For each problem a node drawn for its root's name, from all the nodes as often as they occur."""
    rng = random.Random(SEED)
    drawn = {root: rng.choice(nodes) for root in sorted({graph.root for graph in graphs})}
    return [drawn[graph.root] for graph in graphs]


def labels(names: list[str]) -> Tensor:
    """The number of each name among all that occur. (problems,)"""
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return torch.tensor([places[name] for name in names])


def most_common(truth: Tensor) -> float:
    """The share of the most common label of (problems,)."""
    return truth.bincount().max().item() / len(truth)


def cross_validate(features: Tensor, truth: Tensor) -> list[bool]:
    """Whether each problem's label is found by a probe that did not see it; features (problems, hidden)."""
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(SEED))
    found = torch.zeros(len(truth), dtype=torch.bool)  # (problems,)
    targets = torch.nn.functional.one_hot(truth).double()  # (problems, labels)
    for fold in order.chunk(FOLDS):
        train = torch.ones(len(truth), dtype=torch.bool)  # (problems,)
        train[fold] = False
        own = features[train].double()
        mean, scale = own.mean(0), own.std(0) + 1e-6
        x = (own - mean) / scale  # (train, hidden)
        gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)  # (hidden, hidden)
        base = targets[train].mean(0)  # (labels,)
        weights = torch.linalg.solve(gram, x.T @ (targets[train] - base))  # (hidden, labels)
        found[fold] = (((features[fold].double() - mean) / scale @ weights + base).argmax(1)) == truth[fold]
    return found.tolist()


@torch.no_grad()
def hidden_states(subject: Subject) -> Tensor:
    """What goes into the first block and comes out of each at the places of the thoughts, on the CPU: (problems,
    layers + 1, thoughts, hidden)."""
    found = {}
    for part, batch in subject.batches(subject.prompts(), "hidden states"):
        _, embeds = think(subject, batch)
        output = subject.model.base_causallm.base_model(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"].to(embeds.device),
            position_ids=batch["position_ids"].to(embeds.device),
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.stack(output.hidden_states, dim=1).cpu().float()  # (batch, layers + 1, length, hidden)
        is_latent = batch["input_ids"] == subject.model.latent_token_id  # (batch, length)
        for row, index in enumerate(part):
            found[index] = states[row][:, is_latent[row]]
    return torch.stack([found[index] for index in range(len(found))])


def draw(canvas: Canvas, rows: list[dict]) -> None:
    """A panel for each step: accuracy over layers, a line for each thought; the control dotted."""
    steps = sorted({row["step"] for row in rows})
    canvas.set_size_inches(3.2 * len(steps) + 0.6, 3.6)
    panels = canvas.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for step, axes in zip(steps, panels, strict=True):
        for thought in sorted({row["thought"] for row in rows}):
            own = [row for row in rows if (row["step"], row["thought"]) == (step, thought)]
            colour, layers = COLOURS[(thought - 1) % len(COLOURS)], [row["layer"] for row in own]
            axes.plot(layers, [row["accuracy"] for row in own], "o-", color=colour, label=f"thought {thought}")
            axes.plot(layers, [row["control"] for row in own], ":", color=colour)
        axes.set(title=f"step {step}", xlabel="layer", ylabel="accuracy (dotted: control)", ylim=(0, 1.02))
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
