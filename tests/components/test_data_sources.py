"""Problems from every kind of source, and how their mistakes are named."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from components.data_sources import content_digest, data_name, file_sha256, locate_problem, read_problems
from config import Config, UserError, path_error
from helpers import make_problems, write_json

PROBLEMS = [*make_problems(5), {"question": "é\u2028?", "answer": "1,000", "steps": []}]
ODD = [1, "a", None, {"b": [1.5]}, [[]], True]  # further keys, of another type in each problem


def json_list(folder, problems):
    return write_json(folder / "list.json", problems)


def json_lines(folder, problems):
    path = folder / "lines.json"
    path.write_text("\n\n".join(json.dumps(p, ensure_ascii=False) for p in problems) + "\r\n", encoding="utf-8")
    return str(path)


def parquet_file(folder, problems, name="file.parquet"):
    """Without further keys, which a table cannot hold in any type."""
    table = pyarrow.Table.from_pylist([{k: v for k, v in p.items() if k != "odd"} for p in problems])
    parquet.write_table(table.append_column("image", pyarrow.array([b"\xff"] * len(problems))), folder / name)
    return str(folder / name)


def hub(folder, problems):
    """A data set in the form of the hub's, in place of one there: datasets looks for a folder first."""
    os.chdir(folder)
    (folder / "owner" / "gsm8k-aug").mkdir(parents=True)
    parquet_file(folder / "owner" / "gsm8k-aug", problems, "train-00000-of-00001.parquet")
    parquet_file(folder / "owner" / "gsm8k-aug", problems[::-1], "test-00000-of-00001.parquet")
    return "hub:owner/gsm8k-aug"


SOURCES = [json_list, json_lines, parquet_file, hub]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_problems(place, source):
    path = source(place, [{**problem, "odd": odd} for problem, odd in zip(PROBLEMS, ODD, strict=True)])
    assert read_problems(path) == PROBLEMS
    assert read_problems(path, max_size=2) == PROBLEMS[:2]


def test_a_split_of_the_hub(place):
    path = hub(place, PROBLEMS)
    assert read_problems(f"{path}:test") == PROBLEMS[::-1]
    assert content_digest(f"{path}:test") != content_digest(path) == content_digest(f"{path}:train")


@pytest.mark.parametrize("source", SOURCES)
def test_steps_may_be_missing_where_nothing_needs_them(place, source):
    path = source(place, [{key: problem[key] for key in ("question", "answer")} for problem in PROBLEMS])
    assert read_problems(path, need_steps=False) == [problem | {"steps": []} for problem in PROBLEMS]
    with pytest.raises(UserError, match='problem 0: has no "steps"'):
        read_problems(path)


