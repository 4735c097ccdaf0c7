"""The ProsQA generator: valid problems, published statistics, shipped files, command line."""

import copy
import hashlib
import json
from collections import Counter
from itertools import islice
from statistics import fmean

import prosqa
import prosqa_stats
import pytest
from common import DATA, DataError
from prosqa import Recipe, generate
from transformers import AutoTokenizer

from helpers import REPOSITORY

PUBLISHED_VALID = "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"  # SHA-256

# Counted in the 800 problems of the published validation and test files.
PUBLISHED = {
    "nodes": {
        14: 1,
        17: 6,
        18: 7,
        19: 31,
        20: 53,
        21: 97,
        22: 142,
        23: 155,
        24: 149,
        25: 98,
        26: 47,
        27: 12,
        28: 2,
    },
    "hops of the shortest path": {3: 326, 4: 350, 5: 105, 6: 19},
    "number of shortest paths": {1: 472, 2: 234, 3: 63, 4: 19, 5: 8, 6: 4},
    "hops to the wrong option": {1: 159, 2: 417, 3: 201, 4: 21, 5: 2},
    "nodes without a parent": {2: 461, 3: 253, 4: 68, 5: 16, 6: 2},
    "nodes >= 2 by parents": {0: 445, 1: 7979, 2: 5068, 3: 2221, 4: 698, 5: 188, 6: 36, 7: 8, 8: 2},
    "nodes below neither entity": {0: 461, 1: 184, 2: 106, 3: 34, 4: 9, 5: 5, 6: 1},
    "nodes below both": {0: 239, 1: 284, 2: 173, 3: 63, 4: 32, 5: 8, 6: 1},
    "root is node": {0: 291, 1: 509},
    "correct option is": {"first": 404, "second": 396},
}
# Mean and tolerance: four standard errors of the difference between 800 and 2,000 problems.
PUBLISHED_MEANS = {
    "nodes": (22.806, 0.33),
    "edges": (35.998, 0.96),
    "hops of the shortest path": (3.771, 0.13),
    "number of shortest paths": (1.586, 0.15),
    "hops to the wrong option": (2.112, 0.13),
    "nodes without a parent": (2.556, 0.13),
    "nodes below neither entity": (0.706, 0.17),
    "nodes of entity 0 alone": (9.106, 0.47),
    "nodes of entity 1 alone": (11.752, 0.50),
    "nodes below both": (1.241, 0.20),
}
# A problem of the published files (MIT licence).
EXAMPLE = json.loads(
    '{"question": "Every zumpus is a timpus. Every jompus is a terpus. Eva is a sterpus. Eva is a zumpus. '
    "Max is a rorpus. Every timpus is a lorpus. Every jompus is a rorpus. Every tumpus is a terpus. Every "
    "sterpus is a zumpus. Every terpus is a gerpus. Tom is a storpus. Every zumpus is a jompus. Every "
    "sterpus is a timpus. Every storpus is a boompus. Tom is a boompus. Every timpus is a tumpus. Is Eva a "
    'boompus or gerpus?", "answer": "Eva is a gerpus.", "steps": ["Eva is a zumpus.", "Every zumpus is a '
    'jompus.", "Every jompus is a terpus.", "Every terpus is a gerpus."], "idx_to_symbol": ["Tom", "Eva", '
    '"Max", "sterpus", "zumpus", "timpus", "tumpus", "jompus", "terpus", "rorpus", "storpus", "boompus", '
    '"lorpus", "gerpus"], "edges": [[1, 3], [3, 4], [1, 4], [4, 5], [3, 5], [5, 6], [4, 7], [7, 8], [6, 8], '
    '[2, 9], [7, 9], [0, 10], [10, 11], [0, 11], [5, 12], [8, 13]], "root": 1, "target": 13, "neg_target": '
    "11}"
)


@pytest.fixture(scope="module")
def sample():
    """2,000 generated problems."""
    return list(generate(Recipe(), 2000, seed=7))


@pytest.fixture(scope="module")
def shipped():
    """The shipped problems by split; skip if data/ has the published files instead."""
    if hashlib.sha256((DATA / "prosqa_valid.json").read_bytes()).hexdigest() == PUBLISHED_VALID:
        pytest.skip("data/ holds the published ProsQA files")
    return {split: json.loads((DATA / f"prosqa_{split}.json").read_text()) for split in prosqa.SHIPPED}


