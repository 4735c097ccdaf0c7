"""DDP, FSDP and gradient accumulation against one rank: equal steps, collectives, resume, several nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed import HashStore
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import memory
from components import activation_checkpointing, distributed, parallelize
from components.parallelize import choose_strategy
from config import Config, UserError
from helpers import make_problems, read_lines, tiny_gpt2, write_json
from helpers.faults import ROOT, Fault, free_port, wrap
from helpers.setting import Setting, assert_same, metrics

slow = pytest.mark.slow
CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # sums in another order, through AdamW: a fiftieth of one step, lr 1e-3


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """Without dropout, whose masks depend on the rank. An epoch is two steps of 16 problems and one of 1."""
    setting = Setting(tmp_path_factory.mktemp("parallel"), dropout=0.0)
    setting.values |= {"train_path": write_json(setting.directory / "odd.json", make_problems(33)), "num_epochs": 3}
    setting.values |= {"epochs_per_stage": 1, "max_latent_stage": 2, "lr": 1e-3, "save_every_steps": None}
    setting.values |= {"batch_size_training": 16, "gradient_accumulation_steps": 1}
    return setting


@pytest.fixture(scope="module")
def single(setting) -> Path:
    """The reference: one rank, no accumulation."""
    return setting.reference()


def finish(setting: Setting, name: str, ranks: int, **changes) -> Path:
    """Runs to the end and returns the run directory."""
    outcome = setting.run(name, ranks, **changes)
    assert outcome.codes == [0] * ranks, outcome.output
    return setting.directory / name


def assert_close(run: Path, reference: Path) -> None:
    """Metrics and weights of two runs agree to float32 accuracy; predictions are equal.

    The biases of attention keys are left out: the softmax cancels them, so their gradients are rounding errors, which
    AdamW normalizes to steps as large as any other.
    """
    mine, theirs = metrics(run), metrics(reference)
    assert [list(line) for line in mine] == [list(line) for line in theirs]
    for line, other in zip(mine, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    weights, others = (load_file(directory / "last" / "model.safetensors") for directory in (run, reference))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        parts = zip(weight.chunk(3), others[name].chunk(3), strict=True)  # of c_attn: queries, keys, values
        for part, (a, b) in zip("qkv", parts, strict=True):
            if not (part == "k" and name.endswith("attn.c_attn.bias")):
                torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for path in reference.glob("predictions_*"):
        assert (run / path.name).read_bytes() == path.read_bytes()


# --- equivalence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "per_pass", "passes", "strategy"),
    [
        (1, 4, 4, "auto"),
        (2, 8, 1, "ddp"),
        pytest.param(2, 2, 4, "ddp", marks=slow),
        pytest.param(2, 8, 1, "fsdp", marks=slow),
        (2, 2, 4, "fsdp"),
        pytest.param(4, 4, 1, "ddp", marks=slow),
        pytest.param(4, 1, 4, "ddp", marks=slow),
        pytest.param(4, 4, 1, "fsdp", marks=slow),
        pytest.param(4, 1, 4, "fsdp", marks=slow),
    ],
)
def test_ranks_and_micro_batches_match_one_large_batch(setting, single, ranks, per_pass, passes, strategy):
    shape = {"batch_size_training": per_pass, "gradient_accumulation_steps": passes, "parallel": strategy}
    name = f"{ranks}-{per_pass}-{passes}-{strategy}"
    assert_close(finish(setting, name, ranks, **shape), single)


@slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_fsdp_with_different_numbers_of_thoughts_per_rank(setting, ranks):
    """Up to twelve thoughts, in training and validation."""
    problems = [problem for steps in range(1, 13) for problem in make_problems(3, steps, seed=steps)]
    mixed = write_json(setting.directory / "mixed.json", problems)
    changes = {"max_latent_stage": 12, "pad_latent_to_max": False, "uniform_prob": 0.5, "resume": 11, "num_epochs": 13}
    changes |= {"train_path": mixed, "val_path": mixed, "batch_size_eval": 2}
    alone = finish(setting, f"thoughts-alone-{ranks}", 1, batch_size_training=2 * ranks, **changes)
    shared = finish(setting, f"thoughts-{ranks}", ranks, batch_size_training=2, parallel="fsdp", **changes)
    assert_close(shared, alone)
    texts = [line["generated"] for line in read_lines(shared / "predictions_13.jsonl")]
    assert {1, 12} <= {int(text[1:].split()[0]) for text in texts}


def test_lora_on_two_ranks_matches_one(setting):
    """The random initial adapters are those of rank 0."""
    changes = {"lora_rank": 2, "num_epochs": 2, "bf16": False}
    alone, shared = (finish(setting, f"adapters-{n}", n, batch_size_training=16 // n, **changes) for n in (1, 2))
    assert_close(shared, alone)


@slow
def test_fsdp_with_bf16(setting, single):
    run = finish(setting, "bf16", 2, bf16=True, parallel="fsdp", batch_size_training=8)
    losses, exact = ([line["train/loss"] for line in metrics(d) if "train/loss" in line] for d in (run, single))
    assert losses == pytest.approx(exact, rel=0.05) and losses != exact
    assert {weight.dtype for weight in load_file(run / "last" / "model.safetensors").values()} == {torch.float32}
    assert setting.run("bf16-killed", 2, Fault("kill", "step", 5), bf16=True, parallel="fsdp", batch_size_training=8)
    assert_same(finish(setting, "bf16-killed", 2, bf16=True, parallel="fsdp", batch_size_training=8), run)


@slow
@pytest.mark.parametrize(("per_pass", "passes", "strategy"), [(8, 1, "ddp"), (8, 1, "fsdp"), (2, 4, "fsdp")])
def test_ranks_and_micro_batches_match_one_large_batch_in_bf16(setting, per_pass, passes, strategy):
    """As a GPU computes it; gradients are rounded in each pass, so up to bfloat16's rounding."""
    shape = {"bf16": True, "num_epochs": 3, "max_grad_norm": None}
    runs = []
    for name, ranks, options in (
        ("bf16-alone", 1, {}),
        (f"bf16-{strategy}-{passes}", 2, {"batch_size_training": per_pass, "gradient_accumulation_steps": passes}),
    ):
        outcome = setting.run(
            name, ranks, GPUAutocast(), **shape, **options, parallel=strategy if ranks > 1 else "auto"
        )
        assert outcome.codes == [0] * ranks, outcome.output
        runs.append([line for line in metrics(setting.directory / name) if "train/loss" in line])
    for mine, theirs in zip(*runs, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-2)


