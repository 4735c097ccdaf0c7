"""The graphs that problems ask about, the two forms in which they are written, and the classes of what a model wrote.

Two data sets state a graph, ProsQA in sentences and preprocessing/mini.py's in letters:

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
FIELDS = ("idx_to_symbol", "edges", "root", "target", "neg_target")  # a ProsQA file's own graph

Edge = tuple[str, str]  # parent, child


@dataclass(frozen=True)
class Graph:
    """A problem's graph: its edges in the question's order, the root asked about, the right end and the wrong one."""

    edges: tuple[Edge, ...]
    root: str
    target: str
    other: str

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """The children of each node that has some."""
        children = defaultdict(list)
        for parent, child in self.edges:
            children[parent].append(child)
        return dict(children)

    def levels(self, start: str) -> list[list[str]]:
        """The nodes that 0, 1, 2, .. edges lead to from a node (in a circle of facts: as many as there are edges)."""
        levels = [[start]]
        while len(levels) <= len(self.edges):
            after = dict.fromkeys(child for node in levels[-1] for child in self.children.get(node, ()))
            if not after:
                break
            levels.append(list(after))
        return levels

    def level(self, k: int) -> list[str]:
        """The nodes that k edges lead to from the root."""
        levels = self.levels(self.root)
        return levels[k] if k < len(levels) else []

    def distance(self, start: str, goal: str) -> int | None:
        """The fewest edges from one node to another; None where there is no way."""
        return next((k for k, nodes in enumerate(self.levels(start)) if goal in nodes), None)

    def reachable(self, start: str) -> set[str]:
        """The nodes that a node leads to, itself among them."""
        return set().union(*self.levels(start))

    def leads_to_target(self, node: str) -> bool:
        """Whether a node is the target or on a way to it."""
        return self.target in self.reachable(node)

    def height(self, node: str, longest: bool) -> int | None:
        """The longest or the shortest distance from a node to a leaf; None where only a circle follows."""
        levels = self.levels(node)
        if longest:
            return len(levels) - 1
        return next((k for k, nodes in enumerate(levels) if any(node not in self.children for node in nodes)), None)

    @cached_property
    def roles(self) -> dict[str, str]:
        """ON_PATH or REACHABLE for each node that the root leads to; on the path: on a shortest one to the target."""
        shortest, roles = self.distance(self.root, self.target), {}
        for node in self.reachable(self.root):
            rest = self.distance(node, self.target)
            on_path = rest is not None and self.distance(self.root, node) + rest == shortest
            roles[node] = ON_PATH if on_path else REACHABLE
        return roles

    def role(self, node: str) -> str:
        """Which of ROLES a node has."""
        return self.roles.get(node, UNREACHABLE)

    def edge_role(self, edge: Edge) -> str:
        """Which of ROLES an edge has: on a shortest path, else by whether the root leads to its parent."""
        parent, child = edge
        if self.role(parent) == self.role(child) == ON_PATH:
            follows = self.distance(self.root, child) == self.distance(self.root, parent) + 1
            return ON_PATH if follows else REACHABLE
        return UNREACHABLE if self.role(parent) == UNREACHABLE else REACHABLE


@dataclass(frozen=True)
class Form:
    """How a data set writes its graphs; the groups of the patterns are named.

    fact: parent and child; query, after the last fact: root and the options one and two; step: child, and parent where
    a step names it; answer, with {root} and {node}; opening: what is written of a step before the concept that it
    names first, naming: that concept's {node} as it follows; lead: how many edges beyond k that concept lies from the
    root in the first step after k thoughts.
    """

    fact: str
    query: str
    step: str
    answer: str
    opening: str
    naming: str
    lead: int

    def graph(self, problem: dict) -> Graph | None:
        """The graph of a problem, from its own fields or else its text; None where it isn't written in this form."""
        asked = re.fullmatch(f"(?:{self.fact} )+{self.query}", problem["question"].strip())
        if not asked:
            return None
        edges = tuple(edge for *_, edge in self.facts(problem["question"]))
        if all(field in problem for field in FIELDS):
            return graph_of_fields(problem, edges)
        root, one, two = (asked[name] for name in ("root", "one", "two"))
        answer = normalize(problem["answer"])
        if answer not in (self.answers(root, one), self.answers(root, two)):
            return None
        return Graph(edges, root, *((one, two) if answer == self.answers(root, one) else (two, one)))

    def facts(self, question: str) -> list[tuple[int, int, Edge]]:
        """Where each fact of a question starts and ends (in characters), and its edge."""
        return [(*fact.span(), (fact["parent"], fact["child"])) for fact in re.finditer(self.fact, question)]

    def answers(self, root: str, node: str) -> str:
        """The answer that names a node, as answers are compared."""
        return normalize(self.answer.format(root=root, node=node))

    def written(self, node: str) -> str:
        """What follows `opening` in a step that names a node first."""
        return self.naming.format(node=node)

    def chain(self, text: str, thoughts: int, graph: Graph) -> list[str] | None:
        """The nodes of the steps in a generated text, a step per line; [] where there are none.

        None where a line is no step, or does not go on where the one before it ended. Steps that name their child
        alone start at the root if no thought stands for the first of them.
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
    """The form in which a problem states a graph; None where it states none (GSM8k, ProntoQA)."""
    return next((form for form in (PROSQA, LETTERS) if form.graph(problem)), None)


def graph_of_fields(problem: dict, stated: tuple[Edge, ...]) -> Graph:
    """The graph of a ProsQA problem's own fields, its edges in the order in which the question states them."""
    try:
        names = problem["idx_to_symbol"]
        edges = [(names[parent], names[child]) for parent, child in problem["edges"]]
        ends = [names[problem[key]] for key in ("root", "target", "neg_target")]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{', '.join(FIELDS)} of the problem {problem['question'][-60:]!r} are no graph ({error}); mend them, "
            "or leave them out: the question states the graph too"
        ) from error
    place = {edge: number for number, edge in enumerate(stated)}
    return Graph(tuple(sorted(edges, key=lambda edge: place.get(edge, len(place)))), *ends)