@pytest.mark.parametrize("source", [json_list, json_lines, parquet_file])
def test_files_may_be_gzipped(place, source):
    content = gzip.compress(Path(source(place, PROBLEMS)).read_bytes())
    (place / "data.gz").write_bytes(content)
    assert read_problems("data.gz") == PROBLEMS
    for damaged in (content[:40], content[:20] + b"?" + content[21:]):
        (place / "data.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"data\.gz: not a valid gzip file"):
            read_problems("data.gz")


def test_a_config_and_a_slice_of_the_hub(place):
    path = hub(place, PROBLEMS)
    assert read_problems(f"{path}:default:test[1:3]") == PROBLEMS[::-1][1:3]
    assert read_problems(f"{path}:test[:50%]") == PROBLEMS[::-1][:3]
    slices = [content_digest(f"{path}:{split}") for split in ("test", "test[:2]", "test[2:]", "default:test[2:]")]
    assert len(set(slices)) == 3 and slices[2] == slices[3]
    with pytest.raises(UserError, match="hub:owner/gsm8k-aug:other:test: cannot be loaded"):
        read_problems(f"{path}:other:test")


@pytest.mark.parametrize("source", SOURCES)
def test_several_sources_are_read_one_after_the_other(place, source):
    paths = [source(place, PROBLEMS), write_json(place / "more.json", PROBLEMS[:2]), write_json(place / "bad.json", [])]
    assert read_problems(paths[:2]) == [*PROBLEMS, *PROBLEMS[:2]]
    assert read_problems(paths, max_size=len(PROBLEMS) + 1) == [*PROBLEMS, PROBLEMS[0]]
    assert locate_problem(paths, len(PROBLEMS) - 1, None) == f"{paths[0]}: problem {len(PROBLEMS) - 1}"
    assert locate_problem(paths, len(PROBLEMS) + 1, None) == f"{paths[1]}: problem 1"
    with pytest.raises(UserError, match=r"bad.json: expected a list of problems .* got an empty list"):
        read_problems(paths)
    write_json(place / "bad.json", [PROBLEMS[0], {**PROBLEMS[0], "answer": 4}])
    with pytest.raises(UserError, match=r'bad.json: problem 1: "answer": expected a string'):
        read_problems(paths)


def test_the_digest_and_the_name_of_several_sources(place):
    one, other = (write_json(place / name, problems) for name, problems in (("a.json", PROBLEMS), ("b", PROBLEMS[:2])))
    digests = [content_digest(paths) for paths in (one, other, [one, other], [other, one], [one, one])]
    assert len({*digests}) == 5 and content_digest([one]) == digests[0]
    write_json(place / "b", PROBLEMS[:3])
    assert content_digest([one, other]) != digests[2]
    with pytest.raises(UserError, match=r"none.json: cannot read the data"):
        content_digest([one, "none.json"])
    assert [data_name(paths) for paths in (one, [one], [one, other])] == ["a", "a", "a+1"]


COLUMNS = {"question": "problem", "answer": "solution", "steps": "rationale"}


@pytest.mark.parametrize("source", SOURCES)
def test_fields_may_have_other_names(place, source):
    problems = [{COLUMNS[field]: problem[field] for field in problem} for problem in PROBLEMS]
    path = source(place, [problem | {"answer": "another"} for problem in problems])
    assert read_problems(path, columns=COLUMNS) == PROBLEMS
    assert read_problems([path, path], columns=COLUMNS) == [*PROBLEMS, *PROBLEMS]
    columns = COLUMNS | {"steps": "thoughts"}
    assert read_problems(path, need_steps=False, columns=columns) == [{**p, "steps": []} for p in PROBLEMS]
    with pytest.raises(UserError, match=r'problem 0: has no "steps"; a problem is {"problem": .*"thoughts": '):
        read_problems(path, columns=columns)
    with pytest.raises(UserError, match='has no "question"'):
        read_problems(path)


def test_in_a_table_steps_of_another_name_may_be_a_string_of_lines(place):
    path = parquet_file(place, [{"question": "?", "answer": "4", "rationale": "1+1=2\n2+2=4"}])
    assert read_problems(path, columns={"steps": "rationale"})[0]["steps"] == ["1+1=2", "2+2=4"]


def test_one_json_line_is_a_file_too(place):
    assert read_problems(json_lines(place, PROBLEMS[:1])) == PROBLEMS[:1]
    renamed = [{"problem": PROBLEMS[0]["question"], "answer": PROBLEMS[0]["answer"], "steps": PROBLEMS[0]["steps"]}]
    assert read_problems(json_lines(place, renamed), columns={"question": "problem"}) == PROBLEMS[:1]


@pytest.mark.parametrize("source", [parquet_file, hub])
def test_in_a_table_steps_may_be_a_string_of_lines(place, source):
    texts = ["1+1=2\n2+2=4", "1+1=2\r\n", "", "a\u2028b\fc\x1cd\x85e\r\n\nf\n"]
    path = source(place, [{"question": "?", "answer": "4", "steps": text} for text in texts])
    steps = [["1+1=2", "2+2=4"], ["1+1=2"], [], ["a\u2028b\fc\x1cd\x85e", "", "f"]]
    assert [problem["steps"] for problem in read_problems(path)] == steps


@pytest.mark.parametrize("source", [json_list, json_lines])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(place, source):
    path = Path(source(place, PROBLEMS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").replace(b"}, {", b"},\r\n{"))
    assert read_problems(str(path)) == PROBLEMS


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"answer": None}, ["problem 2", '"answer": expected a string, got None']),
        ({"question": " "}, ["problem 2", '"question" is empty']),
        ({"steps": ["1", "<|latent|>"]}, ["problem 2", '"steps[1]" contains <|latent|>']),
        ({"steps": None}, ["problem 2", '"steps": expected a list, got None']),
    ],
    ids=str,
)
def test_a_mistake_is_named_by_index_and_field(place, source, change, parts):
    path = source(place, [*PROBLEMS[:2], {**PROBLEMS[2], **change}])
    with pytest.raises(UserError) as error:
        read_problems(path)
    assert [part for part in [f"{path}: ", *parts] if part not in str(error.value)] == []


