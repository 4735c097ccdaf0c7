"""preprocessing/mini.py: problems are correct, and only a path search reveals the answer."""

import json
from itertools import islice, pairwise

import mini
import pytest
from common import DataError

from helpers import REPOSITORY

PROBLEMS = list(islice(mini.make_problems(seed=1), 100))


def read(problem):
    """Parse a question into arrows, the two ends, and the root."""
    *arrows, one, other, root = problem["question"].split()
    return [tuple(arrow.split(">")) for arrow in arrows], (one, other), root


def hops_from(arrows, node):
    """Return the distance from a node to each reachable node."""
    found, reached, count = {}, {node}, 0
    while reached:
        found |= dict.fromkeys(reached, count)
        reached, count = {child for parent, child in arrows if parent in reached} - set(found), count + 1
    return found


@pytest.mark.parametrize("problem", PROBLEMS[:20], ids=range(20))
def test_only_answer_is_reachable_by_the_steps(problem):
    arrows, ends, root = read(problem)
    [wrong] = set(ends) - {problem["answer"]}
    assert hops_from(arrows, root)[problem["answer"]] == mini.HOPS == len(problem["steps"])
    assert wrong not in hops_from(arrows, root)
    assert problem["steps"][-1] == problem["answer"]
    assert set(pairwise([root, *problem["steps"]])) <= set(arrows)


def test_ends_are_leaves_of_equal_depth():
    for first, second in zip(PROBLEMS[::2], PROBLEMS[1::2], strict=True):  # one graph, both roots
        assert len(read(first)[0]) == len(read(second)[0])
        for problem in (first, second):
            arrows, ends, _ = read(problem)
            inner = {parent for parent, _ in arrows}
            assert not inner & set(ends)
            [wrong] = set(ends) - {problem["answer"]}
            assert any(hops_from(arrows, node).get(wrong) == mini.HOPS for node in inner)


def test_answer_letter_and_position_are_random():
    first = [read(problem)[1].index(problem["answer"]) for problem in PROBLEMS]
    assert 30 < sum(first) < 70
    assert len({problem["answer"] for problem in PROBLEMS}) > 10


def test_tokenizer_equals_mini_model(tmp_path):
    mini.main(["--tokenizer", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (REPOSITORY / "args" / "mini_model" / path.name).read_bytes()


@pytest.mark.parametrize("hops, parents", [(2, 1.5), (4, 1.5), (3, 2.5)])
def test_out_of_distribution_problems(tmp_path, hops, parents):
    knobs = ["--hops", str(hops), "--parents", str(parents), "--num", "20"]
    mini.main(["--out", str(tmp_path / "far.json"), *knobs])
    problems = json.loads((tmp_path / "far.json").read_text())
    assert len(problems) == 20
    for arrows, ends, root in map(read, problems):
        found = hops_from(arrows, root)
        assert [found.get(end) for end in sorted(ends, key=lambda end: end not in found)] == [hops, None]
    edges = sum(len(read(problem)[0]) for problem in problems) / 20
    assert edges > 21 if parents > 2 else edges < 21
    with pytest.raises(DataError, match="already exists"):
        mini.main(["--out", str(tmp_path / "far.json"), *knobs])


def test_mini_rejects_impossible_options(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "MAX_REJECTED", 100)
    for knobs, problem in [(["--nodes", "17"], "16 letters"), (["--hops", "15"], "accepts none")]:
        with pytest.raises(DataError, match=problem):
            mini.main(["--out", str(tmp_path / "x.json"), *knobs])
    with pytest.raises(SystemExit):
        mini.main(["--hops", "2"])  # would overwrite data/mini_train.json with other problems
    assert "--out FILE is needed" in capsys.readouterr().err
