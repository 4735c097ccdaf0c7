"""Generate ProsQA problems: which of two concepts follows from a graph of "is a" facts?

    python preprocessing/prosqa.py                                    the three files that data/ ships
    python preprocessing/prosqa.py --num 500 --seed 1 --out FILE      any other set; see --help
    python preprocessing/prosqa.py --tokenizer FOLDER                 one token per word (shipped in args/prosqa_model)

A graph grows node by node from two entities, 0 and 1. A node's label is a bit mask of the entities it descends from:
1 = node 0, 2 = node 1, 3 = both, 0 = neither. The question asks for the deepest leaf that descends from one entity
only; the wrong option descends only from the other.

All draws use Random.random(), whose sequence Python guarantees for a seed; other methods may change between versions.
"""

import argparse
import math
import random
import sys
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from common import DATA, DataError, run_script, write_json, write_tokenizer
from tqdm import tqdm

SHIPPED = {"train": 17886, "valid": 300, "test": 500}  # consecutive problems of one stream
SHIPPED_SEED = 2412
MAX_REJECTED = 300_000  # graphs in a row

PUBLISHED_NAMES = (
    "Tom Bob Max Gabriel Oliver Polly Alex Jack Carol Sam Stella Sally Eva Fae Rex Davis Wren",
    "quimpus sterpus scrompus vumpus terpus wumpus tumpus grimpus storpus rorpus zumpus fompus bompus "
    "jompus lorpus boompus yerpus brimpus rempus gorpus shumpus lempus impus hilpus yimpus gerpus "
    "kerpus jelpus felpus rompus worpus numpus zhorpus dumpus gwompus timpus chorpus yumpus",
)
ENTITIES, CONCEPTS = (names.split() for names in PUBLISHED_NAMES)


def made_up_names(onsets: str, endings: str, taken: Sequence[str]) -> list[str]:
    """Combine every onset with every ending, for graphs that need more names than the published ones."""
    names = [onset + ending for ending in endings.split() for onset in onsets.split()]
    return [name for name in names if name not in taken]


MORE_ENTITIES = made_up_names("B C D F G H J K L M N P R S T V W Z", "arlo ella ovan erik", ENTITIES)
MORE_CONCEPTS = made_up_names(
    "b bl br ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr r s sh sk sl sp st t th tr v w y z zh",
    "umpus orpus erpus impus ompus elpus ilpus",
    CONCEPTS,
)


@dataclass(frozen=True)
class Recipe:
    """Graph parameters; the defaults reproduce the statistics of the published files."""

    nodes: int = 28  # before isolated nodes are dropped
    parents: float = 1.5  # Poisson mean of the number of parents of a new node
    min_hops: int = 3  # length of the shortest path from root to target
    max_hops: int = 6
    printed: bool = False  # choose parents as in the paper's algorithm

    def __post_init__(self):
        """Raise DataError for invalid values."""
        if self.nodes < 4 or not 0 < self.parents <= 100:
            raise DataError(f"--nodes {self.nodes} must be 4 or more, --parents {self.parents} within 0..100.")
        if not 1 <= self.min_hops <= self.max_hops < self.nodes:
            raise DataError(
                f"--min-hops {self.min_hops} and --max-hops {self.max_hops} must be in order, "
                f"1 or more, and below --nodes {self.nodes}."
            )


# Draws


def pick(items: Sequence, rng: random.Random):
    """Draw an item uniformly."""
    return items[int(rng.random() * len(items))]


def shuffled(items: Sequence, rng: random.Random) -> list:
    """Return the items in uniformly random order."""
    return sorted(items, key=lambda _: rng.random())


def poisson(mean: float, rng: random.Random) -> int:
    """Draw a Poisson number (Knuth's algorithm)."""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * rng.random()
    return count


def draw_weighted(items: Sequence, weights: Sequence[float], count: int, rng: random.Random) -> list:
    """Draw `count` different items, one after the other, with probabilities proportional to their weights."""
    items, weights, drawn = list(items), list(weights), []
    for _ in range(count):
        sums = list(accumulate(weights))
        place = bisect(sums, rng.random() * sums[-1])
        drawn.append(items.pop(place))
        del weights[place]
    return drawn


