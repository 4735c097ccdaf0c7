"""Graphs: parsing, roles of nodes and edges, classification of outputs."""

import json
from itertools import islice

import mini
import prosqa
import pytest

from analysis.graphs import (
    CLASSES,
    LETTERS,
    ON_PATH,
    PROSQA,
    REACHABLE,
    UNREACHABLE,
    Graph,
    UserError,
    classify,
    find_form,
)
from helpers import REPOSITORY

# r > a > b > t is a shortest path, so is r > c > b > t; r > c > d > b > t is longer.
EDGES = ("r>a", "a>b", "b>t", "r>c", "c>b", "c>d", "d>b", "a>e", "e>f", "x>y")
GRAPH = Graph(tuple(tuple(edge.split(">")) for edge in EDGES), "r", "t", "y")
LONG_NAMES = {"r": "Tom", "x": "Sam"} | {letter: f"{letter}umpus" for letter in "abtcdefy"}


def sentence(edge):
    parent, child = (LONG_NAMES[letter] for letter in edge.split(">"))
    return f"{parent if parent[0].isupper() else f'Every {parent}'} is a {child}."


LETTERS_PROBLEM = {"question": f"{' '.join(EDGES)} y t r", "steps": ["a", "b", "t"], "answer": "t"}
PROSQA_PROBLEM = {
    "question": f"{' '.join(map(sentence, EDGES))} Is Tom a yumpus or tumpus?",
    "steps": [sentence(edge) for edge in EDGES[:3]],
    "answer": "Tom is a tumpus.",
}


def classify_letters(steps, thoughts, answer="t"):
    text = "".join(f"{step}\n" for step in steps) + (f"### {answer}" if answer else "")
    return classify(text, LETTERS, GRAPH, thoughts)


def classify_sentences(edges, thoughts, answer="t"):
    text = "".join(f"{sentence(edge)}\n" for edge in edges) + (f"### Tom is a {LONG_NAMES[answer]}." if answer else "")
    return classify(text, PROSQA, PROSQA.graph(PROSQA_PROBLEM), thoughts)


def test_find_form():
    assert find_form(LETTERS_PROBLEM) is LETTERS and LETTERS.graph(LETTERS_PROBLEM) == GRAPH
    assert find_form(PROSQA_PROBLEM) is PROSQA
    named = [tuple(LONG_NAMES[node] for node in edge) for edge in GRAPH.edges]
    assert PROSQA.graph(PROSQA_PROBLEM) == Graph(tuple(named), "Tom", "tumpus", "yumpus")
    for question in ("How many apples?", "Every lorpus is a rempus. True or false: Sam is a rempus.", ""):
        assert find_form({"question": question, "steps": [], "answer": "5"}) is None
    assert find_form({"question": "a>b b>c a", "steps": ["b"], "answer": "b"}) is None  # the ring's: no two options
    assert find_form(LETTERS_PROBLEM | {"answer": "x"}) is None  # neither option


def test_facts_positions():
    for form, problem in ((PROSQA, PROSQA_PROBLEM), (LETTERS, LETTERS_PROBLEM)):
        question, facts = problem["question"], form.facts(problem["question"])
        assert [edge for *_, edge in facts] == list(form.graph(problem).edges)
        stated = " ".join(question[start:end] for start, end, _ in facts)
        assert question.startswith(f"{stated} ")


def test_graph_of_prosqa_fields_in_question_order():
    problem = next(prosqa.generate(prosqa.Recipe(), 1, seed=3))
    graph, names = PROSQA.graph(problem), problem["idx_to_symbol"]
    assert graph == PROSQA.graph({key: problem[key] for key in ("question", "steps", "answer")})
    assert sorted(graph.edges) == sorted((names[parent], names[child]) for parent, child in problem["edges"])
    assert graph.other == names[problem["neg_target"]]
    with pytest.raises(UserError, match=r"idx_to_symbol.*are not a valid graph.*remove them"):
        PROSQA.graph(problem | {"edges": [[0, 99]]})


def test_written_concept():
    assert (PROSQA.opening + PROSQA.written("lorpus"), PROSQA.lead) == ("Every lorpus", 0)
    assert (LETTERS.opening + LETTERS.written("h"), LETTERS.lead) == ("h\n", 1)


def test_distances_levels_and_heights():
    assert GRAPH.distance("r", "t") == 3 and GRAPH.distance("r", "r") == 0 and GRAPH.distance("t", "r") is None
    assert GRAPH.reachable("r") == set("racbdetf") and GRAPH.reachable("x") == {"x", "y"}
    assert [GRAPH.level(k) for k in range(6)] == [["r"], ["a", "c"], ["b", "e", "d"], ["t", "f", "b"], ["t"], []]
    assert [GRAPH.height(node, longest=True) for node in "rcat"] == [4, 3, 2, 0]
    assert [GRAPH.height(node, longest=False) for node in "rcat"] == [3, 2, 2, 0]
    assert [GRAPH.leads_to_target(node) for node in "rdtexy"] == [True, True, True, False, False, False]


def test_roles_of_nodes_and_edges():
    roles = {ON_PATH: "racbt", REACHABLE: "def", UNREACHABLE: "xy?"}
    assert all(GRAPH.role(node) == role for role, nodes in roles.items() for node in nodes)
    edges = {ON_PATH: "ra ab bt rc cb", REACHABLE: "cd db ae ef", UNREACHABLE: "xy"}
    assert all(GRAPH.edge_role(tuple(edge)) == role for role, names in edges.items() for edge in names.split())
    between = Graph((*GRAPH.edges, ("a", "c")), "r", "t", "y")
    assert between.edge_role(("a", "c")) == REACHABLE  # both nodes are on the path, the edge is not


