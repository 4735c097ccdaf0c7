"""Trains and tests methods of the paper's Table 1 on one data set, and prints the table.

    python scripts/table1.py prosqa                                   all eight methods, one seed
    python scripts/table1.py gsm --methods cot coconut --seeds 3 --processes 4
    python scripts/table1.py ring bf16=True                           further words go to every run.py

Every method M runs args/DATASET_M.yaml, one after the other. What is finished is not done again, so the same command
goes on where it was stopped. A run that starts from another one (GSM8k's Coconut from CoT) starts from the same seed's,
which is trained before.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import Config, UserError, parse_overrides, read_yaml  # noqa: E402
from curriculum import METHODS  # noqa: E402

# Table 1 of the paper, GPT-2: accuracy in % with its standard deviation, and generated tokens.
PAPER = {
    "gsm": {
        "cot": "42.9±0.2 (25.0)",
        "no_cot": "16.5±0.5 (2.2)",
        "icot": "30.0 (2.2)",
        "pause_token": "16.4±1.8 (2.2)",
        "coconut": "34.1±1.5 (8.2)",
        "no_curriculum": "14.4±0.8 (8.2)",
        "no_thoughts": "21.6±0.5 (2.3)",
        "pause_as_thought": "24.1±0.7 (2.2)",
    },
    "prontoqa": {
        "cot": "98.8±0.8 (92.5)",
        "no_cot": "93.8±0.7 (3.0)",
        "icot": "99.8±0.3 (3.0)",
        "pause_token": "77.7±21.0 (3.0)",
        "coconut": "99.8±0.2 (9.0)",
        "no_curriculum": "52.4±0.4 (9.0)",
        "no_thoughts": "99.9±0.1 (3.0)",
        "pause_as_thought": "100.0±0.1 (3.0)",
    },
    "prosqa": {
        "cot": "77.5±1.9 (49.4)",
        "no_cot": "76.7±1.0 (8.2)",
        "icot": "98.2±0.3 (8.2)",
        "pause_token": "75.9±0.7 (8.2)",
        "coconut": "97.0±0.3 (14.2)",
        "no_curriculum": "76.1±0.2 (14.2)",
        "no_thoughts": "95.5±1.1 (8.2)",
        "pause_as_thought": "96.6±0.8 (8.2)",
    },
}


def launch(processes: int, config: Path, words: list[str]) -> None:
    """Runs run.py to its end; a failure ends this program with its exit code."""
    command = [sys.executable, "run.py", str(config), *words]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
        command[1:1] = torchrun
    print("\n$ " + " ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        print(f"error: that command ended with exit code {code}; the same table1 command goes on there")
        sys.exit(code)


def train(path: Path, seed: int, processes: int, words: list[str]) -> tuple[Config, list[str]]:
    """Trains one config with one seed, and before it the run that it starts from; returns the config and its words."""
    config = Config(read_yaml(path) | parse_overrides(words)[0])  # run.py tells of those that are none
    own = [*words, f"name={config.name}-seed{seed}", f"seed={seed}"]
    if config.load_model_path and not any(word.startswith("load_model_path=") for word in words):
        start = Path(config.load_model_path)  # save_path/NAME/best, of the NAME in some config beside this one
        train(path.with_name(f"{start.parent.name.replace('-', '_')}.yaml"), seed, processes, words)
        own.append(f"load_model_path={config.save_path}/{start.parent.name}-seed{seed}/{start.name}")
    launch(processes, path, own)
    return config, own


def train_and_test(dataset: str, method: str, seed: int, processes: int, words: list[str]) -> dict:
    """Trains one method with one seed and tests its best checkpoint; returns the test's metrics."""
    path = ROOT / "args" / f"{dataset}_{method}.yaml"
    config, own = train(path, seed, processes, words)
    directory = Path(config.save_path) / f"{config.name}-seed{seed}"
    test = config.val_path.replace("_valid", "_test")
    best = (ROOT / directory / "best").resolve().name
    tested = ROOT / directory / f"eval_{best}"
    pattern = f"metrics_{Path(test).stem}*.yaml"
    if not any(tested.glob(pattern)):
        evaluation = ["only_eval=True", f"load_model_path={directory}/best", f"val_path={test}", "resume=0"]
        launch(processes, path, [w for w in own if not w.startswith("load_model_path=")] + evaluation)
    metrics = max(tested.glob(pattern), key=lambda path: path.stat().st_mtime)
    return {**yaml.safe_load(metrics.read_text(encoding="utf-8")), "directory": directory}


def format_table(dataset: str, results: dict[str, list[dict]]) -> str:
    """The table as Markdown: mean ± standard deviation over seeds, tokens and seconds per problem, and the paper's."""
    paper = PAPER.get(dataset, {})
    rows = ["| method | accuracy % | generated tokens | seconds per problem |" + (" paper |" if paper else "")]
    rows.append("|---|---|---|---|" + ("---|" if paper else ""))
    for method, tests in results.items():
        accuracies = [100 * test["eval/acc"] for test in tests]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        tokens, seconds = (
            statistics.mean(test[f"eval/{name}"] for test in tests) for name in ("new_tokens", "seconds")
        )
        row = f"| {method} | {statistics.mean(accuracies):.1f}{spread} | {tokens:.1f} | {seconds:.4f} |"
        rows.append(row + (f" {paper[method]} |" if paper else ""))
    return "\n".join(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="gsm, prontoqa, prosqa, ring: the first part of the names in args/")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--processes", type=int, default=1, help="per run, under torchrun where more than one")
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in words])
    methods = sorted(arguments.methods, key=list(METHODS).index)  # cot first: others may start from it
    results = {method: [] for method in methods}
    try:
        for seed in range(arguments.seeds):
            for method in methods:
                test = train_and_test(arguments.dataset, method, seed, arguments.processes, words)
                results[method].append(test)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"\n{arguments.dataset}, {arguments.seeds} seed(s), test set\n\n{format_table(arguments.dataset, results)}")
    directories = [str(test["directory"]) for tests in results.values() for test in tests]
    print("\nCheckpoints, metrics and predictions:\n" + "\n".join(directories))


if __name__ == "__main__":
    main()
