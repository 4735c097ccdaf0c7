"""Tokenized data: what they hold, and the cache that keeps them, in which nothing false or half is ever found."""

from __future__ import annotations

import errno
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components import tokenization
from components.distributed import Processes
from components.tokenization import RULES, cache_name, cached_files, load_tokenized, locked, tokenize_problems
from config import UserError
from helpers import byte_tokenizer, make_problems, show, snapshot, write_json
from helpers.faults import Fault, flip, truncate
from helpers.setting import Setting, assert_same


@pytest.fixture
def source(tmp_path):
    return write_json(tmp_path / "data.json", make_problems(5))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "cache"


@pytest.fixture
def tokenized(monkeypatch):
    """The numbers of problems of all chunks that are tokenized, while all is done in this process."""
    sizes, chunk = [], tokenization.tokenize_chunk

    def counted(problems, first, tokenizer):
        sizes.append(len(problems))
        return chunk(problems, first, tokenizer)

    monkeypatch.setattr(tokenization, "tokenize_chunk", counted)
    monkeypatch.setattr(tokenization, "cores", lambda: 0)
    return sizes


def load(path, folder, tokenizer=None, size=None):
    """The rows of a source, by way of a cache folder."""
    [data] = load_tokenized([(path, size)], tokenizer or byte_tokenizer(), folder and str(folder), Processes())
    return data.to_list()


# --- content ----------------------------------------------------------------------------------------------------------


def test_the_rules_of_this_version():
    """Whoever has to change this changes what a cache of theirs holds, and must count RULES up."""
    tokenizer = byte_tokenizer(bos=True)
    [row] = tokenize_problems([{"question": "q?", "answer": "7", "steps": ["ab", ""]}], tokenizer)
    parts = {name: row[f"{name}_tokenized"] for name in ("question", "answer")}
    assert {name: show(ids, tokenizer) for name, ids in parts.items()} == {"question": "^q?\n", "answer": "### 7$"}
    assert [show(step, tokenizer) for step in row["steps_tokenized"]] == ["ab\n", "\n"]
    assert [row[name] for name in ("question", "answer", "steps", "idx")] == ["q?", "7", ["ab", ""], 0]
    assert RULES == 1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_cores_makes_the_same_file(tmp_path, monkeypatch, workers):
    problems, tokenizer = make_problems(50), byte_tokenizer()
    monkeypatch.setattr(tokenization, "CHUNK", 7)
    files = [tmp_path / "one", tmp_path / "many"]
    for file, count in zip(files, (0, workers), strict=True):
        monkeypatch.setattr(tokenization, "cores", lambda count=count: count)
        with file.open("wb") as sink:
            tokenization.write_tokenized(sink, problems, tokenizer, "title")
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = tokenize_problems(problems, tokenizer)
    assert [row["idx"] for row in rows] == list(range(50))
    assert [row["question"] for row in rows] == [problem["question"] for problem in problems]


# --- what is found again ----------------------------------------------------------------------------------------------


def test_the_next_run_finds_what_was_tokenized(source, cache, tokenized, tmp_path):
    first = load(source, cache)
    assert tokenized == [5]
    before = snapshot(cache)
    os.rename(source, tmp_path / "moved.json")
    os.utime(tmp_path / "moved.json", (0, 0))
    assert load(str(tmp_path / "moved.json"), cache) == first
    assert tokenized == [5] and snapshot(cache) == before


def test_a_cache_that_cannot_be_written_any_more_is_still_found(source, cache, tokenized, monkeypatch, capsys):
    first = load(source, cache)
    monkeypatch.setattr(tokenization, "locked", None)
    assert load(source, cache) == first
    assert tokenized == [5] and "warning" not in capsys.readouterr().out


def test_any_change_makes_a_file_of_its_own(source, cache, tokenized, tmp_path, monkeypatch):
    load(source, cache)
    load(write_json(tmp_path / "other.json", [*make_problems(4), make_problems(6)[5]]), cache)
    load(source, cache, byte_tokenizer(bos=True))
    load(source, cache, size=3)
    larger = byte_tokenizer()
    larger.add_tokens(["+"])
    load(source, cache, larger)
    monkeypatch.setattr(tokenization, "RULES", RULES + 1)
    load(source, cache)
    assert tokenized == [5, 5, 5, 3, 5, 5]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 6