# The graph: edges are (parent, child) pairs of node numbers


def candidates(labels: list[int], recipe: Recipe, rng: random.Random) -> list[int]:
    """Return the allowed parents of the next node; most nodes stay on one entity's side."""
    first = rng.random()
    second = first if recipe.printed else rng.random()  # the published files were made with two draws
    neutral = {0} if recipe.printed else set()
    if first <= 0.35:
        allowed = neutral | {1}
    elif second <= 0.7:
        allowed = neutral | {2}
    else:
        allowed = {0, 1, 2, 3}
    return [node for node, label in enumerate(labels) if label in allowed]


def draw_graph(recipe: Recipe, rng: random.Random) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Draw edges; return them with each node's label and depth (hops from its entity for labels 1 and 2, else 0)."""
    edges, labels, depths = [], [1, 2], [0, 0]
    for node in range(2, recipe.nodes):
        pool = candidates(labels, recipe, rng)
        weights = [1.5 * depths[other] + 1 for other in pool]
        parents = draw_weighted(pool, weights, min(len(pool), poisson(recipe.parents, rng)), rng)
        label = 0
        for parent in parents:
            label |= labels[parent]
        above = [depths[parent] for parent in parents if labels[parent] == label]
        edges += [(parent, node) for parent in parents]
        labels.append(label)
        depths.append(1 + min(above) if label in (1, 2) else 0)
    return edges, labels, depths


def draw_ends(
    edges: list, labels: list[int], depths: list[int], recipe: Recipe, rng: random.Random
) -> tuple[int, int, int] | None:
    """Draw root, target and neg_target; return None if no pair of leaves fits the recipe."""
    inner = {parent for parent, _ in edges}
    leaves = [node for node in range(2, len(labels)) if labels[node] in (1, 2) and node not in inner]
    if len({labels[node] for node in leaves}) < 2:
        return None
    deepest = max(depths[node] for node in leaves)
    if not recipe.min_hops <= deepest <= recipe.max_hops:
        return None
    target = pick([node for node in leaves if depths[node] == deepest], rng)
    neg_target = pick([node for node in leaves if labels[node] != labels[target]], rng)
    return labels[target] - 1, target, neg_target


def shortest_paths(edges: Sequence, start: int, goal: int) -> list[list[int]]:
    """Return all shortest paths from start to goal as lists of nodes.

    Edges lead to larger numbers and are sorted by child, so one pass is enough.
    """
    paths = defaultdict(list, {start: [[start]]})
    for parent, child in edges:
        found = paths[child] + [[*path, child] for path in paths[parent]]
        shortest = min(map(len, found), default=0)
        paths[child] = [path for path in found if len(path) == shortest]
    return paths[goal]


# The text


def name_nodes(edges: Sequence, count: int, rng: random.Random) -> list[str]:
    """Name each node: nodes without a parent after entities, others after concepts, all different."""
    children = {child for _, child in edges}
    concepts = shuffled(enough(CONCEPTS, MORE_CONCEPTS, len(children)), rng)
    entities = shuffled(enough(ENTITIES, MORE_ENTITIES, count - len(children)), rng)
    return [(concepts if node in children else entities).pop() for node in range(count)]


def enough(names: list[str], more: list[str], count: int) -> list[str]:
    """Return the published names, extended if more than these are needed."""
    if count > len(names) + len(more):
        raise DataError(
            f"A graph needs {count} names of one kind, but there are {len(names) + len(more)}. Lower --nodes."
        )
    return (names + more)[: max(count, len(names))]


def fact(names: Sequence[str], edge: Sequence[int]) -> str:
    """Return the sentence of an edge; entity names are capitalized."""
    parent, child = (names[node] for node in edge)
    return f"{parent if parent[0].isupper() else 'Every ' + parent} is a {child}."


