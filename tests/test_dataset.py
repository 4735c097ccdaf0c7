"""Training sequences, labels and batches as strings: S, L, E, P are the markers, ^ bos, $ eos, a dot is -100."""

import copy
import itertools
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from datasets import Dataset

import dataset
from components.distributed import Processes
from components.tokenization import tokenize_problems
from config import Config, UserError
from curriculum import END, LATENT, METHODS, PAUSE, START, schedule_table, stage_of
from dataset import (
    Lengths,
    MyCollator,
    PlanningCollator,
    check_lengths,
    epoch_order,
    get_cot_latent_dataset,
    get_dataset,
    get_question_latent_dataset,
    model_args,
    step_batches,
    to_device,
)
from helpers import byte_tokenizer, make_problems, show, write_json

TWO_STEPS = {"question": "q?", "answer": "7", "steps": ["ab", "c"]}
ALL = "ab\nc\n### 7$"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([START, END, LATENT, PAUSE])
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make(get, tokenizer, problems, stage, config, **options):
    """The dataset that `get` builds for the config's method."""

    method = METHODS[config.method]
    names = (START, PAUSE if method.placeholder == "pause" else LATENT, END)
    ids = tokenizer.convert_tokens_to_ids(names)
    examples = tokenize_problems(problems, tokenizer)
    return get(stage, examples, config, *ids, no_special_marker=not method.markers, **options)


# --- sequences --------------------------------------------------------------------------------------------------------

COCONUT = [  # stage, options, prompt in training, target, prompt in generation; max_latent_stage is 3
    (0, {}, "q?\nSE", ALL, "q?\nSE"),
    (1, {}, "q?\nSLE", "c\n### 7$", "q?\nSLE"),
    (2, {}, "q?\nSLLE", "### 7$", "q?\nSLLE"),
    (3, {}, "q?\nSLLLE", "### 7$", "q?\nSLLLE"),
    (4, {}, "q?\nSLLLE", "### 7$", "q?\nSLLLE"),
    (9, {}, "q?\nSLLLE", "### 7$", "q?\nSLLLE"),
    (1, {"pad_latent_to_max": False}, "q?\nSLE", "c\n### 7$", "q?\nSLE"),
    (3, {"pad_latent_to_max": False}, "q?\nSLLLE", "### 7$", "q?\nSLLE"),
    (4, {"pad_latent_to_max": False}, "q?\nSLLE", "### 7$", "q?\nSLLE"),
    (2, {"max_latent_stage": 1}, "q?\nSLE", "### 7$", "q?\nSLE"),
    (2, {"max_latent_stage": 1, "pad_latent_to_max": False}, "q?\nSLE", "### 7$", "q?\nSLE"),
    (1, {"max_latent_stage": 0}, "q?\nSE", "### 7$", "q?\nSE"),
    (1, {"c_thought": 2}, "q?\nSLLE", "c\n### 7$", "q?\nSLLE"),
    (3, {"c_thought": 2}, "q?\nSLLLLLLE", "### 7$", "q?\nSLLLLLLE"),
    (4, {"c_thought": 2, "pad_latent_to_max": False}, "q?\nSLLLLE", "### 7$", "q?\nSLLLLE"),
    (1, {"c_thought": 0}, "q?\nSE", "c\n### 7$", "q?\nSE"),
]
ICOT = [  # stage (removed tokens), options, target
    (0, {}, ALL),
    (1, {}, "b\nc\n### 7$"),
    (4, {}, "\n### 7$"),
    (5, {}, "### 7$"),
    (9, {}, "### 7$"),
    (2, {"remove_all_when_remove_beyond": 3}, "\nc\n### 7$"),
    (3, {"remove_all_when_remove_beyond": 3}, "### 7$"),
]
CASES = [({"method": "coconut", "max_latent_stage": 3, **options}, stage, *texts) for stage, options, *texts in COCONUT]
CASES += [
    ({**options, "method": "pause_as_thought"}, stage, *(text.replace("L", "P") for text in texts))
    for options, stage, *texts in CASES
]
CASES += [
    ({**options, "method": "no_thoughts"}, stage, "q?\n", target, "q?\n")
    for options, stage, _, target, _ in CASES
    if options["method"] == "coconut"
]
CASES += [
    ({"method": "icot", "removal_smoothing_lambda": None, **options}, stage, "q?\n", target, "q?\n")
    for stage, options, target in ICOT
]
for stage in (0, 1, 5):
    options = {"max_latent_stage": 3, "c_thought": 2}
    CASES += [
        ({"method": "cot", "max_latent_stage": 0, "c_thought": 0}, stage, "q?\n", ALL, "q?\n"),
        ({"method": "no_cot", **options}, stage, "q?\n", "### 7$", "q?\n"),
        ({"method": "no_curriculum", **options}, stage, "q?\nSLLLLLLE", "### 7$", "q?\nSLLLLLLE"),
        ({"method": "pause_token", **options}, stage, "q?\nSPPPPPPE", "### 7$", "q?\nSPPPPPPE"),
    ]


