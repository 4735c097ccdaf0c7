"""Generate mini: ProsQA's question at a size that can be trained from scratch on a CPU, with one token per fact.

    python preprocessing/mini.py          data/mini_{train,valid,test}.json
    python preprocessing/mini.py --tokenizer FOLDER     its tokenizer (shipped in args/mini_model)
    python preprocessing/mini.py --out FILE --hops 4    out-of-distribution test problems

The graphs are those of preprocessing/prosqa.py, but smaller. "c>a h>e ... c e b" states the facts in random order, then
asks whether b leads to c or to e; the steps are the nodes on the path, the answer is the last one. The first step is
the hard one: which of the root's children leads to one of the two? Both ends are equally far from their roots; in
ProsQA, the correct end is the deepest leaf, and its number of ancestors alone gives most answers away.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from common import DATA, DataError, run_script, write_json, write_tokenizer
from prosqa import MAX_REJECTED, Recipe, draw_graph, pick, shortest_paths, shuffled

HOPS = 3  # from a root to its end
RECIPE = Recipe(nodes=16, min_hops=HOPS, max_hops=HOPS)
NODES = "abcdefghijklmnop"
SPLITS = {"valid": 500, "test": 1000, "train": 40_000}  # train last, so that its size can change
SEED, OTHER_SEED = 0, 1
KNOBS = ("nodes", "parents", "hops", "num")


def draw_ends(labels: list[int], depths: list[int], edges: list, hops: int, rng: random.Random) -> list[int] | None:
    """Draw a leaf below each root, both at the given distance; return None if there are none."""
    inner = {parent for parent, _ in edges}
    leaves = [node for node, depth in enumerate(depths) if depth == hops and node not in inner]
    sides = [[node for node in leaves if labels[node] == side] for side in (1, 2)]
    return [pick(side, rng) for side in sides] if all(sides) else None


def ask(edges: list, root: int, ends: list[int], rng: random.Random) -> dict:
    """Make the problem of a graph and a root, with random letters and order of facts."""
    letters = shuffled(NODES, rng)
    _, *steps = (letters[node] for node in pick(shortest_paths(edges, root, ends[root]), rng))
    arrows = [f"{letters[parent]}>{letters[child]}" for parent, child in shuffled(edges, rng)]
    asked = [*(letters[end] for end in shuffled(ends, rng)), letters[root]]
    return {"question": " ".join([*arrows, *asked]), "steps": steps, "answer": steps[-1]}


def make_problems(seed: int, recipe: Recipe = RECIPE) -> Iterator[dict]:
    """Yield problems endlessly: each graph is used with both roots, with different letters.

    Raises: DataError if the recipe needs more letters than there are, or rejects MAX_REJECTED graphs in a row.
    """
    if recipe.nodes > len(NODES):
        raise DataError(f"--nodes {recipe.nodes}: the tokenizer has only {len(NODES)} letters; lower --nodes.")
    rng, rejected = random.Random(seed), 0
    while rejected < MAX_REJECTED:
        edges, labels, depths = draw_graph(recipe, rng)
        if ends := draw_ends(labels, depths, edges, recipe.min_hops, rng):
            yield from (ask(edges, root, ends, rng) for root in (0, 1))
        rejected = 0 if ends else rejected + 1
    raise DataError(f"{recipe} accepts none of {rejected:,} graphs; lower --hops or raise --nodes.")


def words() -> list[str]:
    """Return the vocabulary, each word with the space or newline that follows it."""
    letters = [f"{node}{end}" for end in ("", " ", "\n") for node in NODES]
    return [*letters, *(f"{x}>{y} " for x in NODES for y in NODES if x != y)]


def main(argv: list[str] | None = None) -> None:
    """Write problems or the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="write the tokenizer instead of problems")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write problems with the options below")
    parser.add_argument("--nodes", type=int, default=RECIPE.nodes, help="nodes per graph, including isolated ones")
    parser.add_argument("--parents", type=float, default=RECIPE.parents, help="mean number of parents of a node")
    parser.add_argument("--hops", type=int, default=HOPS, help="distance from a root to its end")
    parser.add_argument("--num", type=int, default=SPLITS["test"], help="number of problems")
    args = parser.parse_args(argv)
    if args.tokenizer:
        write_tokenizer(args.tokenizer, words())
        return
    if not args.out and any(getattr(args, key) != parser.get_default(key) for key in KNOBS):
        parser.error("--out FILE is needed with these options: those of data/mini_*.json are fixed")
    if args.out and args.out.exists():
        raise DataError(f"{args.out} already exists; remove it or choose another file.")
    files, seed = {DATA / f"mini_{split}.json": count for split, count in SPLITS.items()}, SEED
    if args.out:
        files, seed = {args.out: args.num}, OTHER_SEED
    problems = make_problems(seed, Recipe(args.nodes, args.parents, args.hops, args.hops))
    for path, count in files.items():
        write_json(path, list(islice(problems, count)))
        print(f"{path}: {count:,} problems")


if __name__ == "__main__":
    run_script(main)
