"""Compare one training step of Coconut with its lower bound, side by side.

    python benchmarks/train_step.py                                          GPT-2 small, the paper's shape
    python benchmarks/train_step.py --layers 4 --width 256 --batch 32 --question 360 --answer 48
    python benchmarks/train_step.py --device cuda --bf16 --sweep             thoughts 0 to 16, batch 1 to 64
    python benchmarks/train_step.py --launches                               count operations of a GPU, on any machine
    python benchmarks/train_step.py --launches --variants compiled           the same of compiled passes; takes minutes

Variants, forward and backward, all with the same weights and the same batch (on the CPU):
  floor      the plain model, with transformers' own activation functions, over the padded batch, with thoughts as
             ordinary tokens and the vocabulary projection only at supervised positions: no thoughts are fed back
  hf         the plain transformers call with labels, which projects every position onto the vocabulary
  ours       Coconut
  unfused    Coconut with transformers' own activation functions: the same arithmetic as the floor's, plus thoughts
  compiled   Coconut with `compile: True`
  graphs     the same with CUDA graphs (experimental, only on request)
  recompute  naive Coconut over the floor's model: the whole prefix is recomputed for each thought, without a cache
Times are CPU seconds of the process (CUDA: events) after a warm-up step. Ratios are computed within each repeat;
median, min and max over repeats are reported. Memory is the peak of a separate step above the level before it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import memory  # noqa: E402
from coconut import Coconut, autocast_dtype  # noqa: E402
from components.kv_cache import causal_mask  # noqa: E402

START, END, LATENT, EOS, VOCABULARY = 50257, 50258, 50259, 50256, 50260


def make_model(args) -> nn.Module:
    """Create a random GPT-2 (small by default) or a 135M-parameter Llama, without dropout."""
    torch.manual_seed(0)
    if args.model == "llama":
        shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=1536, tie_word_embeddings=True, **shape)
        return LlamaForCausalLM(config)
    shape = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 64}
    config = GPT2Config(vocab_size=VOCABULARY, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **shape)
    return GPT2LMHeadModel(config)


def make_batch(size: int, question: int, thoughts: int, answer: int) -> dict[str, Tensor]:
    """Create a batch as the collator does, (size, question + 2 + thoughts + answer) tokens.

    Question lengths vary from 70 % up, padded on the left; answers likewise, padded on the right.
    """
    generator = torch.Generator().manual_seed(0)
    length = question + 2 + thoughts + answer
    input_ids = torch.randint(0, EOS, (size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row in range(size):
        left, right = (int(n * 0.3 * torch.rand((), generator=generator)) for n in (question, answer))
        left, right = (0, 0) if row == 0 else (left, right)
        attention_mask[row, :left] = 0
        attention_mask[row, length - right :] = 0
        labels[row, question + 2 + thoughts : length - right] = 0
    if thoughts:
        input_ids[:, question] = START
        input_ids[:, question + 1 : question + 1 + thoughts] = LATENT
        input_ids[:, question + 1 + thoughts] = END
    input_ids[attention_mask == 0] = EOS
    labels = torch.where(labels == 0, input_ids, labels)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "position_ids": position_ids}


def to_device(lm: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Move the batch to the model's device, with a causal mask; return it with rows, columns and targets (supervised,).

    Without a host sync, as in Coconut.
    """
    labels = batch["labels"]
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # on the CPU, where the batch is
    supervised = (rows, columns, labels[rows, columns + 1])
    inputs = {key: batch[key].to(lm.device, non_blocking=True) for key in batch if key != "labels"}
    dtype = autocast_dtype(lm.device) or lm.dtype
    inputs["attention_mask"] = causal_mask(inputs["attention_mask"], labels.shape[1], dtype)
    return inputs, tuple(t.to(lm.device, non_blocking=True) for t in supervised)