def test_a_checkpoints_tokenizer_is_that_of_the_model(tmp_path, source):
    tokenizer = byte_tokenizer(pad=True)
    tokenizer.add_tokens(["<|latent|>"])
    tokenizer(["a", "bcd"], padding=True)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    again = type(tokenizer).from_pretrained(tmp_path / "checkpoint")
    assert cache_name(source, None, again) == cache_name(source, None, tokenizer)


def test_a_mistake_in_any_source_is_named_before_a_file_is_made(source, cache, tmp_path):
    bad = write_json(tmp_path / "bad.json", [*make_problems(2), {"question": "?"}])
    with pytest.raises(UserError, match=r"bad\.json: problem 2"):
        load_tokenized([(source, None), (bad, None)], byte_tokenizer(), str(cache), Processes())
    assert not cache.parent.exists()


def test_without_a_folder_nothing_is_left(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = snapshot(tmp_path)
    assert len(load(source, None)) == 5
    assert snapshot(tmp_path) == before


# --- faults -----------------------------------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink()


def foreign(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (truncate, "data.arrow"),
        (flip, "data.arrow"),
        (missing, "data.arrow"),
        (truncate, "manifest.json"),
        (foreign, "manifest.json"),
        (missing, "manifest.json"),
    ],
)
def test_a_damaged_cache_is_named_and_made_again(source, cache, tokenized, capsys, harm, name):
    first = load(source, cache)
    [entry] = cache.glob("coconut-*/")
    whole = {path.name: path.read_bytes() for path in entry.iterdir()}
    harm(entry / name)
    assert load(source, cache) == first
    assert f"warning: {entry} is damaged ({name}" in capsys.readouterr().out
    assert tokenized == [5, 5]
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole


def test_a_run_that_is_killed_while_it_tokenizes_leaves_nothing_false(source, cache, monkeypatch):
    first = load(source, None)
    monkeypatch.setattr(tokenization, "tokenize_chunk", lambda *_: os.kill(os.getpid(), 9))
    monkeypatch.setattr(tokenization, "cores", lambda: 0)
    killed = multiprocessing.get_context("fork").Process(target=load, args=(source, cache))
    killed.start()
    killed.join()
    assert killed.exitcode == -9 and len(list(cache.glob("*.partial"))) == 1
    monkeypatch.undo()
    assert load(source, cache) == first
    assert not list(cache.glob("*.partial"))


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(monkeypatch, cache):
    """The disk is full when the file is half written; the temporary folder has room."""
    write = tokenization.write_tokenized

    def patched(sink, *arguments):
        write(sink, *arguments)
        if sink.name.startswith(str(cache)):
            refuse()

    monkeypatch.setattr(tokenization, "write_tokenized", patched)
    return "No space left"


def file_in_its_place(_, cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    return "File exists"


def without_locks(monkeypatch, _):
    monkeypatch.setattr(tokenization.fcntl, "flock", refuse)
    monkeypatch.setattr(tokenization, "write_tokenized", None)
    return "No space left"


@pytest.mark.parametrize("fault", [full, file_in_its_place])
def test_without_room_for_a_cache_the_run_goes_on(source, cache, tmp_path, capsys, monkeypatch, fault):
    first = load(source, None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reason = fault(monkeypatch, cache)
    before = snapshot(tmp_path)
    assert load(source, cache) == first
    [message] = capsys.readouterr().out.splitlines()
    assert f"warning: the cache of tokenized data in {cache} cannot be used" in message and reason in message
    assert "data_cache names another folder" in message
    assert [name for name in snapshot(tmp_path) if name not in before and "coconut-" in name] == []


def test_without_room_anywhere_the_key_is_named(source, cache, monkeypatch):
    monkeypatch.setattr(tokenization, "write_tokenized", refuse)
    with pytest.raises(UserError, match=r"data_cache: no folder takes .* No space left"):
        load(source, cache)


def test_a_tokenizer_that_cannot_be_told_from_others_has_no_cache(source, cache, capsys):
    class Slow:
        eos_token_id, is_fast = 0, False

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2] for _ in texts]}

    assert [row["answer_tokenized"] for row in load(source, cache, Slow())] == [[1, 2, 0]] * 5
    assert "cannot be used" in capsys.readouterr().out and not cache.exists()


