"""Loading models, checkpoints and files of the official code; marker tokens; what is refused."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint import format_utils
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.utils import hub

import run
from coconut import check_model
from components.pretrained import load_pretrained, read_tensors
from config import Config, UserError
from curriculum import END, LATENT, PAUSE, START
from helpers import byte_tokenizer, make_problems, save_model, tiny_gpt2, tiny_llama, words, write_json

V = len(byte_tokenizer())  # rows without markers
TOKENS = {"coconut": [START, END, LATENT], "pause_token": [START, END, LATENT, PAUSE]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders: GPT-2 (tied embeddings), Llama (untied), one without the token "<<", one with spare rows."""
    place, short = tmp_path_factory.mktemp("models"), byte_tokenizer(arrows=False)
    return {
        "gpt2": save_model(place / "gpt2"),
        "llama": save_model(place / "llama", tiny_llama(V, 128)),
        "no_arrows": save_model(place / "no_arrows", tiny_gpt2(len(short), 128), short),
        "spare_rows": save_model(place / "spare_rows", tiny_llama(V + 40, 128)),
    }


def load(folder, path=None, method="coconut", **options):
    return load_pretrained(Config({"method": method, "model_id": folder, **options}), path)


def tables(lm):
    return [lm.get_input_embeddings().weight, lm.get_output_embeddings().weight]


def test_source_names_the_key_and_folder_that_were_loaded(folders):
    folder = folders["gpt2"]
    for path, key in ((None, "model_id"), (folder, "load_model_path")):
        assert load(folder, path).source == f"{key}: {str(folder)!r}"


def random_state(lm, rows=None, seed=5):
    """A random state dict of the model, with its embeddings resized to `rows`."""
    torch.manual_seed(seed)
    if rows:
        lm.resize_token_embeddings(rows, mean_resizing=False)
    for p in lm.parameters():
        p.data.normal_()
    return {name: value.clone() for name, value in lm.state_dict().items()}