class GPUAutocast:
    """Computes layer norms and losses in float32 under autocast, as a GPU does, with the policy of FSDP for a GPU."""

    def inject(self):
        for module, name in ((functional, "layer_norm"), (functional, "cross_entropy")):
            setattr(module, name, memory.in_float32(getattr(module, name)))
        parallelize.MixedPrecisionPolicy = memory.gpu_policy


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_activation_checkpointing_is_bit_identical(setting, ranks, strategy):
    shape = {"batch_size_training": 8, "parallel": strategy, "num_epochs": 2}
    runs = []
    for mode in (False, "block"):
        name = f"again-{ranks}-{strategy}-{mode}"
        outcome = setting.run(name, ranks, RecomputeShort(), gradient_checkpointing=mode, **shape)
        assert outcome.codes == [0] * ranks, outcome.output
        assert ("computed again" in outcome.output) == (mode == "block")
        runs.append(setting.directory / name)
    assert_same(*runs)


class RecomputeShort:
    """Applies activation checkpointing to passes of 4 columns or more, and prints when it does."""

    def inject(self):
        activation_checkpointing.MIN_CHECKPOINTED_COLUMNS = 4
        wrap(activation_checkpointing, "checkpoint", lambda *_: print("computed again"))


# --- choice of strategy, collectives ----------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


class Count:
    """Prints the number of collectives in an epoch of rank 0, and checks how gradients are stored."""

    def inject(self):
        import train

        wrap(train, "model_args", lambda _: self.trainer and self.check(self.trainer.parallel_model))
        wrap(train.Trainer, "all_gather_totals", lambda trainer, *_: self.check(trainer.parallel_model))
        epoch = train.Trainer.train_epoch

        def counted(trainer, number):
            self.trainer = trainer
            with Collectives() as mode:
                epoch(trainer, number)
            if parallelize.is_sharded(trainer.parallel_model):
                assert [p for p in trainer.model.parameters() if p.grad is not None] == []  # validation has the room
            trainer.processes.print(json.dumps(mode.counts))

        train.Trainer.train_epoch = counted
        for name in ("mean_loss", "predict_all"):
            self.count_in_validation(name)

    def count_in_validation(self, name: str) -> None:
        """Prints the number of times that this part of a validation gathers weights."""
        from evaluate import Validator

        function = getattr(Validator, name)

        def counted(validator, stage):
            with Collectives() as mode:
                result = function(validator, stage)
            validator.processes.print(f"{name} gathers {mode.counts['_allgather_base_']}")
            return result

        setattr(Validator, name, counted)

    def check(self, model) -> None:
        """Between and after micro-batches no gradient is stored twice (under DDP, this model has one bucket), and under
        FSDP there are no unsharded gradients."""
        if isinstance(model, DistributedDataParallel):
            storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
            assert len(storages) == 1
        for unit in parallelize.fsdp_units(model):
            for part in unit._get_fsdp_state()._fsdp_param_group.fsdp_params:
                assert part.unsharded_accumulated_grad is None
                assert not hasattr(part, "_unsharded_param") or part._unsharded_param.grad is None


