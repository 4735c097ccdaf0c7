"""Fused activation functions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from components.activations import COMPOSED, fuse_gelu
from helpers import tiny_gpt2, tiny_llama
from helpers.batches import BATCHES, align, batch_of, wrap

NAMES = [name for name in COMPOSED if name in ACT2FN]


@pytest.mark.parametrize("name", NAMES)
def test_fused_gelu_is_composed_gelu_up_to_rounding(name):
    x = torch.linspace(-12, 12, 100_001)
    module = nn.Sequential(ACT2FN[name])
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    expected = module(inputs[0])
    fuse_gelu(module)
    found = module(inputs[1])
    assert type(module[0]) is nn.GELU
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.sum(), i)[0] for y, i in zip((expected, found), inputs, strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=2e-6)


def test_coconut_with_fused_gelu_equals_plain_model_and_saves_less():
    rows = BATCHES["thoughts_0"]
    plain = tiny_gpt2(activation_function="gelu_new")
    fused = wrap(copy.deepcopy(plain))
    batch = batch_of(rows, align(rows))
    expected, before = loss_and_saved_bytes(lambda: plain(**batch, use_cache=False).loss)
    found, after = loss_and_saved_bytes(lambda: fused(**batch).loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert after < 0.8 * before
    for mine, theirs in zip(fused.base_causallm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def loss_and_saved_bytes(compute) -> tuple[torch.Tensor, int]:
    """A loss, after its backward pass, and the bytes of all tensors that were saved for it."""
    saved = []

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    loss.backward()
    return loss.detach(), sum(saved)


def test_saved_config_and_weights_are_those_of_plain_model(tmp_path):
    lm = tiny_gpt2()
    lm.save_pretrained(tmp_path / "plain")
    wrap(lm).base_causallm.save_pretrained(tmp_path / "fused")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert type(opened.transformer.h[0].mlp.act) is type(ACT2FN["gelu_new"])


def test_shared_module_is_replaced_everywhere_and_others_are_kept():
    shared = ACT2FN["gelu_new"].eval()
    lm = tiny_gpt2()
    for block in lm.transformer.h:
        block.mlp.act = block.mlp.second = shared
    fuse_gelu(lm)
    acts = [act for block in lm.transformer.h for act in (block.mlp.act, block.mlp.second)]
    assert {type(act) for act in acts} == {nn.GELU} and not any(act.training for act in acts)

    function = torch.nn.functional.gelu
    lm.transformer.h[0].mlp.act, lm.transformer.h[0].mlp.__dict__["act"] = None, function
    fuse_gelu(lm)
    assert lm.transformer.h[0].mlp.__dict__["act"] is function
    for other in (tiny_llama(), tiny_gpt2(activation_function="gelu"), tiny_gpt2(activation_function="relu")):
        before = [type(module) for module in other.modules()]
        fuse_gelu(other)
        assert [type(module) for module in other.modules()] == before
