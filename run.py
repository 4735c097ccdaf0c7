"""Trains or evaluates one experiment.

    torchrun --nnodes 1 --nproc_per_node N run.py CONFIG.yaml [key=value ...]
    python run.py CONFIG.yaml [key=value ...]         (one process, on a GPU or on the CPU)

Exit codes: 0 done, 2 a user's mistake, 3 a loss or gradient that is not finite, 4 a checkpoint that could not be
saved, 5 a GPU that is out of memory, 6 another process that ended or does not answer, 130 and 143 stopped by SIGINT
and SIGTERM after saving: the same command continues the run.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers
import yaml

from build import Run, build, evaluation_stage
from components.distributed import destroy_distributed, init_distributed, is_lost_peer, name_of, places
from components.errors import Interrupted, SaveError
from components.files import make_private, saving
from config import Config, UserError, load_config
from evaluate import validate, write_predictions
from train import NotFiniteError, train
from utils import StopRequest

EXIT_CODES = {UserError: 2, NotFiniteError: 3, SaveError: 4}


def main(words: list[str] | None = None) -> int:
    """The program: parses the command line, runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as args/gsm_coconut.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to set on top of the file")
    arguments = parser.parse_args(words)
    transformers.logging.disable_progress_bar()  # only the training's own bars
    with StopRequest() as stop:
        code = 0
        try:
            processes = init_distributed()  # first, so that torchrun does not end the one that prints before it can
            config = load_config(arguments.config, arguments.overrides)
            run = build(config, processes, stop)
            test(run) if config.only_eval else train(run)
        except tuple(EXIT_CODES) as error:
            code = EXIT_CODES[type(error)]
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on every node: a file may be missing on one alone
                print(f"error: {error}", file=sys.stderr, flush=True)
        except RuntimeError as error:
            if not (full := isinstance(error, torch.OutOfMemoryError)) and not is_lost_peer(error):
                raise
            code = 5 if full else 6
            explain = out_of_memory if full else lost
            print(f"error: {explain(error)}", file=sys.stderr, flush=True)  # every process has its own to say
        except Interrupted as interruption:
            code = 128 + interruption.signal
    if code == 0:  # else the others may wait in a collective, and so would this one; the end of the process does it
        destroy_distributed()
        if config.analyze and not config.debug and not config.only_eval and run.processes.is_rank0:
            run = None  # its model and gradients fill a GPU
            code = analyze(config)
    return code


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """What a user can do about a GPU that is full, so that the same run goes on."""
    keys = "halve batch_size_training and double gradient_accumulation_steps, which makes the same steps, or set "
    keys += "gradient_checkpointing: block, or parallel: fsdp on several GPUs"
    if any(frame.name == "validate" for frame in traceback.extract_tb(error.__traceback__)):
        keys = "lower batch_size_eval (if it is not set, it is batch_size_training) or max_new_tokens"
    again = "Earlier checkpoints are as they were, and the same command goes on from the newest"
    return f"out of GPU memory: {standing(error)}; {keys}. {again}"


def lost(error: RuntimeError) -> str:
    """What a user should know where another process has ended or does not answer."""
    return f"lost another process, look at what that one says: {standing(error)}; earlier checkpoints are as they were"


def standing(error: Exception) -> str:
    """Which process an error struck in which place, and its first line."""
    place = places(traceback.extract_tb(error.__traceback__))
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return f"{name_of(int(os.environ.get('RANK', 0)))} in {place}: {first_line}"


def test(run: Run) -> None:
    """only_eval: tests the loaded model at its stage and writes to save_path/name/eval_CHECKPOINT."""
    config, checkpoint = run.config, Path(run.config.load_model_path)
    stage = evaluation_stage(config, run.pretrained)
    run.processes.print(f"evaluating {checkpoint} on {config.val_path} at stage {stage}")
    for key, trained in run.pretrained.description.items():
        if getattr(config, key, trained) != trained:
            run.processes.print(f"warning: {key} is {getattr(config, key)} here, but the checkpoint has {trained}")
    evaluation = validate(run, stage)
    found = {"problems": len(evaluation.predictions), **evaluation.metrics()}
    summary = {"checkpoint": str(checkpoint), "val_path": config.val_path, "stage": stage, **found}
    if not config.debug:
        directory = run.directory / f"eval_{checkpoint.resolve().name}"
        run.processes.run_on_rank0(lambda: write_evaluation(evaluation.predictions, summary, directory))
        run.processes.print(f"predictions and metrics: {directory}")


def analyze(config: Config) -> int:
    """The analysis of a trained run's best checkpoint, unless it is there; returns the exit code."""
    from analysis.study import folder_of, study  # needs an optional package

    best = str(Path(config.save_path, config.name, "best"))
    if (folder_of(best) / "report.html").exists():
        return 0
    try:
        study(best, config.val_path, batch_size=config.batch_size_eval or config.batch_size_training)
    except UserError as error:
        print(f"error: analyze: {error}; the run itself is done", file=sys.stderr)
        return EXIT_CODES[UserError]
    return 0


def write_evaluation(predictions: list[dict], summary: dict, directory: Path) -> None:
    """Writes what only_eval found, beside what it found before."""
    with saving(directory):
        make_private(directory)
        path = unused(directory / f"predictions_{Path(summary['val_path']).stem}.jsonl")
        write_predictions(predictions, path)
        path.with_name(path.stem.replace("predictions", "metrics") + ".yaml").write_text(yaml.safe_dump(summary))


def unused(path: Path) -> Path:
    """The path, or the first of path_2, path_3, ... that does not exist: nothing is overwritten."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_stem(f"{path.stem}_{number}"), number + 1
    return candidate


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # gloo's threads can abort an interpreter that shuts down, with all work done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
