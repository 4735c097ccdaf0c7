"""What data cost: seconds from the command to the first step, and the memory of 1, 2 and 4 processes.

    python benchmarks/gsm_size.py FOLDER train.json
    python benchmarks/data.py train.json TOKENIZER [key=value ...] [--ranks 1 2 4] [--project FOLDER]

Trains a tiny model with the tokenizer in the folder TOKENIZER over one epoch of the file, but every optimizer step
computes nothing, so that all that is left is data. The first start has an empty cache, later ones what it left there;
32 problems, which cost nearly nothing, are there to compare with. Memory, at the end of the epoch, is the sum over all
processes of their proportional share (PSS), so that shared pages count once, and the private memory of the last rank.
Seconds are CPU seconds of the slowest process, but for the first column, which is the clock's.
--project names another checkout (as of an earlier commit) whose core is measured instead.
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


def measure(project: Path, words: list[str], ranks: int) -> list[dict]:
    """What each of the processes of a run of this script as a worker reports."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as reports:
        command = [sys.executable, *torchrun, __file__, "--worker", reports, "--project", str(project), *words]
        environment = {**os.environ, "STARTED": str(time.time()), "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            sys.exit(finished.stderr)
        return [json.loads(path.read_text()) for path in Path(reports).iterdir()]


def work(project: Path, words: list[str], reports: Path) -> None:
    """One process: an epoch without any arithmetic, then its report."""
    sys.path.insert(0, str(project))
    import torch

    import build
    import dataset
    import train
    from components.distributed import destroy_distributed, init_distributed
    from config import load_config
    from utils import StopRequest

    report = {"rank": int(os.environ.get("RANK", 0))}

    def note(*_) -> dict:
        """In place of a step's passes and update, or of an earlier version's train_step."""
        report.setdefault("first step", time.time() - float(os.environ["STARTED"]))
        report.setdefault("first step, CPU", sum(os.times()[:4]))  # workers that have ended included
        return {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "tokens": 1}

    clock(build, "check_lengths", report)
    clock(train if hasattr(train, "epoch_order") else dataset, "epoch_order", report)
    train.Trainer.train_step = note
    train.Trainer.backward = lambda *_: note() and torch.zeros(())
    train.Trainer.gradient_norm = lambda _: torch.zeros(())
    train.Trainer.update = lambda *_: 0.0
    config, processes = load_config(words[0], words[1:]), init_distributed()
    trainer = train.Trainer(build.build(config, processes, StopRequest()))
    clock(trainer, "train_epoch", report)
    trainer.train_epoch(0)
    processes.gather(None)
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    report |= {name: int(fields[name].split()[0]) / 1024 for name in ("Pss", "Private_Clean", "Private_Dirty")}  # MiB
    (reports / str(processes.rank)).write_text(json.dumps(report))
    processes.gather(None)
    destroy_distributed()


def clock(module, name: str, report: dict) -> None:
    """Adds the CPU seconds of every call of a function to the report."""
    function = getattr(module, name)

    def clocked(*args, **kwargs):
        started = time.process_time()
        result = function(*args, **kwargs)
        report[name] = report.get(name, 0) + time.process_time() - started
        return result

    setattr(module, name, clocked)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="train.json TOKENIZER [key=value]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.project, arguments.words, arguments.worker)
    train, tokenizer, *words = arguments.words
    print("| ranks | data | first step, s | CPU s | check_lengths | order | whole epoch | PSS, MiB | private, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        small, config = make_files(Path(folder), Path(train), Path(tokenizer))
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        starts = [(arguments.ranks[0], "first start", train)]
        for ranks in arguments.ranks:
            starts += [(ranks, "32 problems", small), (ranks, "later start", train)]
        for ranks, title, path in starts:
            reports = measure(arguments.project, [config, f"train_path={path}", *words], ranks)
            print(f"| {ranks} | {title} | {columns(reports)} |", flush=True)
    return None


def make_files(folder: Path, train: Path, tokenizer: Path) -> tuple[str, str]:
    """The files of 32 problems and of the config."""
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
    """A row's figures: the slowest process's seconds, the memory of all, and the last one's own."""
    names = ("first step", "first step, CPU", "check_lengths", "epoch_order", "train_epoch")
    seconds = [f"{max(report.get(name, 0) for report in reports):.1f}" for name in names]
    last = max(reports, key=lambda report: report["rank"])
    memory = [sum(report["Pss"] for report in reports), last["Private_Clean"] + last["Private_Dirty"]]
    return " | ".join([*seconds, *(f"{mib:.0f}" for mib in memory)])


if __name__ == "__main__":
    main()