@dataclass(frozen=True)
class Verdict:
    """What a generated text is.

    kind: one of CLASSES; chain: the nodes of its steps (Form.chain); answer: as evaluate reads it. None where what they
    compare is missing: answer_right; path_right, the chain ends at the target; agree, the answer names the chain's end.
    """

    kind: str
    chain: list[str] | None
    answer: str | None
    answer_right: bool | None
    path_right: bool | None
    agree: bool | None


def classify(text: str, form: Form, graph: Graph, thoughts: int) -> Verdict:
    """Judges the text that a model generated after some thoughts (0: no step is hidden, as for CoT and no CoT)."""
    chain, answer = form.chain(text, thoughts, graph), extract_answer(text)
    right = None if answer is None else answer == form.answers(graph.root, graph.target)
    path_right = chain[-1] == graph.target if chain else None
    agree = answer == form.answers(graph.root, chain[-1]) if chain and answer is not None else None
    kind = (CORRECT_LABEL if right else INCORRECT_LABEL) if chain == [] else path_kind(chain, graph)
    return Verdict(kind, chain, answer, right, path_right, agree)


def path_kind(chain: list[str] | None, graph: Graph) -> str:
    """The class of a chain, whole or partial: the steps before it may be hidden, but must be possible."""
    if chain is None or not set(pairwise(chain)) <= set(graph.edges):
        return HALLUCINATION
    before = graph.distance(graph.root, chain[0])
    if before is None:
        return HALLUCINATION
    if chain[-1] != graph.target:
        return WRONG_TARGET
    shortest = graph.distance(graph.root, graph.target)
    return CORRECT_PATH if before + len(chain) - 1 == shortest else LONGER_PATH
