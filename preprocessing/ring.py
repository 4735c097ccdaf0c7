"""Makes the quickstart's problems: follow arrows around a ring.

    python preprocessing/ring.py          data/ring_{train,valid,test}.json
    python preprocessing/ring.py --small  data/ring_small_*.json: two arrows, a ring of seven (tests/stress/smoke.py)
    python preprocessing/ring.py --tokenizer FOLDER     the tokenizer for them (args/ring_model holds it)

A question states the eight arrows of a ring in random order and a start: "c>a h>e ... b". The steps are the nodes
that four arrows lead to, one after another; the answer is the last. Every arrow is one token, so that a single look-up
follows it, while four in a row are more than two layers can do at once.
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


def make_problem(random_: random.Random, nodes: str, hops: int) -> dict:
    """One problem: question, steps and answer."""
    ring = random_.sample(nodes, len(nodes))
    after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    path = [random_.choice(nodes)]
    for _ in range(hops):
        path.append(after[path[-1]])
    arrows = [f"{node}>{after[node]}" for node in random_.sample(nodes, len(nodes))]
    return {"question": " ".join([*arrows, path[0]]), "steps": path[1:], "answer": path[-1]}


def make_problems(count: int, seed: int, nodes: str = NODES, hops: int = HOPS) -> list[dict]:
    """Problems of which no two have the same ring and start, in whatever order the arrows stand.

    Of eight nodes 40,320 exist, of seven 5,040.
    """
    random_, problems = random.Random(seed), {}
    while len(problems) < count:
        problem = make_problem(random_, nodes, hops)
        *arrows, start = problem["question"].split()
        problems.setdefault((frozenset(arrows), start), problem)
    return list(problems.values())


def words() -> list[str]:
    """The words of these problems, each with the blank or newline behind it."""
    return [*NODES, *(f"{node}\n" for node in NODES), *(f"{x}>{y} " for x in NODES for y in NODES if x != y)]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="write the tokenizer instead of problems")
    parser.add_argument("--small", action="store_true", help="write the smaller problems instead")
    arguments = parser.parse_args(argv)
    if arguments.tokenizer:
        write_tokenizer(arguments.tokenizer, words())
        return
    name, splits, kind = "ring", SPLITS, (NODES, HOPS)
    if arguments.small:
        name, splits, kind = "ring_small", SMALL_SPLITS, (SMALL_NODES, SMALL_HOPS)
    problems = make_problems(sum(splits.values()), SEED, *kind)
    for split, count in splits.items():
        path = DATA / f"{name}_{split}.json"
        write_json(path, [problems.pop() for _ in range(count)])
        print(f"{path}: {count:,} problems")


if __name__ == "__main__":
    run_script(main)
