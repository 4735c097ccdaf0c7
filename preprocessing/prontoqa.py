"""Convert the output of the ProntoQA generator to the training format.

    python preprocessing/prontoqa.py [SOURCE] [--out FOLDER]

Reads SOURCE (default: data/5hop_0shot_random.json), writes prontoqa_{train,valid,test}.json to FOLDER (default: data/).
"""

import argparse
from pathlib import Path

from common import DATA, DataError, read_json, run_script, write_json

SPLITS = {"train": slice(9000), "valid": slice(9000, 9200), "test": slice(9200, None)}
SENTENCES = 11  # of a chain with five hops
REMEDY = "Delete it if it is broken, and generate it with `bash preprocessing/prontoqa.bash`."


def check_example(example: object) -> None:
    """Raise DataError, naming the field, unless `example` is a question with a chain of 11 sentences."""
    problem = example.get("test_example") if isinstance(example, dict) else None
    if not isinstance(problem, dict):
        raise DataError("'test_example' is missing")
    for field in ("question", "query", "answer"):
        if not isinstance(problem.get(field), str):
            raise DataError(f"'{field}' is missing or not a string")
    chain = problem.get("chain_of_thought")
    if not isinstance(chain, list) or len(chain) != SENTENCES or not all(isinstance(text, str) for text in chain):
        raise DataError(f"'chain_of_thought' is not a list of {SENTENCES} strings")


def convert_example(example: dict) -> dict:
    """Convert an example: the chain becomes six steps, five of two sentences and one of one."""
    problem = example["test_example"]
    chain = problem["chain_of_thought"]
    return {
        "question": f"{problem['question']} {problem['query']}",
        "steps": [" ".join(chain[start : start + 2]) for start in range(0, len(chain), 2)],
        "answer": problem["answer"],
    }


def convert(raw: object, source: object) -> list[dict]:
    """Convert all examples in file order; raise DataError with `source` and the name of the example."""
    if not isinstance(raw, dict):
        raise DataError(f"{source} is not a JSON object of examples.\n{REMEDY}")
    for name, example in raw.items():
        try:
            check_example(example)
        except DataError as error:
            raise DataError(f"{source}, {name}: {error}.\n{REMEDY}") from error
    if len(raw) <= SPLITS["test"].start:
        raise DataError(f"{source} has {len(raw):,} problems; more than 9,200 are needed (--num-trials).\n{REMEDY}")
    return [convert_example(example) for example in raw.values()]


def main() -> None:
    """Convert SOURCE, replacing existing results; nothing is written unless all of it is valid."""
    parser = argparse.ArgumentParser(description="Convert ProntoQA to prontoqa_{train,valid,test}.json.")
    parser.add_argument("source", nargs="?", type=Path, default=DATA / "5hop_0shot_random.json")
    parser.add_argument("--out", type=Path, default=DATA, help="folder for the three files (data)")
    args = parser.parse_args()
    problems = convert(read_json(args.source, REMEDY), args.source)
    for split, part in SPLITS.items():
        path = args.out / f"prontoqa_{split}.json"
        write_json(path, problems[part])
        print(f"{path}: {len(problems[part]):,} problems")


if __name__ == "__main__":
    run_script(main)
