"""Faults as objects: what goes wrong, where, at which step and in which process of a run.

The production code has no hooks for them: `Fault.inject` patches its modules from outside. A run with a fault is

    python tests/helpers/faults.py '{"action": "kill", "place": "step", "step": 3}' CONFIG.yaml [key=value ...]

(under torchrun, too), or `launch(..., fault=Fault("kill", "step", 3))`, which forks it from a server that has
imported everything, so that a run of a tiny model takes a second.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once in a run.

    action: kill (SIGKILL), sigterm, sigint, impatient (SIGTERM, and later once more), wait (until a signal comes),
            raise (an exception), full (ENOSPC), limit (no file may grow beyond `limit` bytes from now on, as on a full
            disk), nan (a loss), inf (all gradients of this process), oom (a GPU is out of memory), hang (for `limit`
            seconds, of which the others wait for 4), unseen (this process sees no file of the run for `limit` seconds,
            of which it waits for 3)
    place:  step (an optimizer step begins), backward (its gradients are there), optimizer (it is about to take it),
            validation (an answer is there),
            state (a save has written the weights and begins with the training state), moments (it begins with that of
            the optimizer), rename (a save is about to rename its files), renamed (it has), slim (an older checkpoint is
            about to lose its optimizer's state), log (metrics are about to be made durable), forward (for nan)
    step:   the number of the optimizer step; for places in saves and validation, the last finished one
    once:   a file that says that the fault has struck, so that a restarted process is spared
    """

    action: str
    place: str = "step"
    step: int = 1
    rank: int = 0
    limit: int = 0
    once: str | None = None

    def inject(self) -> None:
        """Patches the modules of the program so that the fault strikes this process when it comes to its place."""
        import train
        from components import distributed

        if self.action == "hang":  # for all processes
            distributed.TIMEOUT, distributed.HANG_WARNING = timedelta(seconds=4), timedelta(seconds=1)
        if self.action == "unseen":
            distributed.VISIBILITY_TIMEOUT = 3
        if int(os.environ.get("RANK", 0)) != self.rank or (self.once and Path(self.once).exists()):
            return
        self.watch_trainer(train.Trainer)
        if self.action == "unseen":
            return self.hide(time.monotonic())
        {
            "step": lambda: wrap(train.Trainer, "backward", lambda *_: self.strike(self.step - 1)),
            "backward": lambda: wrap(train.Trainer, "all_gather_totals", self.at_gradients),
            "optimizer": lambda: wrap(torch.optim.AdamW, "step", lambda *_: self.strike(self.step - 1)),
            "validation": self.at_validation,
            "state": self.at_state,
            "moments": self.at_moments,
            "slim": self.at_slim,
            "rename": lambda: self.at_rename(after=False),
            "renamed": lambda: self.at_rename(after=True),
            "log": self.at_log,
            "forward": self.at_forward,
        }[self.place]()

    def hide(self, start: float) -> None:
        """Hides the small files of a run, as a file system does that shows late, or never, what others have written."""

        def before(path, *_):
            is_of_run = any((folder / "metrics.jsonl").exists() for folder in list(path.parents)[:2])
            if is_of_run and time.monotonic() < start + self.limit:
                raise FileNotFoundError(path)

        wrap(Path, "read_text", before)

    def watch_trainer(self, trainer_class) -> None:
        """Keeps hold of the trainer, which knows the step."""
        wrap(trainer_class, "fit", lambda trainer, *_: object.__setattr__(self, "trainer", trainer))

    def at_gradients(self, trainer, loss, *_) -> None:
        """Strikes where the gradients of a step are there."""
        if loss is not None:
            self.strike(self.step - 1)

    def at_validation(self) -> None:
        """Strikes where the first answer of a validation is there."""
        wrap(__import__("evaluate"), "predict", lambda *_: self.strike(self.step))

    def at_state(self) -> None:
        """Strikes where a save writes the training state: some files are complete, this one is torn."""

        def before(_, path):
            if ".partial" in str(path):
                Path(path).write_bytes(b"torn")
                self.strike(self.step)

        wrap(torch, "save", before)

    def at_moments(self) -> None:
        """Strikes where a save writes the optimizer's state."""

        def before(_, path):
            path.write_bytes(b"torn")
            self.strike(self.step)

        from components import checkpoint

        wrap(checkpoint, "save_file", before)

    def at_slim(self) -> None:
        """Strikes where the manifest of an older checkpoint is rewritten and the file is still there."""
        from components import checkpoint_manager

        write = checkpoint_manager.write_manifest

        def patched(*arguments):
            write(*arguments)
            self.strike(self.step)

        checkpoint_manager.write_manifest = patched

    def at_rename(self, after: bool) -> None:
        """Strikes before or after a save moves its directory to its place."""
        replace = os.replace

        def patched(source, target):
            ours = Path(source).name.startswith("checkpoint_") and not Path(source).is_symlink()
            if ours and not after:
                self.strike(self.step)
            replace(source, target)
            if ours and after:
                self.strike(self.step)

        os.replace = patched

    def at_log(self) -> None:
        """Strikes where the metrics are made durable."""

        def before(descriptor):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
                self.strike(self.step)

        wrap(os, "fsync", before)

    def at_forward(self) -> None:
        """Multiplies the loss of a training step's passes by NaN."""
        from coconut import Coconut

        forward = Coconut.forward

        def patched(model, *args, **kwargs):
            output = forward(model, *args, **kwargs)
            if model.training and self.due(self.step - 1):
                output.loss = output.loss * float("nan")
            return output

        Coconut.forward = patched

    def due(self, finished: int) -> bool:
        """Whether the run has finished so many optimizer steps and the fault has not struck before."""
        return self.trainer.state.step == finished and not (self.once and Path(self.once).exists())

    def strike(self, finished: int) -> None:
        """Lets the fault happen, if the run has finished so many optimizer steps."""
        if not self.due(finished):
            return
        if self.once:
            Path(self.once).touch()
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action in ("sigterm", "sigint"):
            signal.raise_signal(getattr(signal, self.action.upper()))
        elif self.action == "impatient":
            import utils

            utils.StopRequest.SAME_REQUEST = -1  # no need to wait
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        elif self.action == "inf":
            for parameter in self.trainer.model.parameters():
                parameter.grad.mul_(float("inf"))
        elif self.action == "wait":
            while not self.trainer.stop.signal:
                time.sleep(0.01)
        elif self.action == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines of advice")
        elif self.action == "hang":
            time.sleep(self.limit)
        elif self.action == "raise":
            raise RuntimeError("an injected error")
        elif self.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


