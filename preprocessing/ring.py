"""Generate problems for tiny models: follow arrows around a ring.

    python preprocessing/ring.py          data/ring_{train,valid,test}.json
    python preprocessing/ring.py --small  data/ring_small_*.json: two arrows, a ring of seven (quickstart.bash)
    python preprocessing/ring.py --tokenizer FOLDER     its tokenizer (shipped in args/ring_model)

A question states the eight arrows of a ring in random order, and a start: "c>a h>e ... b". The steps are the nodes
reached by four arrows, one after another; the answer is the last one. Each arrow is one token, so that one look-up
follows it, but four in a row are more than two layers can do in one pass.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from common import DATA, run_script, write_json, write_tokenizer

NODES, HOPS = "abcdefgh", 4
SPLITS = {"train": 10_000, "valid": 200, "test": 500}
SMALL_NODES, SMALL_HOPS = "abcdefg", 2
SMALL_SPLITS = {"train": 4_000, "valid": 200, "test": 300}
SEED = 0


def make_problem(rng: random.Random, nodes: str, hops: int) -> dict:
    """Draw one problem."""
    ring = rng.sample(nodes, len(nodes))
    after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    path = [rng.choice(nodes)]
    for _ in range(hops):
        path.append(after[path[-1]])
    arrows = [f"{node}>{after[node]}" for node in rng.sample(nodes, len(nodes))]
    return {"question": " ".join([*arrows, path[0]]), "steps": path[1:], "answer": path[-1]}


def make_problems(count: int, seed: int, nodes: str = NODES, hops: int = HOPS) -> list[dict]:
    """Draw distinct problems: no two have the same ring and start, regardless of the order of arrows.

    There are 40,320 with eight nodes, and 5,040 with seven.
    """
    rng, problems = random.Random(seed), {}
    while len(problems) < count:
        problem = make_problem(rng, nodes, hops)
        *arrows, start = problem["question"].split()
        problems.setdefault((frozenset(arrows), start), problem)
    return list(problems.values())


def words() -> list[str]:
    """Return the vocabulary, each word with the space or newline that follows it."""
    return [*NODES, *(f"{node}\n" for node in NODES), *(f"{x}>{y} " for x in NODES for y in NODES if x != y)]


def main(argv: list[str] | None = None) -> None:
    """Write problems or the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="write the tokenizer instead of problems")
    parser.add_argument("--small", action="store_true", help="write the small problems instead")
    args = parser.parse_args(argv)
    if args.tokenizer:
        write_tokenizer(args.tokenizer, words())
        return
    name, splits, kind = "ring", SPLITS, (NODES, HOPS)
    if args.small:
        name, splits, kind = "ring_small", SMALL_SPLITS, (SMALL_NODES, SMALL_HOPS)
    problems = make_problems(sum(splits.values()), SEED, *kind)
    for split, count in splits.items():
        path = DATA / f"{name}_{split}.json"
        write_json(path, [problems.pop() for _ in range(count)])
        print(f"{path}: {count:,} problems")


if __name__ == "__main__":
    run_script(main)
