"""The analysis of trained models: thoughts, replacements and scores match plain computations."""

import csv
import fcntl
import json
import subprocess
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import analyze
import mini
import prosqa
import pytest
import torch
import yaml
from transformers import AutoTokenizer

import run
from analysis import interventions, k_sweep, lens, operands, probes, search
from analysis.graphs import find_form
from analysis.thoughts import (
    NOISE,
    extended,
    log_probabilities,
    noise,
    open_subject,
    read_thoughts,
    think,
    write_answers,
)
from config import Config
from helpers import REPOSITORY, byte_tokenizer, save_model, tiny_gpt2, tiny_llama, tiny_qwen3, words, write_json

PROBLEMS = list(islice(mini.make_problems(seed=3), 12))
KINDS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "qwen3": tiny_qwen3}
RUNS = {
    "gpt2": "coconut",
    "llama": "coconut",
    "qwen3": "coconut",
    "pause": "pause_as_thought",
    "cot": "cot",
    "brief": "coconut",
}


@pytest.fixture(scope="module")
def save_path(tmp_path_factory):
    """Train one epoch per method on mini problems, with two of the steps already replaced."""
    save_path = tmp_path_factory.mktemp("analysis")
    data = write_json(save_path / "data.json", PROBLEMS)
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "args" / "mini_model")
    config = {"save_path": str(save_path), "logger": "none", "lr": 1e-2, "c_thought": 2, "max_latent_stage": 2}
    config |= {"train_path": data, "val_path": data, "max_new_tokens": 12, "resume": 3, "num_epochs": 4}
    (save_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, method in RUNS.items():
        model = save_model(save_path / f"{name}_model", KINDS.get(name, tiny_gpt2)(len(tokenizer), 128), tokenizer)
        values = {
            "name": name,
            "method": method,
            "model_id": model,
            "c_thought": 1 if name in ("brief", "pause") else 2,
        }
        assert run.main([str(save_path / "config.yaml"), *words(values)]) == 0
    return save_path


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3"])
def subject(save_path, request):
    return open_subject(str(save_path / request.param / "best"), PROBLEMS, batch_size=5)


def plain_thoughts(subject, prompt, given):
    """Compute the input embeddings of a prompt by uncached passes; given[i] replaces thought i, unless None."""
    lm, ids = subject.model.base_causallm, torch.tensor([prompt["input_ids"]])
    embeds = lm.get_input_embeddings()(ids).clone()  # (1, length, hidden)
    places = (ids[0] == subject.model.latent_token_id).nonzero().flatten().tolist()
    with torch.no_grad():
        for save_path, value in zip(places, given, strict=True):
            own = lm.base_model(inputs_embeds=embeds[:, :save_path]).last_hidden_state[:, -1]
            embeds[:, save_path] = own if value is None else value
    return embeds, places


def test_read_thoughts_matches_uncached_passes(subject):
    own = read_thoughts(subject)  # (problems, thoughts, hidden)
    others = torch.randn_like(own)
    for forced in ([False] * 4, [False, True, False, True], [True] * 4):
        found = read_thoughts(subject, others, forced)
        for index, prompt in enumerate(subject.prompts):
            given = [others[index, i] if is_forced else None for i, is_forced in enumerate(forced)]
            embeds, places = plain_thoughts(subject, prompt, given)
            torch.testing.assert_close(found[index], embeds[0, places], rtol=1e-4, atol=1e-4)


def test_replacing_thoughts_by_themselves_is_identity(subject):
    own = read_thoughts(subject)  # (problems, thoughts, hidden)
    part, batch = next(subject.batches(subject.prompts, ""))
    before, _ = think(subject, batch)
    for forced in ([True] * 4, [True, False] * 2):
        torch.testing.assert_close(think(subject, batch, own[part], forced)[0], before, rtol=1e-3, atol=1e-3)
    changed, _ = think(subject, batch, 3 * torch.randn_like(own[part]), [True] * 4)
    assert (changed - before).abs().max() > 0.1


def test_replaced_thoughts_change_answers(subject):
    own, before = read_thoughts(subject), write_answers(subject, "")
    others = (write_answers(subject, "", scale * torch.randn_like(own), [True] * 4) for scale in (3, 10, 30, 100))
    assert any(other != before for other in others)


def test_write_answers_matches_validation(save_path, subject):
    directory = next(path for path in save_path.glob("*/best") if str(path) == subject.checkpoint.path).parent
    expected = [json.loads(line) for line in (directory / "predictions_4.jsonl").read_text().splitlines()]
    answers = write_answers(subject, "")
    for key in ("answer", "new_tokens"):
        assert [answer[key] for answer in answers] == [line[key] for line in expected]


def test_log_probabilities_match_single_pass(subject):
    texts = ["a\n", "b\nc\n", "d e f "]
    prompts = subject.prompts[:3]
    tokens = [subject.tokenize(text) for text in texts]
    items = [extended(prompt, own) for prompt, own in zip(prompts, tokens, strict=True)]
    found = log_probabilities(subject, items, [1, 2, 3], "")
    for prompt, own, score, count in zip(prompts, tokens, found, [1, 2, 3], strict=True):
        embeds, _ = plain_thoughts(subject, prompt, [None] * 4)
        lm = subject.model.base_causallm
        table = lm.get_input_embeddings()
        with torch.no_grad():
            logits = lm(inputs_embeds=torch.cat([embeds, table(torch.tensor([own]))], 1)).logits[0].log_softmax(-1)
        assert len(own) == count
        expected = sum(logits[len(prompt["input_ids"]) - 1 + i, id].item() for i, id in enumerate(own))
        assert score == pytest.approx(expected, abs=1e-3)


def test_search_values_are_raw_probabilities(subject):
    found = search.values(subject, level=2, steps=1)
    for graph, own in zip(subject.graphs, found, strict=True):
        assert own.keys() == set(graph.level(2)) and 0 < sum(own.values()) < 1
    own_again = search.values(subject, level=2, steps=1, replaced=lambda thoughts: thoughts)
    assert all(one == pytest.approx(other, rel=1e-3, abs=1e-6) for one, other in zip(found, own_again, strict=True))
    assert search.values(subject, level=2, steps=1, replaced=noise) != found


def test_attention_rows_sum_to_one_over_all_kinds(subject):
    kernel = subject.model.base_causallm.config._attn_implementation
    rows = lens.attention_rows(subject)
    assert subject.model.base_causallm.config._attn_implementation == kernel
    for start in ("answer", "thought 1", "thought 4"):
        own = {row["to"]: row["weight"] for row in rows if row["from"] == start}
        assert sum(own.values()) == pytest.approx(1, abs=1e-4)
        assert {
            "facts on the path",
            "facts not reachable",
            "question's rest",
            "thought 1",
            "start marker",
        } <= own.keys()


def test_hidden_states_start_with_thought_and_end_with_next(subject):
    states, thoughts = probes.hidden_states(subject), read_thoughts(subject)
    inner = states.shape[1] - 1
    torch.testing.assert_close(states[:, inner, :-1], thoughts[:, 1:], rtol=1e-4, atol=1e-4)
    if subject.model.base_causallm.config.model_type != "gpt2":  # GPT-2 adds position embeddings first
        torch.testing.assert_close(states[:, 0], thoughts, rtol=1e-4, atol=1e-4)


def test_cross_validate_finds_only_encoded_labels():
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (300,), generator=random)
    noise = torch.randn(300, 8, generator=random)
    there = noise + 5 * torch.nn.functional.one_hot(truth, 8)
    other = torch.randint(3, (300,), generator=random)
    [found, not_there] = probes.cross_validate(there, [truth, other])
    assert found > 290 and 0.23 < not_there / 300 < 0.43
    [nothing] = probes.cross_validate(noise, [truth])
    assert 0.15 < nothing / 300 < 0.35