def official_file(path: Path, state: dict, wrapped: bool) -> Path:
    """A checkpoint as the official code saves it: plain, or `wrapped` (prefixed, with the embedding a second time)."""
    if wrapped:
        embedding = next(v for name, v in state.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
        state = {f"base_causallm.{name}": value for name, value in state.items()} | {"embedding.weight": embedding}
    torch.save(state, path)
    return path


# --- marker tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TOKENS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_marker_tokens_are_appended_and_initialized_from_init_token(folders, kind, method):
    plain = AutoModelForCausalLM.from_pretrained(folders[kind])
    loaded = load(folders[kind], method=method)
    assert [loaded.token_id(token) for token in TOKENS[method]] == list(range(V, V + len(TOKENS[method])))
    arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
    for table, before in zip(tables(loaded.lm), tables(plain), strict=True):
        assert torch.equal(table[:V], before)
        assert torch.equal(table[V:], before[arrows].expand(len(TOKENS[method]), -1))


@pytest.mark.parametrize(("kind", "init"), [("no_arrows", "<<"), ("llama", "two words")])
def test_marker_tokens_fall_back_to_mean_embedding(folders, kind, init):
    plain = AutoModelForCausalLM.from_pretrained(folders[kind])
    for table, before in zip(tables(load(folders[kind], new_token_init=init).lm), tables(plain), strict=True):
        torch.testing.assert_close(table[-3:], before.mean(0).expand(3, -1))


def test_new_token_init_selects_the_init_token(folders):
    loaded = load(folders["llama"], new_token_init="a")
    letter = loaded.tokenizer.convert_tokens_to_ids("a")
    for table in tables(loaded.lm):
        assert torch.equal(table[V:], table[letter].expand(3, -1))


def test_model_with_spare_embedding_rows_is_not_resized(folders):
    plain = AutoModelForCausalLM.from_pretrained(folders["spare_rows"])
    loaded = load(folders["spare_rows"])
    assert [loaded.token_id(token) for token in TOKENS["coconut"]] == [V, V + 1, V + 2]
    arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
    for table, before in zip(tables(loaded.lm), tables(plain), strict=True):
        assert torch.equal(table[V : V + 3], before[arrows].expand(3, -1))
        assert torch.equal(table[:V], before[:V])
        assert torch.equal(table[V + 3 :], before[V + 3 :])


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_thoughts", "icot"])
def test_methods_without_markers_do_not_resize_embeddings(folders, method):
    assert len(tables(load(folders["gpt2"], method=method).lm)[0]) == V


def test_pad_token_defaults_to_eos(folders, tmp_path):
    tokenizer = load(folders["gpt2"]).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    padded = byte_tokenizer(pad=True)
    own = load(save_model(tmp_path / "padded", tokenizer=padded)).tokenizer
    assert own.pad_token_id == padded.pad_token_id != own.eos_token_id


def test_bf16_weights_are_loaded_as_float32(tmp_path):
    folder = save_model(tmp_path / "half", tiny_gpt2(V, 128).to(torch.bfloat16))
    assert {p.dtype for p in load(folder).lm.parameters()} == {torch.float32}


def test_from_scratch_initializes_randomly_unless_load_model_path_is_set(folders, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folders["gpt2"]).transformer.wpe.weight
    torch.manual_seed(1)
    first = load(folders["gpt2"], from_scratch=True).lm.transformer.wpe.weight
    torch.manual_seed(1)
    again = load(folders["gpt2"], from_scratch=True).lm.transformer.wpe.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    path = official_file(tmp_path / "file", random_state(tiny_gpt2(V, 128)), wrapped=False)
    assert torch.equal(
        load(folders["gpt2"], path, from_scratch=True).lm.transformer.wpe.weight,
        torch.load(path)["transformer.wpe.weight"],
    )
    assert torch.equal(load(folders["gpt2"], folders["gpt2"], from_scratch=True).lm.transformer.wpe.weight, plain)


# --- official checkpoints ---------------------------------------------------------------------------------------------

MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.mark.parametrize("head", ["with_head", "without_tied_head"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("kind", MODELS)
def test_official_checkpoint_is_loaded_bit_identically(folders, tmp_path, kind, wrapped, head):
    state = random_state(MODELS[kind](V, 128), rows=V + 3)
    if head == "without_tied_head" and kind == "gpt2":
        state.pop("lm_head.weight")
    loaded = load(folders[kind], official_file(tmp_path / "checkpoint_33", state, wrapped))
    own = loaded.lm.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert len(own["lm_head.weight"]) == V + 3


@pytest.mark.parametrize("kind", MODELS)
def test_official_cot_checkpoint_initializes_coconut(folders, tmp_path, kind):
    state = random_state(MODELS[kind](V, 128))
    loaded = load(folders[kind], official_file(tmp_path / "checkpoint_6", state, wrapped=False))
    own = loaded.lm.state_dict()
    arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
    for name, value in state.items():
        assert torch.equal(own[name][: len(value)], value)
        if len(own[name]) != len(value):
            assert torch.equal(own[name][V:], value[arrows].expand(3, -1))
    assert len(own["lm_head.weight"]) == V + 3


def test_official_cot_checkpoint_with_spare_rows_initializes_markers(folders, tmp_path):
    state = random_state(tiny_llama(V + 40, 128))
    loaded = load(folders["spare_rows"], official_file(tmp_path / "cot", state, wrapped=False))
    arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
    for table in tables(loaded.lm):
        assert torch.equal(table[V : V + 3], table[arrows].expand(3, -1))
    wrapped = load(folders["spare_rows"], official_file(tmp_path / "coconut", state, wrapped=True))
    assert torch.equal(tables(wrapped.lm)[0], state["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("method", "options", "warning"),
    [
        ("cot", {"only_eval": True}, "method cot uses it without thoughts"),
        ("no_cot", {"only_eval": True}, "method no_cot uses it without thoughts"),
        ("no_thoughts", {"only_eval": True, "resume": 9}, "method no_thoughts uses it without thoughts"),
        ("icot", {}, "method icot uses it without thoughts"),
        (
            "coconut",
            {"only_eval": True},
            "which holds no stage: stage 0, 0 thoughts; for one that was saved after N epochs, set resume to N - 1",
        ),
        (
            "no_curriculum",
            {"only_eval": True},
            "which holds no stage: stage 4, 6 thoughts; for one that was saved after N epochs, set resume to N - 1",
        ),
        ("coconut", {"only_eval": True, "resume": 9}, None),
        ("coconut", {}, None),
        ("pause_token", {}, None),
    ],
)
def test_use_of_official_coconut_file_without_its_thoughts_is_a_warning(
    folders, tmp_path, capsys, method, options, warning
):
    path = official_file(tmp_path / "file", random_state(tiny_gpt2(V, 128), V + 3), wrapped=True)
    load(folders["gpt2"], path, method, c_thought=2, max_latent_stage=3, **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == (warning is not None)
    if warning:
        assert f"load_model_path: '{path}' is an official Coconut file, " in lines[0] and warning in lines[0]


@pytest.mark.parametrize("method", ["pause_token", "pause_as_thought"])
def test_evaluation_of_official_coconut_file_with_pause_tokens_is_refused(folders, tmp_path, method):
    path = official_file(tmp_path / "file", random_state(tiny_gpt2(V, 128), V + 3), wrapped=True)
    with pytest.raises(UserError, match=rf"official Coconut file, without <\|pause\|>; method {method}"):
        load(folders["gpt2"], path, method, only_eval=True)


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_fsdp_wrapped_module._orig_mod."]
)
def test_prefixes_of_wrapped_modules_are_stripped(folders, tmp_path, wrapper):
    state = random_state(tiny_gpt2(V, 128), rows=V + 3)
    names = [name.replace("transformer.h.", f"transformer.h.{wrapper}") for name in state]  # FSDP wraps blocks, too
    torch.save(
        {f"{wrapper}base_causallm.{k}": v for k, v in zip(names, state.values(), strict=True)}, tmp_path / "file"
    )
    own = load(folders["gpt2"], tmp_path / "file").lm.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def with_mask_buffers(state):
    """The state dict with the causal masks that old versions of transformers saved as if they were weights."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    return {**state, **masks, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


def test_mask_buffers_of_old_gpt2_files_are_no_weights(folders, tmp_path):
    state = random_state(tiny_gpt2(V, 128))
    torch.save(with_mask_buffers(state), tmp_path / "file")
    shutil.copytree(folders["gpt2"], tmp_path / "folder")
    weights = {name: value for name, value in state.items() if name != "lm_head.weight"}
    save_file(with_mask_buffers(weights), tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path / "file", tmp_path / "folder"):
        own = load(folders["gpt2"], path, "cot").lm.state_dict()
        assert all(torch.equal(own[name], value) for name, value in state.items())


# --- refused checkpoint files -----------------------------------------------------------------------------------------


def change(name, value):
    return lambda state: state.update({name: value})


REFUSED = [
    (lambda s: s.pop("transformer.h.1.ln_1.weight"), "transformer.h.1.ln_1.weight"),
    (lambda s: s.pop("transformer.wpe.weight"), "transformer.wpe.weight"),
    (lambda s: [s.pop("transformer.wte.weight"), s.pop("lm_head.weight")], "transformer.wte.weight"),
    (change("extra.weight", torch.zeros(3)), "extra.weight"),
    (change("transformer.h.0.ln_1.weight", torch.zeros(5)), "transformer.h.0.ln_1.weight"),
    (change("transformer.wte.weight", torch.zeros(V, 5)), "transformer.wte.weight"),
    (change("transformer.wte.weight", torch.tensor(1.0)), "transformer.wte.weight"),
    (change("transformer.wte.weight", torch.zeros(V - 9, 16)), "transformer.wte.weight"),
    (dict.clear, "missing"),
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("damage", "named"), REFUSED, ids=range(len(REFUSED)))
def test_mismatched_official_checkpoint_is_refused(folders, tmp_path, damage, named, wrapped):
    state = random_state(tiny_gpt2(V, 128))
    damage(state)
    if wrapped:
        state = {f"base_causallm.{name}": value for name, value in state.items()}
    torch.save(state, tmp_path / "file")
    with pytest.raises(UserError, match="load_model_path") as refusal:
        load(folders["gpt2"], tmp_path / "file")
    assert named in str(refusal.value)
    assert "file" in str(refusal.value)


def test_file_whose_head_differs_from_its_embedding_is_refused_by_a_tied_model(folders, tmp_path):
    state = random_state(tiny_gpt2(V, 128)) | {"lm_head.weight": torch.zeros(V, 16)}
    torch.save(state, tmp_path / "file")
    with pytest.raises(UserError, match=r"transformer\.wte\.weight and lm_head\.weight differ.*tie_word_embeddings"):
        load(folders["gpt2"], tmp_path / "file")


def test_names_that_do_not_fit_are_shown_from_both_sides(folders, runs, tmp_path):
    torch.save(random_state(tiny_llama(V, 128)), tmp_path / "file")
    shutil.copytree(runs / "coconut" / "checkpoint_3", tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    weights |= {"extra.weight": weights.pop("model.norm.weight"), "lm_head.weight": torch.zeros(9, 16)}
    save_file(weights, tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: transformer\.\S+.*; unexpected: model\.embed_tokens"):
        load(folders["gpt2"], tmp_path / "file", "cot")
    shown = "missing: model.norm.weight; unexpected: extra.weight; of another shape: lm_head.weight"
    with pytest.raises(UserError, match=shown):
        load(folders["gpt2"], tmp_path / "folder")


class Harmful:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_pickled_code_in_official_checkpoint_is_refused(folders, tmp_path):
    torch.save({"transformer.wpe.weight": Harmful(tmp_path / "ran")}, tmp_path / "file")
    with pytest.raises(UserError, match="not a file of plain weights"):
        load(folders["gpt2"], tmp_path / "file")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn"], ids=["empty", "text", "torn"])
def test_unreadable_checkpoint_file_is_refused(folders, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"load_model_path: .*file"):
        load(folders["gpt2"], tmp_path / "file")


@pytest.mark.parametrize(
    "value", [[1], {"a": 1}, {1: torch.zeros(2)}, torch.zeros(2)], ids=["list", "dict", "ids", "tensor"]
)
def test_checkpoint_file_without_state_dict_is_refused(folders, tmp_path, value):
    torch.save(value, tmp_path / "file")
    with pytest.raises(UserError, match="not a state dict"):
        load(folders["gpt2"], tmp_path / "file")


@pytest.mark.parametrize("key", ["model_id", "load_model_path"])
@pytest.mark.parametrize("place", ["step.6", "step.6/__0_0.distcp"])
def test_sharded_checkpoint_is_refused_with_the_command_that_converts_it(folders, tmp_path, capsys, place, key):
    state = random_state(tiny_gpt2(V, 128))
    checkpoint.save({"model": state}, checkpoint_id=tmp_path / "step.6")
    given = str(tmp_path / place)
    with pytest.raises(UserError) as refusal:
        load(given) if key == "model_id" else load(folders["gpt2"], given)
    source, target = str(tmp_path / "step.6"), str(tmp_path / "file")
    assert str(refusal.value).startswith(f"{key}: {given!r} is a sharded checkpoint")
    assert f"format_utils dcp_to_torch {source} FILE, and set load_model_path" in str(refusal.value)
    format_utils.dcp_to_torch_save(source, target)  # what the command calls
    torch.save(torch.load(target)["model"], target)
    assert torch.equal(load(folders["gpt2"], Path(target), "cot").lm.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_class_in_a_refused_pickle_is_named(tmp_path, legacy):
    torch.save({"args": Namespace()}, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"since they can execute code\. Unsupported global: GLOBAL argparse\.Namespace"
    ):
        read_tensors(tmp_path / "file")


@pytest.mark.parametrize(
    ("gone", "lacking"),
    [("config.json", "config.json"), ("tokenizer*.json", "tokenizer_config.json")],
)
def test_file_that_a_folder_lacks_is_named(folders, tmp_path, gone, lacking):
    folder = shutil.copytree(folders["llama"], tmp_path / "copy")
    for path in folder.glob(gone):
        path.unlink()
    with pytest.raises(UserError, match=rf"model_id: '{folder}' cannot be loaded: .* The folder has no {lacking}$"):
        load(str(folder))


def test_reason_of_a_library_is_shown_whole_and_without_colours(folders, monkeypatch):
    def fail(*_, **__):
        raise ValueError("\x1b[1mFailed\x1b[0m:\n\tno tiktoken")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot be loaded: Failed: no tiktoken$"):
        load(folders["gpt2"])


# --- checkpoint directories -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """Two short runs: cot, and coconut at stage 2 of 2."""
    place = tmp_path_factory.mktemp("runs")
    config = {"model_id": folders["llama"], "save_path": str(place), "logger": "none", "max_new_tokens": 4, "lr": 1e-3}
    config |= {key: write_json(place / "data.json", make_problems(8)) for key in ("train_path", "val_path")}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["method=coconut", "max_latent_stage=2", "c_thought=2", "resume=2", "num_epochs=3", "name=coconut"]
    assert run.main([str(place / "config.yaml"), "method=cot", "name=cot"]) == 0
    assert run.main([str(place / "config.yaml"), *command]) == 0
    return place


def test_checkpoint_loads_with_transformers(runs):
    path = runs / "coconut" / "checkpoint_3"
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.convert_ids_to_tokens([V, V + 1, V + 2]) == [START, END, LATENT]
    assert tokenizer(f"a{START}{LATENT}{END}")["input_ids"][1:] == [V, V + 2, V + 1]
    with torch.no_grad():
        assert lm(torch.tensor([[1, V, 3]])).logits.shape == (1, 3, V + 3)


def test_checkpoint_and_coconut_json_round_trip(folders, runs):
    path = runs / "coconut" / "best"
    loaded = load(folders["gpt2"], path)  # the architecture is the checkpoint's
    saved = load_file(path / "model.safetensors")
    own = loaded.lm.state_dict()
    assert set(saved) == set(own)
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    expected = {"method": "coconut", "stage": 2, "epoch": 3, "c_thought": 2, "max_latent_stage": 2}
    assert expected.items() <= loaded.description.items()
    assert loaded.description["token_ids"] == {START: V, END: V + 1, LATENT: V + 2}


def test_cot_checkpoint_initializes_coconut(folders, runs):
    path = runs / "cot" / "best"
    saved = load_file(path / "model.safetensors")
    assert len(saved["lm_head.weight"]) == V
    loaded = load(folders["gpt2"], path)
    arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
    for table, name in zip(tables(loaded.lm), ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert torch.equal(table[:V], saved[name])
        assert torch.equal(table[V:], saved[name][arrows].expand(3, -1))


def test_cot_checkpoint_with_spare_rows_initializes_coconut_from_folder_or_hub(folders, runs, tmp_path, monkeypatch):
    """Its tokenizer has the markers and the model rows for them; only coconut.json tells that these are untrained."""
    words = [str(runs / "config.yaml"), "method=cot", "name=spare", f"model_id={folders['spare_rows']}"]
    assert run.main(words) == 0
    folder, revision = runs / "spare" / "checkpoint_1", "0123456789" * 4
    cached = tmp_path / "models--owner--spare"  # as huggingface_hub stores a download
    shutil.copytree(folder, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path), raising=False)  # its name in transformers 4
    for model_id in (str(folder), "owner/spare"):
        trust = model_id == "owner/spare" and transformers.__version__ < "5"  # where it is needed to load, not to think
        loaded = load(model_id, trust_remote_code=trust)
        arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
        for table in tables(loaded.lm):
            assert torch.equal(table[V : V + 3], table[arrows].expand(3, -1)), model_id


def test_pause_token_is_added_to_a_coconut_checkpoint(folders, runs):
    path = runs / "coconut" / "best"
    saved = load_file(path / "model.safetensors")
    loaded = load(folders["gpt2"], path, method="pause_as_thought")
    assert loaded.token_id(PAUSE) == V + 3
    arrows = loaded.tokenizer.convert_tokens_to_ids("<<")
    for table, name in zip(tables(loaded.lm), ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert torch.equal(table[: V + 3], saved[name])
        assert torch.equal(table[V + 3], saved[name][arrows])


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 ignores the head of such a folder")
def test_folder_whose_head_differs_from_its_embedding_keeps_both(folders, tmp_path):
    """transformers 5 loads such a folder untied, whatever its config says; new rows must not tie it."""
    shutil.copytree(folders["gpt2"], tmp_path / "untied")
    weights = load_file(tmp_path / "untied" / "model.safetensors") | {"lm_head.weight": torch.ones(V, 16)}
    save_file(weights, tmp_path / "untied" / "model.safetensors", metadata={"format": "pt"})
    embedding, head = tables(load(str(tmp_path / "untied")).lm)
    assert torch.equal(embedding[:V], weights["transformer.wte.weight"])
    assert torch.equal(head[:V], weights["lm_head.weight"])


@pytest.mark.parametrize("key", ["model_id", "load_model_path"])
def test_folder_of_adapters_is_refused(folders, runs, tmp_path, capsys, key):
    peft = pytest.importorskip("peft")
    lm = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    peft.get_peft_model(lm, peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"])).save_pretrained(
        tmp_path / "adapter"
    )
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    values = {"method": "coconut", "name": "new", "save_path": tmp_path / "saved", key: tmp_path / "adapter"}
    assert run.main([str(runs / "config.yaml"), *words(values)]) == 2
    assert f"error: {key}: '{tmp_path / 'adapter'}' holds LoRA or other adapters" in capsys.readouterr().err
    assert not (tmp_path / "saved").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def without(name):
    def edit(path):
        state = load_file(path)
        state.pop(name)
        save_file(state, path, metadata={"format": "pt"})

    return edit


def with_extra(path):
    save_file(load_file(path) | {"extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("model.safetensors", truncate, "cannot be loaded"),
        ("model.safetensors", Path.unlink, "cannot be loaded"),
        ("config.json", Path.unlink, "cannot be loaded"),
        ("config.json", truncate, "cannot be loaded"),
        ("tokenizer.json", truncate, "cannot be loaded"),
        ("coconut.json", truncate, "coconut.json"),
        ("model.safetensors", without("model.norm.weight"), "model.norm.weight"),
        ("model.safetensors", with_extra, "extra.weight"),
    ],
)
def test_damaged_checkpoint_directory_is_refused(folders, runs, tmp_path, file, damage, named):
    shutil.copytree(runs / "coconut" / "checkpoint_3", tmp_path / "copy")
    damage(tmp_path / "copy" / file)
    with pytest.raises(UserError, match="copy") as refusal:
        load(folders["gpt2"], tmp_path / "copy")
    assert named in str(refusal.value)
    assert "load_model_path" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 3


def test_damaged_checkpoint_exits_with_code_2_and_writes_nothing(runs, tmp_path, capsys):
    shutil.copytree(runs / "coconut" / "checkpoint_3", tmp_path / "copy")
    truncate(tmp_path / "copy" / "model.safetensors")
    command = {
        "method": "coconut",
        "name": "new",
        "save_path": tmp_path / "saved",
        "load_model_path": tmp_path / "copy",
    }
    assert run.main([str(runs / "config.yaml"), *words(command)]) == 2
    assert "error: load_model_path" in capsys.readouterr().err
    assert not (tmp_path / "saved").exists()


def test_model_that_cannot_be_saved_is_refused_before_training(runs, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("\x1b[1mGenerationConfig is invalid:\x1b[0m\n- `temperature`: `do_sample` is False")

    folder = save_model(tmp_path / "model")
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", refuse)
    words_ = words({"method": "cot", "name": "new", "save_path": tmp_path / "saved", "model_id": folder})
    assert run.main([str(runs / "config.yaml"), *words_]) == 2
    reason = "GenerationConfig is invalid: - `temperature`: `do_sample` is False"
    expected = f"error: model_id: '{folder}': the model can be loaded, but not saved: {reason}\n"
    assert capsys.readouterr().err.endswith(expected)
    assert not (tmp_path / "saved").exists()


def test_coconut_json_contents(runs):
    text = (runs / "cot" / "best" / "coconut.json").read_text()
    assert json.loads(text)["method"] == "cot"
    assert json.loads(text)["token_ids"] == {}
    assert text.endswith("}\n")


SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0}
SIZES |= {"eos_token_id": 0, "pad_token_id": 0}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.3, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("granite", {"logits_scaling": 3.0}),  # logits that are more than the head
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),  # positions that count padding
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.02}),
        ("mamba", {"state_size": 8, "time_step_rank": 4}),  # recurrent
    ],
)
def test_unsupported_architecture_is_refused(kind, options):
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | options))
    with pytest.raises(UserError, match="cannot be trained with thoughts"):
        check_model(lm, byte_tokenizer().eos_token_id, "model_id")


def test_model_whose_forward_fails_is_refused(folders, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(GPT2LMHeadModel, "forward", fail)
    with pytest.raises(UserError, match="model_id: GPT2LMHeadModel cannot be trained with thoughts: AssertionError"):
        check_model(load(folders["gpt2"]).lm, 0, "model_id")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("mistral", {"num_key_value_heads": 2}),
        ("falcon", {"alibi": True}),
        ("gpt_neox", {}),
    ],
)
def test_supported_architectures_pass_check_model(kind, options):
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | options)).train()
    check_model(lm, byte_tokenizer().eos_token_id, "model_id")
    assert lm.training
