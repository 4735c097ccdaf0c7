"""Says whether a run is like a reference: the same training, and curves within the spread of the reference's seeds.

    python scripts/compare.py checkpoints/smoke-coconut-seed0 results/smoke
    python scripts/compare.py RUN [RUN ...] REFERENCE     REFERENCE: a folder with the runs of several seeds, or a run

A run is its directory, or the RUN.yaml that scripts/record.py wrote of it.

Only the reference's runs of RUN's method count, over the epochs that all have finished. A curve lies within the spread
if it lies between the lowest and the highest seed, widened by their distance and at least by the margin below on either
side; it has left it where two epochs in a row, or the last one, lie outside. A reference of one seed does not show its
spread: then the margin alone is allowed, which may be less than another seed's distance.

Exit code: 0 all alike; 1 another training (the keys are named) or a curve that has left; 2 nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

from runs import Finished, UserError, differences, find_runs, read_run

ACCURACY_MARGIN = 0.05
LOSS_MARGIN, LEAST_LOSS_MARGIN = 0.1, 0.01  # a part of the loss; nats, since losses near zero differ by their multiple


def references(folder: Path, run: Finished) -> list[Finished]:
    """The reference's runs of the run's method. Raises UserError where there is none, or where they are no seeds."""
    found = [read_run(path) for path in find_runs(folder)]
    if not found:
        raise UserError(f"{folder}: holds no run; give a run's directory, a folder of them, or a folder of results")
    alike = [other for other in found if other.config["method"] == run.config["method"]]
    if not alike:
        methods = ", ".join(sorted({other.config["method"] for other in found}))
        raise UserError(f"{run.directory} is of method {run.config['method']}, {folder} has {methods} only")
    for other in alike[1:]:
        if keys := differences(alike[0], other):
            both = f"{alike[0].directory} and {other.directory}"
            raise UserError(f"{both} differ in {', '.join(keys)}; give one of them as the reference")
    return alike


def spread(values: list[float], name: str) -> tuple[float, float]:
    """The lowest and the highest value that pass as one more seed's."""
    low, high = min(values), max(values)
    margin = ACCURACY_MARGIN if name == "accuracy" else max(LOSS_MARGIN * high, LEAST_LOSS_MARGIN)
    widening = max(high - low, margin)
    return low - widening, high + widening


def epochs_outside(name: str, run: Finished, seeds: list[Finished]) -> tuple[list[str], bool]:
    """A line for every epoch in which a curve of the run lies outside the spread, and whether it has left it."""
    curves = [seed.curves[name] for seed in (run, *seeds)]
    epochs, lines, outside = sorted(set.intersection(*map(set, curves))), [], []
    for epoch in epochs:
        value, *others = (curve[epoch] for curve in curves)
        low, high = spread(others, name)
        outside.append(not low <= value <= high)
        if outside[-1]:
            place = f"epoch {epoch} (stage {run.stages[epoch]})"
            lines.append(f"  {place}: {name} {value:.3f}, outside {low:.3f} to {high:.3f}")
    return lines, (True, True) in pairwise(outside) or outside[-1:] == [True]


def compare(run: Finished, seeds: list[Finished]) -> bool:
    """Prints what differs between a run and the reference's seeds; returns whether they are alike."""
    common = set.intersection(*(set(each.stages) for each in (run, *seeds)))
    if not common:
        raise UserError(f"{run.directory} has no finished epoch in common with the reference")
    print(f"{run.directory}: {len(common)} epochs beside {len(seeds)} seed(s) of the reference")
    if len(seeds) == 1:
        print("  one seed shows no spread: the margin alone is allowed, another seed may lie outside")
    keys = differences(run, seeds[0])
    for key, (here, there) in keys.items():
        print(f"  another training: {key} is {here!r} here, {there!r} in the reference")
    for name, version in seeds[0].versions.items():
        if run.versions.get(name) != version:
            print(f"  {name} {run.versions.get(name)} here, {version} in the reference")
    left = []
    for name in run.curves:
        lines, gone = epochs_outside(name, run, seeds)
        print("\n".join([f"{name}: {'has LEFT' if gone else 'within'} the reference's spread", *lines]))
        left += [name] if gone else []
    print("alike" if not keys and not left else "NOT alike")
    return not keys and not left


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, save_path/name")
    parser.add_argument("reference", type=Path, help="a folder with the runs of several seeds, or a run")
    arguments = parser.parse_args(words)
    try:
        runs = [read_run(directory) for directory in arguments.runs]
        alike = [compare(run, references(arguments.reference, run)) for run in runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(alike) else 1


if __name__ == "__main__":
    sys.exit(main())
