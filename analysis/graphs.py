"""Parse the graph of a problem, and classify generated text by it.

Two formats: sentences (ProsQA) and letters (preprocessing/mini.py). Question, and steps:

    Every lorpus is a rempus. Tom is a lorpus. ... Is Tom a rempus or jelpus?      Tom is a lorpus. | Every lorpus ...
    c>a h>e ... b e c                                                              h | e | b
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from config import UserError
from evaluate import extract_answer, normalize

ROLES = ON_PATH, REACHABLE, UNREACHABLE = "on the path", "reachable", "not reachable"
CLASSES = CORRECT_PATH, LONGER_PATH, HALLUCINATION, WRONG_TARGET, CORRECT_LABEL, INCORRECT_LABEL = (
    "Correct Path",
    "Longer Path",
    "Hallucination",
    "Wrong Target",
    "Correct Label",
    "Incorrect Label",
)
FIELDS = ("idx_to_symbol", "edges", "root", "target", "neg_target")  # the graph in a ProsQA file

Edge = tuple[str, str]  # parent, child


@dataclass(frozen=True)
class Graph:
    """The graph of a problem: edges in the question's order, the root, the correct and the wrong end."""

    edges: tuple[Edge, ...]
    root: str
    target: str
    other: str

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Map each inner node to its children."""
        children = defaultdict(list)
        for parent, child in self.edges:
            children[parent].append(child)
        return dict(children)

    def levels(self, start: str) -> list[list[str]]:
        """Return the nodes reached by 0, 1, 2, .. edges from a node (with cycles, as many levels as edges)."""
        levels = [[start]]
        while len(levels) <= len(self.edges):
            after = dict.fromkeys(child for node in levels[-1] for child in self.children.get(node, ()))
            if not after:
                break
            levels.append(list(after))
        return levels

    def level(self, k: int) -> list[str]:
        """Return the nodes reached by k edges from the root."""
        levels = self.levels(self.root)
        return levels[k] if k < len(levels) else []

    def distance(self, start: str, goal: str) -> int | None:
        """Return the length of a shortest path, or None if there is no path."""
        return next((k for k, nodes in enumerate(self.levels(start)) if goal in nodes), None)

    def reachable(self, start: str) -> set[str]:
        """Return the nodes reachable from a node, including itself."""
        return set().union(*self.levels(start))

    def leads_to_target(self, node: str) -> bool:
        """Return whether the target is reachable from a node."""
        return self.target in self.reachable(node)

    def height(self, node: str, longest: bool) -> int | None:
        """Return the longest or shortest distance from a node to a leaf; None if only a cycle follows."""
        levels = self.levels(node)
        if longest:
            return len(levels) - 1
        return next((k for k, nodes in enumerate(levels) if any(node not in self.children for node in nodes)), None)

    @cached_property
    def roles(self) -> dict[str, str]:
        """Map each reachable node to ON_PATH (on a shortest path from root to target) or REACHABLE."""
        shortest, roles = self.distance(self.root, self.target), {}
        for node in self.reachable(self.root):
            rest = self.distance(node, self.target)
            on_path = rest is not None and self.distance(self.root, node) + rest == shortest
            roles[node] = ON_PATH if on_path else REACHABLE
        return roles

    def role(self, node: str) -> str:
        """Return the role of a node, one of ROLES."""
        return self.roles.get(node, UNREACHABLE)

    def edge_role(self, edge: Edge) -> str:
        """Return the role of an edge: ON_PATH on a shortest path, otherwise by whether its parent is reachable."""
        parent, child = edge
        if self.role(parent) == self.role(child) == ON_PATH:
            follows = self.distance(self.root, child) == self.distance(self.root, parent) + 1
            return ON_PATH if follows else REACHABLE
        return UNREACHABLE if self.role(parent) == UNREACHABLE else REACHABLE


@dataclass(frozen=True)
class Form:
    """The text format of a data set's graphs, as regular expressions with named groups and format strings.

    fact: parent, child; query: root and the options one, two, after the facts; step: child, and parent if the format
    names it; answer: with {root} and {node}; opening: the text of a step before the first concept that it names,
    naming: that concept's {node} as it follows; lead: after k thoughts, the first concept of the next step is k + lead
    edges from the root.
    """

    fact: str
    query: str
    step: str
    answer: str
    opening: str
    naming: str
    lead: int

    def graph(self, problem: dict) -> Graph | None:
        """Parse the graph of a problem from its fields or its text; return None if the text has another format."""
        query = re.fullmatch(f"(?:{self.fact} )+{self.query}", problem["question"].strip())
        if not query:
            return None
        edges = tuple(edge for *_, edge in self.facts(problem["question"]))
        if all(field in problem for field in FIELDS):
            return graph_of_fields(problem, edges)
        root, one, two = (query[name] for name in ("root", "one", "two"))
        answer = normalize(problem["answer"])
        if answer not in (self.answers(root, one), self.answers(root, two)):
            return None
        return Graph(edges, root, *((one, two) if answer == self.answers(root, one) else (two, one)))

    def facts(self, question: str) -> list[tuple[int, int, Edge]]:
        """Find the facts of a question: start, end (in characters) and edge of each."""
        return [(*fact.span(), (fact["parent"], fact["child"])) for fact in re.finditer(self.fact, question)]

    def answers(self, root: str, node: str) -> str:
        """Return the normalized answer that names a node."""
        return normalize(self.answer.format(root=root, node=node))

    def written(self, node: str) -> str:
        """Return what follows `opening` in a step that names a node first."""
        return self.naming.format(node=node)

    def chain(self, text: str, thoughts: int, graph: Graph) -> list[str] | None:
        """Parse the steps of a generated text, one per line, into a chain of nodes ([] if there are none).

        Returns None for a malformed step, or one that does not continue the previous one. If steps name only their
        child, the chain starts at the root unless a thought replaced the first step.
        """
        lines = [line.strip() for line in text.split("#")[0].splitlines()]
        steps = [re.fullmatch(self.step, line) for line in lines if line]
        if not all(steps):
            return None
        children = [step["child"] for step in steps]
        parents = [step["parent"] for step in steps if "parent" in step.re.groupindex]
        if parents:
            return [parents[0], *children] if parents[1:] == children[:-1] else None
        return [graph.root, *children] if children and not thoughts else children


SENTENCE = r"(?:Every (?=[a-z])|(?=[A-Z]))(?P<parent>\w+) is a (?P<child>\w+)\."  # an entity's name is capitalized
PROSQA = Form(
    fact=SENTENCE,
    query=r"Is (?P<root>\w+) a (?P<one>\w+) or (?P<two>\w+)\?",
    step=SENTENCE,
    answer="{root} is a {node}.",
    opening="Every",
    naming=" {node}",
    lead=0,
)
LETTERS = Form(
    fact=r"(?P<parent>\w+)>(?P<child>\w+)",
    query=r"(?P<one>\w+) (?P<two>\w+) (?P<root>\w+)",
    step=r"(?P<child>\w+)",
    answer="{node}",
    opening="",
    naming="{node}\n",
    lead=1,
)


def find_form(problem: dict) -> Form | None:
    """Return the format of a problem's graph, or None if it has none (GSM8k, ProntoQA)."""
    return next((form for form in (PROSQA, LETTERS) if form.graph(problem)), None)


