"""Each thought by itself: what the vocabulary projection reads in it, its size and direction, what attends to it, and
what the answer is when it is forced after fewer of them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.findings import Findings
from analysis.graphs import ROLES, Graph, find_form
from analysis.report import Cell, Figure
from analysis.statistics import compare
from analysis.thoughts import Subject, read_thoughts, think, write_answers

TOP = 8  # tokens that are shown of each thought
NO_NODE, SEVERAL = "no node", "several nodes"


def analyze(subject: Subject, chosen: int) -> Findings:
    """Everything above for the subject with the thoughts that it was trained with."""
    thoughts = read_thoughts(subject)  # (problems, thoughts, hidden)
    probabilities, tokens = top_tokens(subject, thoughts)  # (problems, thoughts, TOP) each
    meanings = [roles_of_tokens(subject, problem) for problem in subject.problems]
    figures = [grid(subject, probabilities[chosen], tokens[chosen], meanings[chosen], chosen)]
    if any(meanings):
        figures.append(decoded(probabilities, tokens, meanings))
    figures += [early_answers(subject), geometry(subject, thoughts), attention(subject)]
    decode, problems = subject.opened.pretrained.tokenizer.decode, {}
    for index, (values, ids) in enumerate(zip(probabilities.tolist(), tokens.tolist(), strict=True)):
        rows = [[[decode(id), p] for id, p in zip(i, v, strict=True)] for i, v in zip(ids, values, strict=True)]
        problems[index] = {"top_tokens": rows}
    summary = [f"forced after {r['cell']}: accuracy {r['rate']:.1%}" for r in figures[-3].rows]
    return Findings(figures, problems, summary, {"thoughts": thoughts})


def top_tokens(subject: Subject, thoughts: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities and the ids of the tokens that each thought projects to, (problems, thoughts, TOP) each."""
    device, found = subject.model.base_causallm.device, []
    with torch.no_grad():
        for part in thoughts.split(subject.batch_size):
            found.append(subject.model.logits(part.to(device)).softmax(-1).topk(TOP))
    return torch.cat([part.values.cpu() for part in found]), torch.cat([part.indices.cpu() for part in found])


def roles_of_tokens(subject: Subject, problem: dict) -> dict[int, str]:
    """The role of the node that a token begins the name of, as a step writes it or a question states it; {} without a
    graph."""
    form = find_form(problem)
    if form is None:
        return {}
    graph, roles = form.graph(problem), {}
    for node in dict.fromkeys(node for edge in graph.edges for node in edge):
        for text in (form.written(node), node, f"{node} "):
            first = subject.tokenize(text)[0]
            roles[first] = SEVERAL if roles.get(first, graph.role(node)) != graph.role(node) else graph.role(node)
    return roles


def grid(subject: Subject, probabilities: Tensor, tokens: Tensor, meanings: dict, chosen: int) -> Figure:
    """The top tokens of one problem's thoughts, rank by thought; probabilities, tokens (thoughts, TOP)."""
    rows, decode = [], subject.opened.pretrained.tokenizer.decode
    for rank in range(TOP):
        row = {"rank": rank + 1}
        for number in range(len(tokens)):
            id = tokens[number, rank].item()
            text = f"{decode(id)!r} {probabilities[number, rank]:.3f}"
            row[f"thought {number + 1}"] = Cell(text, meanings.get(id, ""))
        rows.append(row)
    words = (
        "What each thought is closest to through the vocabulary projection, with probabilities; coloured by the "
        "role of the node that a token begins."
    )
    return Figure("thought_tokens", f"Thoughts of problem {chosen} in tokens", words, rows)


def decoded(probabilities: Tensor, tokens: Tensor, meanings: list[dict]) -> Figure:
    """How often a thought's first token names a node of each role, and what probability its top tokens give them."""
    rows, n = [], len(meanings)
    for number in range(tokens.shape[1]):
        first, mass = Counter(), Counter()
        for index, roles in enumerate(meanings):
            named = [roles.get(id, NO_NODE) for id in tokens[index, number].tolist()]
            first[named[0]] += 1
            for role, p in zip(named, probabilities[index, number].tolist(), strict=True):
                mass[role] += p / n
        for role in (*ROLES, SEVERAL, NO_NODE):
            row = {"thought": number + 1, "role": role, "n": n, "first token is one": first[role] / n}
            rows.append(row | {f"probability among the top {TOP}": mass[role]})
    words = (
        "Over all problems: the share whose first token names a node of the role (several nodes: the token begins"
        " names of different roles), and the mean probability of such tokens."
    )
    return Figure("decoded_roles", "What thoughts decode to", words, rows)


def early_answers(subject: Subject) -> Figure:
    """The answer forced after j thoughts: the text goes on with the mark of an answer."""
    cells = {}
    for j in range(subject.thoughts + 1):
        answers = write_answers(subject.with_thoughts(j), f"answer after {j}", start="### ")
        cells[f"{j} thoughts"] = {index: answer["correct"] for index, answer in enumerate(answers)}
    words = "Accuracy when the answer is forced after so many thoughts, against the number trained."
    return Figure("early_stopping", "The answer, forced early", words, compare(cells, f"{subject.thoughts} thoughts"))