def test_probe_control_assigns_distinct_nodes_to_roots():
    graphs = [find_form(problem).graph(problem) for problem in PROBLEMS]
    drawn = probes.control(graphs, "abcdefghijklmnop")
    by_root = {graph.root: node for graph, node in zip(graphs, drawn, strict=True)}
    assert all(by_root[graph.root] == node for graph, node in zip(graphs, drawn, strict=True))
    assert len(set(by_root.values())) == len(by_root)


def test_intervention_subsets_and_modes():
    subsets = interventions.subsets(3)
    assert list(subsets) == ["all", "only 1", "only 2", "only 3", "first 2", "last 2"]
    assert [len(interventions.modes(chosen)) for chosen in subsets.values()] == [1, 2, 2, 1, 2, 1]


def test_frozen_keeps_and_propagated_recomputes_later_thoughts(save_path):
    subject = open_subject(str(save_path / "gpt2" / "best"), PROBLEMS, batch_size=5)
    own = read_thoughts(subject)
    changed = own.clone()
    changed[:, 0] = 3 * torch.randn_like(own[:, 0])
    frozen = read_thoughts(subject, changed, [True] * 4)
    propagated = read_thoughts(subject, changed, [True, *[False] * 3])
    torch.testing.assert_close(frozen[:, 1:], own[:, 1:])
    assert (propagated[:, 1:] - own[:, 1:]).norm(dim=-1).min() > 1e-3
    torch.testing.assert_close(propagated[:, 0], changed[:, 0])