def differ(first: Counter, second: Counter) -> bool:
    """Two-sample chi-square test at p = 0.001; adjacent values are pooled until both expect 5 or more."""
    totals = first.total(), second.total()
    bins, pooled = [], [0, 0]
    for value in sorted(first | second):
        pooled = [pooled[0] + first[value], pooled[1] + second[value]]
        if sum(pooled) * min(totals) / sum(totals) >= 5:
            bins.append(pooled)
            pooled = [0, 0]
    bins[-1] = [bins[-1][0] + pooled[0], bins[-1][1] + pooled[1]]
    chi_square = 0
    for pair in bins:
        for observed, total in zip(pair, totals, strict=True):
            expected = sum(pair) * total / sum(totals)
            chi_square += (observed - expected) ** 2 / expected
    freedom = len(bins) - 1
    scale = 2 / (9 * freedom)
    return chi_square > freedom * (1 - scale + 3.09 * scale**0.5) ** 3  # Wilson-Hilferty quantile


def test_generated_statistics_match_published_files(sample):
    rows = prosqa_stats.gather(sample)
    for row, (mean, tolerance) in PUBLISHED_MEANS.items():
        assert fmean(rows[row]) == pytest.approx(mean, abs=tolerance), row
    assert not [row for row, counts in PUBLISHED.items() if differ(Counter(rows[row]), Counter(counts))]


def test_paper_algorithm_differs_from_published_files():
    rows = prosqa_stats.gather(generate(Recipe(printed=True), 300, seed=0))
    assert fmean(rows["nodes without a parent"]) == pytest.approx(4.8, abs=0.3)
    assert differ(Counter(rows["nodes without a parent"]), Counter(PUBLISHED["nodes without a parent"]))


def test_generated_problems_pass_check(sample):
    for problem in [EXAMPLE, *sample]:
        prosqa_stats.check_problem(problem)


def descendants(problem, start):
    """Compute the nodes reachable from `start` without the code under test."""
    found = {start}
    for _ in problem["idx_to_symbol"]:
        found |= {child for parent, child in problem["edges"] if parent in found}
    return found


def test_question_has_exactly_one_answer(sample):
    for problem in sample[:300]:
        reached = descendants(problem, problem["root"])
        assert problem["target"] in reached and problem["neg_target"] not in reached
        facts = {sentence + "." for sentence in problem["question"].split(". ")[:-1]}
        assert set(problem["steps"]) <= facts
        subjects = [step.removeprefix("Every ").split()[0] for step in problem["steps"]]
        objects = [step.rstrip(".").split()[-1] for step in problem["steps"]]
        names = problem["idx_to_symbol"]
        assert subjects == [names[problem["root"]], *objects[:-1]] and objects[-1] == names[problem["target"]]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("answer", "Eva is a boompus.", "answer"),
        ("steps", [EXAMPLE["steps"][0], *EXAMPLE["steps"]], "shortest path"),
        ("neg_target", 12, "other entity"),
        ("target", 11, "root alone"),
        ("target", 8, "leaf"),
        ("root", 2, "root"),
        ("edges", [*EXAMPLE["edges"], [8, 13]], "twice"),
        ("edges", EXAMPLE["edges"][:-1], "no edge"),
        ("edges", EXAMPLE["edges"][::-1], "sorted"),
        ("idx_to_symbol", [name.lower() for name in EXAMPLE["idx_to_symbol"]], "entities"),
        ("question", EXAMPLE["question"].replace("Tom is a storpus. ", ""), "facts"),
        ("question", EXAMPLE["question"].replace("or gerpus", "or lorpus"), "query"),
    ],
)
def test_check_problem_detects_violations(key, value, rule):
    broken = copy.deepcopy(EXAMPLE) | {key: value}
    with pytest.raises(DataError, match=rule):
        prosqa_stats.check_problem(broken)


def test_shortest_paths():
    edges = [(0, 2), (0, 3), (1, 3), (2, 4), (3, 4), (4, 5), (0, 5), (2, 6), (4, 6)]
    assert prosqa.shortest_paths(edges, 0, 4) == [[0, 2, 4], [0, 3, 4]]
    assert prosqa.shortest_paths(edges, 0, 5) == [[0, 5]]
    assert prosqa.shortest_paths(edges, 0, 6) == [[0, 2, 6]]
    assert prosqa.shortest_paths(edges, 1, 2) == []


def test_shipped_files_equal_generator_output(shipped):
    assert {split: len(problems) for split, problems in shipped.items()} == prosqa.SHIPPED
    fresh = generate(Recipe(), sum(prosqa.SHIPPED.values()), prosqa.SHIPPED_SEED)
    assert list(islice(fresh, 200)) == shipped["train"][:200]


