"""Coconut's forward and generate against an oracle: one row at a time, every thought recomputed without a KV cache."""

import random

import pytest
import torch
from torch.nn import functional as F

from coconut import plan_batch
from helpers import exact_model
from helpers.batches import BATCHES, END, EOS, LATENT, START, align, batch_of, make_labels, make_row, pad, wrap

# --- oracle -----------------------------------------------------------------------------------------------------------


def oracle_embeds(lm, row):
    """Input embeddings (1, length, hidden) of one unpadded row of token ids; latent tokens are replaced by thoughts."""
    embeds = lm.get_input_embeddings()(torch.tensor([row]))
    for p in (i for i, id in enumerate(row) if id == LATENT):
        hidden = lm.base_model(inputs_embeds=embeds[:, :p], use_cache=False).last_hidden_state
        embeds = torch.cat([embeds[:, :p], hidden[:, -1:], embeds[:, p + 1 :]], dim=1)
    return embeds


def oracle_logits(lm, row):
    return lm(inputs_embeds=oracle_embeds(lm, row), use_cache=False).logits[0]  # (length, vocabulary)


def oracle_loss(lm, rows, labels):
    losses = [
        F.cross_entropy(oracle_logits(lm, row)[:-1], torch.tensor(target[1:]), reduction="sum")
        for row, target in zip(rows, labels, strict=True)
    ]
    return sum(losses) / sum(id != -100 for target in labels for id in target[1:])


def oracle_generate(lm, row, count, limit=10**9):
    """Greedy tokens of one row, up to the first eos (excluded), `limit` positions or `count` new tokens."""
    new = []
    while len(new) < count and len(row) + len(new) < limit:
        token = oracle_logits(lm, row + new)[-1].argmax().item()
        if token == EOS:
            break
        new.append(token)
    return new


CASES = [pytest.param(rows, align(rows), id=name) for name, rows in BATCHES.items()]
CASES += [
    pytest.param(BATCHES["mixed"], [0] * 5, id="mixed_unaligned"),
    pytest.param(BATCHES["mixed"], [3, 6, 0, 1, 2], id="mixed_left_padded"),
    pytest.param(BATCHES["thoughts_0"], [4, 0, 2], id="no_thoughts_left_padded"),
    pytest.param(BATCHES["scattered"], [0] * 4, id="scattered_unaligned"),
    pytest.param(BATCHES["scattered"], [2, 5, 0, 1], id="scattered_left_padded"),
]
KINDS = ["gpt2", "llama", "qwen3"]
SLIDING = "qwen2"  # one layer attends three columns back, so padding between a row's tokens would use up its window


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, SLIDING])
@pytest.mark.parametrize(("rows", "offsets"), CASES)
def test_loss_and_gradients_match_oracle(kind, rows, offsets):
    if all(set(target) == {-100} for target in make_labels(rows)):
        pytest.skip("nothing is supervised")
    lm, labels = exact_model(kind), make_labels(rows)
    expected = oracle_loss(lm, rows, labels)
    expected.backward()
    gradients = {name: p.grad for name, p in lm.named_parameters()}
    lm.zero_grad(set_to_none=True)

    mask = pad([[1] * len(row) for row in rows], offsets)
    output = wrap(lm)(pad(rows, offsets), mask, labels=pad(labels, offsets, fill=-100))
    output.loss.backward()

    close(output.loss, expected)
    assert {name for name, p in lm.named_parameters() if p.grad is None} == set()
    for name, p in lm.named_parameters():
        close(p.grad, gradients[name])


@pytest.mark.parametrize("kind", [*KINDS, SLIDING])
@pytest.mark.parametrize(("rows", "offsets"), CASES)
def test_logits_and_inputs_embeds_match_oracle(kind, rows, offsets):
    lm = exact_model(kind)
    mask = pad([[1] * len(row) for row in rows], offsets)
    with torch.no_grad():
        output = wrap(lm)(pad(rows, offsets), mask)
        assert output.loss is None
        for number, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
            columns = slice(offset, offset + len(row))
            close(output.logits[number, columns], oracle_logits(lm, row))
            close(output.inputs_embeds[number, columns], oracle_embeds(lm, row)[0])


@pytest.mark.parametrize("rows", [BATCHES["mixed"], BATCHES["scattered"], BATCHES["thoughts_0"]])
def test_min_passes_does_not_change_logits(rows):
    lm, passes = exact_model("gpt2"), []
    mask = pad([[1] * len(row) for row in rows], align(rows))
    lm.base_model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        expected = wrap(lm)(pad(rows, align(rows)), mask).logits
        needed = len(passes)
        plan = plan_batch(pad(rows, align(rows)), mask, None, LATENT)
        others = sorted({*range(1, mask.shape[1])} - {*plan.pass_starts})[-needed - 2 :]
        plan.pass_starts = sorted([*plan.pass_starts, *others])
        given = wrap(lm)(pad(rows, align(rows)), mask, plan=plan).logits
    close(given[mask == 1], expected[mask == 1])
    assert len(passes) == needed + needed + len(others)


