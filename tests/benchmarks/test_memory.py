"""Simulated memory of a training step."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig

from benchmarks import memory
from components.distributed import Processes

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=500, n_embd=128, n_layer=2, n_head=4, n_positions=128),
    "llama": LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=384, tie_word_embeddings=False, **LLAMA),
    "tables": LlamaConfig(vocab_size=9000, hidden_size=64, intermediate_size=64, tie_word_embeddings=True, **LLAMA),
}


def arguments(*options: str):
    """Parse the benchmark's command line for a small batch."""
    return memory.parse(["--batch", "8", "--length", "96", *options])


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


@pytest.mark.slow
def test_sharding_checkpointing_and_bf16_reduce_simulated_peak():
    def peak(*options: str) -> int:
        return memory.simulate(CONFIGS["llama"], arguments("--gpus", "4", *options), thoughts=3).total

    assert peak() > peak("--strategy", "fsdp")
    assert peak() > peak("--gradient-checkpointing", "mlp") > peak("--gradient-checkpointing", "block")
    assert peak() > peak("--bf16")
