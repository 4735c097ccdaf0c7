"""Thoughts one by one: projection onto the vocabulary, norm and direction, attention, early forced answers."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from itertools import takewhile

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn import functional as F

from analysis.findings import Findings
from analysis.graphs import ROLES, Form, Graph
from analysis.report import WIDTH, Cell, Figure
from analysis.statistics import compare
from analysis.thoughts import NOISE, Subject, look, noise, read_thoughts, write_answers

TOP = 8  # tokens shown per thought
NO_NODE, SEVERAL = "no node", "several nodes"


def analyze(subject: Subject, baselines: list[Subject], chosen: int) -> Findings:
    """Analyze the thoughts of the subject, as many as trained; early answers and attention also of the baselines."""
    thoughts = read_thoughts(subject)  # (problems, thoughts, hidden)
    vectors = {"thought": thoughts, NOISE: noise(thoughts)}
    probabilities, tokens = top_tokens(subject, thoughts)  # (problems, thoughts, TOP) each
    meanings = [roles_of_tokens(subject, *each) for each in zip(subject.forms, subject.graphs, strict=True)]
    figures = [grid(subject, probabilities[chosen], tokens[chosen], meanings[chosen], chosen)]
    if any(meanings):
        figures.append(decoded(subject, vectors, meanings))
    early = early_answers([subject, *baselines])
    figures += [early, geometry(subject, vectors), attention([subject, *baselines])]
    decode, problems = subject.checkpoint.pretrained.tokenizer.decode, {}
    for index, (values, ids) in enumerate(zip(probabilities.tolist(), tokens.tolist(), strict=True)):
        rows = [[[decode(id), p] for id, p in zip(i, v, strict=True)] for i, v in zip(ids, values, strict=True)]
        problems[index] = {"top_tokens": rows}
    rates = [f"{row['cell']} {row['rate']:.1%}" for row in early.rows]
    line = f"accuracy of the answer forced after a number of thoughts or pause tokens: {', '.join(rates)}"
    return Findings(figures, problems, [line], {"thoughts": thoughts})


def top_tokens(subject: Subject, thoughts: Tensor) -> tuple[Tensor, Tensor]:
    """Project thoughts onto the vocabulary: probabilities and ids of the top tokens, (problems, thoughts, TOP) each."""
    device, found = subject.model.base_causallm.device, []
    with torch.no_grad():
        for part in thoughts.split(subject.batch_size):
            found.append(subject.model.logits(part.to(device)).softmax(-1).topk(TOP))
    return torch.cat([part.values.cpu() for part in found]), torch.cat([part.indices.cpu() for part in found])


def roles_of_tokens(subject: Subject, form: Form | None, graph: Graph | None) -> dict[int, str]:
    """Map each token that begins a node's name (in a step or in the question) to the node's role; {} without graph."""
    if form is None:
        return {}
    roles = {}
    for node in dict.fromkeys(node for edge in graph.edges for node in edge):
        for text in (form.written(node), node, f"{node} "):
            first = subject.tokenize(text)[0]
            roles[first] = SEVERAL if roles.get(first, graph.role(node)) != graph.role(node) else graph.role(node)
    return roles


def grid(subject: Subject, probabilities: Tensor, tokens: Tensor, meanings: dict, chosen: int) -> Figure:
    """Tabulate the top tokens of one problem's thoughts, rank by thought; probabilities, tokens (thoughts, TOP)."""
    rows, decode = [], subject.checkpoint.pretrained.tokenizer.decode
    for rank in range(TOP):
        row = {"rank": rank + 1}
        for number in range(len(tokens)):
            id = tokens[number, rank].item()
            text = f"{decode(id)!r} {probabilities[number, rank]:.3f}"
            row[f"thought {number + 1}"] = Cell(text, meanings.get(id, ""))
        rows.append(row)
    caption = (
        "Top tokens of each thought projected onto the vocabulary, with probabilities; coloured by the role of the "
        "node whose name the token begins."
    )
    return Figure("thought_tokens", f"Thoughts of problem {chosen} in tokens", caption, rows)


def decoded(subject: Subject, vectors: dict[str, Tensor], meanings: list[dict]) -> Figure:
    """Tabulate how often the top token of a thought names a node of each role, and the probability of each role.

    vectors: thoughts and controls, (problems, thoughts, hidden) each.
    """
    rows = []
    for name, own in vectors.items():
        probabilities, tokens = top_tokens(subject, own)  # (problems, thoughts, TOP) each
        for number in range(own.shape[1]):
            row = {"vectors": name, "place": number + 1}
            rows += [row | found for found in decoded_roles(probabilities[:, number], tokens[:, number], meanings)]
    caption = (
        "Share of problems whose top token names a node of the role (several nodes: the token begins names of "
        "different roles), and the mean probability of such tokens."
    )
    return Figure("decoded_roles", "What thoughts decode to", caption, rows)