def name(value):
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("options", "stage", "prompt", "target", "generation_prompt"), CASES, ids=name)
def test_sequences_of_every_method_and_stage(tokenizer, options, stage, prompt, target, generation_prompt):
    config = Config(options)
    [item] = make(get_cot_latent_dataset, tokenizer, [TWO_STEPS], stage, config)
    assert show(item["input_ids"], tokenizer) == prompt + target
    assert show(item["labels"], tokenizer) == "." * len(prompt) + target
    [question] = make(get_question_latent_dataset, tokenizer, [TWO_STEPS], stage, config)
    assert show(question["input_ids"], tokenizer) == generation_prompt
    assert "labels" not in question
    for feature in (item, question):
        assert feature["attention_mask"] == [1] * len(feature["input_ids"])
        assert feature["position_ids"] == list(range(len(feature["input_ids"])))
        assert feature["idx"] == 0


@pytest.mark.parametrize(
    ("steps", "stage", "pad", "prompt", "target"),
    [
        ([], 0, True, "q?\nSE", "### 7$"),
        ([], 1, True, "q?\nSLE", "### 7$"),
        ([], 3, True, "q?\nSLLE", "### 7$"),
        ([], 3, False, "q?\nSE", "### 7$"),
        ([""], 0, True, "q?\nSE", "\n### 7$"),
        ([""], 1, True, "q?\nSLE", "### 7$"),
        ([""], 3, False, "q?\nSLE", "### 7$"),
    ],
)
def test_sequences_of_problems_without_steps(tokenizer, steps, stage, pad, prompt, target):
    config = Config({"method": "coconut", "max_latent_stage": 2, "pad_latent_to_max": pad})
    [item] = make(get_cot_latent_dataset, tokenizer, [{**TWO_STEPS, "steps": steps}], stage, config)
    assert show(item["input_ids"], tokenizer) == prompt + target
    assert show(item["labels"], tokenizer) == "." * len(prompt) + target


def test_bos_is_prepended_to_the_question_only():
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.add_tokens([START, END, LATENT])
    config = Config({"method": "coconut", "max_latent_stage": 2})
    [item] = make(get_cot_latent_dataset, tokenizer, [TWO_STEPS], 0, config)
    assert show(item["input_ids"], tokenizer) == "^q?\nSE" + ALL
    assert show(item["labels"], tokenizer) == "......" + ALL
    [question] = make(get_question_latent_dataset, tokenizer, [TWO_STEPS], 0, config)
    assert show(question["input_ids"], tokenizer) == "^q?\nSE"


