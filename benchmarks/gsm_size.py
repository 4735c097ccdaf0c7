"""Create a training file of GSM8k's size from its validation and test problems.

    python benchmarks/gsm_size.py FOLDER OUT.json [--problems 385620]

FOLDER contains gsm_valid.txt and gsm_test.txt (see data/README.md). They are repeated in turn with permuted digits: the
lengths are realistic, the solutions wrong. Deterministic.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "preprocessing"))

from gsm_icot import convert

PROBLEMS, DIGITS = 385_620, "0123456789"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    args = parser.parse_args()
    names = [args.folder / f"gsm_{split}.txt" for split in ("valid", "test")]
    problems = [problem for name in names for problem in convert(name.read_text(encoding="utf-8"), name)]
    lines, rng, output = [json.dumps(problem, ensure_ascii=False) for problem in problems], random.Random(0), []
    for number in range(args.problems):
        others = "".join(rng.sample(DIGITS, len(DIGITS)))
        output.append(lines[number % len(lines)].translate(str.maketrans(DIGITS, others)))
    args.out.write_text("[" + ",\n".join(output) + "]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