def decoded_roles(probabilities: Tensor, tokens: Tensor, meanings: list[dict]) -> list[dict]:
    """Count the roles that the vectors of one place decode to; probabilities, tokens (problems, TOP)."""
    n, first, mass = len(meanings), Counter(), Counter()
    for index, roles in enumerate(meanings):
        named = [roles.get(id, NO_NODE) for id in tokens[index].tolist()]
        first[named[0]] += 1
        for role, p in zip(named, probabilities[index].tolist(), strict=True):
            mass[role] += p / n
    return [
        {"role": role, "n": n, "first token is one": first[role] / n, f"probability among the top {TOP}": mass[role]}
        for role in (*ROLES, SEVERAL, NO_NODE)
    ]


def early_answers(models: list[Subject]) -> Figure:
    """Force the answer after j thoughts by continuing with the answer mark."""
    cells, first = {}, models[0]
    for model in (model for model in models if model.has_placeholders):
        begun = mark_of_answer(model)
        for j in range(model.thoughts + 1):
            answers = write_answers(model.with_thoughts(j), f"answer after {j}", begun=begun)
            cells[f"{model.name}, {j}"] = {index: answer["correct"] for index, answer in enumerate(answers)}
    caption = (
        f"Accuracy when the answer is forced after a number of thoughts (or pause tokens), against {first.name} with "
        "as many as trained."
    )
    return Figure(
        "early_stopping", "The answer, forced early", caption, compare(cells, f"{first.name}, {first.thoughts}")
    )


