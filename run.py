"""Train or evaluate one experiment.

    torchrun --nnodes 1 --nproc_per_node N run.py CONFIG.yaml [key=value ...]
    python run.py CONFIG.yaml [key=value ...]         (one process, on a GPU or on the CPU)
    python run.py CONFIG.yaml --dry-run               (load everything, say what would be trained, write nothing)
    python run.py --help                              (all keys)

CONFIG.yaml is one of args/ or your own, and key=value words change its keys: run.py args/gsm_cot.yaml lr=5e-5 seed=1

Exit codes: 0 done, 2 a user's mistake, 3 a loss or gradient that is not finite, 4 a checkpoint that could not be
saved, 5 a GPU out of memory, 6 another process died or does not answer; 128 + the signal: stopped by SIGTERM (143),
SIGINT (130), SIGUSR1 or SIGHUP after saving, and the same command resumes the run.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for torch, below: spinning threads stall on a busy machine

if __name__ == "__main__":  # until main takes over: no traceback of whatever import a Ctrl-C falls into
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    import torch
except ModuleNotFoundError:
    print(f"error: {sys.executable} has no torch; activate the environment: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

from coconut import Coconut, check_model
from components.checkpoint import check_intact, check_saving, find_checkpoint
from components.display import describe_keys, print_without_errors, quiet_libraries
from components.distributed import Processes, destroy_distributed, init_distributed
from components.errors import exit_code, message
from components.lora import add_lora
from components.parallelize import replicate
from components.pretrained import Pretrained, load_on_rank0
from components.run_directory import Claim, check_directory, check_writable, follow, locate
from config import Config, listed, load_config
from curriculum import METHODS, stage_of
from dataset import Lengths, load_data
from evaluate import Validator, evaluate_checkpoint
from train import Trainer
from utils import StopRequest, set_seed

ONE_THREAD = 1_000_000  # parameters; for smaller models, threads cost more CPU time than they save


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*words} or not words:
        print(f"{__doc__}\n{describe_keys()}" if words else __doc__.split("\n\nExit codes")[0], flush=True)
        return 0 if words else 2
    dry = "--dry-run" in words
    path, *overrides = [word for word in words if word != "--dry-run"] or [""]
    quiet_libraries()
    with Claim() as claim:
        with StopRequest() as stop:
            try:
                processes = init_distributed()  # first, so that torchrun does not end the one that prints before it can
                config = load_config(path, overrides)
                processes.print(f"config: {path}" + (f"   changed: {' '.join(overrides)}" if overrides else ""))
                dry_run(config, processes, stop) if dry else run(config, processes, claim, stop)
            except Exception as error:
                code = exit_code(error)
                if code is None:
                    raise
                if code < 128 and (text := message(error)):
                    print(f"error: {text}", file=sys.stderr, flush=True)
                return code  # without leaving the process group, where the others may wait in a collective
        destroy_distributed()
        if config.analyze and not dry and not config.debug and not config.only_eval and processes.is_rank0:
            return analyze(config)
    return 0


def run(config: Config, processes: Processes, claim: Claim, stop: StopRequest) -> None:
    """Train, or evaluate config.load_model_path; the model is freed before the process group is."""
    directory = config.run_directory
    if not config.debug:  # before anything of the directory is read, and before hours of validation
        processes.run_on_rank0(lambda: check_writable(directory) if config.only_eval else claim.acquire(directory))
    job = set_up(config, processes, stop)
    evaluate_checkpoint(job) if config.only_eval else job.fit(claim)


def dry_run(config: Config, processes: Processes, stop: StopRequest) -> None:
    """Load and check all that a run needs, and print what it would do; nothing of it is written or locked."""
    if not config.debug:
        processes.run_on_rank0(lambda: check_directory(config.run_directory))
    with TemporaryDirectory() as folder:
        config = Config(config.resolved() | {"data_cache": folder})
        job = set_up(config, processes, stop)
    if config.only_eval:
        what = f"{config.load_model_path} would be tested on {len(job.problems):,} problems of {config.val_path}"
        return processes.print(f"{what}\ndry run: nothing was written")
    job.introduce()
    epochs, size = range(job.state.epoch, config.num_epochs), config.problems_per_step(processes.world_size)
    steps, lengths = math.ceil(len(job.data) / size), Lengths(job.data)
    processes.print(
        f"steps: {steps:,} of {size} problems in each of {len(epochs)} epochs, {steps * len(epochs):,} in all"
    )
    for stage in sorted({stage_of(epoch, config) for epoch in epochs}):
        n = lengths.of_sequences(stage, config)
        processes.print(f"stage {stage}: sequences of {n.min()} to {n.max()} tokens, {n.mean():.0f} on average")
    weights, optimizer_state = (f"{size / 1e6:,.1f} MB" for size in job.checkpoint_bytes())
    processes.print(f"a checkpoint: {weights}, and {optimizer_state} of optimizer state\ndry run: nothing was written")


def set_up(config: Config, processes: Processes, stop: StopRequest) -> Trainer | Validator:
    """Load model and data and return what runs them: a Trainer, or for only_eval a Validator.

    Whatever is wrong with them is found here, before anything of a run is written.
    """
    config.problems_per_step(processes.world_size)  # raises for a global_batch_size that cannot be divided
    checkpoint = None
    if not config.debug and not config.only_eval:
        checkpoint, config = find_checkpoint(config, processes)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    pretrained = load(config, checkpoint, processes)
    on_cpu = processes.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ  # which torchrun sets
    if on_cpu and pretrained.lm.num_parameters() < ONE_THREAD:
        torch.set_num_threads(1)
    train_data, valid_data = load_data(config, pretrained, processes)
    model = Coconut.wrap(pretrained.lm, pretrained.tokenizer)
    validator = Validator(model, pretrained, valid_data, config, processes, stop)
    processes.run_on_rank0(validator.check_references)
    if config.only_eval:
        replicate(model, processes)
        return validator
    return Trainer(model, pretrained, train_data, validator, config, processes, stop, checkpoint)


def load(config: Config, checkpoint: Path | None, processes: Processes) -> Pretrained:
    """Load the model and tokenizer of a run that resumes from `checkpoint` (None: a fresh start), and seed all ranks.

    With LoRA a checkpoint has only the trained weights, and the frozen ones come from where they came at first.
    """
    set_seed(config.seed)  # random weights come from rank 0
    path = None if config.lora_rank else checkpoint
    if path is None and config.load_model_path:
        path = processes.run_on_each_node(lambda: locate(config.load_model_path))
    if path is None or path != checkpoint:  # find_checkpoint has verified its own
        processes.run_on_rank0(lambda: check_intact(config, path))
    pretrained = load_on_rank0(config, path, processes)
    eos = pretrained.tokenizer.eos_token_id
    processes.run_on_rank0(lambda: check_model(pretrained.lm, eos, pretrained.source))
    if not config.only_eval and not config.debug:
        processes.run_on_rank0(lambda: check_saving(pretrained, config))
    if config.lora_rank and not config.only_eval:
        new_ids = [pretrained.token_id(token) for token in METHODS[config.method].tokens]
        add_lora(pretrained.lm, config.lora_rank, new_ids, config.bf16)
    set_seed(config.seed, processes.rank)  # every rank has its own dropout masks
    return pretrained


def analyze(config: Config) -> int:
    """Analyze the best checkpoint of a finished run in a process of its own; returns its exit code."""
    best = config.run_directory / "best"
    if (config.run_directory / f"analysis_{follow(best).resolve().name}" / "report.html").exists():
        return 0
    script, batch = (
        Path(__file__).parent / "scripts" / "analyze.py",
        config.batch_size_eval or config.batch_size_training,
    )
    command = [sys.executable, str(script), str(best), "--batch", str(batch)]
    command += [word for path in listed(config.val_path) for word in ("--data", path)]
    code = subprocess.run(command, check=False).returncode
    if code:
        print("error: analyze failed; the run itself is done", file=sys.stderr)
    return code


if __name__ == "__main__":
    print_without_errors()
    code = main()
    if "RANK" in os.environ:  # gloo's threads can abort an interpreter that shuts down, with all work done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
