"""Checkpoints in other hands: transformers and servers go on with the same tokens as our own generation."""

import io
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import ask
import convert
import hub
import lm_eval_coconut
import pytest
import torch
import transformers
import yaml
from build import inputs
from huggingface_hub import ModelCard
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from runs import read_run
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import run
from coconut import Coconut
from components.files import verify_manifest
from config import Config, UserError
from curriculum import END, LATENT, PAUSE, START
from dataset import MyCollator, get_dataset, get_question_latent_dataset
from helpers import (
    REPOSITORY,
    byte_tokenizer,
    make_problems,
    save_model,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    words,
    write_json,
)

V = len(byte_tokenizer())
METHODS = {"gpt2": "coconut", "llama": "no_curriculum", "pause": "pause_token", "cot": "cot"}
PROMPTS = ["1+2+3\n", "4+5+6+7+8\n", "9\n"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with four short runs, which write steps, pause, and think with two kinds of models; 4 thoughts each."""
    place = tmp_path_factory.mktemp("share")
    models = {name: save_model(place / f"{name}_model") for name in ("gpt2", "pause", "cot")}
    models["llama"] = save_model(place / "llama_model", tiny_llama(V, 128))
    data = write_json(place / "data.json", make_problems(8, steps=4))
    config = {"save_path": str(place), "logger": "none", "lr": 1e-3, "c_thought": 2, "max_latent_stage": 2}
    config |= {"train_path": data, "val_path": data, "max_new_tokens": 6, "resume": 2, "num_epochs": 3}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    for name, method in METHODS.items():
        values = {"name": name, "method": method, "model_id": models[name]}
        assert run.main([str(place / "config.yaml"), *words(values)]) == 0
    return place


def ours(folder, prompts=PROMPTS, **options):
    """Our generation's tokens for each prompt alone, made as validation makes them: markers, thoughts and answer."""
    model, tokenizer = Coconut.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    description = json.loads((folder / "coconut.json").read_text())
    config = Config({key: description[key] for key in ("method", "c_thought", "max_latent_stage")})
    problems = [{"question": prompt.removesuffix("\n"), "answer": "", "steps": []} for prompt in prompts]
    examples = get_dataset(write_json(folder.parent / "prompts.json", problems), tokenizer)
    ids = description["token_ids"]
    order = [ids.get(START), ids.get(LATENT, ids.get(PAUSE)), ids.get(END)]
    features = get_question_latent_dataset(description["stage"], examples, config, *order, no_special_marker=not ids)
    rows = []
    for feature, question in zip(features, examples["question_tokenized"], strict=True):
        batch = MyCollator(tokenizer, model.latent_token_id)([feature])
        [row] = model.eval().generate(**inputs(batch), max_new_tokens=6, **options).tolist()
        rows.append(row[len(question) :])
    return rows


def opened(folder, **options):
    """The model as transformers opens it with trust, its tokenizer, and the prompts as a padded batch."""
    lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return lm, tokenizer, tokenizer(PROMPTS, return_tensors="pt", padding=True)


def plain_model(folder):
    """The model alone: transformers 4 runs the code of a local folder even without trust."""
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert transformers.__version__.startswith("4.") or "generate" not in vars(lm)
    vars(lm).pop("generate", None)
    return lm


def without_padding(rows, eos):
    """Rows of tokens without what follows after their ends."""
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_transformers_goes_on_with_the_same_tokens(place, name, side):
    lm, tokenizer, batch = opened(place / name / "best")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
    found = lm.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()  # greedy, and as long as validation's
    expected = ours(place / name / "best")
    assert without_padding(found, tokenizer.eos_token_id) == without_padding(expected, tokenizer.eos_token_id)


def test_the_thoughts_are_the_ones_that_matter(place):
    """Without trust the folder is a plain model, which does not think and says something else."""
    folder = place / "gpt2" / "best"
    lm, _, batch = opened(folder)
    thinking = lm.generate(**batch)
    assert thinking.shape[1] == batch["input_ids"].shape[1] + 6 + 6
    plain = plain_model(folder)
    assert plain.generate(**batch).shape[1] == batch["input_ids"].shape[1] + 6
    middle = thinking[:, :-6]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)], dim=1)
    assert not torch.equal(plain.generate(middle, attention_mask=mask), thinking)


