"""Makes ProsQA's question at a size that a CPU trains from scratch: single letters, a token per fact.

    python preprocessing/mini.py          data/mini_{train,valid,test}.json
    python preprocessing/mini.py --tokenizer FOLDER     the tokenizer for them (args/mini_model holds it)

The graphs are those of preprocessing/prosqa.py, smaller. "c>a h>e ... c e b" states the facts in random order, then
asks whether b leads to c or to e; the steps are the nodes on the way, the answer is the last. The first step is the
hard one: of the root's children, which leads to one of the two? Both ends are equally far from the roots they descend
from, since ProsQA's right one is the deepest leaf: the number of its ancestors alone gives most answers away.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from common import DATA, run_script, write_json
from prosqa import Recipe, draw_graph, pick, shortest_paths, shuffled
from ring import write_tokenizer

RECIPE = Recipe(nodes=16)
HOPS = 3  # from the root to either end
NODES = "abcdefghijklmnop"
SPLITS = {"valid": 500, "test": 1000, "train": 40_000}  # the training set last: it may grow
SEED = 0


def draw_ends(labels: list[int], depths: list[int], edges: list, rng: random.Random) -> list[int] | None:
    """A leaf below each root, both HOPS away; None where the graph has no two such leaves."""
    inner = {parent for parent, _ in edges}
    leaves = [node for node, depth in enumerate(depths) if depth == HOPS and node not in inner]
    sides = [[node for node in leaves if labels[node] == side] for side in (1, 2)]
    return [pick(side, rng) for side in sides] if all(sides) else None


def ask(edges: list, root: int, ends: list[int], rng: random.Random) -> dict:
    """The problem of a graph and a root, with letters and an order of the facts drawn at random."""
    letters = shuffled(NODES, rng)
    _, *steps = (letters[node] for node in pick(shortest_paths(edges, root, ends[root]), rng))
    arrows = [f"{letters[parent]}>{letters[child]}" for parent, child in shuffled(edges, rng)]
    asked = [*(letters[end] for end in shuffled(ends, rng)), letters[root]]
    return {"question": " ".join([*arrows, *asked]), "steps": steps, "answer": steps[-1]}


def make_problems(seed: int) -> Iterator[dict]:
    """Problems without end: each graph is asked about from both roots, with other letters."""
    rng = random.Random(seed)
    while True:
        edges, labels, depths = draw_graph(RECIPE, rng)
        if ends := draw_ends(labels, depths, edges, rng):
            yield from (ask(edges, root, ends, rng) for root in (0, 1))


def words() -> list[str]:
    """The words of these problems, each with the blank or newline behind it."""
    letters = [f"{node}{end}" for end in ("", " ", "\n") for node in NODES]
    return [*letters, *(f"{x}>{y} " for x in NODES for y in NODES if x != y)]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="write the tokenizer instead of problems")
    arguments = parser.parse_args(argv)
    if arguments.tokenizer:
        write_tokenizer(arguments.tokenizer, words())
        return
    problems = make_problems(SEED)
    for split, count in SPLITS.items():
        path = DATA / f"mini_{split}.json"
        write_json(path, list(islice(problems, count)))
        print(f"{path}: {count:,} problems")


if __name__ == "__main__":
    run_script(main)
