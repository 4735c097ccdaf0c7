"""Low-rank adapters: what is trained, what is saved, and that a run with them continues exactly."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

import run
from helpers import byte_tokenizer, make_problems, save_model, tiny_gpt2, tiny_llama, write_json
from lora import add_lora, merged, parameter_groups

NEW_ROWS = [47, 49]


def trained(lm):
    """The model after a few steps with adapters, on tokens that include one of the new rows."""
    add_lora(lm, 4, NEW_ROWS)
    optimizer = torch.optim.AdamW(parameter_groups(lm, weight_decay=0.1, lora_rank=4), lr=1e-2)
    input_ids = torch.arange(40, 50)[None]  # (1, 10)
    for _ in range(3):
        optimizer.zero_grad()
        lm(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    return lm.eval()


@pytest.mark.parametrize(
    "make", [tiny_gpt2, tiny_llama, lambda: tiny_llama(tie_word_embeddings=True)], ids=["gpt2", "untied", "tied"]
)
def test_adapters_and_new_rows_are_trained_and_merge_into_the_weights(make):
    lm = make()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    lm = trained(lm)
    after = merged(lm, lm.state_dict())
    assert after.keys() == before.keys()
    for name in (n for n, p in lm.named_parameters() if "lora_" not in n):
        changed = lm.state_dict()[name] != before[name.replace(".base_layer", "")]
        if changed.ndim == 2:
            assert set(changed.any(1).nonzero().flatten().tolist()) <= set(NEW_ROWS), name
        else:
            assert not changed.any(), name
    assert (lm.get_input_embeddings().weight != before[embedding_name(before)]).any()
    plain = make()
    plain.load_state_dict(after)
    input_ids = torch.arange(10)[None]
    torch.testing.assert_close(plain.eval()(input_ids).logits, lm(input_ids).logits, rtol=1e-4, atol=1e-5)


def embedding_name(state: dict) -> str:
    """The input embedding's name in a state dict."""
    return next(name for name in state if name.endswith(("wte.weight", "embed_tokens.weight")))


def test_a_run_with_adapters_continues_bit_for_bit(tmp_path):
    tokenizer = byte_tokenizer()
    values = {
        "method": "coconut",
        "max_latent_stage": 1,
        "model_id": save_model(tmp_path / "model", tiny_gpt2(len(tokenizer), dropout=0.1), tokenizer),
        "train_path": write_json(tmp_path / "train.json", make_problems(8)),
        "val_path": write_json(tmp_path / "valid.json", make_problems(2, seed=1)),
        "save_path": str(tmp_path / "runs"),
        "lora_rank": 2,
        "lr": 1e-2,
        "batch_size_training": 4,
        "max_new_tokens": 2,
        "logger": "none",
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    for words in (["name=a", "num_epochs=1"], ["name=a", "num_epochs=2"], ["name=b", "num_epochs=2"]):
        assert run.main([str(config), *words]) == 0
    interrupted, whole = (load_file(tmp_path / f"runs/{name}/last/model.safetensors") for name in "ab")
    assert interrupted.keys() == whole.keys()
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)