def mark_of_answer(subject: Subject) -> list[int]:
    """Return the tokens that all answers begin with: those of "### " that do not merge with the answer after it."""
    with_answer = subject.tokenize(f"### {subject.problems[0]['answer']}")
    pairs = zip(subject.tokenize("### "), with_answer, strict=False)
    return [id for id, other in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def geometry(subject: Subject, vectors: dict[str, Tensor]) -> Figure:
    """Tabulate norms (compared with embeddings) and cosine similarities.

    vectors: thoughts and controls, (problems, thoughts, hidden) each.
    """
    rows = [row for name, own in vectors.items() for row in directions(name, own)]
    table = subject.model.base_causallm.get_input_embeddings().weight.detach().float()  # (vocabulary, hidden)
    norms = table.norm(dim=1).cpu()  # (vocabulary,)
    blank = {"cosine to the one before": None, "cosine to the mean": None}
    rows.append({"vectors": "token embeddings", "n": len(norms)} | spread("norm", norms) | blank)
    caption = (
        "Norms of thoughts, and of the token embeddings they replace; mean cosine similarities over problems, to the "
        "previous thought and to the mean at the same place. Noise has cosines near 0."
    )
    return Figure("geometry", "Norms and directions", caption, rows)


def directions(name: str, vectors: Tensor) -> list[dict]:
    """Compute norms and cosines of (problems, places, hidden) vectors, one row per place."""
    rows = []
    for place in range(vectors.shape[1]):
        own = vectors[:, place]  # (problems, hidden)
        before = F.cosine_similarity(own, vectors[:, place - 1], dim=-1).mean().item() if place else None
        center = F.cosine_similarity(own, own.mean(0, keepdim=True), dim=-1).mean().item()
        row = {"vectors": f"{name} {place + 1}", "n": len(own)} | spread("norm", own.norm(dim=1))
        rows.append(row | {"cosine to the one before": before, "cosine to the mean": center})
    return rows


def spread(name: str, numbers: Tensor) -> dict[str, float]:
    """Compute mean and standard deviation of (n,) numbers."""
    return {f"{name}, mean": numbers.mean().item(), f"{name}, standard deviation": numbers.std().item()}


def attention(models: list[Subject]) -> Figure:
    """Tabulate how much thoughts and the answer attend to facts (by role), the rest of the question and thoughts."""
    rows = [row for model in models if model.has_placeholders for row in attention_rows(model)]
    caption = (
        "Mean attention over layers, heads and problems, from a thought (or pause token) or from the answer (the end "
        "marker, which predicts its first token), to all tokens of a kind; the weights from one place sum to 1. The "
        "plot shows the model itself, the table also the others."
    )
    own = [row for row in rows if row["model"] == models[0].name]
    return Figure("attention", "Attention", caption, rows, lambda canvas: draw_attention(canvas, own))


def draw_attention(canvas: Canvas, rows: list[dict]) -> None:
    """Draw a heatmap of the attention in %: kinds of tokens down, thoughts and the answer across."""
    across = [name for name in dict.fromkeys(row["from"] for row in rows) if name != "answer"] + ["answer"]
    down = sorted(dict.fromkeys(row["to"] for row in rows), key=kind_order)
    weights = {(row["to"], row["from"]): 100 * row["weight"] for row in rows}
    canvas.set_size_inches(WIDTH, 1.2 + 0.32 * len(down))
    axes = canvas.subplots()
    cells = [[weights.get((to, start), 0) for start in across] for to in down]
    axes.pcolormesh(cells, cmap="Blues", vmin=0, vmax=100, edgecolors="white")
    for (to, start), weight in weights.items():
        colour = "white" if weight > 50 else "#111111"
        place = (across.index(start) + 0.5, down.index(to) + 0.5)
        axes.annotate(f"{weight:.0f}", place, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks([place + 0.5 for place in range(len(across))], [f"from {name}" for name in across], fontsize=9)
    axes.set_yticks([place + 0.5 for place in range(len(down))], [f"to {name}" for name in down], fontsize=9)
    axes.set_title(f"attention in % (n = {rows[0]['n']})")
    axes.grid(False)
    axes.invert_yaxis()


def kind_order(kind: str) -> tuple:
    """Sort the kinds of `kinds_of_tokens` as they occur in a prompt, facts by role, thoughts by number."""
    named = ["first token", *(f"facts {role}" for role in ROLES), "question's rest", "start marker"]
    if kind in named:
        return (named.index(kind),)
    number = int(kind.split()[1]) if kind.startswith("thought ") else sys.maxsize  # the end marker
    return len(named), number


def attention_rows(subject: Subject) -> list[dict]:
    """Compute the rows of one model."""
    lm = subject.model.base_causallm
    kernel, sums, counts = lm.config._attn_implementation, Counter(), Counter()
    lm.set_attn_implementation("eager")  # other kernels return no weights
    few = replace(subject, batch_size=max(subject.batch_size // 8, 1))  # the weights of all layers need memory
    try:
        for part, batch in few.batches(few.prompts, "attention"):
            weights = attention_weights(subject, batch)  # (batch, length, length)
            for row, index in enumerate(part):
                is_own = batch["attention_mask"][row].bool()  # (length,)
                own = weights[row][is_own][:, is_own]  # (own tokens, own tokens)
                kinds = kinds_of_tokens(subject, index, len(own))
                for start, line in sources(subject, own):
                    for kind, weight in zip(kinds, line, strict=True):
                        sums[start, kind] += weight
                        counts[start, kind] += 1
    finally:
        lm.set_attn_implementation(kernel)
    n = len(subject.problems)
    rows = [
        {"model": subject.name, "from": start, "to": kind, "n": n, "weight": total / n}
        | {"weight per token": total / counts[start, kind]}
        for (start, kind), total in sums.items()
    ]
    return sorted(rows, key=lambda row: (len(row["from"]), row["from"]))


def attention_weights(subject: Subject, batch: dict) -> Tensor:
    """Average attention weights over layers and heads, (batch, length, length) on the CPU."""
    layers = look(subject, batch, output_attentions=True).attentions  # (batch, heads, length, length) each
    return torch.stack([layer.float().mean(1) for layer in layers]).mean(0).cpu()


def kinds_of_tokens(subject: Subject, index: int, length: int) -> list[str]:
    """Label each token of a prompt: first token (attention sink), fact by role, question's rest, marker, thought."""
    question, form, graph = subject.problems[index]["question"], subject.forms[index], subject.graphs[index]
    offsets = subject.checkpoint.pretrained.tokenizer(question + "\n", return_offsets_mapping=True)["offset_mapping"]
    facts = [(*place, f"facts {graph.edge_role(edge)}") for *place, edge in form.facts(question)] if form else []
    kinds = [next((kind for a, b, kind in facts if start < b and end > a), "question's rest") for start, end in offsets]
    kinds[0] = "first token"
    thoughts = [f"thought {number + 1}" for number in range(subject.thoughts)]
    kinds += ["start marker", *thoughts, "end marker"]
    assert len(kinds) == length, "prompt length differs from that of its parts"
    return kinds


def sources(subject: Subject, own: Tensor) -> list[tuple[str, list[float]]]:
    """Return the attention weights (tokens,) from each thought and the answer; own (tokens, tokens) of one prompt."""
    first = len(own) - 1 - subject.thoughts
    named = [(f"thought {number + 1}", own[first + number].tolist()) for number in range(subject.thoughts)]
    return [*named, ("answer", own[-1].tolist())]
