"""Convert GSM8k in the iCoT format to the training format.

    python preprocessing/gsm_icot.py SPLIT      data/gsm_SPLIT.txt -> data/gsm_SPLIT.json

A line `QUESTION||STEP STEP #### ANSWER` becomes {"question", "steps", "answer"}. A line without steps gets the single
step "", as in the official files.
"""

import argparse
import sys

from common import DATA, DataError, read_text, run_script, write_json

REMEDY = (
    "Every line must be of the form QUESTION||STEP STEP #### ANSWER. "
    "`bash preprocessing/gsm_icot.bash` downloads and verifies the files."
)
POINTER = "version https://git-lfs"


def parse_line(line: str) -> dict:
    """Parse a line; raise DataError naming the missing part."""
    question, bars, solution = line.partition("||")
    steps, hashes, answer = solution.partition("####")
    answer = answer.strip()
    present = {"'||'": bars, "'####'": hashes, "a question": question.strip(), "an answer": answer}
    missing = [part for part, found in present.items() if not found]
    if missing:
        raise DataError(f"has no {' and no '.join(missing)}: {line[:80]!r}")
    return {"question": question, "steps": steps.strip().split(" "), "answer": answer}


def convert(text: str, source: object) -> list[dict]:
    """Convert a whole file, one problem per line; raise DataError with `source` and line number."""
    if text.startswith(POINTER):
        raise DataError(f"{source} is a git-lfs pointer, not the data.\n{REMEDY}")
    problems = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            problems.append(parse_line(line))
        except DataError as error:
            raise DataError(f"{source}, line {number} {error}\n{REMEDY}") from error
    return problems


def main() -> None:
    """Convert the split given on the command line, replacing an existing result."""
    parser = argparse.ArgumentParser(description="Convert data/gsm_SPLIT.txt to data/gsm_SPLIT.json.")
    parser.add_argument("split", help="train, valid, test")
    split = parser.parse_args().split
    source, target = DATA / f"gsm_{split}.txt", DATA / f"gsm_{split}.json"
    text = read_text(source, REMEDY)
    problems = convert(text, source)
    if not text.endswith("\n"):
        print(f"warning: {source} has no final newline; is it complete?", file=sys.stderr)
    write_json(target, problems)
    without = sum(problem["steps"] == [""] for problem in problems)
    print(f"{target}: {len(problems):,} problems, {without:,} without steps")


if __name__ == "__main__":
    run_script(main)