@pytest.mark.parametrize("source", [parquet_file, hub])
def test_a_missing_or_numeric_column_is_a_mistake(place, source):
    path = source(place, [{"question": "?", "steps": ["a"]}])
    with pytest.raises(UserError, match='problem 0: has no "answer"'):
        read_problems(path)
    parquet_file(place, [{**PROBLEMS[0], "answer": 5}])
    with pytest.raises(UserError, match='problem 0: "answer": expected a string, got 5'):
        read_problems("file.parquet")


def test_a_broken_json_line_is_named(place):
    lines = [json.dumps(PROBLEMS[0]), "", '{"question": "?", ', json.dumps(PROBLEMS[1])]
    (place / "lines.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"lines.jsonl: problem 1 \(line 3\): not valid JSON: .* at column 19"):
        read_problems("lines.jsonl")


@pytest.mark.parametrize("size", [10, 300])
def test_a_torn_parquet_file_is_refused(place, size):
    parquet_file(place, PROBLEMS)
    os.truncate("file.parquet", size)
    with pytest.raises(UserError, match=r"file\.parquet: not a valid Parquet file"):
        read_problems("file.parquet")


@pytest.mark.parametrize(
    ("path", "reason"), [("hub:nobody/nothing:test", "nobody/nothing"), ("hub:owner/gsm8k-aug:valid", "valid")]
)
def test_what_the_hub_does_not_give_is_a_clear_error(place, path, reason):
    """The tests run with HF_HUB_OFFLINE, so nothing is asked of the hub."""
    hub(place, PROBLEMS)
    for read in (read_problems, content_digest):
        with pytest.raises(UserError, match=f"{path}: cannot be loaded from the hub: .*{reason}.*HF_HUB_OFFLINE"):
            read(path)


def test_the_reason_of_the_hub_is_shown_whole_and_without_colours(monkeypatch):
    def fail(*_, **__):
        raise ValueError("\x1b[1mBuilderConfig 'x' not found.\x1b[0m\nAvailable: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"hub: BuilderConfig 'x' not found\. Available: \['main', 'socratic'\]; check"):
        content_digest("hub:owner/name:x:train")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("train_path", "hub:owner/name", None),
        ("val_path", "hub:owner/name:test", None),
        ("val_path", "hub:owner/name", "add one, such as hub:owner/name:validation"),
        ("val_path", "hub:owner/name:main:test", None),
        ("val_path", "hub:owner/name:test[:10]", None),
        ("train_path", "hub:owner/name:main:train[10%:-5]", None),
        ("val_path", "hub:owner/name:test[10]", "hub:OWNER/NAME"),
        ("val_path", "hub:owner/name:a:b:c", "hub:OWNER/NAME"),
        ("train_path", "hub:name", "hub:OWNER/NAME"),
        ("train_path", "hub:owner/name:", "hub:OWNER/NAME"),
        ("train_path", "hub:YOUR_NAME/data", "placeholder"),
    ],
)
def test_the_form_of_a_hub_path(key, value, complaint):
    error = path_error(key, value, Config())
    assert error is None if complaint is None else complaint in error


def test_the_digest_is_that_of_the_content_alone(place):
    path = json_list(place, PROBLEMS)
    before = content_digest(path)
    os.utime(path, (0, 0))
    os.rename(path, "other.json")
    assert content_digest("other.json") == before
    write_json(place / "other.json", PROBLEMS[:-1])
    assert content_digest("other.json") != before
    with pytest.raises(UserError, match=r"list.json: cannot read the data: No such file"):
        content_digest(path)


def test_a_file_is_hashed_once_until_it_changes(place):
    path = json_list(place, PROBLEMS)
    before, hashed = content_digest(path), file_sha256.cache_info().misses
    assert content_digest(path) == before and file_sha256.cache_info().misses == hashed
    os.utime(path, (0, 0))
    time.sleep(0.05)  # longer than a tick of the file system's clock
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text.replace("1,000", "2,000"), encoding="utf-8")
    os.utime(path, (0, 0))  # so neither its size nor its time tells
    assert content_digest(path) != before
