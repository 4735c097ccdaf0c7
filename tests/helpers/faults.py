"""Fault injection: what fails, where, at which step and on which rank.

The production code has no hooks for it: `Fault.inject` patches its modules. A run with a fault is

    python tests/helpers/faults.py '{"action": "kill", "place": "step", "step": 3}' CONFIG.yaml [key=value ...]

(under torchrun, too), or `launch(..., fault=Fault("kill", "step", 3))`, which forks it from a server with all imports
done, so that a run of a tiny model takes a second.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import socket
import stat
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
    """A fault that strikes once in a run.

    action: none, kill (SIGKILL), sigterm, sigint, sigusr1, sighup, impatient (SIGTERM twice), wait (until a signal
            arrives), raise (an exception), full (ENOSPC), limit (from then on no file may grow beyond `limit` bytes, as
            on a full disk),
            nan (the loss), inf (all gradients of this rank), oom (GPU out of memory), hang (for `limit` seconds; the
            timeout of collectives is 4 s), unseen (this rank sees no file of the run for `limit` seconds; it waits 3 s)
    place:  step (an optimizer step begins), backward (its gradients are computed), optimizer (before optimizer.step),
            validation (after the first prediction),
            state (in a save, after the weights and before the training state), moments (before the optimizer state),
            rename (before a checkpoint is renamed to its final name), renamed (after that), slim (before the optimizer
            state of an older checkpoint is deleted), log (before metrics are flushed to disk), forward (for nan)
    step:   the number of the optimizer step; for places in saves and validation, the last finished one
    lacking: an error number: from the start, symbolic links and fsync of directories fail with it
    once:   a file that is created when the fault strikes, so that a restarted process is spared
    """

    action: str
    place: str = "step"
    step: int = 1
    rank: int = 0
    limit: int = 0
    lacking: int = 0
    once: str | None = None

    def inject(self) -> None:
        """Patches modules so that the fault strikes when this process reaches its place."""
        import train
        from components import distributed

        if self.action == "hang":  # on all ranks
            distributed.TIMEOUT, distributed.HANG_WARNING = timedelta(seconds=4), timedelta(seconds=1)
        if self.action == "unseen":
            distributed.VISIBILITY_TIMEOUT = 3
        if int(os.environ.get("RANK", 0)) != self.rank or (self.once and Path(self.once).exists()):
            return
        self.watch_trainer(train.Trainer)
        if self.lacking:
            self.take_away_links()
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
        """Hides the small files of a run, like a shared filesystem that shows writes of other nodes late or never."""

        def before(path, *_):
            is_of_run = any((folder / "metrics.jsonl").exists() for folder in list(path.parents)[:2])
            if is_of_run and time.monotonic() < start + self.limit:
                raise FileNotFoundError(path)

        wrap(Path, "read_text", before)

    def take_away_links(self) -> None:
        """Behaves like a cloud mount or network share that has no symbolic links and cannot sync directories."""

        def fail(*_):
            raise OSError(self.lacking, os.strerror(self.lacking))

        wrap(os, "symlink", fail)
        wrap(os, "fsync", lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode) and fail())

    def watch_trainer(self, trainer_class) -> None:
        """Keeps a reference to the trainer, which counts the steps."""
        wrap(trainer_class, "fit", lambda trainer, *_: object.__setattr__(self, "trainer", trainer))

    def at_gradients(self, trainer, loss, *_) -> None:
        """Strikes where the gradients of a step are there."""
        if loss is not None:
            self.strike(self.step - 1)

    def at_validation(self) -> None:
        """Strikes before the first prediction of a validation is made."""
        wrap(__import__("evaluate"), "until_eos", lambda *_: self.strike(self.step))

    def at_state(self) -> None:
        """Strikes where a save writes the training state: earlier files are complete, this one is torn."""

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
        """Strikes after the manifest of an older checkpoint is rewritten and before the optimizer state is deleted."""
        from components import checkpoint_manager

        write = checkpoint_manager.write_manifest

        def patched(*arguments):
            write(*arguments)
            self.strike(self.step)

        checkpoint_manager.write_manifest = patched

    def at_rename(self, after: bool) -> None:
        """Strikes before or after a save renames its directory."""
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
        """Strikes before the metrics are flushed to disk."""

        def before(descriptor):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
                self.strike(self.step)

        wrap(os, "fsync", before)

    def at_forward(self) -> None:
        """Multiplies the losses of a training step by NaN."""
        from coconut import Coconut

        forward = Coconut.forward

        def patched(model, *args, **kwargs):
            output = forward(model, *args, **kwargs)
            if model.training and self.due(self.step - 1):
                output.loss = output.loss * float("nan")
            return output

        Coconut.forward = patched

    def due(self, finished: int) -> bool:
        """Whether `finished` optimizer steps are done and the fault has not struck before."""
        return self.trainer.state.step == finished and not (self.once and Path(self.once).exists())

    def strike(self, finished: int) -> None:
        """Executes the action if `finished` optimizer steps are done."""
        if not self.due(finished):
            return
        if self.once:
            Path(self.once).touch()
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action.startswith("sig"):
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
    """Patches a function so that `before` is called first, with the same positional arguments."""
    function = getattr(owner, name)

    def patched(*args, **kwargs):
        before(*args)
        return function(*args, **kwargs)

    setattr(owner, name, patched)


def truncate(path: Path) -> None:
    """Cuts off the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The exit codes of a run by rank (-9: SIGKILL), and the output of all ranks."""

    codes: list[int]
    output: str


def launch(words: list[str], ranks: int = 1, fault: Fault | None = None, timeout: float = 120, env=None) -> Outcome:
    """Runs run.main(words) in `ranks` processes, without torchrun: nothing else terminates the peers of a dead rank.

    Raises TimeoutError, and kills them, if one is still running after `timeout` seconds.
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
    """The fork server, with all modules imported."""
    paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run", "helpers.faults", "transformers.models.gpt2.modeling_gpt2", "datasets"])
    return context


def work(words: list[str], fault: Fault | None, environment: dict[str, str], output: str) -> None:
    """One rank of a run; stdout and stderr go to the file `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()  # to stderr, which is the file now
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests are run by nohup
    sys.exit(drive(words, fault))


def drive(words: list[str], fault: Fault | None) -> int:
    """Calls run.main with a fault and returns the exit code."""
    import run

    if fault is not None:
        fault.inject()
    return run.main(words)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(drive(sys.argv[2:], Fault(**json.loads(sys.argv[1]))))
