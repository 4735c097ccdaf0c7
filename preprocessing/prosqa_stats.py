"""Validate ProsQA files and print their statistics as a table, one column per file.

    python preprocessing/prosqa_stats.py data/prosqa_train.json data/prosqa_valid.json data/prosqa_test.json

Files joined by a comma share a column. A problem that violates the format is an error.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

from common import DataError, read_json, run_script
from prosqa import fact, shortest_paths

KEYS = ["question", "answer", "steps", "idx_to_symbol", "edges", "root", "target", "neg_target"]
AS_SHARES = {
    "share of paths by hops",
    "nodes >= 2 by parents",
    "root is node",
    "correct option is",
}


def facts_of(problem: dict) -> list[str]:
    """Return the sentences of the problem's edges, in order."""
    return [fact(problem["idx_to_symbol"], edge) for edge in problem["edges"]]


def ancestry(edges: list, count: int) -> list[int]:
    """Return per node a bit mask: 1 = is or descends from node 0, 2 = is or descends from node 1."""
    labels = [1, 2] + [0] * (count - 2)
    for parent, child in edges:
        labels[child] |= labels[parent]
    return labels


# Checks


def require(holds: bool, rule: str) -> None:
    """Raise DataError(rule) unless `holds`."""
    if not holds:
        raise DataError(rule)


def check_problem(problem: dict) -> None:
    """Raise DataError with the first rule of the published format that the problem violates."""
    require(list(problem) == KEYS, f"the keys must be {', '.join(KEYS)}")
    check_graph(problem)
    check_ends(problem)
    check_text(problem)


def check_graph(problem: dict) -> None:
    """Check that edges lead to larger numbers, sorted by child, and that entities are the nodes without a parent."""
    names, edges = problem["idx_to_symbol"], problem["edges"]
    children = [child for _, child in edges]
    require(len(set(names)) == len(names), "two nodes have the same name")
    require(
        all(0 <= parent < child < len(names) for parent, child in edges), "an edge does not lead to a larger number"
    )
    require(children == sorted(children), "the edges are not sorted by child")
    require(len(set(map(tuple, edges))) == len(edges), "an edge occurs twice")
    require({node for edge in edges for node in edge} == set(range(len(names))), "a node has no edge")
    entities = {node for node, name in enumerate(names) if name[0].isupper()}
    require(entities == set(range(len(names))) - set(children), "entities are not the nodes without a parent")


def check_ends(problem: dict) -> None:
    """Check that both ends are leaves, each descending from one entity only."""
    edges, root = problem["edges"], problem["root"]
    ends = problem["target"], problem["neg_target"]
    require(root in (0, 1), "the root is neither node 0 nor node 1")
    require(not {parent for parent, _ in edges} & set(ends), "target or neg_target is not a leaf")
    labels = ancestry(edges, len(problem["idx_to_symbol"]))
    require(labels[ends[0]] == root + 1, "the target does not descend from the root alone")
    require(labels[ends[1]] == 2 - root, "neg_target does not descend from the other entity alone")


def check_text(problem: dict) -> None:
    """Check that the question states each edge once and asks for both ends, and that the steps are a shortest path."""
    names, edges = problem["idx_to_symbol"], problem["edges"]
    root, target, neg_target = (problem[key] for key in ("root", "target", "neg_target"))
    *facts, query = problem["question"].split(". ")
    require(sorted(f"{text}." for text in facts) == sorted(facts_of(problem)), "the facts are not the edges")
    options = [f"{names[target]} or {names[neg_target]}", f"{names[neg_target]} or {names[target]}"]
    require(query in [f"Is {names[root]} a {pair}?" for pair in options], "the query does not name the ends")
    require(problem["answer"] == f"{names[root]} is a {names[target]}.", "the answer is not the target")
    paths = shortest_paths(edges, root, target)
    steps = [[fact(names, edge) for edge in pairwise(path)] for path in paths]
    require(problem["steps"] in steps, "the steps are not a shortest path")


# Statistics


def measure(problem: dict) -> dict[str, list]:
    """Compute the values of each row of the table: one, or one per node."""
    names, edges, root = problem["idx_to_symbol"], problem["edges"], problem["root"]
    parents = Counter(child for _, child in edges)
    nodes_by_label = Counter(ancestry(edges, len(names)))
    paths = shortest_paths(edges, root, problem["target"])
    wrong_paths = shortest_paths(edges, 1 - root, problem["neg_target"])
    first_option = problem["question"].split()[-3]
    return {
        "nodes": [len(names)],
        "edges": [len(edges)],
        "hops of the shortest path": [len(paths[0]) - 1],
        "share of paths by hops": [len(paths[0]) - 1],
        "number of shortest paths": [len(paths)],
        "hops to the wrong option": [len(wrong_paths[0]) - 1],
        "nodes without a parent": [len(names) - len(parents)],
        "nodes >= 2 by parents": [parents[node] for node in range(2, len(names))],
        "nodes below neither entity": [nodes_by_label[0]],
        "nodes of entity 0 alone": [nodes_by_label[1]],
        "nodes of entity 1 alone": [nodes_by_label[2]],
        "nodes below both": [nodes_by_label[3]],
        "root is node": [root],
        "correct option is": ["first" if first_option == names[problem["target"]] else "second"],
    }


def gather(problems: Iterable[dict]) -> dict[str, list]:
    """Collect `measure` over all problems, by row."""
    rows = defaultdict(list)
    for problem in problems:
        for row, values in measure(problem).items():
            rows[row] += values
    return rows


def spread(values: list[int]) -> str:
    """Format mean ± standard deviation [min, max]."""
    return f"{fmean(values):.3f} ± {pstdev(values):.2f} [{min(values)}, {max(values)}]"


def shares(values: list) -> str:
    """Format the relative frequency of each value."""
    return ", ".join(f"{value}: {number / len(values):.3f}" for value, number in sorted(Counter(values).items()))


def column(problems: list[dict]) -> dict[str, str]:
    """Compute the cells of one file, by row."""
    distinct = {frozenset(facts_of(problem)) for problem in problems}
    cells = {"problems": f"{len(problems):,}", "different problems": f"{len(distinct):,}"}
    for row, values in gather(problems).items():
        cells[row] = shares(values) if row in AS_SHARES else spread(values)
    return cells


def table(columns: dict[str, dict[str, str]]) -> str:
    """Format columns (title -> row -> cell) as a Markdown table."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in next(iter(columns.values())):
        lines.append([row, *(cells[row] for cells in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The command


def load(path: Path) -> list[dict]:
    """Read a ProsQA file; raise DataError if it or one of its problems is invalid."""
    problems = read_json(path, "Pass a ProsQA file, for example data/prosqa_test.json.")
    for number, problem in enumerate(problems):
        try:
            check_problem(problem)
        except (DataError, LookupError, TypeError) as error:
            raise DataError(f"{path}, problem {number} (from 0): {error}.") from error
    return problems


def main() -> None:
    """Print the table for the files on the command line."""
    parser = argparse.ArgumentParser(description="Statistics of ProsQA files as a Markdown table.")
    parser.add_argument(
        "files", nargs="+", metavar="FILE[,FILE]", help="one column each; files joined by a comma are pooled"
    )
    columns = {}
    for names in parser.parse_args().files:
        columns[names] = column([problem for name in names.split(",") for problem in load(Path(name))])
    print(table(columns))


if __name__ == "__main__":
    run_script(main)
