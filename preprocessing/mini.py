"""Makes ProsQA's question at a size that a CPU trains from scratch: single letters, a token per fact.

    python preprocessing/mini.py          data/mini_{train,valid,test}.json
    python preprocessing/mini.py --tokenizer FOLDER     the tokenizer for them (args/mini_model holds it)
    python preprocessing/mini.py --out FILE --hops 4    test problems of another kind, for a model trained on the first

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

from common import DATA, DataError, run_script, write_json, write_tokenizer
from prosqa import MAX_REJECTED, Recipe, draw_graph, pick, shortest_paths, shuffled

HOPS = 3  # from the root to either end
RECIPE = Recipe(nodes=16, min_hops=HOPS, max_hops=HOPS)
NODES = "abcdefghijklmnop"
SPLITS = {"valid": 500, "test": 1000, "train": 40_000}  # the training set last: it may grow
SEED, OTHER_SEED = 0, 1
KNOBS = ("nodes", "parents", "hops", "num")


def draw_ends(labels: list[int], depths: list[int], edges: list, hops: int, rng: random.Random) -> list[int] | None:
    """A leaf below each root, both so many hops away; None where the graph has no two such leaves."""
    inner = {parent for parent, _ in edges}
    leaves = [node for node, depth in enumerate(depths) if depth == hops and node not in inner]
    sides = [[node for node in leaves if labels[node] == side] for side in (1, 2)]
    return [pick(side, rng) for side in sides] if all(sides) else None


def ask(edges: list, root: int, ends: list[int], rng: random.Random) -> dict:
    """The problem of a graph and a root, with letters and an order of the facts drawn at random."""
    letters = shuffled(NODES, rng)
    _, *steps = (letters[node] for node in pick(shortest_paths(edges, root, ends[root]), rng))
    arrows = [f"{letters[parent]}>{letters[child]}" for parent, child in shuffled(edges, rng)]
    asked = [*(letters[end] for end in shuffled(ends, rng)), letters[root]]
    return {"question": " ".join([*arrows, *asked]), "steps": steps, "answer": steps[-1]}


def make_problems(seed: int, recipe: Recipe = RECIPE) -> Iterator[dict]:
    """Problems without end: each graph is asked about from both roots, with other letters.

    Raises DataError where the recipe needs more letters than there are, or accepts no graph out of MAX_REJECTED.
    """
    if recipe.nodes > len(NODES):
        raise DataError(f"--nodes {recipe.nodes}: the tokenizer knows {len(NODES)} letters; ask for no more nodes.")
    rng, rejected = random.Random(seed), 0
    while rejected < MAX_REJECTED:
        edges, labels, depths = draw_graph(recipe, rng)
        if ends := draw_ends(labels, depths, edges, recipe.min_hops, rng):
            yield from (ask(edges, root, ends, rng) for root in (0, 1))
        rejected = 0 if ends else rejected + 1
    raise DataError(f"{recipe} accepts none of {rejected:,} graphs. Lower --hops or add nodes.")


def words() -> list[str]:
    """The words of these problems, each with the blank or newline behind it."""
    letters = [f"{node}{end}" for end in ("", " ", "\n") for node in NODES]
    return [*letters, *(f"{x}>{y} " for x in NODES for y in NODES if x != y)]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="write the tokenizer instead of problems")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write other problems there, of the kind that follows")
    parser.add_argument("--nodes", type=int, default=RECIPE.nodes, help="of a graph, before unlinked ones are dropped")
    parser.add_argument("--parents", type=float, default=RECIPE.parents, help="mean number of parents of a node")
    parser.add_argument("--hops", type=int, default=HOPS, help="from the root to either end")
    parser.add_argument("--num", type=int, default=SPLITS["test"], help="number of problems")
    arguments = parser.parse_args(argv)
    if arguments.tokenizer:
        write_tokenizer(arguments.tokenizer, words())
        return
    if not arguments.out and any(getattr(arguments, key) != parser.get_default(key) for key in KNOBS):
        parser.error("--out FILE is needed with these arguments: data/mini_*.json have fixed ones")
    if arguments.out and arguments.out.exists():
        raise DataError(f"{arguments.out} exists already; remove it or name another file.")
    files, seed = {DATA / f"mini_{split}.json": count for split, count in SPLITS.items()}, SEED
    if arguments.out:
        files, seed = {arguments.out: arguments.num}, OTHER_SEED
    problems = make_problems(seed, Recipe(arguments.nodes, arguments.parents, arguments.hops, arguments.hops))
    for path, count in files.items():
        write_json(path, list(islice(problems, count)))
        print(f"{path}: {count:,} problems")


if __name__ == "__main__":
    run_script(main)
