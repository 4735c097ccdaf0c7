"""Confidence intervals and paired tests, against known or enumerated values."""

from itertools import product
from math import comb

import numpy as np
import pytest

from analysis.statistics import compare, holm, mcnemar, paired_bootstrap, wilson


def test_wilson_known_values():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # computed by hand
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert wilson(20, 20) == pytest.approx((1 - high, 1))
    for right, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{right} of {n}"):
            wilson(right, n)


def test_wilson_bounds_have_z_score_of_95_percent():
    for right, n in ((1, 7), (40, 50), (499, 500)):
        for end in wilson(right, n):
            assert abs(right / n - end) / (end * (1 - end) / n) ** 0.5 == pytest.approx(1.959964)


def test_mcnemar_equals_binomial_test_of_discordant_pairs():
    for only_a, only_b in product(range(6), repeat=2):
        a = [True] * only_a + [False] * only_b + [True, False]
        b = [False] * only_a + [True] * only_b + [True, False]
        n = only_a + only_b
        as_uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(only_a - only_b)]
        assert mcnemar(a, b) == pytest.approx(sum(comb(n, k) for k in as_uneven) / 2**n)
    assert mcnemar([True] * 3000, [False] * 3000) == 0.0 < mcnemar([True] * 500, [False] * 500)


def test_holm_known_values():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1, 1, 0.003])
    assert holm([]) == []


def test_paired_bootstrap_matches_exhaustive_and_normal_intervals():
    a, b = [1, 1, 0, 1], [0, 1, 0, 0]
    means = [np.mean(drawn) for drawn in product(np.subtract(a, b), repeat=4)]  # all 256 draws, equally likely
    assert paired_bootstrap(a, b) == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert paired_bootstrap(a, a) == (0, 0)
    values = np.random.default_rng(1).normal(0.3, 2, 400)
    low, high = paired_bootstrap(values, np.zeros(400))
    margin = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=0.02)
    assert paired_bootstrap(values, np.zeros(400)) == (low, high) != paired_bootstrap(values, np.zeros(400), seed=1)


def test_compare_columns():
    cells = {
        "noise": {1: False, 0: False, 2: True, 3: True, 4: False, 5: False, 6: False},
        "model": dict.fromkeys(range(7), True),
        "zero": dict(enumerate([True] * 6 + [False])),
    }
    noise, model, zero = compare(cells, "model")
    assert [row["cell"] for row in (noise, model, zero)] == list(cells)
    assert list(noise) == list(model) == list(zero)
    assert (noise["n"], noise["right"], noise["rate"]) == (7, 2, 2 / 7)
    assert (noise["low"], noise["high"]) == wilson(2, 7)
    assert noise["difference"] == pytest.approx(-5 / 7) and noise["difference low"] < -5 / 7 < noise["difference high"]
    assert (noise["McNemar p"], noise["Holm p"]) == (2 / 32, 4 / 32)
    assert (zero["McNemar p"], zero["Holm p"]) == (1, 1)
    assert model["right"] == 7 and model["difference"] is model["difference low"] is model["Holm p"] is None


def test_compare_pairs_by_problem_in_any_order():
    model, noise = dict(enumerate([True, True, True, False])), dict(enumerate([True, True, False, False]))
    rows = compare({"model": model, "noise": noise}, "model")
    assert rows[1]["difference high"] == 0  # noise is never right where model is wrong
    assert compare({"model": model, "noise": dict(reversed(noise.items()))}, "model") == rows


def test_compare_rejects_cells_with_other_problems():
    cells = {"model": {0: True, 1: True}, "noise": {0: True, 1: False}}
    with pytest.raises(ValueError, match="'swapped' lacks 1 of 'model'"):
        compare(cells | {"swapped": {0: True}}, "model")
    with pytest.raises(ValueError, match="'swapped' has 1 problems that 'model' lacks, among them 2"):
        compare(cells | {"swapped": {0: True, 1: True, 2: True}}, "model")
    with pytest.raises(ValueError, match="baseline 'none'"):
        compare(cells, "none")
    with pytest.raises(ValueError, match="baseline 'empty'"):
        compare(cells | {"empty": {}}, "empty")