def test_draw_donors():
    steps, random = [3, 3, 4, 4, 4], torch.Generator().manual_seed(0)
    alike = interventions.draw_donors(steps, True, random)
    other = interventions.draw_donors(steps, False, random)
    assert all(steps[i] == steps[d] and i != d for i, d in enumerate(alike))
    assert all(steps[i] != steps[d] for i, d in enumerate(other))
    assert interventions.draw_donors([3, 3, 7, 6], True, random)[2:] == [3, 2]  # otherwise the nearest
    assert interventions.draw_donors([3, 3], False, random) is None
    assert interventions.draw_donors([3], True, random) is None


def test_replacements(save_path):
    subject = open_subject(str(save_path / "gpt2" / "best"), PROBLEMS, batch_size=5)
    own = torch.randn(12, 4, 16)
    found = {name: replacement.values for name, replacement in interventions.replacements(subject, own).items()}
    torch.testing.assert_close(found[interventions.NOISE_OF_NORM].norm(dim=-1), own.norm(dim=-1))
    assert torch.equal(found[interventions.ORDER].sort(1).values, own.sort(1).values)
    assert not (found[interventions.ORDER] == own).all(2).any()
    assert torch.equal(found[interventions.REPEATED][:, 3], own[:, 0])
    assert interventions.OTHER not in found  # all problems have three steps


def test_question_alone_has_no_markers_and_thoughts(subject):
    alone = subject.with_question_alone()
    expected = [subject.tokenize(problem["question"] + "\n") for problem in subject.problems]
    assert [prompt["input_ids"] for prompt in alone.prompts] == expected
    assert not alone.thinks and len(write_answers(alone, "")) == len(subject.problems)


@pytest.mark.parametrize("noisy, holm, opening", [(55, 0.01, "Thoughts are used"), (97, 0.3, "No use of the thoughts")])
def test_verdict_depends_on_effect_of_replaced_thoughts(noisy, holm, opening):
    def row(condition, places, percent, **compared):
        return {"condition": condition, "places": places, "n": 500, "rate": percent / 100} | compared

    rows = [row(interventions.UNTOUCHED, "", 98), row(interventions.QUESTION, "", 20)]
    compared = {"difference": noisy / 100 - 0.98, "Holm p": holm}
    rows += [row(interventions.NOISE_OF_NORM, "only 1", 1, **compared)]
    rows += [row(interventions.NOISE_OF_NORM, "all", noisy, **compared)]
    found = interventions.verdict(rows)
    assert found.startswith(opening)
    assert all(f"{percent}.0%" in found for percent in (98, noisy, 20)) and "n = 500" in found


def test_k_sweep_without_graph_and_thoughts_draws_nothing(save_path):
    cot = open_subject(str(save_path / "cot" / "best"), PROBLEMS[:2], batch_size=5)
    bare = replace(cot, forms=[None] * 2, graphs=[None] * 2)
    assert [bool(k_sweep.analyze(each, []).figures[0].draw) for each in (cot, bare)] == [True, False]


def test_influence_on_later_thoughts_and_answer_only(save_path):
    subject = open_subject(str(save_path / "gpt2" / "best"), PROBLEMS, batch_size=5)
    rows = interventions.influence(subject, read_thoughts(subject), write_answers(subject, "")).rows
    assert rows[1]["thought 2"] is None and rows[1]["thought 3"] > 1e-4 and rows[3]["answer"] > 1e-4