def wrap(owner, name: str, before) -> None:
    """Calls `before` with the same arguments ahead of every call of a function."""
    function = getattr(owner, name)

    def patched(*args, **kwargs):
        before(*args)
        return function(*args, **kwargs)

    setattr(owner, name, patched)


def truncate(path: Path) -> None:
    """Cuts the second half of a file off."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How the processes of a run ended: their exit codes by rank (-9: SIGKILL), and all that they printed."""

    codes: list[int]
    output: str


def launch(words: list[str], ranks: int = 1, fault: Fault | None = None, timeout: float = 120, env=None) -> Outcome:
    """Runs run.main(words) in `ranks` processes of their own, without torchrun: nobody ends them but themselves.

    Raises TimeoutError, and ends them, where one is still there after `timeout` seconds.
    """
    environment = {"HF_HUB_OFFLINE": "1", **(env or {})}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = (words, fault, {**environment, **own}, str(output))
            processes.append(server().Process(target=work, args=arguments))
            processes[-1].start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
            processes[rank].join()
        texts = "".join(output.read_text(errors="replace") for output in outputs)
    if late:
        raise TimeoutError(f"ranks {late} still ran after {timeout} s; all ranks' output:\n{texts}")
    return Outcome([process.exitcode for process in processes], texts)


def server():
    """A process with all modules imported, from which runs are forked."""
    paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run", "helpers.faults", "transformers.models.gpt2.modeling_gpt2", "datasets"])
    return context


def work(words: list[str], fault: Fault | None, environment: dict[str, str], output: str) -> None:
    """One process of a run: everything printed goes to the file `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.exit(drive(words, fault))


def drive(words: list[str], fault: Fault | None) -> int:
    """run.main with a fault; returns its exit code."""
    import run

    if fault is not None:
        fault.inject()
    return run.main(words)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(drive(sys.argv[2:], Fault(**json.loads(sys.argv[1]))))