def geometry(subject: Subject, thoughts: Tensor) -> Figure:
    """Norms against those of the embeddings, and cosines; thoughts (problems, thoughts, hidden)."""
    table = (
        subject.model.base_causallm.get_input_embeddings().weight.detach().float().norm(dim=1).cpu()
    )  # (vocabulary,)
    rows, n = [], len(thoughts)
    for number in range(thoughts.shape[1]):
        own = thoughts[:, number]  # (problems, hidden)
        before = F.cosine_similarity(own, thoughts[:, number - 1], dim=-1) if number else None  # (problems,)
        center = F.cosine_similarity(own, own.mean(0, keepdim=True), dim=-1)  # (problems,)
        row = {"vectors": f"thought {number + 1}", "n": n} | spread("norm", own.norm(dim=1))
        row |= {"cosine to the thought before": None if before is None else before.mean().item()}
        rows.append(row | {"cosine to the mean thought": center.mean().item()})
    blank = {"cosine to the thought before": None, "cosine to the mean thought": None}
    rows.append({"vectors": "token embeddings", "n": len(table)} | spread("norm", table) | blank)
    words = (
        "Lengths of thoughts beside those of the token embeddings, in whose place they stand; cosines are means "
        "over the problems."
    )
    return Figure("geometry", "Norms and directions", words, rows)


def spread(name: str, numbers: Tensor) -> dict[str, float]:
    """The mean and the standard deviation of (n,) numbers."""
    return {f"{name}, mean": numbers.mean().item(), f"{name}, standard deviation": numbers.std().item()}


def attention(subject: Subject) -> Figure:
    """How much the thoughts and the answer's first token attend to facts by role, to the question's rest, and to
    thoughts: the mean over layers, heads and problems of the weights to all tokens of a kind."""
    lm = subject.model.base_causallm
    kernel, sums, counts = lm.config._attn_implementation, Counter(), Counter()
    lm.set_attn_implementation("eager")  # others do not tell their weights
    try:
        for part, batch in subject.batches(subject.prompts(), "attention"):
            weights = attention_weights(subject, batch)  # (batch, length, length)
            for row, index in enumerate(part):
                own = weights[row][:, batch["attention_mask"][row].bool()]  # (length, own tokens)
                own = own[batch["attention_mask"][row].bool()]  # (own tokens, own tokens)
                kinds = kinds_of_tokens(subject, subject.problems[index], len(own))
                for start, line in sources(subject, own):
                    for kind, weight in zip(kinds, line, strict=False):
                        sums[start, kind] += weight
                        counts[start, kind] += 1
    finally:
        lm.set_attn_implementation(kernel)
    n = len(subject.problems)
    rows = [
        {"from": start, "to": kind, "n": n, "weight": total / n, "weight per token": total / counts[start, kind]}
        for (start, kind), total in sums.items()
    ]
    words = (
        "Mean attention over all layers and heads, from a thought or from the answer's place (the end marker, "
        "where its first token is chosen), to all tokens of a kind; the weights from one place add up to 1."
    )
    return Figure("attention", "Attention", words, sorted(rows, key=lambda row: row["from"]))


@torch.no_grad()
def attention_weights(subject: Subject, batch: dict) -> Tensor:
    """The mean attention weights over layers and heads, (batch, length, length) on the CPU, with the thoughts."""
    _, embeds = think(subject, batch)
    device = embeds.device
    output = subject.model.base_causallm.base_model(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"].to(device),
        position_ids=batch["position_ids"].to(device),
        output_attentions=True,
        use_cache=False,
    )
    return torch.stack([layer.float().mean(1) for layer in output.attentions]).mean(0).cpu()


def kinds_of_tokens(subject: Subject, problem: dict, length: int) -> list[str]:
    """What each token of a prompt is: a fact by its role, the question's rest, a marker or a thought."""
    tokenizer, form = subject.opened.pretrained.tokenizer, find_form(problem)
    offsets = tokenizer(problem["question"] + "\n", return_offsets_mapping=True)["offset_mapping"]
    kinds = ["question"] * len(offsets)
    if form:
        graph: Graph = form.graph(problem)
        facts = [(start, end, graph.edge_role(edge)) for start, end, edge in form.facts(problem["question"])]
        for place, (start, end) in enumerate(offsets):
            kinds[place] = next((f"facts {role}" for a, b, role in facts if start < b and end > a), "question")
    thoughts = [f"thought {number + 1}" for number in range(subject.thoughts)]
    kinds += ["start marker", *thoughts, "end marker"]
    assert len(kinds) == length, "the prompt is not what its parts say"
    return kinds


def sources(subject: Subject, own: Tensor) -> list[tuple[str, list[float]]]:
    """The thoughts and the answer's place with their weights to all tokens; own (tokens, tokens) of one prompt."""
    first = len(own) - 1 - subject.thoughts
    named = [(f"thought {number + 1}", own[first + number].tolist()) for number in range(subject.thoughts)]
    return [*named, ("answer", own[-1].tolist())]