def test_padding_token_ids_do_not_affect_logits():
    rows, offsets = BATCHES["mixed"], [3, 6, 0, 1, 2]
    lm, mask = exact_model("gpt2"), pad([[1] * len(row) for row in rows], offsets)
    with torch.no_grad():
        one, other = (wrap(lm)(pad(rows, offsets, fill), mask).logits[mask == 1] for fill in (0, 33))
    assert torch.equal(one, other)


def test_default_position_ids_ignore_padding():
    rows, offsets = BATCHES["mixed"], [3, 6, 0, 1, 2]
    lm, mask = exact_model("gpt2"), pad([[1] * len(row) for row in rows], offsets)
    position_ids = pad([list(range(len(row))) for row in rows], offsets)
    with torch.no_grad():
        given = wrap(lm)(pad(rows, offsets), mask, position_ids=position_ids).logits[mask == 1]
        shifted = wrap(lm)(pad(rows, offsets), mask, position_ids=position_ids + 1).logits[mask == 1]
        default = wrap(lm)(pad(rows, offsets), mask).logits[mask == 1]
    assert torch.equal(given, default)
    assert not torch.allclose(given, shifted)


def test_lm_head_is_applied_to_supervised_positions_only():
    rows, lm = BATCHES["mixed"], exact_model("gpt2")
    offsets, labels, seen = align(rows), make_labels(rows), []
    lm.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:-1]))
    mask = pad([[1] * len(row) for row in rows], offsets)
    wrap(lm)(pad(rows, offsets), mask, labels=pad(labels, offsets, fill=-100))
    assert sum(shape.numel() for shape in seen) == sum(id != -100 for target in labels for id in target)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gradient_checkpointing_is_refused_with_kv_cache(kind):
    model = wrap(exact_model(kind)).train()
    model.base_causallm.gradient_checkpointing_enable()
    ids = torch.tensor([[5, START, LATENT, END, 6]])
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, torch.ones_like(ids), labels=ids)
    plain = torch.tensor([[5, 6, 7]])  # one pass needs no cache
    loss = model(plain, torch.ones_like(plain), labels=plain).loss
    close(loss, oracle_loss(model.base_causallm, plain.tolist(), plain.tolist()))
    model.eval()(ids, torch.ones_like(ids), labels=ids)


@pytest.mark.parametrize("offsets", [align(BATCHES["mixed"]), [3, 6, 0, 1, 2]], ids=["aligned", "left_padded"])
def test_eager_attention_matches_oracle(offsets):
    rows, lm = BATCHES["mixed"], exact_model("gpt2", attn_implementation="eager")
    assert lm.config._attn_implementation == "eager"
    mask, labels = pad([[1] * len(row) for row in rows], offsets), make_labels(rows)
    output = wrap(lm)(pad(rows, offsets), mask, labels=pad(labels, offsets, fill=-100))
    close(output.loss, oracle_loss(lm, rows, labels))


def test_loss_is_zero_without_supervised_tokens():
    rows = BATCHES["thoughts_2"]
    mask = pad([[1] * len(row) for row in rows], align(rows))
    output = wrap(exact_model("gpt2"))(pad(rows, align(rows)), mask, labels=torch.full_like(mask, -100))
    assert output.loss.item() == 0
    output.loss.backward()


@pytest.mark.parametrize("rows", [[[LATENT, 3, 4]], [[3, LATENT, 4], [LATENT, 3, 4]], [[3, 5, LATENT], [LATENT]]])
def test_latent_as_first_token_is_refused(rows):
    model = wrap(exact_model("gpt2"))
    ids, mask = pad(rows, align(rows)), pad([[1] * len(row) for row in rows], align(rows))
    with pytest.raises(ValueError, match="a row begins with a latent token"):
        model(ids, mask)
    with pytest.raises(ValueError, match="a row begins with a latent token"):
        model.generate(ids, mask)


def test_state_dict_holds_each_weight_once():
    lm = exact_model("gpt2")
    assert set(wrap(lm).state_dict()) == {f"base_causallm.{name}" for name in lm.state_dict()}


# --- generation -------------------------------------------------------------------------------------------------------


def new_tokens(model, rows, offsets, count):
    """Generates for a batch and returns each row's new tokens; also checks that the prompts are returned unchanged."""
    ids, mask = pad(rows, offsets), pad([[1] * len(row) for row in rows], offsets)
    output = model.generate(ids, mask, max_new_tokens=count)
    assert torch.equal(output[:, : ids.shape[1]], ids)
    assert output.shape[1] <= ids.shape[1] + count
    return output[:, ids.shape[1] :].tolist()


def until_eos(tokens):
    """The tokens before the first eos; asserts that only eos follows."""
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    assert set(tokens[end:]) <= {EOS}
    return tokens[:end]


def model_that_ends(kind):
    """A model whose greedy decoding reaches eos early for some rows and not at all for others."""
    lm = exact_model(kind, seed=3)
    with torch.no_grad():
        lm.get_output_embeddings().weight[EOS] *= 1.5
    return lm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "offsets"), CASES)