def graph_of_fields(problem: dict, stated: tuple[Edge, ...]) -> Graph:
    """Read the graph from the fields of a ProsQA problem, edges in the order of the question."""
    try:
        names = problem["idx_to_symbol"]
        edges = [(names[parent], names[child]) for parent, child in problem["edges"]]
        ends = [names[problem[key]] for key in ("root", "target", "neg_target")]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{', '.join(FIELDS)} of the problem {problem['question'][-60:]!r} are not a valid graph ({error}); fix "
            "or remove them: the question states the graph too"
        ) from error
    place = {edge: number for number, edge in enumerate(stated)}
    return Graph(tuple(sorted(edges, key=lambda edge: place.get(edge, len(place)))), *ends)


@dataclass(frozen=True)
class Verdict:
    """The class of a generated text.

    kind: one of CLASSES; chain: nodes of its steps (Form.chain); answer: as extracted in validation; answer_right: the
    answer is correct; path_right: the chain ends at the target; agree: the answer names the chain's end. None where
    there is nothing to compare.
    """

    kind: str
    chain: list[str] | None
    answer: str | None
    answer_right: bool | None
    path_right: bool | None
    agree: bool | None


def classify(text: str, form: Form, graph: Graph, thoughts: int) -> Verdict:
    """Classify the text generated after some thoughts (0: no step is replaced, as for CoT and no-CoT)."""
    chain, answer = form.chain(text, thoughts, graph), extract_answer(text)
    right = None if answer is None else answer == form.answers(graph.root, graph.target)
    path_right = chain[-1] == graph.target if chain else None
    agree = answer == form.answers(graph.root, chain[-1]) if chain and answer is not None else None
    kind = (CORRECT_LABEL if right else INCORRECT_LABEL) if chain == [] else path_kind(chain, graph)
    return Verdict(kind, chain, answer, right, path_right, agree)


def path_kind(chain: list[str] | None, graph: Graph) -> str:
    """Classify a whole or partial chain; the steps before a partial one must exist in the graph."""
    if chain is None or not set(pairwise(chain)) <= set(graph.edges):
        return HALLUCINATION
    before = graph.distance(graph.root, chain[0])
    if before is None:
        return HALLUCINATION
    if chain[-1] != graph.target:
        return WRONG_TARGET
    shortest = graph.distance(graph.root, graph.target)
    return CORRECT_PATH if before + len(chain) - 1 == shortest else LONGER_PATH
