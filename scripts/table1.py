"""Train and test methods of the paper's Table 1 on one data set, and print the table.

    python scripts/table1.py prosqa                                   all eight methods, one seed
    python scripts/table1.py gsm --methods cot coconut --seeds 3 --processes 4
    python scripts/table1.py ring bf16=True                           key=value overrides go to every run.py

Runs args/DATASET_METHOD.yaml, one after the other. Finished runs are skipped, so the same command resumes an
interrupted table. A run that starts from another checkpoint (GSM8k: Coconut from CoT) starts from the one with the same
seed, which is trained first.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analyze import positive_int  # noqa: E402
from evaluations import metrics_files  # noqa: E402

from components.data_sources import content_digest  # noqa: E402
from components.display import print_without_errors  # noqa: E402
from components.export import read_description  # noqa: E402
from components.run_directory import follow  # noqa: E402
from config import HUB, Config, UserError, listed, parse_overrides, read_yaml  # noqa: E402
from curriculum import METHODS  # noqa: E402

# Table 1 of the paper, GPT-2: accuracy in % ± standard deviation (generated tokens).
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


def launch(processes: int, config: Path, overrides: list[str]) -> None:
    """Run run.py; exit with its exit code if it fails. After a Ctrl-C raise KeyboardInterrupt once it has ended."""
    command = [sys.executable, "run.py", str(config), *overrides]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
    print("\n$ " + " ".join(command), flush=True)
    interrupted = []  # by Ctrl-C, which run.py gets, too: it saves, and this waits for it
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
    if code:
        print(f"error: the command above failed with exit code {code}; run the same table1 command again to resume")
        sys.exit(code)


def train(path: Path, seed: int, processes: int, overrides: list[str]) -> tuple[Config, list[str]]:
    """Train one config with one seed, after the run it starts from; return the config and the overrides used."""
    config = Config(read_yaml(path) | parse_overrides(overrides)[0])  # run.py reports invalid ones
    own_overrides = [*overrides, f"name={config.name}-seed{seed}", f"seed={seed}"]
    if config.load_model_path and not any(override.startswith("load_model_path=") for override in overrides):
        start = Path(config.load_model_path)  # save_path/NAME/best; args/ has the config of NAME
        train(path.with_name(f"{start.parent.name.replace('-', '_')}.yaml"), seed, processes, overrides)
        own_overrides.append(f"load_model_path={config.save_path}/{start.parent.name}-seed{seed}/{start.name}")
    launch(processes, path, own_overrides)
    return config, own_overrides


def test_file(config: Config) -> tuple[str | list[str], str]:
    """Return the test file that belongs to a config's validation file, and the digest of its content.

    Raises UserError if it is the validation file itself, or if no checkpoint would be left to test.
    """
    if config.debug:
        raise UserError("debug: True writes no checkpoint that could be tested; leave it out")
    test = [path.replace("_valid", "_test") for path in listed(config.val_path)]
    test = test if isinstance(config.val_path, list) else test[0]
    places = [
        [path if path.startswith(HUB) else str(ROOT / path) for path in listed(paths)]
        for paths in (test, config.val_path)
    ]
    digests = [content_digest(paths) for paths in places]
    if digests[0] == digests[1]:
        raise UserError(
            f"val_path: {config.val_path!r} gives {test!r} as the test set, which has the validation problems; "
            "name the test file like the validation file, with _test in place of _valid"
        )
    return test, digests[0]


def train_and_test(dataset: str, method: str, seed: int, processes: int, overrides: list[str]) -> dict:
    """Train one method with one seed, test its best checkpoint, and return the test metrics."""
    path = ROOT / "args" / f"{dataset}_{method}.yaml"
    test, digest = test_file(Config(read_yaml(path) | parse_overrides(overrides)[0]))
    config, own_overrides = train(path, seed, processes, overrides)
    directory = Path(config.save_path) / f"{config.name}-seed{seed}"
    best = follow(ROOT / directory / "best").resolve()
    trained = read_description(best)
    expected = {"data_digest": digest} | {key: trained.get(key) for key in ("method", "stage", "thoughts")}

    def tests() -> list[dict]:
        """Return the metrics of the best checkpoint on the test set, as it was trained; the latest last."""
        files = metrics_files(best.parent, best.name)
        found = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
        return [metrics for metrics in found if {key: metrics.get(key) for key in expected} == expected]

    if not tests():
        evaluation = ["only_eval=True", f"load_model_path={directory}/best", f"val_path={test}", "resume=0"]
        launch(processes, path, [o for o in own_overrides if not o.startswith("load_model_path=")] + evaluation)
    if not (metrics := tests()):
        raise UserError(
            f"{directory}: no test of {best.name} on {test} with {expected}; it was trained with other settings"
        )
    return {**metrics[-1], "directory": directory}


def format_table(dataset: str, results: dict[str, list[dict]]) -> str:
    """Render the results as Markdown: mean ± standard deviation over seeds, next to the paper's numbers."""
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


def expected_time(epochs: int, rates: list[float]) -> str:
    """Say how long a run of that many epochs takes if it is as fast as the slowest of the earlier ones."""
    if not rates:
        return ""
    seconds = epochs * max(rates)  # not the mean: a run that had finished before took no time
    return f", about {seconds:.0f} s" if seconds < 60 else f", about {seconds / 60:.0f} min"


def main() -> None:
    """Train, test and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="prefix of the configs in args/, such as gsm, prosqa, mini or ring")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=positive_int, default=1, help="number of seeds, from 0")
    parser.add_argument(
        "--processes", type=positive_int, default=1, help="processes per run (torchrun if more than one)"
    )
    overrides = [arg for arg in sys.argv[1:] if "=" in arg and not arg.startswith("-")]
    args = parser.parse_args([arg for arg in sys.argv[1:] if arg not in overrides])
    methods = sorted({*args.methods}, key=list(METHODS).index)  # cot first: other runs may start from it
    results = {method: [] for method in methods}
    rates = []  # seconds per epoch
    runs = list(itertools.product(range(args.seeds), methods))
    try:
        for number, (seed, method) in enumerate(runs, 1):
            path, started = ROOT / "args" / f"{args.dataset}_{method}.yaml", time.monotonic()
            epochs = Config(read_yaml(path) | parse_overrides(overrides)[0]).num_epochs
            print(f"\n[{number}/{len(runs)}] {method}{expected_time(epochs, rates)}", flush=True)
            results[method].append(train_and_test(args.dataset, method, seed, args.processes, overrides))
            rates.append((time.monotonic() - started) / epochs)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; rerun the same command to resume", flush=True)
        sys.exit(130)
    files = ", ".join(sorted({str(test["val_path"]) for tests in results.values() for test in tests}))
    print(f"\n{args.dataset}, {args.seeds} seed(s), test set {files}\n\n{format_table(args.dataset, results)}")
    directories = [str(test["directory"]) for tests in results.values() for test in tests]
    print("\nCheckpoints, metrics and predictions:\n" + "\n".join(directories))


if __name__ == "__main__":
    print_without_errors()
    main()