@dataclass(frozen=True)
class Eight(distributed.Processes):
    """Eight ranks; another one has the smallest GPU."""

    world_size: int = 8
    smallest: int = 0

    def all_reduce_max(self, values):
        return [max(value, -self.smallest) for value in values]


def test_auto_chooses_ddp_below_half_of_the_smallest_gpu_and_fsdp_above(monkeypatch):
    monkeypatch.setattr(parallelize, "gpu_memory", lambda device: 2**60)
    model = tiny_gpt2()
    half = 16 * sum(p.numel() for p in model.parameters())
    assert choose_strategy(model, Config(), Eight(smallest=2 * half + 1)) == "ddp"
    assert choose_strategy(model, Config(), Eight(smallest=2 * half)) == "fsdp"
    assert choose_strategy(model, Config({"parallel": "ddp"}), Eight(smallest=1)) == "ddp"
    assert choose_strategy(model, Config({"parallel": "fsdp"}), Eight(smallest=2**60)) == "fsdp"
    for key in ({"lora_rank": 2}, {"compile": True}):
        assert choose_strategy(model, Config(key), Eight(smallest=1)) == "ddp"


def test_auto_is_ddp_on_a_cpu():
    assert choose_strategy(tiny_gpt2(), Config(), distributed.Processes(world_size=1)) == "ddp"


def test_fsdp_is_refused_by_an_older_torch(monkeypatch):
    monkeypatch.setattr(parallelize, "HAS_FSDP2", False)
    monkeypatch.setattr(parallelize, "gpu_memory", lambda device: 2**60)
    assert choose_strategy(tiny_gpt2(), Config(), Eight(smallest=1)) == "ddp"
    with pytest.raises(UserError, match="parallel: fsdp needs torch"):
        choose_strategy(tiny_gpt2(), Config({"parallel": "fsdp"}), Eight(smallest=2**60))


