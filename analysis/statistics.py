"""Confidence intervals of rates, and paired tests between cells with the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # all intervals are 95 %
COMPARED = ("difference", "difference low", "difference high", "McNemar p", "Holm p")  # columns vs. the baseline


def wilson(right: int, n: int) -> tuple[float, float]:
    """Compute the Wilson interval of the rate right / n."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n} is not a rate")
    rate, part = right / n, Z * Z / n
    centre = (rate + part / 2) / (1 + part)
    half = math.sqrt(part * (rate * (1 - rate) + part / 4)) / (1 + part)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """Compute the bootstrap interval of mean(a - b), resampling problems."""
    differences = np.subtract(a, b, dtype=float)  # (problems,)
    # There are few distinct values, and only their counts matter: draw counts instead of problems.
    values, counts = np.unique(differences, return_counts=True)  # (values,) each
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), draws)
    low, high = np.percentile(drawn @ values / len(differences), [2.5, 97.5])  # of (draws,)
    return float(low), float(high)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Compute the two-sided p of McNemar's exact test."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's step-down procedure; the order is kept."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def rate(right: Sequence[bool]) -> dict:
    """Compute the columns of one cell."""
    low, high = wilson(sum(right), len(right))
    return {"n": len(right), "right": sum(right), "rate": sum(right) / len(right), "low": low, "high": high}


def difference(right: Sequence[bool], base: Sequence[bool]) -> dict:
    """Compute the columns that compare a cell with the baseline."""
    low, high = paired_bootstrap(right, base)
    return {"difference": (sum(right) - sum(base)) / len(base), "difference low": low, "difference high": high}


def compare(cells: dict[str, dict[int, bool]], baseline: str) -> list[dict]:
    """Tabulate cells ({problem: correct} each): rate, and paired difference from the baseline.

    The Holm family is all cells but the baseline, whose own comparison columns are None.

    Raises: ValueError, naming the cell, if its problems are not those of the baseline.
    """
    same_problems(cells, baseline)
    outcomes = {name: [bool(cell[idx]) for idx in sorted(cell)] for name, cell in cells.items()}
    base = outcomes.pop(baseline)
    ps = [mcnemar(right, base) for right in outcomes.values()]
    compared = {
        name: difference(right, base) | {"McNemar p": p, "Holm p": adjusted}
        for (name, right), p, adjusted in zip(outcomes.items(), ps, holm(ps), strict=True)
    }
    compared[baseline] = dict.fromkeys(COMPARED)
    rates = {baseline: rate(base)} | {name: rate(right) for name, right in outcomes.items()}
    return [{"cell": name} | rates[name] | compared[name] for name in cells]


def same_problems(cells: dict[str, dict[int, bool]], baseline: str) -> None:
    """Raise ValueError unless all cells have the problems of the baseline, and at least one."""
    if not cells.get(baseline):
        raise ValueError(f"the baseline {baseline!r} is not a cell with problems; cells: {', '.join(cells)}")
    expected = cells[baseline].keys()
    for name, cell in cells.items():
        if missing := sorted(expected - cell.keys()):
            raise ValueError(f"cell {name!r} lacks {len(missing)} of {baseline!r}'s problems, among them {missing[0]}")
        if more := sorted(cell.keys() - expected):
            raise ValueError(f"cell {name!r} has {len(more)} problems that {baseline!r} lacks, among them {more[0]}")