@cache
def wrap(lm: nn.Module, fused: bool = True, **compile_options) -> Coconut:
    """Return Coconut over a copy of the model that shares its weights (cached).

    A copy, because Coconut fuses the activation functions of the model that it is given, and the floor keeps its own.
    compile_options: those of torch.compile; none for eager passes.
    """
    weights = {id(tensor): tensor for tensor in (*lm.parameters(), *lm.buffers())}
    with nullcontext() if fused else patch("coconut.fuse_gelu"):
        model = Coconut(deepcopy(lm, weights), LATENT, START, END, EOS)
    if compile_options:
        model.compile(**compile_options)
    return model


def supervised_loss(lm: nn.Module, hidden: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross entropy of states (batch, length, hidden), projected only at supervised positions."""
    logits = wrap(lm).logits(hidden[rows, columns])  # (supervised, vocabulary), in float32
    return F.cross_entropy(logits, targets)


def floor(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute the loss without thoughts."""
    inputs, supervised = to_device(lm, batch)
    return supervised_loss(lm, lm.base_model(**inputs, use_cache=False).last_hidden_state, *supervised)


def hf(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute the loss with transformers."""
    inputs = {key: value.to(lm.device, non_blocking=True) for key, value in batch.items()}
    return lm(**inputs, use_cache=False).loss


def ours(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute Coconut's loss."""
    return wrap(lm)(**batch).loss


def unfused(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute Coconut's loss with the model's own activation functions."""
    return wrap(lm, fused=False)(**batch).loss


def compiled(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute Coconut's loss with compiled passes."""
    return wrap(lm, mode="default")(**batch).loss


def graphs(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute Coconut's loss with compiled passes and CUDA graphs."""
    return wrap(lm, mode="reduce-overhead")(**batch).loss


def recompute(lm: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute Coconut's loss naively, recomputing the prefix for each thought (latents must share columns)."""
    inputs, supervised = to_device(lm, batch)
    embeds = lm.get_input_embeddings()(inputs["input_ids"])  # (batch, length, hidden)
    mask, position_ids = inputs["attention_mask"], inputs["position_ids"]
    thoughts = (batch["input_ids"] == LATENT).any(0).nonzero().flatten().tolist()
    for end in [*thoughts, embeds.shape[1]]:
        prefix = {"attention_mask": mask[:, :, :end, :end], "position_ids": position_ids[:, :end]}
        hidden = lm.base_model(inputs_embeds=embeds[:, :end], **prefix, use_cache=False).last_hidden_state
        if end < embeds.shape[1]:
            embeds = torch.cat([embeds[:, :end], hidden[:, -1:], embeds[:, end + 1 :]], dim=1)
    return supervised_loss(lm, hidden, *supervised)


VARIANTS = {"floor": floor, "hf": hf, "ours": ours, "unfused": unfused}
VARIANTS |= {"compiled": compiled, "graphs": graphs, "recompute": recompute}


def retain_memory(retain: bool) -> None:
    """Keep freed memory in the process, or not.

    On the CPU, zeroing fresh pages takes up to half of a step, erratically: retain memory for times, not for peaks.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0 if retain else 65536)  # M_MMAP_MAX: number of separately mapped tensors
    libc.mallopt(-3, 131072)  # M_MMAP_THRESHOLD in bytes; grows by itself unless set
    libc.mallopt(-1, -1 if retain else 131072)  # M_TRIM_THRESHOLD: -1 for never


def resident(key: str) -> int:
    """Read a memory size from /proc/self/status, in bytes (Linux)."""
    return 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])


def memory_of(step, lm: nn.Module, device: str) -> int:
    """Measure the peak memory of a step above the level before it, in bytes (CUDA allocator or resident set)."""
    lm.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    retain_memory(False)
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory, which would hide the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    peak = resident("VmHWM")
    retain_memory(True)
    return peak - before


def run_step(variant, lm: nn.Module, batch: dict[str, Tensor], args) -> Tensor:
    """Run one forward and backward pass; return the loss (scalar)."""
    lm.zero_grad(set_to_none=True)
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
        loss = variant(lm, batch)
    loss.backward()
    return loss.detach()


def seconds_of(function, device: str) -> float:
    """Time a call: CPU seconds of the process, or GPU time between two events."""
    if device == "cpu":
        started = time.process_time()
        function()
        return time.process_time() - started
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    function()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / 1000


def compare(lm: nn.Module, batch: dict[str, Tensor], args) -> list[dict]:
    """Measure all variants; return a row each: seconds, ratio to the floor (median, least, most), memory, tokens/s."""
    names = dict.fromkeys(["floor", *args.variants])
    steps = {name: partial(run_step, VARIANTS[name], lm, batch, args) for name in names}
    losses = {name: step().item() for name, step in steps.items()}  # doubles as warm-up
    check_losses(losses, args.bf16)
    memory = {name: memory_of(step, lm, args.device) for name, step in steps.items()}
    rounds = []
    for number in range(args.repeats):  # rotate the order: each variant affects the next
        turn = number % len(steps)
        order = [*steps][turn:] + [*steps][:turn]
        rounds.append({name: seconds_of(steps[name], args.device) for name in order})
    tokens, rows = int(batch["attention_mask"].sum()), []
    for name in steps:
        seconds = statistics.median(measured[name] for measured in rounds)
        ratios = sorted(measured[name] / measured["floor"] for measured in rounds)
        row = {"variant": name, "seconds": seconds, "ratio": statistics.median(ratios), "least": ratios[0]}
        row |= {"most": ratios[-1], "memory_mib": memory[name] / 2**20, "memory_ratio": memory[name] / memory["floor"]}
        rows.append(row | {"tokens_per_second": tokens / seconds})
    return rows


def check_losses(losses: dict[str, float], bf16: bool) -> None:
    """Assert that all variants with thoughts compute the same loss."""
    values = [value for name, value in losses.items() if name not in ("floor", "hf")] or [0.0]
    assert max(values) - min(values) <= (2e-2 if bf16 else 1e-4) * max(values), f"losses differ: {losses}"


def show(rows: list[dict], title: str) -> None:
    """Print rows as a Markdown table."""
    print(f"\n{title}\n")
    print("| variant | ratio to floor | least .. most | memory ratio | s/step | tokens/s |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['variant']} | {r['ratio']:.2f} | {r['least']:.2f} .. {r['most']:.2f} | {r['memory_ratio']:.2f} "
            f"| {r['seconds']:.3f} | {r['tokens_per_second']:.0f} |",
            flush=True,
        )


FREE = ("device", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view")


def launches(schema: torch.FunctionSchema) -> bool:
    """Return whether an operation launches a kernel: all do but views, and those that create a tensor unfilled."""
    aliases = [argument.alias_info for argument in schema.arguments]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and schema.name.removeprefix("aten::") not in FREE


class Launches(TorchDispatchMode):
    """Count by name the operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._opname] += launches(function._schema)
        return function(*args, **(kwargs or {}))


def count_launches(thoughts: int, layers: int = 12) -> Counter:
    """Count by name what a forward and backward pass of GPT-2 in bf16, with dropout, launches on a GPU.

    Simulated by memory.py: attention is one operation, forward and backward. An operation may launch several kernels.
    """
    given = memory.parse(["--bf16", "--layers", str(layers)])
    with memory.fake_processes(1) as processes, FakeTensorMode(allow_non_fake_inputs=True), memory.gpu_kernels():
        job = memory.Job(memory.model_config(given), given, processes)
        batch = job.make_batch(given.batch, given.length, thoughts, given.answer)
        with Launches() as mode:
            job.loss(batch).backward()
    return mode.counts


def show_launches() -> None:
    """Print the counts as a Markdown table."""
    print("| thoughts | operations | additions | casts | matrix products |\n|---|---|---|---|---|")
    for thoughts in (0, 1, 2, 3, 6):
        counts = count_launches(thoughts)
        products = counts["mm"] + counts["addmm"]
        print(f"| {thoughts} | {counts.total()} | {counts['add']} | {counts['_to_copy']} | {products} |", flush=True)


def count_compiled_launches(layers: int, thoughts: Sequence[int]) -> list[Counter]:
    """Count what a forward and backward pass of a narrow compiled GPT-2 in bf16 launches, for numbers of thoughts.

    Inductor's kernels for the CPU, which torch's profiler sees, stand for those for a GPU. No dropout in attention, so
    that it is one operation, as a GPU's kernels make it.
    """
    config = GPT2Config(vocab_size=VOCABULARY, n_layer=layers, n_embd=64, n_head=1, attn_pdrop=0)
    lm = GPT2LMHeadModel(config).train()
    args, counts = argparse.Namespace(device="cpu", bf16=True), []
    for number in thoughts:
        step = partial(run_step, compiled, lm, make_batch(4, 32, number, 16), args)
        with inductor_config.patch({"cpp.enable_kernel_profile": True}):
            step(), step()  # compiles
        counts.append(profile_launches(step))
    return counts


def profile_launches(function: Callable) -> Counter:
    """Count by name what a call launches, compiled or not, from a profile of it on the CPU."""
    with profile() as profiler:
        function()
    events = (event for event in profiler.events() if event.cpu_parent is None)
    return Counter(name for event in events for name in launched(event))


def launched(event: FunctionEvent) -> Iterator[str]:
    """Yield the operations in a profiler's event that launch a kernel, without those that they are made of."""
    if "cpp_fused" in event.name:
        yield "fused"
        return
    namespace, _, name = event.name.rpartition("::")
    if namespace == "aten" and all(child.name != event.name for child in event.cpu_children):  # autocast calls it again
        operation = getattr(torch.ops.aten, name)
        overload = getattr(operation, operation.overloads()[0])
        if not overload.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            if launches(overload._schema):
                yield name
            return
    for child in event.cpu_children:
        yield from launched(child)


def show_compiled_launches(thoughts: Sequence[int] = (0, 1, 6)) -> None:
    """Print the counts of one and two layers, and the line through them at GPT-2's twelve, as a Markdown table."""
    one, two = (count_compiled_launches(layers, thoughts) for layers in (1, 2))
    print("| thoughts | 1 layer | 2 layers | 12 layers, by the line | of these fused kernels |\n|---|---|---|---|---|")
    for number, *counts in zip(thoughts, one, two, strict=True):
        (a, b), (fused_a, fused_b) = [c.total() for c in counts], [c["fused"] for c in counts]
        print(f"| {number} | {a} | {b} | {a + 11 * (b - a)} | {fused_a + 11 * (fused_b - fused_a)} |", flush=True)


def environment(device: str) -> dict:
    """Return device, versions and commit."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions, "commit": commit}


def parse(argv: list[str] | None = None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--question", type=int, default=128, help="tokens")
    parser.add_argument("--thoughts", type=int, default=6)
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[v for v in VARIANTS if v != "graphs"])
    parser.add_argument("--sweep", action="store_true", help="thoughts 0 to 16, and batch 1 to 64")
    parser.add_argument("--launches", action="store_true", help="count the operations of a step instead")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    return parser.parse_args(argv)


def main() -> None:
    """Measure and print the tables."""
    args = parse()
    if args.launches:
        return show_compiled_launches() if args.variants == ["compiled"] else show_launches()
    torch.set_num_threads(args.threads)
    lm = make_model(args).to(args.device).train()
    shapes = [(args.batch, args.thoughts)]
    if args.sweep:
        shapes = [(args.batch, thoughts) for thoughts in (0, 1, 2, 4, 6, 8, 16)]
        shapes += [(batch, args.thoughts) for batch in (1, 2, 4, 8, 16, 32, 64) if batch != args.batch]
    results = []
    for size, thoughts in shapes:
        batch = make_batch(size, args.question, thoughts, args.answer)
        if args.device == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        rows = compare(lm, batch, args)
        title = f"batch {size}, question {args.question}, thoughts {thoughts}, answer {args.answer}"
        show(rows, title)
        results.append({"batch": size, "thoughts": thoughts, "rows": rows})
    settings = {key: str(value) for key, value in vars(args).items()}
    print("\n" + json.dumps(environment(args.device)))
    if args.out:
        text = json.dumps({**environment(args.device), "settings": settings, "results": results}, indent=1)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