def test_sampling_and_beams_follow_thoughts_too(place):
    lm, _, batch = opened(place / "gpt2" / "best")
    torch.manual_seed(0)
    sampled = lm.generate(**batch, do_sample=True, num_return_sequences=20, max_new_tokens=3)
    length = batch["input_ids"].shape[1]
    assert sampled.shape == (60, length + 6 + 3)
    assert (sampled[:, length : length + 6] == torch.tensor([V, V + 2, V + 2, V + 2, V + 2, V + 1])).all()
    assert len(sampled[:20].unique(dim=0)) > 1
    assert torch.equal(lm.generate(**batch, do_sample=True, top_k=1), lm.generate(**batch))
    assert lm.generate(**batch, num_beams=3).shape[1] <= length + 6 + 6


def test_the_first_sampled_token_has_the_distribution_after_the_thoughts(place):
    folder = place / "gpt2" / "best"
    lm, tokenizer, _ = opened(folder)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    out = lm.generate(**prompt, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    model = Coconut.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(out.sequences[:, :-1], torch.ones_like(out.sequences[:, :-1])).logits[:, -1]
    torch.testing.assert_close(out.logits[0], expected)


def test_what_a_caller_may_want_besides(place):
    """The folder named to a plain model, ids by position, another number of thoughts, a streamer."""
    folder = place / "gpt2" / "best"
    lm, tokenizer, batch = opened(folder)
    length = batch["input_ids"].shape[1]
    plain = plain_model(folder)
    named = plain.generate(**batch, custom_generate=str(folder), trust_remote_code=True)
    assert torch.equal(named, lm.generate(**batch))
    again = lm.generate(**batch, custom_generate=str(folder), trust_remote_code=True)  # to one that has the code
    assert torch.equal(named, again)
    assert lm.generate(batch["input_ids"][1:2], thoughts=0, max_new_tokens=2).shape == (1, length + 2 + 2)
    lm.generate(**tokenizer("1+2\n", return_tensors="pt"), streamer=TextStreamer(tokenizer))
    with pytest.raises(ValueError, match="input_ids"):
        lm.generate(inputs_embeds=torch.zeros(1, 2, 16))


def test_coconut_opens_what_it_saves(place, tmp_path):
    folder = place / "llama" / "best"
    model = Coconut.from_pretrained(folder)
    assert (model.start_latent_id, model.end_latent_id, model.latent_token_id) == (V, V + 1, V + 2)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = Coconut.from_pretrained(tmp_path / "saved")
    assert again.description == model.description == json.loads((folder / "coconut.json").read_text())
    assert again.eos_token_id == model.eos_token_id
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert ours(tmp_path / "saved") == ours(folder)
    description = {"token_ids": {}, "stage": 0}
    shutil.copytree(place / "gpt2" / "best", tmp_path / "earlier")
    write_json(tmp_path / "earlier" / "coconut.json", description)
    with pytest.raises(ValueError, match="earlier version"):
        Coconut.from_pretrained(tmp_path / "earlier")
    with pytest.raises(ValueError, match="holds a model already"):
        again.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma3], ids=["gpt2", "gemma3"])
def test_a_model_of_ones_own_is_saved_with_its_thoughts(make, tmp_path):
    model, mask = Coconut(make(), 49, 47, 48, 0).eval(), torch.ones(1, 7, dtype=torch.long)
    model.save_pretrained(tmp_path / "saved", thoughts=3)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    found = lm.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    expected = model.generate(torch.tensor([[1, 2, 47, 49, 49, 49, 48]]), mask, max_new_tokens=2)
    assert found.tolist() == expected.tolist()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no coconut\.json"):
        Coconut.from_pretrained(save_model(tmp_path / "plain"))