def test_get_dataset_tokenizes_question_steps_and_answer(tokenizer, tmp_path):
    problems = [TWO_STEPS, {"question": "é", "answer": "1,000", "steps": [], "extra": 1}]
    path = write_json(tmp_path / "data.json", problems)
    first, second = get_dataset(path, tokenizer)
    assert show(first["question_tokenized"], tokenizer) == "q?\n"
    assert [show(step, tokenizer) for step in first["steps_tokenized"]] == ["ab\n", "c\n"]
    assert show(first["answer_tokenized"], tokenizer) == "### 7$"
    assert tokenizer.decode(second["question_tokenized"]) == "é\n"
    assert second["steps_tokenized"] == []
    assert [first["idx"], second["idx"]] == [0, 1]
    assert list(get_dataset(path, tokenizer, max_size=1)) == [first]


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"method": "coconut", "max_latent_stage": 2, "epochs_per_stage": 2}, [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]),
        ({"method": "no_thoughts", "max_latent_stage": 1}, [0, 1, 2, 2, 2]),
        ({"method": "pause_as_thought", "max_latent_stage": 0, "epochs_per_stage": 3}, [0, 0, 0, 1, 1]),
        ({"method": "cot", "max_latent_stage": 2}, [0, 0, 0, 0]),
        ({"method": "no_cot", "max_latent_stage": 2}, [3, 3, 3]),
        ({"method": "no_curriculum", "max_latent_stage": 2}, [3, 3, 3]),
        ({"method": "pause_token", "max_latent_stage": 2}, [3, 3, 3]),
        ({"method": "icot", "remove_per_epoch": 4, "remove_all_when_remove_beyond": 10}, [0, 4, 8, 10, 10]),
    ],
    ids=name,
)
def test_stage_of_each_epoch(options, stages):
    config = Config({**options, "num_epochs": len(stages)})
    assert [stage_of(epoch, config) for epoch in range(len(stages))] == stages


def test_data_set_functions_name_a_missing_method():
    for make in (get_cot_latent_dataset, get_question_latent_dataset):
        with pytest.raises(ValueError, match="method: None is not a method; choose one of cot, no_cot"):
            make(0, [], Config({"max_latent_stage": 2}), 1, 2, 3)


@pytest.mark.parametrize("rate", [8, 7, 0.3, 2.5])
def test_removed_tokens_of_icot_at_all_positions_equal_exact_fractions(rate):
    config = Config({"method": "icot", "remove_per_epoch": rate, "remove_all_when_remove_beyond": 100_000})
    for epoch, examples in itertools.product((0, 3, 8), (7, 21, 1000)):
        for done in range(examples):
            exact = (epoch + Fraction(done, examples)) * Fraction(str(rate))
            assert stage_of(epoch + done / examples, config) == int(exact), (epoch, done, examples)


def test_schedule_table():
    config = Config(
        {"method": "coconut", "max_latent_stage": 2, "epochs_per_stage": 2, "c_thought": 3, "num_epochs": 9}
    )
    rows = [row.split(maxsplit=3) for row in schedule_table(config).splitlines()]
    assert rows == [
        ["epochs", "stage", "thoughts", "steps left"],
        ["1-2", "0", "0", "all"],
        ["3-4", "1", "3", "all but the first 1"],
        ["5-6", "2", "6", "all but the first 2"],
        ["7-9", "3", "6", "none"],
    ]


COCONUT = {"method": "coconut", "max_latent_stage": 2, "epochs_per_stage": 3, "num_epochs": 4}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (COCONUT, None),
        (
            COCONUT | {"num_epochs": 3},
            "never inserts a thought or pause in 3 epochs; check num_epochs, epochs_per",
        ),
        (COCONUT | {"num_epochs": 3, "uniform_prob": 0.1}, None),
        (COCONUT | {"c_thought": 0, "uniform_prob": 0.1}, "never inserts a thought or pause in 4 epochs"),
        (COCONUT | {"max_latent_stage": 0}, "never inserts a thought or pause in 4 epochs"),
        (COCONUT | {"method": "no_thoughts", "num_epochs": 3}, "never removes a step in 3 epochs"),
        (COCONUT | {"method": "no_curriculum", "num_epochs": 1}, None),
        (COCONUT | {"method": "pause_token", "max_latent_stage": 0}, "never inserts a thought or pause"),
        (
            {"method": "icot", "remove_per_epoch": 0, "num_epochs": 9},
            "never removes a step in 9 epochs; check num_e",
        ),
        ({"method": "icot", "remove_per_epoch": 2, "num_epochs": 1}, None),  # within the epoch
        ({"method": "cot"}, None),
        ({"method": "no_cot"}, None),
    ],
)
def test_schedule_warns_of_a_run_that_ends_before_its_method_begins(options, complaint):
    lines = [line for line in schedule_table(Config(options)).splitlines() if line.startswith("warning: ")]
    assert len(lines) == (complaint is not None)
    assert complaint is None or (complaint in lines[0] and f"method {options['method']} " in lines[0])


