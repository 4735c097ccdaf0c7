"""Memory of passes over a KV cache: tensors saved for backward, activation checkpointing, causal mask, compilation."""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from coconut import Coconut, plan_batch
from components import activation_checkpointing, kv_cache
from helpers import MODELS, saved_bytes, tiny_gpt2, tiny_llama
from helpers.batches import BATCHES, END, LATENT, START, batch_of, wrap


def gradients(model, batch, bf16=False) -> dict:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}
    model.zero_grad(set_to_none=True)
    return found


# --- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("mode", ["block", "mlp"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "qwen2"])
def test_activation_checkpointing_gradients_are_bit_identical(kind, mode, columns, bf16, monkeypatch):
    """With dropout, left padding and unaligned thoughts; short passes are checkpointed or not."""
    monkeypatch.setattr(activation_checkpointing, "MIN_CHECKPOINTED_COLUMNS", columns)
    options = {"dropout": 0.3} if kind == "gpt2" else {"attention_dropout": 0.3}
    rows, offsets = BATCHES["mixed"], [3, 6, 0, 1, 2]
    torch.manual_seed(0)
    model, batch, calls = wrap(MODELS[kind](**options)).train(), batch_of(rows, offsets), []
    expected = gradients(model, batch, bf16)
    model.checkpoint_activations(mode)
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, batch, bf16)
    assert {name for name, gradient in expected.items() if not torch.equal(gradient, found[name])} == set()
    lengths = [b - a for a, b in passes(model, batch)]
    again = sum(length >= columns for length in lengths)
    assert again > 0 and (columns == 1 or again < len(lengths))
    assert len(calls) == len(lengths) + (again if mode == "block" else 0)  # in mode mlp the hook stands outside


def passes(model: Coconut, batch: dict) -> list[tuple[int, int]]:
    """The first and last column of each pass."""
    plan = plan_batch(batch["input_ids"], batch["attention_mask"], None, LATENT)
    return list(pairwise([0, *plan.pass_starts, batch["input_ids"].shape[1]]))


@pytest.mark.slow
def test_activation_checkpointing_reduces_peak_memory(monkeypatch):
    """4 layers of width 512, 256 + 6 + 48 tokens, batch 16: the peak without weights and gradients."""
    rows = [[*[5] * 254, START, *[LATENT] * 6, END, *[7] * 48]] * 16
    batch, peaks = batch_of(rows, [0] * 16), {}
    for mode in ("unfused", "fused", "block", "mlp"):
        with FakeTensorMode(allow_non_fake_inputs=True), monkeypatch.context() as patch:
            if mode == "unfused":  # transformers' own GELU, which keeps all that it is composed of
                patch.setattr("coconut.fuse_gelu", lambda lm: None)
            model = wrap(tiny_gpt2(positions=320, n_embd=512, n_layer=4, n_head=8)).train()
        if mode in ("block", "mlp"):
            model.checkpoint_activations(mode)
        peaks[mode] = activation_peak(model, batch | {"plan": plan_batch(**batch, latent_token_id=LATENT)})
    assert peaks["block"] <= 0.45 * peaks["unfused"] and peaks["mlp"] <= 0.7 * peaks["unfused"], peaks
    assert peaks["block"] < peaks["mlp"] < peaks["fused"] < peaks["unfused"], peaks


def activation_peak(model: Coconut, batch: dict) -> int:
    """Peak bytes of activations and temporary tensors in a simulated forward and backward pass."""
    tracker = MemTracker()
    tracker.track_external(model)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model(**batch).loss.backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    return sum(size for kind, size in peak.items() if kind not in ("Parameter", "Gradient", "Buffer", "Total"))


# --- bf16 and compiled passes -----------------------------------------------------------------------------------------


def question_and_answer(thoughts: int, rows: int = 4) -> dict:
    """Rows of 20 + thoughts tokens."""
    row = [*[5] * 9, START, *[LATENT] * thoughts, END, *[7] * 9]
    return batch_of([row] * rows, [0] * rows)