def test_a_checkpoint_without_its_code_is_damaged(place, tmp_path):
    shutil.copytree(place / "cot" / "best", tmp_path / "copy")
    assert verify_manifest(tmp_path / "copy") is None
    (tmp_path / "copy" / "custom_generate" / "generate.py").unlink()
    assert "generate.py is missing" in verify_manifest(tmp_path / "copy")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_plain_model_goes_on_from_a_prompts_embeddings(place, name):
    folder = place / name / "best"
    model, tokenizer = Coconut.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    thoughts = [model.start_latent_id, *[model.latent_token_id] * 4, model.end_latent_id]
    prompt = torch.tensor(tokenizer("1+2+3\n")["input_ids"] + thoughts)
    embeds = model.inputs_embeds(prompt)
    assert embeds.shape == (len(prompt), 16)
    plain = plain_model(folder)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    found = plain.generate(inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=6)
    expected = model.generate(prompt[None], mask, max_new_tokens=6)[:, len(prompt) :]
    eos = model.eos_token_id
    assert without_padding(found.tolist(), eos) == without_padding(expected.tolist(), eos)
    assert not torch.equal(embeds[-4:-2], model.base_causallm.get_input_embeddings()(prompt)[-4:-2])


# --- scripts/ask.py ---------------------------------------------------------------------------------------------------


def asked(capsys, *arguments) -> list[dict]:
    """What ask.py says in JSON."""
    ask.main([str(argument) for argument in (*arguments, "--json")])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_ask_says_what_the_model_says(place, capsys, name):
    folder = place / name / "best"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [said] = asked(capsys, folder, "1+2+3")
    middle, thoughts = (0, "") if name == "cot" else (6, "" if name == "pause" else "[4 thoughts]")
    [new] = without_padding([row[middle:] for row in ours(folder, PROMPTS[:1])], tokenizer.eos_token_id)
    assert said["question"] == "1+2+3"
    assert said["generated"] == thoughts + tokenizer.decode(new)
    assert said["new_tokens"] == min(len(new) + 1, 6) + (4 if thoughts else 0)
    assert said["seconds"] > 0


def test_ask_thinks_as_long_as_it_is_told(place, capsys):
    folder = place / "gpt2" / "best"
    for count, shown in ((1, "[1 thought]"), (7, "[7 thoughts]")):
        [said] = asked(capsys, folder, "1+2+3", "--thoughts", count)
        assert said["generated"].startswith(shown)
    [said] = asked(capsys, folder, "1+2+3", "--thoughts", 0)
    assert "thought" not in said["generated"]


def test_ask_shows_the_tokens_that_thoughts_are_closest_to(place, capsys):
    folder = place / "gpt2" / "best"
    [said] = asked(capsys, folder, "1+2+3", "--show-thoughts")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():  # the first thought comes before any other, so the plain model has it, too
        prompt = tokenizer("1+2+3\n" + START, return_tensors="pt", return_token_type_ids=False)
        expected = lm(**prompt).logits[0, -1].softmax(-1).max(-1)
    assert [len(tokens) for tokens in said["thoughts"]] == [5] * 4
    token, probability = said["thoughts"][0][0]
    assert token == tokenizer.decode(expected.indices)
    assert probability == pytest.approx(expected.values.item(), rel=1e-4)
    ask.main([str(folder), "1+2+3", "--show-thoughts"])
    assert "thought 4: " in capsys.readouterr().out