def test_cyclic_graph_terminates():
    circle = Graph((("a", "b"), ("b", "a"), ("b", "c")), "a", "c", "x")
    assert circle.distance("a", "c") == 2 and circle.height("a", longest=False) == 2
    assert Graph((("a", "b"), ("b", "a")), "a", "c", "x").height("a", longest=False) is None


CHAINS = [  # edges, the same chain in letters, thoughts before it, class
    (["r>a", "a>b", "b>t"], "abt", 0, "Correct Path"),
    (["r>c", "c>b", "b>t"], "cbt", 0, "Correct Path"),  # another shortest path than the reference
    (["r>c", "c>d", "d>b", "b>t"], "cdbt", 0, "Longer Path"),
    (["r>a", "a>t"], "at", 0, "Hallucination"),  # no such edge
    (["x>y"], None, 0, "Hallucination"),  # an edge not reachable from the root
    (["r>a", "c>b", "b>t"], None, 0, "Hallucination"),  # all edges exist, the chain does not connect
    (["r>a", "a>e", "e>f"], "aef", 0, "Wrong Target"),
    (["r>a", "a>b"], "ab", 0, "Wrong Target"),  # it stops early
    (["c>b", "b>t"], "cbt", 1, "Correct Path"),
    (["b>t"], "bt", 2, "Correct Path"),
    (["b>t"], "t", 3, "Correct Path"),  # the number of replaced steps is not checked
    (["c>d", "d>b", "b>t"], "cdbt", 1, "Longer Path"),
    (["a>e", "e>f"], "aef", 1, "Wrong Target"),
    (["a>b", "b>y"], "aby", 1, "Hallucination"),
    (["x>y"], "xy", 2, "Hallucination"),
]


@pytest.mark.parametrize(("edges", "letters", "thoughts", "kind"), CHAINS)
def test_classify_chains_in_both_forms(edges, letters, thoughts, kind):
    assert kind in CLASSES and classify_sentences(edges, thoughts).kind == kind
    if letters is not None:
        assert classify_letters(letters, thoughts).kind == kind


def test_classify_answer_without_steps():
    for judge in (classify_sentences, classify_letters):
        for thoughts in (0, 3):
            assert [judge([], thoughts, answer).kind for answer in "ty"] == ["Correct Label", "Incorrect Label"]
            nothing = judge([], thoughts, None)
            assert (nothing.kind, nothing.answer_right, nothing.path_right) == ("Incorrect Label", None, None)


@pytest.mark.parametrize(
    "steps",
    [
        "Every aumpus is a bumpus",  # cut off
        "Every Tom is a aumpus.",
        "aumpus is a bumpus.",
        "Tom is a aumpus. Every aumpus is a bumpus.",  # not a step per line
        "Tom is a a a a",
        "Every aumpus is a bumpus.\n<|endoftext|>",
    ],
)
def test_classify_malformed_steps_as_hallucination(steps):
    graph = PROSQA.graph(PROSQA_PROBLEM)
    verdict = classify(f"{steps}\n### Tom is a tumpus.", PROSQA, graph, 1)
    assert (verdict.kind, verdict.chain, verdict.answer_right, verdict.agree) == ("Hallucination", None, True, None)
    assert classify("a b\nt\n### t", LETTERS, GRAPH, 0).kind == "Hallucination"


def test_classify_answer_and_path_separately():
    for judge, steps in ((classify_sentences, EDGES[:3]), (classify_letters, "abt")):
        rows = [judge(steps, 0, answer) for answer in ("t", "y", None)]
        assert {row.kind for row in rows} == {"Correct Path"} and all(row.path_right for row in rows)
        assert [row.answer_right for row in rows] == [True, False, None]
        assert [row.agree for row in rows] == [True, False, None]
    astray = classify_letters("aef", 0, "t")
    assert (astray.kind, astray.answer_right, astray.path_right, astray.agree) == ("Wrong Target", True, False, False)
    assert classify_letters("aef", 0, "f").agree
    assert classify("t\n### y\n### t,", LETTERS, GRAPH, 3).answer_right  # the last answer counts, as in validation


def shipped():
    with open(REPOSITORY / "data" / "prosqa_valid.json", encoding="utf-8") as file:
        return json.load(file)[:20]


@pytest.mark.parametrize(
    "make",
    [
        shipped,
        lambda: list(prosqa.generate(prosqa.Recipe(), 20, seed=5)),
        lambda: list(islice(mini.make_problems(seed=5), 20)),
    ],
    ids=["shipped", "prosqa", "mini"],
)
def test_classify_reference_solutions_as_correct(make):
    for problem in make():
        form, steps = find_form(problem), problem["steps"]
        graph = form.graph(problem)
        assert graph.role(graph.target) == ON_PATH and graph.role(graph.other) == UNREACHABLE
        for k in range(len(steps) + 1):
            text = "".join(f"{step}\n" for step in steps[k:]) + f"### {problem['answer']}"
            verdict = classify(text, form, graph, k)
            assert verdict.kind == ("Correct Path" if k < len(steps) else "Correct Label")
            assert verdict.answer_right and verdict.path_right == verdict.agree == (True if k < len(steps) else None)