# --- uniform_prob and removal smoothing -------------------------------------------------------------------------------


def stages_drawn(tokenizer, epoch=0, count=300, problems=None, **options):
    """The number of thoughts of each problem at scheduled stage 5, from which the sampled stage follows."""
    config = Config({"method": "coconut", "max_latent_stage": 4, **options})
    problems = problems or [{"question": "q", "answer": "1", "steps": ["a", "b", "c"]}] * count
    dataset = make(get_cot_latent_dataset, tokenizer, problems, 5, config, epoch=epoch)
    latent = tokenizer.convert_tokens_to_ids(LATENT)
    return [item["input_ids"].count(latent) for item in dataset]


def test_uniform_prob_samples_stages_from_zero_to_number_of_steps(tokenizer):
    assert set(stages_drawn(tokenizer)) == {4}
    drawn = Counter(stages_drawn(tokenizer, uniform_prob=1))
    assert set(drawn) == {0, 1, 2, 3}
    assert all(45 < count < 105 for count in drawn.values())
    kept = Counter(stages_drawn(tokenizer, uniform_prob=0.3))[4]
    assert 180 < kept < 240


def test_uniform_prob_does_not_affect_icot(tokenizer):
    problems = [{"question": "q", "answer": "1", "steps": ["a", "b"]}] * 9
    plain, mixed = (
        list(make(get_cot_latent_dataset, tokenizer, problems, 1, Config({"method": "icot", "uniform_prob": p})))
        for p in (0, 1)
    )
    assert mixed == plain


def test_sampled_stage_depends_only_on_seed_epoch_and_example(tokenizer):
    drawn = stages_drawn(tokenizer, uniform_prob=0.5)
    torch.manual_seed(1)
    assert stages_drawn(tokenizer, uniform_prob=0.5) == drawn
    assert stages_drawn(tokenizer, uniform_prob=0.5, count=50) == drawn[:50]
    assert stages_drawn(tokenizer, uniform_prob=0.5, epoch=1) != drawn
    assert stages_drawn(tokenizer, uniform_prob=0.5, seed=1) != drawn


def test_sampled_stage_is_independent_of_access_order(tokenizer):
    config = Config({"method": "coconut", "max_latent_stage": 4, "uniform_prob": 0.5})
    dataset = make(get_cot_latent_dataset, tokenizer, make_problems(30, steps=3), 5, config)
    forward = [dataset[i] for i in range(30)]
    assert [dataset[i] for i in reversed(range(30))] == forward[::-1]


def test_uniform_prob_does_not_affect_validation_sequences(tokenizer):
    config = Config({"method": "coconut", "max_latent_stage": 4, "uniform_prob": 1})
    dataset = make(get_cot_latent_dataset, tokenizer, make_problems(20), 5, config, mix_stages=False)
    latent = tokenizer.convert_tokens_to_ids(LATENT)
    assert {item["input_ids"].count(latent) for item in dataset} == {4}


def test_icot_removal_smoothing_distribution(tokenizer):
    config = Config({"method": "icot", "removal_smoothing_lambda": 0.7})
    problems = [{"question": "q", "answer": "1", "steps": ["a" * 30]}] * 400
    dataset = make(get_cot_latent_dataset, tokenizer, problems, 2, config)
    offsets = Counter(29 - len(item["input_ids"]) + len("q\n### 1$") for item in dataset)
    assert 170 < offsets[0] < 230  # exp(-0.7) = 0.497, so half of the problems drop none, a quarter one
    assert 70 < offsets[1] < 130
    assert min(offsets) == 0
    exact = make(get_cot_latent_dataset, tokenizer, problems, 2, config, mix_stages=False)
    assert {len(item["input_ids"]) for item in exact} == {29 + len("q\n### 1$")}


# --- shuffling --------------------------------------------------------------------------------------------------------


