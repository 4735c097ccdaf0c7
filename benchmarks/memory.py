"""Simulate the peak GPU memory of a training step, by part, for models and numbers of GPUs that are not available.

    python benchmarks/memory.py --model llama-8b --gpus 8 --strategy fsdp --bf16
    python benchmarks/memory.py --model FOLDER --gpus 4 --strategy ddp --bf16 --batch 32 --length 512 --thoughts 0 6
    python benchmarks/memory.py --model gpt2 --bf16 --device cuda      compare the simulation with a real GPU

The unmodified training code (Coconut, parallelize, AdamW) runs on fake tensors: torch's FakeTensorMode
tracks shapes, its fake process group replaces collectives, and its memory trackers sum what is alive. Nothing large is
allocated, so a CPU is enough.

Weights are what a GPU holds between steps; gathered weights are temporary copies (all-gathered under fsdp, in bfloat16
under autocast); gradients include those that wait for the remaining passes; activations are the rest. Fragmentation of
the allocator and the CUDA context (about 0.5 GiB) come on top.
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
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut import Coconut, plan_batch
from components import distributed, parallelize

START, END, LATENT, EOS = 1, 2, 3, 0  # arbitrary tokens
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
    """Compute CPU tensors with the operations of a GPU, which save other tensors for the backward pass.

    Attention is memory-efficient attention, dropout saves a mask of bytes, and autocast keeps in float32 what it does
    on a GPU, so that FSDP need not cast the inputs of blocks.
    """
    with ExitStack() as patches:
        patches.enter_context(patch.object(F, "scaled_dot_product_attention", efficient_attention))
        patches.enter_context(patch.object(F, "dropout", byte_dropout))
        for module, name in ((F, "layer_norm"), (F, "cross_entropy"), (torch, "pow")):
            patches.enter_context(patch.object(module, name, in_float32(getattr(module, name))))
        patches.enter_context(patch.object(parallelize, "MixedPrecisionPolicy", gpu_policy))
        yield


def gpu_policy(**options) -> MixedPrecisionPolicy:
    """Return the policy of FSDP that `parallelize` chooses on a GPU."""
    return MixedPrecisionPolicy(**options | {"cast_forward_inputs": False})


def in_float32(function: Callable) -> Callable:
    """Wrap a function to compute in float32 under autocast."""

    def call(*tensors, **options):
        if torch.is_autocast_enabled("cpu"):
            tensors = (t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)
        return function(*tensors, **options)

    return call


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """F.scaled_dot_product_attention by the kernel for masks on a GPU, (batch, heads, columns, size) each."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:  # (batch, 1, columns, all columns); the kernel needs a float mask with aligned rows
        size = attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool or attn_mask.stride(-2) % 8:
            attn_mask = query.new_zeros(*attn_mask.shape[:-1], size + -size % 8)[..., :size]
        attn_mask = attn_mask.expand(*query.shape[:-1], size)
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    return operation(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def byte_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout as on a GPU."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


class WholeTracker:
    """A memory tracker that records only the peak of the whole model, not of each module (which is slow).

    Tensors with the shape of a weight are counted as copies of weights before the backward pass, and as gradients in
    it: torch's trackers recognize those of fsdp, but not the copies of autocast and gradients held by autograd.
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
        """Record the shapes of the weights, and of their transposes (gradients of matmuls)."""
        shapes = [p.shape for p in model.parameters()]
        self.shapes = frozenset([*shapes, *(shape[::-1] for shape in shapes)])

    def restart(self) -> None:
        """Reset the peak and the module statistics."""
        self.reset_mod_stats()
        self._peak_mem.clear()
        self._peak_mem_snap.clear()

    def footprint(self) -> Footprint:
        """Return the peak by part."""
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
    """Tracker for one process and ddp."""


class ShardTracker(WholeTracker, FSDPMemTracker):
    """Tracker for fsdp."""

    copies, gradients = "Unsharded Param", "Unsharded Grad"


@contextmanager
def fake_processes(world_size: int) -> Iterator[distributed.Processes]:
    """Simulate rank 0 of several processes; collectives transfer nothing.

    The model stays on the meta device, and weights are not broadcast. DDP's reducer is prevented from reading tensors
    (to compare weights among ranks and rebuild its buckets).
    """
    ddp = "torch.nn.parallel.distributed."
    with ExitStack() as patches:
        patches.enter_context(patch.object(nn.Module, "to", lambda module, *_: module))
        patches.enter_context(patch.multiple(parallelize, to_meta=Mock(), load_from_rank0=Mock()))
        patches.enter_context(patch.object(parallelize, "DistributedDataParallel", UnreducedDDP))
        patches.enter_context(patch.object(dist.Reducer, "_rebuild_buckets", lambda _: False))
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            patches.enter_context(patch(ddp + name))
        if world_size > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
            patches.callback(dist.destroy_process_group)
            mesh = dist.init_device_mesh("cpu", (world_size,))  # needs real tensors, so it is created here
            patches.enter_context(patch.object(dist, "init_device_mesh", lambda *_: mesh))
        yield distributed.Processes(world_size=world_size)


class UnreducedDDP(nn.parallel.DistributedDataParallel):
    """DDP whose gradient buckets are not reduced."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, self.no_reduction)

    @staticmethod
    def no_reduction(_, bucket):
        """Return the bucket unchanged, in place of an all-reduce."""
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


class Job:
    """A model, distributed as in training, and its optimizer steps."""

    def __init__(self, config: PretrainedConfig, args, processes: distributed.Processes):
        self.bf16, self.processes = args.bf16, processes
        with processes.device:
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.coconut = Coconut(lm, LATENT, START, END, EOS).train()
        if args.gradient_checkpointing:
            self.coconut.checkpoint_activations(args.gradient_checkpointing)
        blocks = self.coconut.blocks
        self.model = parallelize.parallelize(self.coconut, blocks, args.strategy, self.bf16, processes)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def make_batch(self, rows: int, columns: int, thoughts: int, answer: int) -> dict:
        """Create a batch of (rows, columns) tokens without padding: question, thoughts, supervised answer."""
        end = columns - answer
        with unset_fake_temporarily():  # the plan reads the tokens
            input_ids = torch.full((rows, columns), START)
            input_ids[:, end - thoughts : end] = LATENT
            attention_mask, labels = torch.ones_like(input_ids), torch.full_like(input_ids, -100)
            labels[:, end:] = START
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            return {**batch, "plan": plan_batch(**batch, latent_token_id=LATENT)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Run a forward pass, as the Trainer does."""
        with torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.model(**batch).loss

    def step(self, batch: dict[str, Tensor]) -> None:
        """Run an optimizer step, as the Trainer does."""
        self.loss(batch).backward()
        parallelize.reshard(self.model)
        self.optimizer.step()
        parallelize.zero_grad(self.model)


def simulate(config: PretrainedConfig, args, thoughts: int, gpu: bool = True) -> Footprint:
    """Simulate the peak of a training step by part, with the kernels of a GPU or CPU."""
    kernels = gpu_kernels() if gpu else nullcontext()
    with fake_processes(args.gpus) as processes, FakeTensorMode(allow_non_fake_inputs=True), kernels:
        job = Job(config, args, processes)
        job.step(job.make_batch(1, 8, 0, 1))  # creates the optimizer state
        sharded = parallelize.is_sharded(job.model)
        tracker = ShardTracker(job.model, job.optimizer) if sharded else PlainTracker()
        tracker.watch(job.model)
        tracker.track_external(job.model, job.optimizer)
        batch = job.make_batch(args.batch, args.length, thoughts, args.answer)
        with tracker:
            job.step(batch)
        return tracker.footprint()


def measure(config: PretrainedConfig, args, thoughts: int) -> int:
    """Measure the peak of the same step on a real GPU, in bytes of tensors, without those that were there before."""
    before = torch.cuda.memory_allocated()
    job = Job(config, args, distributed.Processes(device=torch.device("cuda")))
    batch = job.make_batch(args.batch, args.length, thoughts, args.answer)
    job.step(batch)  # warm-up; creates the optimizer state
    torch.cuda.reset_peak_memory_stats()
    job.step(batch)
    return torch.cuda.max_memory_allocated() - before


def parse(argv: list[str] | None = None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="override the number of layers")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="with several GPUs")
    parser.add_argument("--thoughts", type=int, nargs="+", default=[0, 6])
    parser.add_argument("--batch", type=int, default=8, help="sequences per GPU")
    parser.add_argument("--length", type=int, default=160, help="tokens per sequence")
    parser.add_argument("--answer", type=int, help="supervised tokens per sequence (default: a fifth)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", choices=("mlp", "block"))
    parser.add_argument("--device", choices=("cuda",), help="also measure the step on a real GPU")
    args = parser.parse_args(argv)
    args.answer = args.answer or args.length // 5
    if args.device and args.gpus > 1:
        parser.error("--device measures one GPU; leave out --gpus")
    return args


def model_config(args) -> PretrainedConfig:
    """Return the architecture selected on the command line."""
    named = MODELS.get(args.model)
    config = named() if named else AutoConfig.from_pretrained(args.model)
    if args.layers:
        config.num_hidden_layers = args.layers
    return config


def main() -> None:
    """Simulate, and measure if a device is given; print a Markdown table in GiB."""
    args = parse()
    config, names = model_config(args), [field.name for field in fields(Footprint)]
    print(f"{' '.join(sys.argv[1:])}\n")
    print(f"| thoughts | {' | '.join(names)} | peak | {args.device or ''} |")
    print("|---" * (len(names) + 3) + "|")
    for thoughts in args.thoughts:
        found = simulate(config, args, thoughts)
        measured = f"{measure(config, args, thoughts) / GIB:.2f}" if args.device else ""
        parts = " | ".join(f"{getattr(found, name) / GIB:.2f}" for name in names)
        print(f"| {thoughts} | {parts} | **{found.total / GIB:.2f}** | {measured} |", flush=True)


if __name__ == "__main__":
    main()
