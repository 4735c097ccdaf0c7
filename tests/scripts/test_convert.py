"""scripts/convert.py: round trips between official files and checkpoints; rejected input."""

import shutil

import convert
import pytest
import torch
from transformers import AutoModelForCausalLM

from coconut import Coconut
from components.files import verify_manifest
from helpers import byte_tokenizer, tiny_gpt2
from helpers.checkpoints import PROMPTS, V, expected_ids

STAGES = ("--max-latent-stage", "2")


def save_official(path, lm, wrapped=True):
    """Save a model as the official code does: prefixed, with a second copy of the input embedding, or plain for CoT."""
    state = lm.state_dict()
    if wrapped:
        embedding = lm.get_input_embeddings().weight.detach()
        state = {f"base_causallm.{name}": value for name, value in state.items()} | {"embedding.weight": embedding}
    torch.save(state, path)
    return path


def from_official(save_path, file, folder, *argv):
    model = folder.with_name("architecture")  # without weights: they come from the file
    shutil.copytree(save_path / "gpt2_model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    convert.main(["from-official", str(file), str(folder), "--model-id", str(model), *argv])
    return folder


def convert_error(capsys, *argv) -> str:
    """Return the error message of a failing conversion."""
    with pytest.raises(SystemExit) as raised:
        convert.main([str(arg) for arg in argv])
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_convert_round_trip_of_official_coconut_file(save_path, tmp_path, capsys):
    torch.manual_seed(7)
    lm = tiny_gpt2(V + 3, 128).eval()
    file = save_official(tmp_path / "checkpoint_1", lm)
    folder = from_official(save_path, file, tmp_path / "ours", "--c-thought", "2", "--max-latent-stage", "2")
    convert.main(["to-official", str(folder), str(tmp_path / "back")])
    printed = capsys.readouterr().out
    assert f"wrote {folder}: coconut.json, config.json, " in printed and f"wrote {tmp_path}/back, " in printed
    assert f'python scripts/ask.py {folder} "..."' in printed
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    tokenizer = byte_tokenizer()
    prompt = torch.tensor([tokenizer(PROMPTS[0])["input_ids"] + [V, V + 2, V + 2, V + 2, V + 2, V + 1]])
    official = Coconut(lm, V + 2, V, V + 1, tokenizer.eos_token_id).generate(prompt, torch.ones_like(prompt), 6)
    [actual] = expected_ids(folder, PROMPTS[:1])
    assert actual == official[0, len(PROMPTS[0]) :].tolist()
    assert verify_manifest(folder) is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "cot"])
def test_to_official_keeps_weights(save_path, tmp_path, name):
    convert.main(["to-official", str(save_path / name / "best"), str(tmp_path / "official")])
    state = torch.load(tmp_path / "official", weights_only=True)
    lm = AutoModelForCausalLM.from_pretrained(save_path / name / "best", dtype=torch.float32)
    prefix = "" if name == "cot" else "base_causallm."
    for key, value in lm.state_dict().items():
        assert torch.equal(value, state.pop(prefix + key))
    assert list(state) == ([] if name == "cot" else ["embedding.weight"])


def test_convert_round_trip_of_official_cot_file(save_path, tmp_path):
    torch.manual_seed(7)
    file = save_official(tmp_path / "cot", tiny_gpt2(V, 128), wrapped=False)
    folder = from_official(save_path, file, tmp_path / "ours", "--method", "cot")
    convert.main(["to-official", str(folder), str(tmp_path / "back")])
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("rows", "wrapped", "argv", "message"),
    [
        (V, False, STAGES, "--method"),
        (V + 3, True, ("--method", "cot"), "--method"),
        (V + 3, True, (), "--max-latent-stage"),
        (V - 9, True, STAGES, f"{V - 9} rows"),
    ],
)
def test_from_official_rejects_mismatched_file(save_path, tmp_path, capsys, rows, wrapped, argv, message):
    file = save_official(tmp_path / "file", tiny_gpt2(rows, 128), wrapped)
    model = ("--model-id", save_path / "gpt2_model")
    assert message in convert_error(capsys, "from-official", file, tmp_path / "ours", *model, *argv)
    assert not (tmp_path / "ours").exists()


def test_convert_rejects_lora_pause_tokens_and_other_vocabularies(save_path, tmp_path, capsys):
    weights = {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}
    torch.save(weights, tmp_path / "lora")
    model = ("--model-id", save_path / "gpt2_model")
    assert "lora_A" in convert_error(capsys, "from-official", tmp_path / "lora", tmp_path / "ours", *model, *STAGES)
    shutil.copytree(save_path / "gpt2" / "best", tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    assert "LoRA" in convert_error(capsys, "to-official", tmp_path / "adapted", tmp_path / "file")
    file = save_official(tmp_path / "plain", tiny_gpt2(V, 128), wrapped=False)
    adapted = ("--model-id", tmp_path / "adapted", "--method", "cot")
    assert "LoRA" in convert_error(capsys, "from-official", file, tmp_path / "ours", *adapted)
    assert "<|pause|>" in convert_error(capsys, "to-official", save_path / "pause" / "best", tmp_path / "file")
    assert "coconut.json" in convert_error(capsys, "to-official", save_path / "gpt2_model", tmp_path / "file")
    shutil.copytree(save_path / "gpt2" / "best", tmp_path / "spare")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "spare")
    lm.resize_token_embeddings(V + 9)
    lm.save_pretrained(tmp_path / "spare")
    assert f"{V + 9} rows" in convert_error(capsys, "to-official", tmp_path / "spare", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_to_official_names_what_a_saved_model_does_not_say(save_path, tmp_path, capsys):
    model = Coconut.from_pretrained(save_path / "gpt2" / "best")
    model.description = {}
    model.save_pretrained(tmp_path / "saved")
    assert "coconut.json has no method" in convert_error(capsys, "to-official", tmp_path / "saved", tmp_path / "file")


def test_to_official_refuses_a_cot_model_with_rows_of_markers(save_path, tmp_path, capsys):
    """The official code loads a CoT file into the base model, whose rows must be as many."""
    folder = tmp_path / "from_coconut"
    shutil.copytree(save_path / "cot" / "best", folder)
    for rows, refused in ((V + 3, True), (V + 40, False)):  # a model may have more rows than tokens from the start
        lm = AutoModelForCausalLM.from_pretrained(folder)
        lm.resize_token_embeddings(rows)
        lm.save_pretrained(folder)
        if refused:
            error = convert_error(capsys, "to-official", folder, tmp_path / "file")
            assert f"{V} rows" in error and f"there are {rows}" in error
            assert not (tmp_path / "file").exists()
        else:
            convert.main(["to-official", str(folder), str(tmp_path / "file")])


def test_convert_never_overwrites(save_path, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("kept")
    model = ("--model-id", save_path / "gpt2_model")
    assert "already exists" in convert_error(capsys, "to-official", save_path / "gpt2" / "best", taken)
    assert "already exists" in convert_error(capsys, "from-official", tmp_path / "file", taken, *model, *STAGES)
    assert taken.read_text() == "kept"
    missing = tmp_path / "nowhere" / "file"
    assert "nowhere does not exist" in convert_error(capsys, "to-official", save_path / "gpt2" / "best", missing)