def test_operand_change():
    problem = {"question": "Ann has 3 boxes of 4 pens.", "steps": ["<<3*4=12>>"], "answer": "12"}
    assert operands.change(problem) == ("Ann has 4 boxes of 4 pens.", "12", "16")
    assert operands.change(problem | {"question": "3 boxes and 3 of 4 pens"}) is None
    assert operands.change(problem | {"question": "3 boxes of 4 pens, not 12"}) is None
    assert operands.change(problem | {"steps": ["<<12/4=3>>"]}) is None
    assert operands.change(problem | {"steps": []}) is None


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_analyze_writes_full_report_with_baselines(save_path, capsys):
    best = save_path / "brief" / "best"
    baselines = [str(save_path / name / "best") for name in ("cot", "pause")]
    assert analyze.main([str(best), "--beside", *baselines, "--limit", "10", "--batch", "5", "--problem", "2"]) == 0
    folder = save_path / "brief" / f"analysis_{best.resolve().name}"
    assert (folder / "report.html").exists() and str(folder) in capsys.readouterr().out
    sweep = read_csv(folder / "k_sweep.csv")
    assert [row["cell"] for row in sweep if row["model"] == "coconut"] == [f"coconut, k = {k}" for k in range(5)]
    assert [row["cell"] for row in sweep if row["model"] == "cot"] == ["cot"]
    assert len([row for row in sweep if row["model"] == "pause_as_thought"]) == 5
    for table in folder.glob("*.csv"):  # all cells cover the same problems, except in rows that do not count problems
        for row in read_csv(table):
            counted = row.get("vectors") == "token embeddings" or "height" in row or table.stem == "search_tree"
            assert counted or row.get("n", "10") == "10", table
    for name in ("value_by_height", "parallelism"):  # results come with controls
        assert {row["model"] for row in read_csv(folder / f"{name}.csv")} == {"coconut", NOISE, "pause_as_thought"}
    assert {row["vectors"] for row in read_csv(folder / "decoded_roles.csv")} == {"thought", NOISE}
    cosines = {row["vectors"]: row["cosine to the mean"] for row in read_csv(folder / "geometry.csv")}
    assert float(cosines["thought 1"]) > float(cosines[f"{NOISE} 1"])
    cells = read_csv(folder / "interventions.csv")
    assert {*interventions.CONTROLS, "cot", "pause_as_thought"} <= {row["condition"] for row in cells}
    lines = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert all(line["correct"] == line["k_sweep"]["coconut, k = 2"]["correct"] for line in lines)
    assert len(lines) == 10 and {"k_sweep", "search", "top_tokens", "interventions"} <= lines[0].keys()
    assert analyze.main([str(best)]) == 2  # never overwritten
    assert "already contains a report" in capsys.readouterr().err


