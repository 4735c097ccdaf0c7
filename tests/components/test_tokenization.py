"""Tokenized data: the columns, and a cache in which an incomplete or outdated file is never used."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import re
import resource
import shutil
import stat
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from components import tokenization
from components.distributed import Processes
from components.tokenization import RULES, check_tokens, fingerprint, load_tokenized, tokenize_problems
from config import UserError, load_config
from helpers import byte_tokenizer, make_problems, save_model, show, snapshot, write_json
from helpers.faults import truncate
from helpers.setting import Setting, assert_same
from run import set_up
from utils import StopRequest


@pytest.fixture
def source(tmp_path):
    return write_json(tmp_path / "data.json", make_problems(5))


@pytest.fixture
def large(tmp_path):
    """A source that `map` tokenizes in two batches."""
    return write_json(tmp_path / "large.json", make_problems(1001))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "cache"


@pytest.fixture
def tokenized(monkeypatch):
    """The sizes of all batches that are tokenized."""
    sizes, chunk = [], tokenization.tokenize_chunk

    def counted(problems, indices, tokenizer):
        sizes.append(len(indices))
        return chunk(problems, indices, tokenizer)

    monkeypatch.setattr(tokenization, "tokenize_chunk", counted)
    return sizes


def load(path, folder, tokenizer=None, size=None):
    """The rows of a source, by way of a cache folder."""
    [data] = load_tokenized([(path, size, True)], tokenizer or byte_tokenizer(), folder and str(folder), Processes())
    return data.to_list()


def arrow_files(cache: Path) -> list[Path]:
    return list(cache.glob("coconut/*.arrow"))


# --- columns ----------------------------------------------------------------------------------------------------------


def test_tokenized_columns_at_this_version_of_the_rules():
    """A change that requires another expectation here makes existing cache files wrong, so it must increase RULES."""
    tokenizer = byte_tokenizer(bos=True)
    [row] = tokenize_problems([{"question": "q?", "answer": "7", "steps": ["ab", ""]}], tokenizer)
    parts = {name: row[f"{name}_tokenized"] for name in ("question", "answer")}
    assert {name: show(ids, tokenizer) for name, ids in parts.items()} == {"question": "^q?\n", "answer": "### 7$"}
    assert [show(step, tokenizer) for step in row["steps_tokenized"]] == ["ab\n", "\n"]
    assert [row[name] for name in ("question", "answer", "steps", "idx")] == ["q?", "7", ["ab", ""], 0]
    assert RULES == 2


def test_several_batches_keep_the_order_of_the_problems(large, cache, tokenized):
    rows, problems = load(large, cache), make_problems(1001)
    assert tokenized == [1000, 1]
    assert [row["idx"] for row in rows] == list(range(1001))
    assert [{name: row[name] for name in problems[0]} for row in rows] == problems
    assert rows == tokenize_problems(problems, byte_tokenizer()).to_list()


@pytest.mark.parametrize("steps", [[], [""]])
def test_a_source_without_any_steps(steps):
    [row] = tokenize_problems([{"question": "q?", "answer": "7", "steps": steps}], byte_tokenizer())
    assert row["steps"] == steps and len(row["steps_tokenized"]) == len(steps)


# --- cache hits and misses --------------------------------------------------------------------------------------------


def test_the_cache_is_keyed_by_content_and_a_hit_does_not_read_the_source(
    source, cache, tokenized, tmp_path, monkeypatch
):
    first = load(source, cache)
    assert tokenized == [5]
    before = snapshot(cache)
    os.rename(source, tmp_path / "moved.json")
    os.utime(tmp_path / "moved.json", (0, 0))
    monkeypatch.setattr(tokenization, "read_problems", None)
    assert load(str(tmp_path / "moved.json"), cache) == first
    assert tokenized == [5] and snapshot(cache) == before


def test_the_cache_is_keyed_by_all_files_and_the_names_of_fields(cache, tokenized, tmp_path):
    problems = [{"question": "q?", "prompt": "p?", "answer": "7", "steps": []}]
    one, other = write_json(tmp_path / "one.json", problems), write_json(tmp_path / "other.json", problems * 2)

    def questions(paths, columns=None):
        [data] = load_tokenized([(paths, None, True, columns)], byte_tokenizer(), str(cache), Processes())
        assert data["idx"][:] == list(range(len(data)))
        return data["question"][:]

    for _ in range(2):  # made, then found
        assert questions(one) == ["q?"]
        assert questions([one, other]) == ["q?"] * 3
        assert questions([one, other], {"question": "prompt"}) == ["p?"] * 3
    assert tokenized == [1, 3, 3]


def test_a_hit_needs_neither_a_lock_nor_a_writable_cache(source, cache, tokenized, monkeypatch, capsys):
    first = load(source, cache)
    monkeypatch.setattr(tokenization, "locked", None)
    monkeypatch.setattr(tokenization, "make_private", None)
    assert load(source, cache) == first
    assert tokenized == [5] and "warning" not in capsys.readouterr().out


def test_other_content_tokenizer_size_or_rules_miss_the_cache(source, cache, tokenized, tmp_path, monkeypatch):
    load(source, cache)
    load(write_json(tmp_path / "other.json", [*make_problems(4), make_problems(6)[5]]), cache)
    load(source, cache, byte_tokenizer(bos=True))
    load(source, cache, size=3)
    larger = byte_tokenizer()
    larger.add_tokens(["+"])
    load(source, cache, larger)
    other_eos = byte_tokenizer()
    other_eos.eos_token = "a"
    assert load(source, cache, other_eos)[0]["answer_tokenized"][-1] == other_eos.eos_token_id
    monkeypatch.setattr(tokenization, "RULES", RULES + 1)
    load(source, cache)
    assert tokenized == [5, 5, 5, 3, 5, 5, 5]
    assert len(arrow_files(cache)) == 7


def test_a_tokenizer_saved_in_a_checkpoint_has_the_same_fingerprint(tmp_path, source):
    tokenizer = byte_tokenizer(pad=True)
    tokenizer.add_tokens(["<|latent|>"])
    tokenizer(["a", "bcd"], padding=True)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    again = type(tokenizer).from_pretrained(tmp_path / "checkpoint")
    assert fingerprint((source, None, True), again) == fingerprint((source, None, True), tokenizer)


def test_invalid_data_is_reported_before_anything_is_written(source, cache, tmp_path):
    bad = write_json(tmp_path / "bad.json", [*make_problems(2), {"question": "?"}])
    with pytest.raises(UserError, match=r"bad\.json: problem 2"):
        load_tokenized([(source, None, True), (bad, None, True)], byte_tokenizer(), str(cache), Processes())
    assert not cache.parent.exists()


def test_without_a_cache_the_temporary_folder_is_removed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = snapshot(tmp_path)
    assert len(load(source, None)) == 5
    assert snapshot(tmp_path) == before


def test_files_in_a_cache_that_others_can_read_are_private(source, cache):
    cache.mkdir(mode=0o755, parents=True)
    load(source, cache)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, cache / "coconut")] == [0o755, 0o700]


# --- faults -----------------------------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize("damage", [truncate, empty, foreign])
def test_a_cache_file_that_cannot_be_opened_is_made_again_with_a_warning(source, cache, tokenized, capsys, damage):
    first = load(source, cache)
    [file] = arrow_files(cache)
    content = file.read_bytes()
    damage(file)
    assert load(source, cache) == first
    assert f"warning: {file} cannot be opened, so {source} is tokenized again" in capsys.readouterr().out
    assert tokenized == [5, 5]
    assert file.read_bytes() == content


@pytest.mark.parametrize("moment", ["while tokenizing", "before the file has its name"])
def test_sigkill_while_tokenizing_leaves_no_file_that_counts(large, cache, monkeypatch, moment):
    chunk = tokenization.tokenize_chunk

    def kill(problems, indices, tokenizer):
        if indices[0] == 1000:
            os.kill(os.getpid(), 9)
        return chunk(problems, indices, tokenizer)

    if moment == "while tokenizing":
        monkeypatch.setattr(tokenization, "tokenize_chunk", kill)
    else:
        monkeypatch.setattr(tokenization, "fsync", lambda _: os.kill(os.getpid(), 9))
    killed = multiprocessing.get_context("fork").Process(target=load, args=(large, cache))
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    assert not arrow_files(cache) and list((cache / "coconut" / "partial").iterdir())
    monkeypatch.undo()
    assert load(large, cache) == load(large, None)
    assert arrow_files(cache) and not (cache / "coconut" / "partial").exists()


def full(monkeypatch, cache):
    """The disk of the cache is full when the file is written; that of the temporary folder has room."""
    tokenize = tokenization.tokenize_problems

    def patched(problems, tokenizer, file, title):
        tokenize(problems, tokenizer, file, title)
        if file.is_relative_to(cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokenization, "tokenize_problems", patched)
    return "No space left"


def file_in_its_place(_, cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    return "File exists"


def without_locks(monkeypatch, cache):
    flock = tokenization.fcntl.flock

    def patched(file, operation):
        if Path(file.name).is_relative_to(cache):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, operation)

    monkeypatch.setattr(tokenization.fcntl, "flock", patched)
    return "No locks available"


@pytest.mark.parametrize("fault", [full, file_in_its_place, without_locks])
def test_a_cache_that_cannot_be_used_is_replaced_by_a_temporary_folder(
    source, cache, tmp_path, capsys, monkeypatch, fault
):
    first = load(source, None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reason = fault(monkeypatch, cache)
    capsys.readouterr()
    assert load(source, cache) == first
    [message] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert f"the cache of tokenized data in {cache} cannot be used" in message and reason in message
    assert "set data_cache to another folder" in message
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("partial"))


def test_without_room_anywhere_data_cache_is_named_and_nothing_is_left(large, cache, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk that is full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"data_cache: no room .* File too large"):
            load(large, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (cache / "coconut").iterdir()] == ["lock"]


def test_slow_tokenizers_are_not_cached(source, cache, capsys):
    class Slow:
        eos_token_id, is_fast = 0, False

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2] for _ in texts]}

    assert [row["answer_tokenized"] for row in load(source, cache, Slow())] == [[1, 2, 0]] * 5
    assert "cannot be used" in capsys.readouterr().out and not cache.exists()


# --- several processes ------------------------------------------------------------------------------------------------


def load_with_log(source: str, cache: Path, log: Path) -> None:
    """A run that logs when it is about to take the lock, and does not tokenize before another one is, too."""
    lock, tokenize = tokenization.locked, tokenization.tokenize_problems

    def note(word: str) -> None:
        with log.open("a") as file:
            file.write(f"{word}\n")

    def logged_lock(folder):
        note("asks")
        return lock(folder)

    def late(*arguments):
        note("tokenizes")
        end = time.monotonic() + 60
        while log.read_text().count("asks") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        return tokenize(*arguments)

    tokenization.locked, tokenization.tokenize_problems = logged_lock, late
    load(source, cache)


def test_of_two_runs_at_once_one_tokenizes_and_the_other_waits(source, cache, tmp_path, capfd):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    runs = [context.Process(target=load_with_log, args=(source, cache, log)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(90)
    assert [run.exitcode for run in runs] == [0, 0]
    assert sorted(log.read_text().split()) == ["asks", "asks", "tokenizes"]
    assert "waiting for another run" in capfd.readouterr().out
    assert len(load(source, cache)) == 5


def test_temporary_files_stay_until_every_process_has_opened_them(source, tmp_path, monkeypatch):
    """Two processes, which are threads here; the second opens its file when the first one waits for it, or has left."""
    from datasets import Dataset

    told, barrier, waits, open_file = {}, threading.Barrier(2, timeout=20), threading.Event(), Dataset.from_file

    def all_gather_object(self, value):
        told[self.rank] = value
        if self.rank == 0 and opened:
            waits.set()
        barrier.wait()
        values = [told[0], told[1]]
        barrier.wait()
        return values

    def from_file(path, **options):
        if threading.current_thread() is other:
            assert waits.wait(20)
        if not options:  # `map` has some
            opened.append(path)
        return open_file(path, **options)

    def load_on(rank):
        try:
            [data] = load_tokenized([(source, None, True)], byte_tokenizer(), None, Processes(rank, 2, local_rank=rank))
            rows.append(len(data))
        finally:
            waits.set()

    opened, rows, other = [], [], threading.Thread(target=load_on, args=(1,))
    monkeypatch.setattr(tokenization, "can_be_opened", lambda file: False)
    monkeypatch.setattr(Processes, "all_gather_object", all_gather_object)
    monkeypatch.setattr(Dataset, "from_file", staticmethod(from_file))
    monkeypatch.setattr(threading, "excepthook", lambda *_: barrier.abort())
    other.start()
    with suppress(threading.BrokenBarrierError):
        load_on(0)
    other.join(20)
    assert rows == [5, 5]


def test_the_first_process_of_each_node_tokenizes_and_all_raise_its_error(monkeypatch):
    """Two nodes of two processes, which are threads here."""
    calls, told, barrier = [], {}, threading.Barrier(4, timeout=20)

    def all_gather_object(self, value):
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

    monkeypatch.setattr(Processes, "all_gather_object", all_gather_object)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run_on_each_node, range(4))) == ["made by 0"] * 2 + ["made by 2"] * 2
        assert sorted(calls) == [0, 2]
        futures = [pool.submit(run_on_each_node, rank, missing=2) for rank in range(4)]
        assert [str(future.exception()) for future in futures] == ["a file is missing for rank 2"] * 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("tokens"))


def test_invalid_data_stops_every_process_of_a_run(setting, tmp_path):
    bad = write_json(tmp_path / "bad.json", [{"question": "?"}])
    outcome = setting.run("bad", 2, val_path=bad, data_cache=tmp_path / "cache")
    assert outcome.codes == [2, 2]
    assert 'problem 0: has no "answer"' in outcome.output
    assert not (tmp_path / "cache").exists()


def test_runs_share_the_folder_data_cache(setting, tmp_path):
    for name in ("first", "second"):
        assert setting.run(name, 2, num_epochs=1, data_cache=tmp_path).codes == [0, 0]
    assert len(arrow_files(tmp_path)) == 2  # of the training and the validation problems
    assert_same(setting.directory / "first", setting.directory / "second")


# --- tokens that fit neither the texts nor the model ------------------------------------------------------------------

WORDS = ["###", "a", "bc", "def", "ghij", "klmno"]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sets(st.sampled_from(WORDS)), st.lists(st.sampled_from(WORDS[1:]), min_size=1, max_size=6), st.integers(0, 2))
def test_a_tokenizer_that_loses_half_of_the_text_or_has_too_many_tokens_is_refused(known, words, missing):
    vocabulary = {word: id for id, word in enumerate(["[EOS]", "[UNK]", *sorted(known)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]")
    problem = {"question": " ".join(words), "answer": words[0], "steps": words[1:3]}
    data = tokenize_problems([problem], tokenizer)
    written = [*words, words[0], *words[1:3], "###"]
    lost = sum(len(word) for word in written if word not in known) / sum(map(len, written))
    rows = 1 + max(1 if lost else 0, *(vocabulary.get(word, 0) for word in written)) - missing
    output = io.StringIO()
    with redirect_stdout(output):
        if missing or lost >= 0.5:
            with pytest.raises(UserError, match=r"model_id: 'm': .* data.json .*embeddings|loses .* in data.json"):
                check_tokens(data, tokenizer, rows, "model_id: 'm'", "data.json")
        else:
            check_tokens(data, tokenizer, rows, "model_id: 'm'", "data.json")
    assert ("warning" in output.getvalue()) is (not missing and 0 < lost < 0.5)


@pytest.mark.parametrize("method", ["cot", "coconut"])
def test_a_folder_without_a_tokenizer_and_tokens_without_a_row_are_refused(tmp_path, method):
    def refused(folder, *words):
        shutil.copytree(tmp_path / "model", tmp_path / folder)
        change = {"bare": bare, "pad": padded, "north": north}[folder]
        change(tmp_path / folder)
        values = {"name": "r", "method": method, "model_id": str(tmp_path / folder), "logger": "none"}
        values |= {"train_path": data, "val_path": data, "save_path": str(tmp_path / "runs")}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        before = snapshot(tmp_path)
        try:
            set_up(load_config(str(tmp_path / "config.yaml")), Processes(), StopRequest())
        except UserError as error:
            assert f"model_id: '{tmp_path / folder}'" in str(error) and snapshot(tmp_path) == before
            return str(error)
        return None

    def bare(folder):
        for path in folder.glob("*token*"):
            path.unlink()

    def padded(folder):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)

    def north(folder):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<north>"])
        tokenizer.save_pretrained(folder)

    save_model(tmp_path / "model")
    problems = [*make_problems(3), {"question": "where is <north>?", "answer": "1", "steps": []}]
    data = write_json(tmp_path / "data.json", problems)
    assert re.search("loses 100%|cannot be loaded", refused("bare"))  # transformers 4 does not load it
    needs_rows = method == "cot"  # the others give the model rows for all tokens
    assert ("pad token '[PAD]' has id" in str(refused("pad"))) is needs_rows
    assert ("token '<north>' in" in str(refused("north"))) is needs_rows