def test_shipped_problems_are_unique_and_valid(shipped):
    problems = [problem for split in shipped.values() for problem in split]
    assert len({frozenset(prosqa_stats.facts_of(problem)) for problem in problems}) == len(problems)
    for problem in problems[::10]:
        prosqa_stats.check_problem(problem)


def test_generate_is_deterministic_and_prefix_stable():
    assert list(generate(Recipe(), 5, seed=1)) == list(generate(Recipe(), 8, seed=1))[:5]
    assert list(generate(Recipe(), 5, seed=1)) != list(generate(Recipe(), 5, seed=2))


def test_generate_skips_duplicates(monkeypatch):
    drawn = iter([EXAMPLE, EXAMPLE, None, *generate(Recipe(), 1, seed=3)])
    monkeypatch.setattr(prosqa, "draw_problem", lambda recipe, rng: next(drawn))
    assert [problem["answer"] for problem in generate(Recipe(), 2, seed=0)].count(EXAMPLE["answer"]) == 1


def test_recipe_changes_graphs():
    larger = list(generate(Recipe(nodes=60, parents=2.5, min_hops=5, max_hops=5), 20, seed=0))
    for problem in larger:
        prosqa_stats.check_problem(problem)
    rows = prosqa_stats.gather(larger)
    assert set(rows["hops of the shortest path"]) == {5}
    assert fmean(rows["nodes"]) > 45 and fmean(rows["edges"]) > 100
    names = {name for problem in larger for name in problem["idx_to_symbol"] if name.islower()}
    assert set(prosqa.CONCEPTS) < names  # published names are used first


def test_unsatisfiable_recipe(monkeypatch):
    monkeypatch.setattr(prosqa, "MAX_REJECTED", 20)
    with pytest.raises(DataError, match="none of 20 graphs"):
        next(generate(Recipe(min_hops=20, max_hops=20), 1, seed=0))
    with pytest.raises(DataError, match="--min-hops 7"):
        Recipe(min_hops=7)
    with pytest.raises(DataError, match="Lower --nodes"):
        prosqa.enough(["Tom"], ["Barlo"], 3)


def test_command_overwrites_only_with_force(tmp_path):
    out = tmp_path / "ood.json"
    argv = ["--out", str(out), "--num", "3", "--nodes", "30"]
    prosqa.main([*argv, "--seed", "1"])
    first = out.read_text()
    assert first == json.dumps(json.loads(first), separators=(",", ":")) and len(json.loads(first)) == 3
    with pytest.raises(DataError, match="--force"):
        prosqa.main([*argv, "--seed", "2"])
    assert out.read_text() == first
    prosqa.main([*argv, "--seed", "2", "--force"])
    assert out.read_text() != first


def test_command_without_arguments_writes_three_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(prosqa, "DATA", tmp_path)
    monkeypatch.setattr(prosqa, "SHIPPED", {"train": 4, "valid": 1, "test": 2})
    prosqa.main([])
    written = [json.loads((tmp_path / f"prosqa_{split}.json").read_text()) for split in ("train", "valid", "test")]
    assert [problem for split in written for problem in split] == list(generate(Recipe(), 7, prosqa.SHIPPED_SEED))
    for argv in (["--num", "5"], ["--out", str(tmp_path / "none.json"), "--num", "0"]):
        with pytest.raises(SystemExit, match="2"):
            prosqa.main(argv)


def test_stats_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps([EXAMPLE]))
    monkeypatch.setattr("sys.argv", ["prosqa_stats.py", str(path), f"{path},{path}"])
    prosqa_stats.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| problems | 1 | 2 |" in lines and "| different problems | 1 | 1 |" in lines
    assert "| share of paths by hops | 4: 1.000 | 4: 1.000 |" in lines
    assert "| edges | 16.000 ± 0.00 [16, 16] | 16.000 ± 0.00 [16, 16] |" in lines
    path.write_text(json.dumps([EXAMPLE, EXAMPLE | {"root": 0}]))
    with pytest.raises(DataError, match=r"one.json, problem 1 \(from 0\)"):
        prosqa_stats.main()


def test_tokenizer_has_one_token_per_word(tmp_path):
    prosqa.main(["--tokenizer", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (REPOSITORY / "args" / "prosqa_model" / path.name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "args" / "prosqa_model")
    for problem in json.loads((DATA / "prosqa_valid.json").read_text()):
        for text in (problem["question"] + "\n", *(step + "\n" for step in problem["steps"]), problem["answer"]):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