@pytest.mark.parametrize(("device", "cast"), [("cuda", False), ("cpu", True)])
def test_fsdp_with_bf16_keeps_the_residual_stream_in_float32_on_a_gpu(monkeypatch, device, cast):
    shards = {}
    monkeypatch.setattr(torch.distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(parallelize, "fully_shard", lambda module, **options: shards.update({module: options}))
    monkeypatch.setattr(parallelize, "load_from_rank0", lambda *_: None)
    model, processes = tiny_gpt2(), distributed.Processes(world_size=2, device=torch.device(device))
    parallelize.parallelize(model, model.transformer.h, "fsdp", True, processes)
    policies = [shards[block]["mp_policy"] for block in model.transformer.h]
    assert {(p.param_dtype, p.cast_forward_inputs) for p in policies} == {(torch.bfloat16, cast)}
    assert "mp_policy" not in shards[model]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_number_of_collectives_per_step(setting, strategy):
    """A small one for each step and one at the start of an epoch. Weights are gathered once in a step, in 3
    units: two blocks and the rest. 3 steps of two, two and one micro-batches have three thoughts each."""
    shape = {"num_epochs": 2, "resume": 1, "max_latent_stage": 1, "c_thought": 3, "parallel": strategy}
    shape |= {"batch_size_training": 4, "gradient_accumulation_steps": 2, "uniform_prob": 0}
    outcome = setting.run(f"counted-{strategy}", 2, Count(), **shape)
    assert outcome.codes == [0, 0], outcome.output
    assert "FutureWarning" not in outcome.output
    counts = Counter(json.loads(re.search(r"^{.*}$", outcome.output, re.MULTILINE)[0]))
    steps, passes = 3, 2 + 2 + 1
    expected = {"allreduce_": steps} if strategy == "ddp" else {"_allgather_base_": 3 * steps}
    expected |= {"allgather_": steps + 1, "_reduce_scatter_base_": 0 if strategy == "ddp" else 3 * passes}
    assert {name: counts[name] for name in expected} == expected
    # Weights are gathered before a validation and kept: its ranks make different numbers of passes.
    assert "mean_loss gathers 0\n" in outcome.output and "predict_all gathers 0\n" in outcome.output


# --- continued by others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), pytest.param("fsdp", "ddp", marks=slow)])
def test_resume_with_another_parallel_strategy(setting, single, before, after):
    name, shape = f"{before}-{after}", {"batch_size_training": 8}
    outcome = setting.run(name, 2, Fault("sigterm", "step", 5), parallel=before, **shape)
    assert outcome.codes == [143, 143]
    assert_close(finish(setting, name, 2, parallel=after, **shape), single)


def test_resume_on_fewer_ranks_with_the_same_effective_batch(setting, single):
    """One rank takes over from two and accumulates two micro-batches."""
    outcome = setting.run("fewer", 2, Fault("sigterm", "step", 5), parallel="fsdp", batch_size_training=8)
    assert outcome.codes == [143, 143]
    assert_close(finish(setting, "fewer", 1, batch_size_training=8, gradient_accumulation_steps=2), single)


@slow
@pytest.mark.parametrize(("before", "after", "strategy"), [(1, 2, "fsdp"), (2, 1, "auto"), (2, 4, "fsdp")])
def test_resume_on_another_number_of_ranks(setting, before, after, strategy):
    """From there on it equals one rank with the same effective batch."""
    name, shape = f"{before}-{after}", {"batch_size_training": 4}
    for run in (name, f"{name}-alone"):
        outcome = setting.run(run, before, Fault("sigterm", "step", 3), parallel="fsdp", **shape)
        assert outcome.codes == [143] * before
    outcome = setting.run(name, after, parallel=strategy, **shape)
    assert outcome.codes == [0] * after, outcome.output
    assert f"saved by {before} processes, so the random streams are seeded anew" in outcome.output
    alone = setting.directory / f"{name}-alone"
    config = yaml.safe_load((alone / "config.yaml").read_text()) | {"batch_size_training": 4 * after}
    (alone / "config.yaml").write_text(yaml.safe_dump(config))  # or the change would be refused
    assert_close(setting.directory / name, finish(setting, alone.name, 1, batch_size_training=4 * after))


@slow
def test_resume_from_one_rank_to_ddp_to_fsdp_and_back(setting, single):
    shapes = [(1, 16, "auto"), (2, 8, "ddp"), (2, 8, "fsdp"), (1, 16, "auto")]
    for step, (ranks, per_pass, strategy) in zip((3, 5, 7, None), shapes, strict=True):
        fault = Fault("sigterm", "step", step) if step else None
        outcome = setting.run("chain", ranks, fault, parallel=strategy, batch_size_training=per_pass)
        assert outcome.codes == [143 if step else 0] * ranks, outcome.output
    assert_close(setting.directory / "chain", single)


# --- multi-node -------------------------------------------------------------------------------------------------------


def two_nodes(launcher: list[str], programs: list[list[str]], **variables: str) -> list[str]:
    """The outputs of two torchrun agents that run a program each, as on two nodes; both must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    agents = []
    for node, program in enumerate(programs):
        options = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1", *launcher]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *program]
        agents.append(subprocess.Popen(command, **pipes))
    try:
        outputs = [agent.communicate(timeout=200)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    return outputs


SHAPE = {"batch_size_training": 4, "gradient_accumulation_steps": 2, "parallel": "fsdp"}


WATCHED = """
import os, runpy, sys
_, root, folder, *words = sys.argv

def tell(event, arguments):
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.symlink")
    changes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and str(arguments[0]).startswith(folder):
        os.write(1, f"wrote {arguments[0]}\\n".encode())

sys.addaudithook(tell)
sys.path.insert(0, root)
sys.argv = ["run.py", *words]
runpy.run_path(f"{root}/run.py", run_name="__main__")
"""


@slow
@pytest.mark.timeout(240)
def test_only_rank_0_of_two_nodes_writes_files(setting, single):
    launcher = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    (setting.directory / "watched.py").write_text(WATCHED)
    words = [str(setting.directory / "watched.py"), str(ROOT), str(setting.directory), *setting.words("nodes", **SHAPE)]
    outputs = two_nodes(launcher, [words, words])
    assert_close(setting.directory / "nodes", single)
    assert "wrote" in outputs[0] and "wrote" not in outputs[1]
    assert "done in" in outputs[0] and "done in" not in outputs[1]


@slow
@pytest.mark.timeout(240)
def test_two_nodes_restart_after_a_worker_dies(setting, single):
    launcher = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--max-restarts", "2"]
    fault = Fault("kill", "step", 5, rank=1, once=str(setting.directory / "struck"))
    program = [
        str(ROOT / "tests" / "helpers" / "faults.py"),
        json.dumps(asdict(fault)),
        *setting.words("restarted", **SHAPE),
    ]
    outputs = two_nodes(launcher, [program, program], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert Path(fault.once).exists() and "resuming" in "".join(outputs)
    assert_close(setting.directory / "restarted", single)


def test_gpu_is_selected_by_local_rank(monkeypatch):
    """Global rank 5 may be local rank 1."""
    taken = []
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(HashStore(), 5, 8)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: taken.append(backend))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: taken.append(f"cuDNN {on}"))
    processes = distributed.init_distributed()
    assert (processes.rank, processes.world_size, str(processes.device)) == (5, 8, "cuda:1")
    assert [str(value) for value in taken] == ["cuda:1", "cuDNN False", "nccl"]
