"""Benchmark data loading: seconds from launch to the first step, and the memory of 1, 2 and 4 processes.

    python benchmarks/gsm_size.py FOLDER train.json
    python benchmarks/data.py train.json TOKENIZER [key=value ...] [--ranks 1 2 4] [--project FOLDER]

Trains a tiny model with the tokenizer in the folder TOKENIZER for one epoch of the file, with optimizer steps that
compute nothing, so that only data loading remains. The first start has an empty cache, later starts a filled one; 32
problems serve as the baseline. Memory is the proportional set size (PSS) summed over all processes, which counts shared
pages once, and the private memory of the last rank, at the end of the epoch. Seconds are CPU seconds of the slowest
process, except in the first column (wall time). --project measures another checkout, such as an earlier commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 1024}


def measure(project: Path, argv: list[str], ranks: int) -> list[dict]:
    """Run this script as a worker; return the report of each process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as reports:
        command = [sys.executable, *torchrun, __file__, "--worker", reports, "--project", str(project), *argv]
        environment = {**os.environ, "STARTED": str(time.time()), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(result.stderr)
        return [json.loads(path.read_text()) for path in Path(reports).iterdir()]


def work(project: Path, argv: list[str], reports: Path) -> None:
    """Run one process: an epoch without computation, then write its report."""
    sys.path.insert(0, str(project))
    import torch

    import dataset
    import run
    import train
    from components.distributed import destroy_distributed, init_distributed
    from config import load_config
    from utils import StopRequest

    report = {"rank": int(os.environ.get("RANK", 0))}

    def skip_step(*_) -> dict:
        """Replace the forward, backward and update of a step (or train_step of an earlier version)."""
        report.setdefault("first step", time.time() - float(os.environ["STARTED"]))
        report.setdefault("first step, CPU", sum(os.times()[:4]))  # including finished workers
        return {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "tokens": 1}

    clock(dataset, "check_lengths", report)
    clock(train if hasattr(train, "epoch_order") else dataset, "epoch_order", report)
    train.Trainer.train_step = skip_step
    train.Trainer.backward = lambda *_: skip_step() and torch.zeros(())
    train.Trainer.optimizer_step = lambda *_: 0.0
    config, processes = load_config(argv[0], argv[1:]), init_distributed()
    trainer = run.set_up(config, processes, StopRequest())
    clock(trainer, "train_epoch", report)
    trainer.train_epoch(0)
    processes.all_gather_object(None)
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    report |= {name: int(fields[name].split()[0]) / 1024 for name in ("Pss", "Private_Clean", "Private_Dirty")}  # MiB
    (reports / str(processes.rank)).write_text(json.dumps(report))
    processes.all_gather_object(None)
    destroy_distributed()


def clock(module, name: str, report: dict) -> None:
    """Patch a function to add the CPU seconds of its calls to the report."""
    function = getattr(module, name)

    def clocked(*args, **kwargs):
        started = time.process_time()
        result = function(*args, **kwargs)
        report[name] = report.get(name, 0) + time.process_time() - started
        return result

    setattr(module, name, clocked)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("argv", nargs="+", metavar="train.json TOKENIZER [key=value]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.project, args.argv, args.worker)
    train, tokenizer, *argv = args.argv
    print("| ranks | data | first step, s | CPU s | check_lengths | order | whole epoch | PSS, MiB | private, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        small, config = make_files(Path(folder), Path(train), Path(tokenizer))
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        starts = [(args.ranks[0], "first start", train)]
        for ranks in args.ranks:
            starts += [(ranks, "32 problems", small), (ranks, "later start", train)]
        for ranks, title, path in starts:
            reports = measure(args.project, [config, f"train_path={path}", *argv], ranks)
            print(f"| {ranks} | {title} | {columns(reports)} |", flush=True)
    return None


def make_files(folder: Path, train: Path, tokenizer: Path) -> tuple[str, str]:
    """Write the 32 problems and the config."""
    small, model = folder / "small.json", folder / "model"
    small.write_text(json.dumps(json.loads(train.read_text(encoding="utf-8"))[:32]), encoding="utf-8")
    model.mkdir()
    for path in tokenizer.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257, **SIZES}))
    values = {"name": "data", "method": "coconut", "c_thought": 2, "max_latent_stage": 3, "logger": "none"}
    values |= {"save_path": str(folder), "model_id": str(model), "from_scratch": True, "val_path": str(small)}
    (folder / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    return str(small), str(folder / "config.yaml")


def columns(reports: list[dict]) -> str:
    """Format a row: seconds of the slowest process, PSS of all processes, private memory of the last rank."""
    names = ("first step", "first step, CPU", "check_lengths", "epoch_order", "train_epoch")
    seconds = [f"{max(report.get(name, 0) for report in reports):.1f}" for name in names]
    last = max(reports, key=lambda report: report["rank"])
    memory = [sum(report["Pss"] for report in reports), last["Private_Clean"] + last["Private_Dirty"]]
    return " | ".join([*seconds, *(f"{mib:.0f}" for mib in memory)])


if __name__ == "__main__":
    main()