def test_batched_generation_matches_single_rows_and_oracle(kind, rows, offsets):
    lm = model_that_ends(kind)
    batch = new_tokens(wrap(lm), rows, offsets, 9)
    with torch.no_grad():
        for row, tokens in zip(rows, batch, strict=True):
            expected = oracle_generate(lm, row, 9)
            [alone] = new_tokens(wrap(lm), [row], [0], 9)
            assert until_eos(tokens) == until_eos(alone) == expected


@pytest.mark.parametrize("offset", [0, 2])
def test_generation_with_sliding_window_attention_matches_oracle(offset):
    lm, rows = model_that_ends(SLIDING), [make_row(random.Random(n), 3, before=4, after=2) for n in range(12)]
    with torch.no_grad():
        expected = [oracle_generate(lm, row, 9) for row in rows]
    assert sum(len(tokens) < 9 for tokens in expected) >= 6  # so many end that the others go on without them
    assert [until_eos(tokens) for tokens in new_tokens(wrap(lm), rows, [offset] * 12, 9)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_generation_cases_cover_immediate_early_and_no_eos(kind):
    lm, kinds = model_that_ends(kind), set()
    for row in (row for rows in BATCHES.values() for row in rows):
        with torch.no_grad():
            length = len(oracle_generate(lm, row, 9))
        kinds.add({0: "at once", 9: "never"}.get(length, "early"))
        if len(kinds) == 3:
            return
    pytest.fail(f"rows end {kinds} only")


def model_that_writes(tokens):
    """A GPT-2 that generates tokens[p] at position p, whatever its input."""
    lm = exact_model("gpt2")
    with torch.no_grad():
        for p in lm.parameters():
            p.zero_()
        lm.transformer.ln_f.weight.fill_(1)
        lm.transformer.wte.weight.copy_(torch.eye(50, 16))
        for position, token in enumerate(tokens[1:]):
            lm.transformer.wpe.weight[position, token] = 100
    return wrap(lm)


def test_generation_stops_when_first_new_token_is_eos():
    model = model_that_writes([5, 5, 5, EOS, 5, 5, 5, 5, EOS])
    assert new_tokens(model, [[1, 2, 3]], [0], 6) == [[]]
    assert new_tokens(model, [[1, 2, 3], [1, 2, 3, 4, 5]], [0, 0], 6) == [[0, 0, 0], [5, 5, 5]]


def test_finished_rows_are_padded_with_eos():
    model = model_that_writes([5, 5, 5, 5, EOS, *[6] * 9])
    assert new_tokens(model, [[1, 2, 3], [1, 2, 3, 4, 5]], [0, 0], 4) == [[5, 0, 0, 0], [6, 6, 6, 6]]


def test_finished_rows_are_dropped_from_the_decoding_batch():
    model, sizes = model_that_writes([*[5] * 6, EOS, *[5] * 9]), []
    model.base_causallm.transformer.wte.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    rows = [[1] * 6, [1] * 5, [1] * 3, [1] * 7]  # the last one starts behind the eos
    assert new_tokens(model, rows, [0] * 4, 5) == [[0] * 5, [5, 0, 0, 0, 0], [5, 5, 5, 0, 0], [5] * 5]
    assert sizes == [4, 4, 2, 2, 1]  # the prompts, then half of the rows and a quarter


@pytest.mark.parametrize("count", [1, 2, 5])
def test_generation_stops_at_max_new_tokens(count):
    model = model_that_writes([5] * 64)
    assert new_tokens(model, [[1, 2, 3], [4]], [0, 2], count) == [[5] * count] * 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_generation_stops_at_max_position_embeddings(kind):
    lm = exact_model(kind, positions=12)
    model, rows = wrap(lm), [list(range(1, 11)), [3, START, LATENT, LATENT, END], list(range(1, 13))]
    for offsets in ([0, 0, 0], align(rows)):
        batch = new_tokens(model, rows, offsets, 30)
        with torch.no_grad():
            for row, tokens in zip(rows, batch, strict=True):
                assert until_eos(tokens) == oracle_generate(lm, row, 30, limit=12)
    assert new_tokens(model, [rows[2]], [0], 30) == [[]]


def test_generate_returns_token_ids_and_keeps_training_mode():
    model = wrap(exact_model("gpt2")).train()
    output = model.generate(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    assert output.dtype == torch.int64
    assert model.training


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [align(BATCHES["mixed"]), [3, 6, 0, 1, 2]], ids=["aligned", "left_padded"])
def test_forward_and_backward_do_not_sync_with_gpu(offsets):
    """On the meta device anything that copies a value to the CPU raises."""
    batch = batch_of(BATCHES["mixed"], offsets)
    model = wrap(exact_model("gpt2").to("meta"))
    loss = model(**batch).loss
    loss.backward()
    assert loss.device.type == "meta"
    # FSDP moves a batch to the GPU ahead of the model, so what must be known of it has to be there by then.
    plan = plan_batch(**batch, latent_token_id=LATENT)
    moved = {name: tensor.to("meta") for name, tensor in batch.items()}
    model(**moved, plan=plan).loss.backward()
    with pytest.raises((NotImplementedError, RuntimeError)):
        model(**moved)