# --- several processes ------------------------------------------------------------------------------------------------


def tokenize_slowly(source: str, cache: Path, log: Path) -> None:
    """A run that tokenizes, and writes down that it does."""
    make = tokenization.make_entry

    def slow(*arguments):
        with log.open("a") as file:
            file.write("asked\n")
        make(*arguments)

    write = tokenization.write_tokenized

    def noted(*arguments):
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        write(*arguments)

    tokenization.make_entry, tokenization.write_tokenized = slow, noted
    cached_files([(source, None)], byte_tokenizer(), cache)


def test_two_runs_at_once_tokenize_once(source, cache, tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    runs = [context.Process(target=tokenize_slowly, args=(source, cache, log)) for _ in range(2)]
    cache.mkdir(parents=True)
    with locked(cache):  # until both have read the data and found nothing
        for run in runs:
            run.start()
        time.sleep(1)
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert sorted(log.read_text().split()) == ["asked", "asked", "made"]
    assert len(load(source, cache)) == 5


def test_each_node_has_a_process_that_makes_and_an_error_of_any_is_raised_by_all(monkeypatch):
    """Two nodes of two processes, which are threads here."""
    calls, told, barrier = [], {}, threading.Barrier(4, timeout=20)

    def gather(self, value):
        told[self.rank] = value
        barrier.wait()
        values = [told[rank] for rank in range(4)]
        barrier.wait()
        return values

    def run_on_each_node(rank, missing=None):
        def make():
            calls.append(rank)
            if rank == missing:
                raise UserError(f"a file is missing for rank {rank}")
            return f"made by {rank}"

        return Processes(rank, 4, local_rank=rank % 2).run_on_each_node(make)

    monkeypatch.setattr(Processes, "gather", gather)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run_on_each_node, range(4))) == ["made by 0"] * 2 + ["made by 2"] * 2
        assert sorted(calls) == [0, 2]
        futures = [pool.submit(run_on_each_node, rank, missing=2) for rank in range(4)]
        assert [str(future.exception()) for future in futures] == ["a file is missing for rank 2"] * 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("tokens"))


def test_both_processes_of_a_run_raise_what_the_first_one_finds(setting, tmp_path):
    bad = write_json(tmp_path / "bad.json", [{"question": "?"}])
    outcome = setting.run("bad", 2, val_path=bad, data_cache=tmp_path / "cache")
    assert outcome.codes == [2, 2]
    assert 'problem 0: has no "answer"' in outcome.output
    assert not (tmp_path / "cache").exists()


def test_runs_share_a_cache_that_is_named(setting, tmp_path):
    for name in ("first", "second"):
        assert setting.run(name, 2, num_epochs=1, data_cache=tmp_path).codes == [0, 0]
    assert len(list(tmp_path.glob("coconut-*/data.arrow"))) == 2  # of the training and the validation problems
    assert_same(setting.directory / "first", setting.directory / "second")


WORKERS = [(1, None), (2, Fault("kill", "backward", 9)), (2, Fault("sigterm", "step", 6))]


@pytest.mark.parametrize(("workers", "fault"), WORKERS, ids=["undisturbed", "killed", "stopped"])
def test_batches_made_ahead_train_bit_for_bit_the_same(setting, workers, fault):
    """In a run with random stages, dropout, and accumulation that is cut short in the middle of an epoch."""
    name = f"workers_{workers}_{fault.action if fault else 'whole'}"
    if fault:
        assert setting.run(name, fault=fault, data_workers=workers).codes == [143 if fault.action == "sigterm" else -9]
    outcome = setting.run(name, data_workers=workers)
    assert outcome.codes == [0], outcome.output
    assert_same(setting.directory / name, setting.reference())


@pytest.mark.parametrize("changes", [{"method": "icot", "remove_per_epoch": 5}, {"group_by_length": True}], ids=str)
def test_stages_within_an_epoch_and_grouping_with_workers_in_two_processes(setting, changes):
    name = "-".join(changes)
    assert setting.run(name, 2, data_workers=2, **changes).codes == [0, 0]
    assert_same(setting.directory / name, setting.reference(2, **changes))
