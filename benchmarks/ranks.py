"""Measure the host memory of loading, saving and resuming: one process, and several with FSDP (gloo).

    python benchmarks/ranks.py                     a Llama of 195 million parameters, 1 and 4 processes

Each phase runs in fresh processes; each process measures its peak relative to the start, after imports and joining the
process group:
  load     from a folder to a model ready for training (with rows for new tokens)
  save     a checkpoint, starting with AdamW's state in memory
  resume   from that checkpoint to model and optimizer
Peaks are summed over processes, though they need not coincide. Two measures:
  own      private memory (anonymous pages), sampled every millisecond. Memory-mapped weights count once they are
           written to; each phase therefore writes to all of them once, as the first optimizer step would
  all      the kernel's peak (VmHWM), including the pages read of mapped files
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PHASES = ("load", "save", "resume")


# --- worker -----------------------------------------------------------------------------------------------------------


class Peak:
    """This process's peak private and total resident memory from now on, relative to now, in bytes."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # reset the kernel's peak
        self.before, self.own, self.done = (self.now(), peak()), self.now(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    @staticmethod
    def now() -> int:
        """Return the bytes of anonymous pages."""
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def watch(self) -> None:
        """Sample until the end."""
        while not self.done.wait(0.001):
            self.own = max(self.own, self.now())

    def end(self) -> dict[str, int]:
        """Return both peaks."""
        self.done.set()
        self.thread.join()
        return {"own": self.own - self.before[0], "all": peak() - self.before[1]}


def peak() -> int:
    """Return the kernel's peak of this process's resident memory, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def work(phase: str, argv: list[str]) -> dict[str, int]:
    """Run a phase in this process; return its peaks."""
    import datasets  # noqa: F401
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from components.distributed import init_distributed
    from components.run_directory import Claim
    from config import load_config
    from run import set_up
    from utils import StopRequest

    processes, config = init_distributed(), load_config(argv[0], argv[1:])
    processes.all_gather_object(None)  # connect
    measured = Peak()
    trainer = set_up(config, processes, StopRequest())
    touch(trainer)
    if phase == "save":
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        before = measured.before
        measured.end()
        measured = Peak()
        measured.before = before
        trainer.state.epoch = 1
        claim = Claim()
        trainer.processes.run_on_rank0(lambda: trainer.open_log(claim))
        trainer.save()
    elif phase == "resume":
        assert trainer.state.epoch == 1 and trainer.optimizer.state
    return measured.end()


def touch(trainer) -> None:
    """Write to all weights and optimizer state once, as the first optimizer step does, so that none is file-backed."""
    tensors = list(trainer.model.parameters())
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
    for tensor in tensors:
        local = tensor.detach()
        (local.to_local() if hasattr(local, "to_local") else local).mul_(1)


# --- launcher ---------------------------------------------------------------------------------------------------------


def make_config(folder: Path, args) -> Path:
    """Write a random Llama, a few problems and a config; return the config's path."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers import byte_tokenizer, make_problems, save_model, write_json

    heads = {"num_attention_heads": args.width // 64, "num_key_value_heads": args.width // 128}
    shape = {"hidden_size": args.width, "intermediate_size": args.width * 11 // 4, "pad_token_id": None}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "max_position_embeddings": 256}
    config = LlamaConfig(num_hidden_layers=args.layers, vocab_size=args.vocabulary, **heads, **shape, **ends)
    lm = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in lm.parameters()) / 1e6:.0f} million parameters", flush=True)
    values = {"method": "coconut", "logger": "none", "save_path": str(folder), "parallel": "fsdp"}
    values |= {"model_id": save_model(folder / "model", lm, byte_tokenizer()), "num_epochs": 9}
    values |= {key: write_json(folder / "data.json", make_problems(4)) for key in ("train_path", "val_path")}
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder / "config.yaml"


def measure(phase: str, ranks: int, argv: list[str]) -> list[dict[str, int]]:
    """Return the peaks of all processes of a phase."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command, started = [sys.executable, __file__, "--phase", phase, *argv], []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**environment, **own}, **pipes))
    outputs = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def main() -> None:
    """Measure all phases; print sums over processes, and their ratio to one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("argv", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=4, help="processes that share the model")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    if args.phase:
        found = work(args.phase, args.argv)
        print(json.dumps(found), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), args)
        print(f"\n| phase | measure | 1 process, MB | sum of {args.ranks} | ratio | main | each other |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for phase in PHASES:
            peaks = {}
            for ranks in (1, args.ranks):
                argv = [str(config), f"name=run-{ranks}-{'load' if phase == 'load' else 'save'}"]
                peaks[ranks] = measure(phase, ranks, argv)
            for kind in ("own", "all"):
                alone, shared = ([peak[kind] / 1e6 for peak in peaks[ranks]] for ranks in (1, args.ranks))
                others = f"{min(shared[1:]):.0f} .. {max(shared[1:]):.0f}"
                row = f"| {phase} | {kind} | {alone[0]:.0f} | {sum(shared):.0f} | {sum(shared) / alone[0]:.2f}"
                print(f"{row} | {shared[0]:.0f} | {others} |", flush=True)


if __name__ == "__main__":
    main()
