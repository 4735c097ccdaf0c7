"""Memory of a training step: estimate, simulation and real step."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from benchmarks import memory
from coconut import Coconut
from components.distributed import Processes
from footprint import Step, estimate

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=500, n_embd=128, n_layer=2, n_head=4, n_positions=128),
    "llama": LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=384, tie_word_embeddings=False, **LLAMA),
    "tables": LlamaConfig(vocab_size=9000, hidden_size=64, intermediate_size=64, tie_word_embeddings=True, **LLAMA),
}


def arguments(*options: str):
    """Parse the benchmark's command line for a small batch."""
    return memory.parse(["--batch", "8", "--length", "96", *options])


@pytest.mark.parametrize(
    "model, thoughts, options",
    [
        ("gpt2", 0, ""),
        ("gpt2", 2, "--bf16"),
        ("gpt2", 2, "--bf16 --gradient-checkpointing block"),
        ("gpt2", 1, "--bf16 --gpus 4"),
        ("llama", 0, "--bf16 --gradient-checkpointing mlp"),
        ("llama", 3, ""),
        ("llama", 2, "--bf16"),
        ("llama", 3, "--bf16 --gpus 4 --strategy fsdp"),
        ("llama", 0, "--bf16 --gpus 4 --strategy fsdp --keep-weights"),
        ("tables", 0, "--batch 1"),
        ("tables", 1, "--batch 1 --gpus 2"),
        ("tables", 1, "--batch 1 --gpus 2 --strategy fsdp"),
    ],
)
def test_estimate_is_near_the_simulation(model, thoughts, options):
    """The estimate's total is within 15 % of the simulated peak, and the state between steps within 1 %."""
    given = arguments(*options.split())
    found = memory.simulate(CONFIGS[model], given, thoughts)
    expected = memory.estimated(CONFIGS[model], given, thoughts)
    assert expected.total == pytest.approx(found.total, rel=0.15)
    assert expected.weights == pytest.approx(found.weights, rel=0.01)
    assert expected.optimizer == pytest.approx(found.optimizer, rel=0.01)


@pytest.mark.parametrize("model", CONFIGS)
def test_simulation_matches_real_step(model, thoughts=2):
    """Fake tensors add up to the bytes of real ones."""
    given = arguments("--batch", "2")
    job = memory.Job(CONFIGS[model], given, Processes())
    job.step(job.make_batch(1, 8, 0, 1))
    tracker = memory.PlainTracker()
    tracker.watch(job.model)
    tracker.track_external(job.model, job.optimizer)
    batch = job.make_batch(given.batch, given.length, thoughts, given.answer)
    with tracker:
        job.step(batch)
    simulated = memory.simulate(CONFIGS[model], given, thoughts, gpu=False)
    assert simulated.total == pytest.approx(tracker.footprint().total, rel=0.01)


def test_estimate_orders_memory_options():
    """Sharding, resharding, activation checkpointing and bfloat16 save memory; gradient accumulation takes more."""
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 8}, vocab_size=500, hidden_size=128))
    model = Coconut(lm, 3, 1, 2, 0)
    shape = {"world_size": 8, "rows": 4, "columns": 96, "thoughts": 3, "supervised": 20}

    def total(strategy="fsdp", **options) -> int:
        return estimate(model, Step(strategy, **shape, **options)).total

    assert total("ddp") > total(keep_weights=True) > total(keep_weights=False)
    assert total() > total(gradient_checkpointing="mlp") > total(gradient_checkpointing="block")
    assert total() > total(bf16=True)
    assert total() < total(accumulate=True) < total("ddp", accumulate=True)
