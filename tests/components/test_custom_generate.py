"""Checkpoints in transformers: generate() with trust_remote_code matches Coconut.generate; saving and loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import hub

from coconut import Coconut
from components import export
from components.files import verify_manifest
from components.pretrained import load_pretrained
from config import Config
from helpers import save_model, tiny_gemma3, tiny_gpt2
from helpers.checkpoints import METHODS, PROMPTS, V, expected_ids, load, train_checkpoints, until_eos


@pytest.fixture(scope="module")
def save_path(tmp_path_factory):
    return train_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def plain_model(folder):
    """Load a checkpoint without its generation code (transformers 4 runs that of local folders even without trust)."""
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert transformers.__version__.startswith("4.") or "generate" not in vars(lm)
    vars(lm).pop("generate", None)
    return lm


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_generate_in_transformers_matches_coconut_generate(save_path, name, side):
    lm, tokenizer, batch = load(save_path / name / "best")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
    actual = lm.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()  # greedy, max_new_tokens as in validation
    expected = expected_ids(save_path / name / "best")
    assert until_eos(actual, tokenizer.eos_token_id) == until_eos(expected, tokenizer.eos_token_id)


def test_generate_without_trust_remote_code_has_no_thoughts(save_path):
    folder = save_path / "gpt2" / "best"
    lm, _, batch = load(folder)
    thinking = lm.generate(**batch)
    assert thinking.shape[1] == batch["input_ids"].shape[1] + 6 + 6
    plain = plain_model(folder)
    assert plain.generate(**batch).shape[1] == batch["input_ids"].shape[1] + 6
    middle = thinking[:, :-6]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)], dim=1)
    assert not torch.equal(plain.generate(middle, attention_mask=mask), thinking)


def test_inherited_sampling_settings_are_replaced_when_a_checkpoint_is_saved(tmp_path):
    """transformers 4 opens a model whose settings contradict each other, but refuses to write them."""
    folder = Path(save_model(tmp_path / "model"))
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    pretrained = load_pretrained(Config({"method": "cot", "model_id": str(folder)}), None)
    description = export.describe(Config({"method": "cot"}), pretrained.tokenizer, 0)
    export.export(pretrained.lm, tmp_path / "saved", description)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == pretrained.tokenizer.eos_token_id and saved["max_new_tokens"] == 128
    assert not {"temperature", "top_p"} & saved.keys()


def test_sampling_and_beam_search_continue_after_thoughts(save_path):
    lm, _, batch = load(save_path / "gpt2" / "best")
    torch.manual_seed(0)
    sampled = lm.generate(**batch, do_sample=True, num_return_sequences=20, max_new_tokens=3)
    length = batch["input_ids"].shape[1]
    assert sampled.shape == (60, length + 6 + 3)
    assert (sampled[:, length : length + 6] == torch.tensor([V, V + 2, V + 2, V + 2, V + 2, V + 1])).all()
    assert len(sampled[:20].unique(dim=0)) > 1
    assert torch.equal(lm.generate(**batch, do_sample=True, top_k=1), lm.generate(**batch))
    assert lm.generate(**batch, num_beams=3).shape[1] <= length + 6 + 6


def test_first_token_logits_match_coconut_forward(save_path):
    folder = save_path / "gpt2" / "best"
    lm, _, batch = load(folder)  # prompts of three lengths
    out = lm.generate(**batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    model, lengths = Coconut.from_pretrained(folder).eval(), batch["attention_mask"].sum(1).tolist()
    for row, length, logits in zip(out.sequences, lengths, out.logits[0], strict=True):
        row = row[None, -1 - 6 - length : -1]  # without padding and the new token
        with torch.no_grad():
            expected = model(row, torch.ones_like(row)).logits[0, -1]
        torch.testing.assert_close(logits, expected)


def test_generate_options_custom_generate_thoughts_and_streamer(save_path):
    folder = save_path / "gpt2" / "best"
    lm, tokenizer, batch = load(folder)
    length = batch["input_ids"].shape[1]
    plain = plain_model(folder)
    for model in (plain, lm):  # without and with the checkpoint's own code
        actual = model.generate(**batch, custom_generate=str(folder), trust_remote_code=True)
        assert torch.equal(actual, lm.generate(**batch))
    assert lm.generate(batch["input_ids"][1:2], thoughts=0, max_new_tokens=2).shape == (1, length + 2 + 2)
    lm.generate(**tokenizer("1+2\n", return_tensors="pt"), streamer=TextStreamer(tokenizer))
    with pytest.raises(ValueError, match="input_ids"):
        lm.generate(inputs_embeds=torch.zeros(1, 2, 16))


def test_save_pretrained_round_trip(save_path, tmp_path):
    folder = save_path / "llama" / "best"
    model = Coconut.from_pretrained(folder)
    assert (model.start_latent_id, model.end_latent_id, model.latent_token_id) == (V, V + 1, V + 2)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = Coconut.from_pretrained(tmp_path / "saved")
    assert again.description == model.description == json.loads((folder / "coconut.json").read_text())
    assert again.eos_token_id == model.eos_token_id
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert expected_ids(tmp_path / "saved") == expected_ids(folder)
    with pytest.raises(ValueError, match="holds a model already"):
        again.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma3], ids=["gpt2", "gemma3"])
def test_save_pretrained_of_user_model_generates_with_thoughts(make, tmp_path):
    model, mask = Coconut(make(), 49, 47, 48, 0).eval(), torch.ones(1, 7, dtype=torch.long)
    model.save_pretrained(tmp_path / "saved", thoughts=3)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    actual = lm.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    expected = model.generate(torch.tensor([[1, 2, 47, 49, 49, 49, 48]]), mask, max_new_tokens=2)
    assert actual.tolist() == expected.tolist()


def test_coconut_json_is_read_in_the_revision_of_the_model(save_path, tmp_path, monkeypatch):
    cached, new = tmp_path / "models--owner--name", "9876543210" * 4  # as huggingface_hub stores downloads
    for commit, thoughts in {(old := "0123456789" * 4): 1, new: 4}.items():
        folder = shutil.copytree(save_path / "gpt2" / "best", cached / "snapshots" / commit)
        description = json.loads((folder / "coconut.json").read_text()) | {"thoughts": thoughts}
        (folder / "coconut.json").write_text(json.dumps(description))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(new)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path), raising=False)  # its name in transformers 4
    assert Coconut.from_pretrained("owner/name", revision=old, trust_remote_code=True).description["thoughts"] == 1
    for options, commit in (({"revision": old}, old), ({}, new)):
        lm = AutoModelForCausalLM.from_pretrained("owner/name", trust_remote_code=True, **options)
        local, _, batch = load(cached / "snapshots" / commit)
        assert lm.generate(**batch).tolist() == local.generate(**batch).tolist()


def test_from_pretrained_rejects_folder_without_coconut_json(tmp_path):
    with pytest.raises(ValueError, match=r"no coconut\.json"):
        Coconut.from_pretrained(save_model(tmp_path / "plain"))


def test_verify_manifest_detects_missing_generate_py(save_path, tmp_path):
    shutil.copytree(save_path / "cot" / "best", tmp_path / "copy")
    assert verify_manifest(tmp_path / "copy") is None
    (tmp_path / "copy" / "custom_generate" / "generate.py").unlink()
    assert "generate.py is missing" in verify_manifest(tmp_path / "copy")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plain_model_generates_from_inputs_embeds(save_path, name):
    folder = save_path / name / "best"
    model, tokenizer = Coconut.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    thoughts = [model.start_latent_id, *[model.latent_token_id] * 4, model.end_latent_id]
    prompt = torch.tensor(tokenizer("1+2+3\n")["input_ids"] + thoughts)
    embeds = model.inputs_embeds(prompt)
    assert embeds.shape == (len(prompt), 16)
    plain = plain_model(folder)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    actual = plain.generate(inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=6)
    expected = model.generate(prompt[None], mask, max_new_tokens=6)[:, len(prompt) :]
    eos = model.eos_token_id
    assert until_eos(actual.tolist(), eos) == until_eos(expected.tolist(), eos)
    assert not torch.equal(embeds[-4:-2], model.base_causallm.get_input_embeddings()(prompt)[-4:-2])


@pytest.mark.parametrize("name", ["gpt2", "pause"])
def test_a_prompt_with_a_marker_is_refused(save_path, name):
    lm, tokenizer, _ = load(save_path / name / "best")
    prompt = tokenizer("1+2 <|start-latent|>\n", return_tensors="pt")
    with pytest.raises(ValueError, match=r"a prompt contains one of <\|start-latent\|>, "):
        lm.generate(**prompt, max_new_tokens=2)