def test_run_with_analyze_writes_report_once_and_keeps_its_claim_meanwhile(save_path, monkeypatch):
    metrics, start_process, seen = save_path / "looked_into" / "metrics.jsonl", subprocess.run, []

    def is_claimed() -> bool:
        with metrics.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def watched(command, **options):
        seen.extend(is_claimed() for word in command if word.endswith("analyze.py"))
        return start_process(command, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    values = {"name": "looked_into", "method": "pause_as_thought", "model_id": str(save_path / "pause_model")}
    command = [str(save_path / "config.yaml"), *words(values | {"c_thought": 1, "analyze": True})]
    assert run.main(command) == 0
    report = save_path / "looked_into" / "analysis_checkpoint_4" / "report.html"
    before = report.stat().st_mtime_ns
    assert run.main(command) == 0 and report.stat().st_mtime_ns == before
    assert seen == [True] and not is_claimed()


def test_analyze_rejects_or_skips_inapplicable_questions(save_path, capsys):
    cot, pause = (str(save_path / name / "best") for name in ("cot", "pause"))
    assert analyze.main([cot, "--questions", "lens"]) == 2
    assert "method cot at stage 0 has no thoughts" in capsys.readouterr().err
    assert analyze.main([pause, "--questions", "k_swep"]) == 2
    assert "k_swep" in capsys.readouterr().err
    assert analyze.main([cot, "--problem", "99"]) == 2
    assert analyze.main([cot, "--limit", "4"]) == 0
    [folder] = (save_path / "cot").glob("analysis_*")
    assert {path.stem for path in folder.glob("*.csv")} == {"k_sweep", "k_sweep_tests"}


def test_analyze_gsm_problems_without_graph(save_path, capsys):
    tokenizer = byte_tokenizer()
    problem = {"question": "Ann has 2 boxes of 3 pens.", "steps": ["<<2*3=6>>"], "answer": "6"}
    other = {"question": "Bob has 5 bags of 7 nuts and 2 more", "steps": ["<<5*7=35>>", "<<35+2=37>>"], "answer": "37"}
    names = {"question": "problem", "steps": "rationale", "answer": "solution"}
    problem, other = ({names[field]: text for field, text in each.items()} for each in (problem, other))
    data = [write_json(save_path / f"gsm{i}.json", [problem, other] * n) for i, n in enumerate((1, 2))]
    model = save_model(save_path / "bytes", tiny_gpt2(len(tokenizer), 128), tokenizer)
    values = {"name": "gsm", "method": "coconut", "model_id": model, "train_path": data, "val_path": data}
    values |= {"c_thought": 1, "columns": names}
    assert run.main([str(save_path / "config.yaml"), *words(values)]) == 0
    assert analyze.main([str(save_path / "gsm" / "best")]) == 0
    [folder] = (save_path / "gsm").glob("analysis_*")
    tables = {path.stem for path in folder.glob("*.csv")}
    assert {"k_sweep", "interventions", "operands", "attention"} <= tables
    assert not tables & {"search_tree", "probes", "decoded_roles"}
    cells = {row["cell"] for row in read_csv(folder / "operands.csv")}
    times = ("before the change", "after the change", NOISE)
    assert cells == {f"{which} result, {when}" for which in ("old", "new") for when in times}


def test_analyze_prosqa_with_bos_token(save_path, capsys):
    recipe = prosqa.Recipe(nodes=9, min_hops=2, max_hops=3)
    problems = list(prosqa.generate(recipe, 10, seed=1))
    data = write_json(save_path / "sentences.json", problems)
    tokenizer = byte_tokenizer(bos=True)
    model = save_model(save_path / "bos", tiny_llama(len(tokenizer), 700), tokenizer)
    values = {"name": "sentences", "method": "coconut", "model_id": model, "train_path": data, "val_path": data}
    assert run.main([str(save_path / "config.yaml"), *words(values | {"c_thought": 1})]) == 0
    best = str(save_path / "sentences" / "best")
    subject = open_subject(best, problems, batch_size=5)
    assert lens.mark_of_answer(subject) == subject.tokenize("### ")
    length = len(subject.prompts[0]["input_ids"])
    kinds = lens.kinds_of_tokens(subject, 0, length)
    question = problems[0]["question"]
    fact = question[: question.index(".") + 1]
    assert kinds[0] == "first token" and len(set(kinds[1 : len(fact) + 1])) == 1 and kinds[1].startswith("facts ")
    assert kinds[question.index("Is ") + 1] == "question's rest"
    assert analyze.main([best, "--questions", "search", "lens", "probes"]) == 0


def test_mark_of_answer_with_gpt2_tokenization(save_path):
    """GPT-2's tokenizer merges the space with the answer's first word: no training text ends in "### "."""
    tokens = {"### ": [21017, 220], "### Tom is a lorpus.": [21017, 4186, 318, 257]}
    subject = SimpleNamespace(tokenize=tokens.__getitem__, problems=[{"answer": "Tom is a lorpus."}])
    assert lens.mark_of_answer(subject) == [21017]


def test_k_sweep_stops_at_model_positions(save_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "args" / "mini_model")
    data = write_json(save_path / "short.json", PROBLEMS[:2])
    longest = max(len(problem["question"].split()) for problem in PROBLEMS[:2])
    model = save_model(save_path / "short_model", tiny_gpt2(len(tokenizer), longest + 8), tokenizer)
    values = {"name": "short", "method": "coconut", "model_id": model, "train_path": data, "val_path": data}
    assert run.main([str(save_path / "config.yaml"), *words(values | {"c_thought": 1, "max_new_tokens": 3})]) == 0
    subject = open_subject(str(save_path / "short" / "best"), PROBLEMS[:2], batch_size=5)
    room = subject.positions - max(len(prompt["input_ids"]) for prompt in subject.with_thoughts(0).prompts)
    config = Config({"method": "coconut", "max_latent_stage": room})
    assert k_sweep.sweep(replace(subject, checkpoint=replace(subject.checkpoint, config=config)))[-1][0] == room