def order(tokenizer, epoch=0, seed=0, shuffle=True):
    config = Config({"method": "coconut", "seed": seed})
    dataset = make(get_cot_latent_dataset, tokenizer, make_problems(40), 0, config, shuffle=shuffle, epoch=epoch)
    return [dataset[i]["idx"] for i in range(len(dataset))]


def test_shuffle_is_a_permutation_seeded_by_seed_and_epoch(tokenizer):
    first = order(tokenizer)
    assert sorted(first) == list(range(40)) == order(tokenizer, shuffle=False)
    torch.manual_seed(1)
    assert order(tokenizer) == first
    different = [first, order(tokenizer, epoch=1), order(tokenizer, seed=1), list(range(40))]
    assert len({tuple(indices) for indices in different}) == 4


def test_group_by_length_fills_each_step_with_similar_lengths():
    rng = random.Random(5)
    lengths = [rng.randint(5, 500) for _ in range(16 * 8 * 3 + 13)]  # three windows, then one full step and a rest of 5
    rows = [  # at the stage of epoch 2 no step is left, so their many tokens do not count
        {
            "question_tokenized": [0] * (n - 4),
            "steps_tokenized": [[0] * rng.randint(1, 500)] * 2,
            "answer_tokenized": [0],
        }
        for n in lengths
    ]
    examples = Dataset.from_list(rows)

    def grouped(**change):
        values = {"method": "coconut", "max_latent_stage": 1, "seed": 1, "group_by_length": True} | change
        return epoch_order(examples, Config(values), epoch=2, step_size=8)

    order = grouped()
    assert sorted(order) == list(range(len(lengths)))
    assert order == grouped() and order != grouped(seed=2)
    plain = grouped(group_by_length=False)
    windows = range(0, len(lengths), 16 * 8)
    assert [sorted(order[i : i + 128]) for i in windows] == [sorted(plain[i : i + 128]) for i in windows]
    steps = [[lengths[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
    assert len(steps[-1]) == 5
    for start in range(0, 48, 16):  # in a window no two steps overlap, and they are not in order
        window = steps[start : start + 16]
        assert [max(step) <= min(after) for step, after in pairwise(sorted(window))] == [True] * 15
        assert window != sorted(window)


# --- collator ---------------------------------------------------------------------------------------------------------


def feature(text, idx=0):
    """A feature from a string: x is a token, L a latent."""
    ids = [9 if char == "L" else 5 for char in text]
    n = len(ids)
    labels = [-100] * (n - 1) + [5]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * n, "position_ids": list(range(n)), "idx": idx}


class Padding:
    """Stands in for the tokenizer."""

    pad_token_id = 0


def drawing(batch):
    signs = {0: "-", 5: "x", 9: "L"}
    return ["".join(signs[id] for id in row) for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            ["xxxxxxxxxxLLxxxxx", "xxxxxLxxxxxxxx", "xxxxxxxLLxxxxxxx"],
            ["xxxxxxxxxxLLxxxxx--", "-----xxxxxLxxxxxxxx", "---xxxxxxxLLxxxxxxx"],
        ),
        (["xxLx", "xxx", "xxxxLxLx"], ["--xxLx--", "xxx-----", "xxxxLxLx"]),
        (["xxx", "x", "xx"], ["xxx", "x--", "xx-"]),
        (["xL"], ["xL"]),
    ],
)
def test_collator_aligns_first_latent_tokens(rows, expected):
    features = [feature(row, idx) for idx, row in enumerate(rows)]
    before = copy.deepcopy(features)
    batch = MyCollator(Padding, latent_id=9)(features)
    assert features == before  # left as they were
    assert drawing(batch) == expected
    for i, row in enumerate(expected):
        real = [column for column, char in enumerate(row) if char != "-"]
        assert batch["attention_mask"][i].tolist() == [int(char != "-") for char in row]
        assert batch["position_ids"][i].tolist() == [real.index(c) if c in real else 0 for c in range(len(row))]
        assert batch["labels"][i].tolist() == [5 if c == real[-1] else -100 for c in range(len(row))]
    assert batch["idx"].tolist() == list(range(len(rows)))
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_collator_without_labels_or_latents():
    features = [{key: v for key, v in feature(row).items() if key not in ("labels", "idx")} for row in ("xLx", "xxxL")]
    assert drawing(MyCollator(Padding, latent_id=9)(features)) == ["--xLx", "xxxL-"]
    batch = MyCollator(Padding)(features)
    assert drawing(batch) == ["xLx-", "xxxL"]
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}