def draw_problem(recipe: Recipe, rng: random.Random) -> dict | None:
    """Draw a problem in the published format; return None if the graph is rejected."""
    edges, labels, depths = draw_graph(recipe, rng)
    ends = draw_ends(edges, labels, depths, recipe, rng)
    if ends is None:
        return None
    used = sorted({node for edge in edges for node in edge})
    number = {node: place for place, node in enumerate(used)}
    edges = [[number[parent], number[child]] for parent, child in edges]
    root, target, neg_target = (number[node] for node in ends)
    names = name_nodes(edges, len(used), rng)
    path = pick(shortest_paths(edges, root, target), rng)
    facts = shuffled([fact(names, edge) for edge in edges], rng)
    first, second = shuffled([names[target], names[neg_target]], rng)
    return {
        "question": f"{' '.join(facts)} Is {names[root]} a {first} or {second}?",
        "answer": f"{names[root]} is a {names[target]}.",
        "steps": [fact(names, step) for step in pairwise(path)],
        "idx_to_symbol": names,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }


def generate(recipe: Recipe, num: int, seed: int) -> Iterator[dict]:
    """Yield `num` problems, no two with the same facts; a smaller `num` gives a prefix.

    Raises: DataError if the recipe rejects MAX_REJECTED graphs in a row.
    """
    rng, seen, rejected = random.Random(seed), set(), 0
    while len(seen) < num:
        problem = draw_problem(recipe, rng)
        facts = problem and frozenset(fact(problem["idx_to_symbol"], edge) for edge in problem["edges"])
        if problem is None or facts in seen:
            rejected += 1
            if rejected == MAX_REJECTED:
                raise DataError(
                    f"{recipe} accepts none of {rejected:,} graphs; widen the range of hops or raise --nodes."
                )
            continue
        rejected = 0
        seen.add(facts)
        yield problem


def words() -> list[str]:
    """Return the vocabulary of the published names, each word with the punctuation or whitespace that follows it."""
    concepts = [concept + end for concept in CONCEPTS for end in (" ", ". ", ".\n", ".", "?\n")]
    return [*concepts, *(f"{name} " for name in (*ENTITIES, "Every", "Is", "is", "a", "or"))]


# The command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Generate ProsQA problems. Without arguments: the three files that data/ ships.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="output file, needed with any other option but --force")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="write the tokenizer instead of problems")
    parser.add_argument("--num", type=int, default=500, help="number of problems")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--preset",
        choices=["released", "paper"],
        default="released",
        help="as the published files, or as the paper's algorithm",
    )
    parser.add_argument("--nodes", type=int, default=Recipe.nodes, help="nodes drawn per graph")
    parser.add_argument("--parents", type=float, default=Recipe.parents, help="mean number of parents per node")
    parser.add_argument(
        "--min-hops", type=int, default=Recipe.min_hops, help="minimum length of the shortest path to the target"
    )
    parser.add_argument("--max-hops", type=int, default=Recipe.max_hops, help="maximum length of that path")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    if args.out is None and args.tokenizer is None and set(argv) - {"--force"}:
        parser.error("--out FILE is needed with these options: those of data/prosqa_*.json are fixed")
    if args.num < 1:
        parser.error(f"--num {args.num} must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write --out, the shipped files, or the tokenizer."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.tokenizer:
        write_tokenizer(args.tokenizer, words())
        return
    sizes = {DATA / f"prosqa_{split}.json": num for split, num in SHIPPED.items()}
    if args.out is not None:
        sizes = {args.out: args.num}
    existing = [str(path) for path in sizes if path.exists()]
    if existing and not args.force:
        raise DataError(f"{', '.join(existing)} already exist; use --force to replace them.")
    recipe = Recipe(args.nodes, args.parents, args.min_hops, args.max_hops, printed=args.preset == "paper")
    total = sum(sizes.values())
    problems = generate(recipe, total, SHIPPED_SEED if args.out is None else args.seed)
    problems = list(tqdm(problems, total=total, unit=" problems"))
    for path, num in sizes.items():
        write_json(path, problems[:num])
        del problems[:num]
        print(f"{path}: {num:,} problems")


if __name__ == "__main__":
    run_script(main)