def kept_in_bf16(model: Coconut, batch: dict) -> int:
    with torch.autocast("cpu", torch.bfloat16):
        return saved_bytes(model, lambda: model(**batch).loss)


def test_rotary_keys_are_saved_once_in_bf16():
    """Each additional thought saves only its own column; float32 keys would be cast, and saved, again in every pass."""
    model = wrap(tiny_llama(positions=256, num_key_value_heads=4)).train()  # transformers 4 copies keys that are shared
    kept = [kept_in_bf16(model, question_and_answer(thoughts, rows=64)) for thoughts in (4, 8, 40, 44)]
    assert kept[3] - kept[2] < 1.1 * (kept[1] - kept[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_compiled_passes_save_each_weight_once_in_bf16(kind):
    """2 bytes per weight, as in eager mode, whatever the number of passes."""
    model = wrap(MODELS[kind](**({"n_embd": 128} if kind == "gpt2" else {"hidden_size": 128}))).train()
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert weights > 50_000
    eager = [kept_in_bf16(model, question_and_answer(thoughts, rows=1)) for thoughts in (0, 3)]
    torch._dynamo.reset()  # what other tests compiled would count against its limit
    model.compile(backend="aot_eager_decomp_partition")  # what the compiler keeps, without compiling it
    compiled = [kept_in_bf16(model, question_and_answer(thoughts, rows=1)) for thoughts in (0, 3)]
    for less, more in (eager, compiled):
        assert 2 * weights <= less and more - less < weights, (kind, weights, eager, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_passes_are_not_recompiled_for_new_shapes(bf16):
    """A graph for each kind of pass only: first or later, one column or several, one row or several."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = wrap(tiny_gpt2(positions=256, n_embd=128)).train()  # wider than the sequences: no equal sizes by chance
    model.compile(backend="eager")
    for thoughts in (0, 1, 3, 2, 5, 4):
        for rows in (4, 1, 3):
            for length in (9, 11, 16, 24):
                row = [*[5] * length, START, *[LATENT] * thoughts, END, *[7] * 9]
                gradients(model, batch_of([row] * rows, [0] * rows), bf16)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_are_float32_under_bf16_autocast(kind):
    model, seen = wrap(MODELS[kind]()).eval(), []
    head = model.base_causallm.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    batch = question_and_answer(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=3)
    assert len(seen) == 4
    for hidden, logits in seen:
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, hidden @ head.weight.T)


# --- causal mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 13, 16])
def test_causal_mask_layout_does_not_depend_on_length(size):
    """If the mask were contiguous at multiples of 8, torch.compile would recompile for those lengths."""
    assert not kv_cache.causal_mask(torch.ones(2, size), 5, torch.float32).is_contiguous()


@pytest.mark.parametrize("columns", [1, 3, 11])
def test_causal_mask_values_dtype_and_alignment(columns):
    """Rows are aligned to 8 elements; 0 is visible, -inf masked."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0], [1] * 11])
    mask = kv_cache.causal_mask(real, columns, torch.bfloat16)
    assert mask.shape == (2, 1, columns, 11) and mask.dtype == torch.bfloat16
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    for row in range(2):
        for query in range(columns):
            at = 11 - columns + query
            visible = [key == at or (key < at and bool(real[row, key])) for key in range(11)]
            assert mask[row, 0, query].tolist() == [0 if v else -torch.inf for v in visible]


def test_all_layers_share_one_causal_mask_per_pass():
    model, masks = wrap(tiny_gpt2()), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda _, args, named: masks.append(named["attention_mask"]), with_kwargs=True
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(**question_and_answer(1))
    assert len(masks) == 4 and masks[0] is masks[1] and masks[2] is masks[3]
    assert {mask.dtype for mask in masks} == {torch.bfloat16}
