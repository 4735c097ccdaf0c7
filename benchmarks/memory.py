"""The memory that a training step takes at its peak on each GPU, by part, for models and machines that are not here.

    python benchmarks/memory.py --model llama-8b --gpus 8 --strategy fsdp --bf16
    python benchmarks/memory.py --model FOLDER --gpus 4 --strategy ddp --bf16 --batch 32 --length 512 --thoughts 0 6
    python benchmarks/memory.py --model gpt2 --bf16 --device cuda      the simulation against a GPU that is here

The training code runs as it is (Coconut, parallelize, AdamW), on tensors without content: torch's
FakeTensorMode knows the shape and size of all that a step makes, its fake process group the size of all that processes
exchange, and its memory trackers sum up what lives at the same time. Nothing large is allocated, so a CPU is enough.

Weights are what a GPU holds from step to step; gathered weights are copies for arithmetic, whole under fsdp, in
bfloat16 under autocast; gradients include those that wait for the passes that are still to come; activations are the
rest. What the allocator loses between its blocks, and CUDA's own half gigabyte or so, come on top.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut import Coconut, plan_batch
from components import distributed, parallelize

START, END, LATENT, EOS = 1, 2, 3, 0  # any tokens will do
GIB = 2**30

LLAMA = {"vocab_size": 128259, "num_key_value_heads": 8, "max_position_embeddings": 131072}  # with three markers
LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192}
LLAMA_3B = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192}
LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
MODELS = {
    "gpt2": lambda: GPT2Config(vocab_size=50260),
    "llama-1b": lambda: LlamaConfig(**LLAMA, **LLAMA_1B, tie_word_embeddings=True),  # Llama 3.2
    "llama-3b": lambda: LlamaConfig(**LLAMA, **LLAMA_3B, tie_word_embeddings=True),  # Llama 3.2
    "llama-8b": lambda: LlamaConfig(**LLAMA, **LLAMA_8B, tie_word_embeddings=False),  # Llama 3
}


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU at the peak of a training step, by part; see the module's docstring."""

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(astuple(self))


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Has tensors on the CPU computed as a GPU would, whose kernels keep other things for the backward pass.

    Attention is the memory-efficient one, dropout keeps a mask of bytes, and autocast leaves in float32 what it does on
    a GPU.
    """
    with ExitStack() as patches:
        patches.enter_context(patch.object(F, "scaled_dot_product_attention", efficient_attention))
        patches.enter_context(patch.object(F, "dropout", byte_dropout))
        for module, name in ((F, "layer_norm"), (F, "cross_entropy"), (torch, "pow")):
            patches.enter_context(patch.object(module, name, in_float32(getattr(module, name))))
        yield


def in_float32(function: Callable) -> Callable:
    """A function of tensors that computes in float32 under autocast."""

    def call(*tensors, **options):
        if torch.is_autocast_enabled("cpu"):
            tensors = (t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)
        return function(*tensors, **options)

    return call


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """F.scaled_dot_product_attention by the kernel that a GPU takes for a mask, (batch, heads, columns, size) each."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:  # (batch, 1, columns, all columns), in float and with aligned rows for this kernel
        size = attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool or attn_mask.stride(-2) % 8:
            attn_mask = query.new_zeros(*attn_mask.shape[:-1], size + -size % 8)[..., :size]
        attn_mask = attn_mask.expand(*query.shape[:-1], size)
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    return operation(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def byte_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout as a GPU computes it."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


class WholeTracker:
    """A memory tracker that records the peak of the whole alone, not of each module, which takes most of its time.

    Tensors of a weight's shape are reported as what they are: copies of weights before the backward pass, gradients in
    it. Torch's trackers know this of fsdp's own alone, not of autocast's copies and of gradients that autograd holds.
    """

    copies, gradients = "Other", "Gradient"  # names of torch's categories
    shapes: frozenset = frozenset()

    def _update_peak_stats(self, peak_state) -> None:
        for device, now in self._curr_mem_snap.items():
            if now["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

    def _track(self, reftype, t: Tensor) -> None:
        if t.shape in self.shapes and reftype.value in ("Activation", "Temp"):
            reftype = self._ref_class(self.copies if reftype.value == "Activation" else self.gradients)
        super()._track(reftype, t)

    def watch(self, model: nn.Module) -> None:
        """Notes the shapes of the weights (and of their transposes, which matrix products make gradients of)."""
        shapes = [p.shape for p in model.parameters()]
        self.shapes = frozenset([*shapes, *(shape[::-1] for shape in shapes)])

    def restart(self) -> None:
        """Forgets the peak so far, and the passes, which it would not see again otherwise."""
        self.reset_mod_stats()
        self._peak_mem.clear()
        self._peak_mem_snap.clear()

    def footprint(self) -> Footprint:
        """The peak by part."""
        [peak] = self._peak_mem_snap.values()
        parts = dict.fromkeys(("weights", "gathered", "gradients", "optimizer", "activations"), 0)
        for category, size in peak.items():
            if category != "Total":
                parts[PARTS.get(category.value, "activations")] += size
        return Footprint(**parts)


PARTS = {  # torch's categories
    "Parameter": "weights",
    "Sharded Param": "weights",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
    "Other": "gathered",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
}


class PlainTracker(WholeTracker, MemTracker):
    """For one process and ddp."""


class ShardTracker(WholeTracker, FSDPMemTracker):
    """For fsdp."""

    copies, gradients = "Unsharded Param", "Unsharded Grad"


@contextmanager
def fake_processes(world_size: int) -> Iterator[distributed.Processes]:
    """The first of several processes, without the others: what they exchange has the right size and no content.

    The model stays where it is made, and its values, which it does not have, are not handed out. DDP's reducer is kept
    from looking into tensors: to compare weights among processes, and to order its buckets anew.
    """
    ddp = "torch.nn.parallel.distributed."
    with ExitStack() as patches:
        patches.enter_context(patch.object(nn.Module, "to", lambda module, *_: module))
        patches.enter_context(patch.multiple(parallelize, to_meta=Mock(), load_from_rank0=Mock()))
        patches.enter_context(patch.object(parallelize, "DistributedDataParallel", Alone))
        patches.enter_context(patch.object(dist.Reducer, "_rebuild_buckets", lambda _: False))
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            patches.enter_context(patch(ddp + name))
        if world_size > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
            patches.callback(dist.destroy_process_group)
            mesh = dist.init_device_mesh("cpu", (world_size,))  # of tensors with content, so it is made here
            patches.enter_context(patch.object(dist, "init_device_mesh", lambda *_: mesh))
        yield distributed.Processes(world_size=world_size)


class Alone(nn.parallel.DistributedDataParallel):
    """DDP whose buckets of gradients come back as they are."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, self.come_back)

    @staticmethod
    def come_back(_, bucket):
        """The hook that DDP calls in place of an exchange among processes."""
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


class Job:
    """A model in training as `parallelize` divides it, and the steps that it makes."""

    def __init__(self, config: PretrainedConfig, arguments, processes: distributed.Processes):
        self.bf16, self.processes = arguments.bf16, processes
        with processes.device:
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.coconut = Coconut(lm, LATENT, START, END, EOS).train()
        if arguments.gradient_checkpointing:
            self.coconut.checkpoint_activations(arguments.gradient_checkpointing)
        blocks, strategy = self.coconut.blocks, arguments.strategy
        self.model = parallelize.parallelize(self.coconut, blocks, strategy, self.bf16, processes)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def make_batch(self, rows: int, columns: int, thoughts: int, answer: int) -> dict:
        """A batch of (rows, columns) tokens without padding: a question, its thoughts, and a supervised answer."""
        end = columns - answer
        with unset_fake_temporarily():  # the plan looks at the tokens
            input_ids = torch.full((rows, columns), START)
            input_ids[:, end - thoughts : end] = LATENT
            attention_mask, labels = torch.ones_like(input_ids), torch.full_like(input_ids, -100)
            labels[:, end:] = START
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            return {**batch, "plan": plan_batch(**batch, latent_token_id=LATENT)}

    def step(self, batch: dict[str, Tensor]) -> None:
        """An optimizer step, as `Trainer` makes it."""
        with torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.model(**batch).loss
        loss.backward()
        parallelize.reshard(self.model)
        self.optimizer.step()
        parallelize.zero_grad(self.model)


def simulate(config: PretrainedConfig, arguments, thoughts: int, gpu: bool = True) -> Footprint:
    """The peak of a training step by part, with a GPU's kernels or the CPU's."""
    kernels = gpu_kernels() if gpu else nullcontext()
    with fake_processes(arguments.gpus) as processes, FakeTensorMode(allow_non_fake_inputs=True), kernels:
        job = Job(config, arguments, processes)
        job.step(job.make_batch(1, 8, 0, 1))  # makes the optimizer's state
        sharded = parallelize.is_sharded(job.model)
        tracker = ShardTracker(job.model, job.optimizer) if sharded else PlainTracker()
        tracker.watch(job.model)
        tracker.track_external(job.model, job.optimizer)
        batch = job.make_batch(arguments.batch, arguments.length, thoughts, arguments.answer)
        with tracker:
            job.step(batch)
        return tracker.footprint()


def measure(config: PretrainedConfig, arguments, thoughts: int) -> int:
    """The peak of the same step on a GPU that is here, in bytes of tensors."""
    job = Job(config, arguments, distributed.Processes(device=torch.device("cuda")))
    batch = job.make_batch(arguments.batch, arguments.length, thoughts, arguments.answer)
    job.step(batch)  # a warm-up, which also makes the optimizer's state
    torch.cuda.reset_peak_memory_stats()
    job.step(batch)
    return torch.cuda.max_memory_allocated()


def parse(words: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="as many layers as this, instead of the model's")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="for several GPUs")
    parser.add_argument("--thoughts", type=int, nargs="+", default=[0, 6])
    parser.add_argument("--batch", type=int, default=8, help="sequences on each GPU")
    parser.add_argument("--length", type=int, default=160, help="tokens of a sequence")
    parser.add_argument("--answer", type=int, help="supervised tokens of a sequence (default: a fifth of them)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", choices=("mlp", "block"))
    parser.add_argument("--device", choices=("cuda",), help="also make the step, on a GPU that is here")
    arguments = parser.parse_args(words)
    arguments.answer = arguments.answer or arguments.length // 5
    if arguments.device and arguments.gpus > 1:
        parser.error("--device makes a step on one GPU: leave --gpus out")
    return arguments


def model_config(arguments) -> PretrainedConfig:
    """The architecture that the command line names."""
    named = MODELS.get(arguments.model)
    config = named() if named else AutoConfig.from_pretrained(arguments.model)
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    return config


def main() -> None:
    """Simulates, and measures where a device is given; prints a Markdown table in GiB."""
    arguments = parse()
    config, names = model_config(arguments), [field.name for field in fields(Footprint)]
    print(f"{' '.join(sys.argv[1:])}\n")
    print(f"| thoughts | {' | '.join(names)} | peak | {arguments.device or ''} |")
    print("|---" * (len(names) + 3) + "|")
    for thoughts in arguments.thoughts:
        found = simulate(config, arguments, thoughts)
        measured = f"{measure(config, arguments, thoughts) / GIB:.2f}" if arguments.device else ""
        parts = " | ".join(f"{getattr(found, name) / GIB:.2f}" for name in names)
        print(f"| {thoughts} | {parts} | **{found.total / GIB:.2f}** | {measured} |", flush=True)


if __name__ == "__main__":
    main()