def test_collator_pads_labels_with_label_pad_token_id():
    batch = MyCollator(Padding, latent_id=9, label_pad_token_id=-7)([feature("xxLx"), feature("xLx")])
    assert batch["labels"][1].tolist() == [-7, -100, -100, 5]


# --- ranks and micro-batches ------------------------------------------------------------------------------------------

DIVISIONS = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)]  # batch size, accumulation, ranks


def divide(examples, per_pass, passes, world_size):
    """The steps of each rank, each a list of micro-batches; asserts that all ranks agree on the size of each step."""
    ranks = [step_batches(examples, per_pass, passes, rank, world_size) for rank in range(world_size)]
    for shares in zip(*ranks, strict=True):
        assert {count for count, _ in shares} == {sum(len(batch) for _, step in shares for batch in step)}
    return [[step for _, step in steps] for steps in ranks]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 11, 13])
@pytest.mark.parametrize(("per_pass", "passes", "world_size"), [*DIVISIONS, (3, 2, 3), (2, 3, 5)])
def test_ranks_cover_each_example_once_in_equally_many_micro_batches(n, per_pass, passes, world_size):
    ranks = divide(range(n), per_pass, passes, world_size)
    assert len({tuple(len(step) for step in steps) for steps in ranks}) == 1
    indices = [i for steps in ranks for step in steps for batch in step for i in batch]
    assert sorted(indices) == list(range(n))
    assert all(len(batch) <= per_pass for steps in ranks for step in steps for batch in step)
    assert all(len(step) <= passes for steps in ranks for step in steps)


@pytest.mark.parametrize("n", [1, 4, 7, 13])
@pytest.mark.parametrize("division", DIVISIONS)
def test_steps_do_not_depend_on_ranks_or_accumulation(n, division):
    ranks = divide(range(n), *division)
    steps = [{i for step in parts for batch in step for i in batch} for parts in zip(*ranks, strict=True)]
    assert steps == [set(range(start, min(start + 4, n))) for start in range(0, n, 4)]


def test_resume_within_an_epoch_yields_the_remaining_steps():
    whole, rest = divide(range(13), 2, 1, 2), divide(range(8, 13), 2, 1, 2)
    assert rest == [steps[2:] for steps in whole]


# --- batched access ---------------------------------------------------------------------------------------------------


def test_getitems_matches_getitem(tokenizer):
    config = Config({"method": "coconut", "max_latent_stage": 2, "uniform_prob": 0.5})
    dataset = make(get_cot_latent_dataset, tokenizer, make_problems(9, steps=3), 2, config, shuffle=True)
    places = [7, 0, 7, 3]
    items = dataset.__getitems__(places)
    assert items == [dataset[place] for place in places]
    assert dataset.lengths(places) == [len(item["input_ids"]) for item in items]


# --- sequence lengths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"method": name} for name in METHODS] + [{"method": "coconut", "pad_latent_to_max": False}], ids=name
)
def test_computed_lengths_match_sequences(tokenizer, options):
    config = Config({"max_latent_stage": 2, "c_thought": 2, "remove_all_when_remove_beyond": 9, **options})
    problems = [{**TWO_STEPS, "steps": ["a", "bcd", "", "ef"][:n], "answer": "7" * (n + 1)} for n in (2, 0, 4, 1, 3)]
    parts = Lengths(tokenize_problems(problems, tokenizer))
    for stage in range(12):
        items = make(get_cot_latent_dataset, tokenizer, problems, stage, config, mix_stages=False)
        assert parts.of_sequences(stage, config).tolist() == [len(item["input_ids"]) for item in items]


def test_lengths_of_selected_examples(tokenizer):
    examples = tokenize_problems(make_problems(9, steps=1) + make_problems(9, steps=3), tokenizer)
    config, chosen = Config({"method": "cot"}), [12, 3, 3, 17]
    expected = Lengths(examples).of_sequences(0, config)[chosen]
    assert Lengths(examples.select(chosen)).of_sequences(0, config).tolist() == expected.tolist()