def test_ask_reads_a_question_from_each_line(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2+3\n\n 4+5 \n"))
    assert [said["question"] for said in asked(capsys, place / "cot" / "best")] == ["1+2+3", "4+5"]


def test_ask_goes_on_after_a_question_that_is_too_long(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2\n" + "1+" * 80 + "\n4+5\n"))
    with pytest.raises(SystemExit) as stopped:
        ask.main([str(place / "gpt2" / "best"), "--json"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("error: ") == 1
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["1+2", "4+5"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpt2_model", "1+2"], "coconut.json"),
        (["nowhere", "1+2"], "nowhere"),
        (["cot/best", "1+2", "--thoughts", "2"], "cot"),
        (["gpt2/best", "1+2", "--thoughts", "-1"], "--thoughts"),
        (["gpt2/best", "1+" * 80], "128"),
    ],
)
def test_ask_refuses_by_name(place, capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        ask.main([str(place / arguments[0]), *arguments[1:]])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


# --- scripts/convert.py -----------------------------------------------------------------------------------------------


def written_officially(path, lm, wrapped=True):
    """An official file of a model: a Coconut module's names and its input embedding twice, or a plain one's."""
    state = lm.state_dict()
    if wrapped:
        embedding = lm.get_input_embeddings().weight.detach()
        state = {f"base_causallm.{name}": value for name, value in state.items()} | {"embedding.weight": embedding}
    torch.save(state, path)
    return path


def convert_official(place, file, folder, *words):
    model = folder.with_name("architecture")  # without weights: the file has them
    shutil.copytree(place / "gpt2_model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    convert.main(["from-official", str(file), str(folder), "--model-id", str(model), *words])
    return folder


def test_an_official_file_comes_back_the_same(place, tmp_path):
    torch.manual_seed(7)
    lm = tiny_gpt2(V + 3, 128).eval()
    file = written_officially(tmp_path / "checkpoint_1", lm)
    folder = convert_official(place, file, tmp_path / "ours", "--c-thought", "2", "--max-latent-stage", "2")
    convert.main(["to-official", str(folder), str(tmp_path / "back")])
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    tokenizer = byte_tokenizer()
    prompt = torch.tensor([tokenizer(PROMPTS[0])["input_ids"] + [V, V + 2, V + 2, V + 2, V + 2, V + 1]])
    official = Coconut(lm, V + 2, V, V + 1, tokenizer.eos_token_id).generate(prompt, torch.ones_like(prompt), 6)
    [found] = ours(folder, PROMPTS[:1])
    assert found == official[0, len(PROMPTS[0]) :].tolist()
    assert verify_manifest(folder) is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "cot"])
def test_the_official_code_gets_the_weights_of_a_checkpoint(place, tmp_path, name):
    convert.main(["to-official", str(place / name / "best"), str(tmp_path / "official")])
    state = torch.load(tmp_path / "official", weights_only=True)
    lm = AutoModelForCausalLM.from_pretrained(place / name / "best", dtype=torch.float32)
    prefix = "" if name == "cot" else "base_causallm."
    for key, value in lm.state_dict().items():
        assert torch.equal(value, state.pop(prefix + key))
    assert list(state) == ([] if name == "cot" else ["embedding.weight"])


def test_a_plain_official_file_is_opened_by_its_method(place, tmp_path):
    torch.manual_seed(7)
    file = written_officially(tmp_path / "cot", tiny_gpt2(V, 128), wrapped=False)
    folder = convert_official(place, file, tmp_path / "ours", "--method", "cot")
    convert.main(["to-official", str(folder), str(tmp_path / "back")])
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def refused(capsys, *words) -> str:
    """The message with which a conversion is refused, after which nothing more is there than before."""
    with pytest.raises(SystemExit) as stopped:
        convert.main([str(word) for word in words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


STAGES = ("--max-latent-stage", "2")


@pytest.mark.parametrize(
    ("rows", "wrapped", "words", "named"),
    [
        (V, False, STAGES, "--method"),
        (V + 3, True, ("--method", "cot"), "--method"),
        (V + 3, True, (), "--max-latent-stage"),
        (V - 9, True, STAGES, f"{V - 9} rows"),
    ],
)
def test_an_official_file_of_another_kind_is_refused(place, tmp_path, capsys, rows, wrapped, words, named):
    file = written_officially(tmp_path / "file", tiny_gpt2(rows, 128), wrapped)
    model = ("--model-id", place / "gpt2_model")
    assert named in refused(capsys, "from-official", file, tmp_path / "ours", *model, *words)
    assert not (tmp_path / "ours").exists()


def test_adapters_other_vocabularies_and_pauses_are_refused(place, tmp_path, capsys):
    weights = {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}
    torch.save(weights, tmp_path / "lora")
    model = ("--model-id", place / "gpt2_model")
    assert "lora_A" in refused(capsys, "from-official", tmp_path / "lora", tmp_path / "ours", *model, *STAGES)
    shutil.copytree(place / "gpt2" / "best", tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(capsys, "to-official", tmp_path / "adapted", tmp_path / "file")
    assert "<|pause|>" in refused(capsys, "to-official", place / "pause" / "best", tmp_path / "file")
    assert "coconut.json" in refused(capsys, "to-official", place / "gpt2_model", tmp_path / "file")
    shutil.copytree(place / "gpt2" / "best", tmp_path / "spare")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "spare")
    lm.resize_token_embeddings(V + 9)
    lm.save_pretrained(tmp_path / "spare")
    assert f"{V + 9} rows" in refused(capsys, "to-official", tmp_path / "spare", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_conversion_overwrites_nothing(place, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("kept")
    model = ("--model-id", place / "gpt2_model")
    assert "exists already" in refused(capsys, "to-official", place / "gpt2" / "best", taken)
    assert "exists already" in refused(capsys, "from-official", tmp_path / "file", taken, *model, *STAGES)
    assert taken.read_text() == "kept"


# --- scripts/lm_eval_coconut.py ---------------------------------------------------------------------------------------


def test_a_missing_harness_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(REPOSITORY / "scripts" / "lm_eval_coconut.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "lm_eval.__main__ is not installed; pip install -r requirements-extra.txt" in capsys.readouterr().err


def asked_by_the_harness(*requests) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=request) for request in requests]


@pytest.mark.parametrize("name", METHODS)
def test_the_harness_gets_the_texts_of_validation_and_their_probabilities(place, name):
    folder = place / name / "best"
    model = lm_eval_coconut.CoconutLM(str(folder), batch_size=2)
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), ours(folder)
    options = {"until": [], "max_gen_toks": 6}
    texts = model.generate_until(asked_by_the_harness(*((prompt, options) for prompt in PROMPTS)), disable_tqdm=True)
    assert texts == tokenizer.batch_decode(expected_answers(expected), skip_special_tokens=True)
    [cut] = model.generate_until(asked_by_the_harness((PROMPTS[0], {**options, "until": [texts[0][2:4]]})), True)
    assert cut == texts[0].split(texts[0][2:4])[0]
    prompts = [model.prompt(prompt)["input_ids"] for prompt in PROMPTS]
    pairs = [*zip(prompts, expected_answers(expected), strict=True), (prompts[0], tokenizer("### 7")["input_ids"])]
    scores = model._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [True, True, True, False]
    for (ids, new), (score, _) in zip(pairs, scores, strict=True):
        input_ids = torch.tensor([ids + new])  # (1, columns)
        loss = model.model(input_ids, torch.ones_like(input_ids), torch.tensor([[-100] * len(ids) + new])).loss
        assert score == pytest.approx(-loss.item() * len(new), rel=1e-4)
    [(score, _)] = model.loglikelihood(asked_by_the_harness((PROMPTS[0], "### 7")), disable_tqdm=True)
    assert score == pytest.approx(scores[3][0], rel=1e-4)


def expected_answers(rows: list[list[int]]) -> list[list[int]]:
    """The tokens that follow markers and thoughts or pauses, which `ours` returns with them."""
    return [row[-6:] for row in rows]


def test_the_harness_reads_answers_as_validation_does(place, tmp_path, monkeypatch):
    said = ["### 1,000", "6\n### 1000", "### 7", "1000"]
    problems = [{"question": f"{i}?", "steps": [], "answer": answer} for i, answer in enumerate(["1000"] * 4)]
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "prosqa_test.json", problems)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval_coconut.CoconutLM, "generate_until", lambda self, requests, **options: said)
    tasks = TaskManager(include_path=str(REPOSITORY / "scripts" / "lm_eval_tasks"), include_defaults=False)
    model = lm_eval_coconut.CoconutLM(str(place / "gpt2" / "best"))
    found = simple_evaluate(model, tasks=["prosqa_thoughts"], task_manager=tasks, bootstrap_iters=0)
    assert found["results"]["prosqa_thoughts"]["exact_match,answer"] == 0.5


def test_the_harness_is_refused_what_thoughts_have_no_part_in(place):
    model = lm_eval_coconut.CoconutLM(str(place / "gpt2" / "best"))
    with pytest.raises(UserError, match="do_sample"):
        model.generate_until(asked_by_the_harness((PROMPTS[0], {"do_sample": True})))
    with pytest.raises(UserError, match="perplexity"):
        model.loglikelihood_rolling(asked_by_the_harness(("text",)))


# --- scripts/hub.py ---------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_a_model_that_thinks_and_its_card(place, tmp_path, capsys):
    checkpoint, folder = place / "gpt2" / "best", tmp_path / "dry"
    assert hub.main(["push", str(checkpoint), "owner/name", "--license", "mit", "--dry-run", str(folder)]) == 0
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written >= {"model.safetensors", "coconut.json", "custom_generate/generate.py", "README.md", "curves.svg"}
    assert not written & {"training_state.pt", "optimizer.safetensors", "manifest.json"}
    assert all(name in capsys.readouterr().out for name in ["owner/name"])
    lm, _, batch = opened(checkpoint)
    assert torch.equal(opened(folder)[0].generate(**batch), lm.generate(**batch))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers") and "coconut" in card.data.tags
    validated = [line for line in map(json.loads, (place / "gpt2" / "metrics.jsonl").open()) if "eval/epoch" in line]
    for line in validated:
        row = f"| {line['eval/epoch']} | {line['eval/stage']} | {line['eval/acc']:.1%} | {line['eval/loss']:.4f} |"
        assert row in card.text
    assert (
        "    max_latent_stage: 2\n" in card.text
        and 'from_pretrained("owner/name", trust_remote_code=True)' in card.text
    )
    assert str(place) not in card.text  # where it lay on this machine concerns nobody
    assert hub.main(["push", str(checkpoint), "owner/name", "--dry-run", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_card_shows_what_a_config_holds_as_text(place, tmp_path):
    shutil.copytree(place / "gpt2", tmp_path / "run", symlinks=True)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config |= {"val_path": "<img src=x onerror=alert(1)>", "new_token_init": "x\n```\n# <script>alert(1)</script>"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["owner/name", "--license", "<b>mine</b>", "--dry-run", str(tmp_path / "dry")]
    assert hub.main(["push", str(tmp_path / "run" / "best"), *words]) == 0
    text = ModelCard.load(tmp_path / "dry" / "README.md").text
    shown = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any(tag in line for line in shown for tag in ("<img", "<script", "<b>", "```"))
    assert "    new_token_init: " in text


@pytest.mark.parametrize("from_scratch, base", [(False, "openai-community/gpt2"), (True, None)])
def test_a_card_names_the_model_of_the_hub_that_was_trained(place, from_scratch, base):
    run = read_run(place / "gpt2")
    run.config.update({"model_id": "openai-community/gpt2", "from_scratch": from_scratch})
    text = hub.card(run, {"epoch": 3, "stage": 2, "thoughts": 4}, "owner/name", None, curves=False)
    assert ModelCard(text).data.base_model == base


def test_an_upload_takes_the_folder_and_tells_what_fails(place, monkeypatch, capsys):
    sent = []

    class Api:
        def create_repo(self, repository, private, exist_ok):
            sent.append((repository, private, exist_ok))

        def upload_folder(self, folder_path, repo_id):
            sent.append({path.name for path in folder_path.iterdir()})
            return "https://example.org/owner/name"

    words = ["push", str(place / "gpt2" / "best"), "owner/name", "--private"]
    monkeypatch.setattr(hub, "HfApi", Api)
    assert hub.main(words) == 0
    assert sent[0] == ("owner/name", True, True) and {"model.safetensors", "README.md"} <= sent[1]
    assert "https://example.org/owner/name" in capsys.readouterr().out

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(Api, "create_repo", refuse)
    assert hub.main(words) == 2
    assert "owner/name: nothing or not all was uploaded: no network" in capsys.readouterr().err
    for other, named in (
        ([str(place / "gpt2_model"), "owner/name"], "metrics.jsonl: cannot be read"),
        ([words[1], "a/b/c"], "a/b/c"),
    ):
        assert hub.main(["push", *other]) == 2
        assert named in capsys.readouterr().err