def test_check_lengths_reports_first_too_long_problem_and_stage(tokenizer):
    config = Config({"method": "coconut", "max_latent_stage": 3, "c_thought": 9, "uniform_prob": 0.5})
    problems = [{**TWO_STEPS, "steps": ["a"] * n} for n in (0, 2, 3, 1)]
    examples = tokenize_problems(problems, tokenizer)
    with pytest.raises(UserError, match="problem 1 makes a sequence of 29 tokens at stage 2"):
        check_lengths(examples, {0}, config, 28, "data.json")
    with pytest.raises(UserError, match="problem 2 makes a sequence of 38 tokens at stage 3"):  # 1 has two steps alone
        check_lengths(examples, {0}, config, 31, "data.json")


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"method": "cot"}, {0}),
        ({"method": "no_cot", "max_latent_stage": 2}, {3}),
        ({"method": "coconut", "max_latent_stage": 2, "c_thought": 6}, {0, 1, 2, 3}),
        ({"method": "coconut", "max_latent_stage": 2, "c_thought": 1}, {0, 1}),
        ({"method": "coconut", "max_latent_stage": 2, "c_thought": 6, "uniform_prob": 0.5}, {0}),
        ({"method": "pause_token", "max_latent_stage": 2, "c_thought": 4}, {3}),
    ],
    ids=name,
)
def test_check_lengths_allows_exactly_max_positions(tokenizer, options, stages):
    config, problems = Config(options), [TWO_STEPS, {**TWO_STEPS, "question": "a longer question"}]
    possible = stages | (set(range(3)) if config.uniform_prob else set())
    longest = max(
        len(item["input_ids"])
        for stage in possible
        for item in make(get_cot_latent_dataset, tokenizer, problems, stage, config, mix_stages=False)
    )
    examples = tokenize_problems(problems, tokenizer)
    check_lengths(examples, stages, config, longest, "data.json")
    with pytest.raises(UserError, match=rf"data\.json: problem 1 .*{longest} tokens.*{longest - 1} positions"):
        check_lengths(examples, stages, config, longest - 1, "data.json")


def test_check_lengths_ignores_uniform_prob_stages_in_validation(tokenizer):
    config = Config({"method": "coconut", "max_latent_stage": 2, "c_thought": 6, "uniform_prob": 0.5})
    [longest] = make(get_cot_latent_dataset, tokenizer, [TWO_STEPS], 0, config, mix_stages=False)
    limit = len(longest["input_ids"])
    check_lengths(tokenize_problems([TWO_STEPS], tokenizer), {0}, config, limit, "data.json", mix_stages=False)


def test_to_device_moves_all_tensors_but_the_plan():
    tokenizer = byte_tokenizer(pad=True)
    feature = {"input_ids": [1, 2], "attention_mask": [1, 1], "position_ids": [0, 1], "labels": [-100, 2], "idx": 0}
    batch = model_args(PlanningCollator(tokenizer, latent_id=9)([feature]))
    moved = to_device(batch, torch.device("meta"))
    assert moved.keys() == batch.keys() and moved["plan"] is batch["plan"]
    assert {key for key in moved if key != "plan" and moved[key].is_meta} == {*batch} - {"plan"}
    assert not any(tensor.is_meta for tensor in batch.values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize(
    ("device", "world_size", "asked", "workers"),
    [("cpu", 1, None, 0), ("cpu", 4, None, 0), ("cuda", 1, None, 1), ("cuda", 4, None, 0), ("cuda", 4, 2, 2)],
)
def test_by_default_only_a_single_gpu_has_a_data_worker(monkeypatch, device, world_size, asked, workers):
    """A process that uses NCCL is not forked unless the user asks for it."""
    monkeypatch.setattr(dataset, "prefetch", lambda make, items, workers, pin: [workers, pin])
    processes = Processes(world_size=world_size, device=torch.device(device))
    found = dataset.prefetch_batches(len, [], Config({"data_workers": asked}), processes)
    assert found == [workers, device == "cuda"]
