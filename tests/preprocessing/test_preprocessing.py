"""GSM8k and ProntoQA: conversion, downloads from a local server, invalid input."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gsm_icot
import prontoqa
import pytest
from common import DataError, write_json

SOURCES = Path(gsm_icot.__file__).parent
LINES = [
    "John cuts his grass.  How much?||<<4-2=2>> <<2/.5=4>> <<100*3=300>> #### 300",
    "Old cars’ dates: when was the third made?|| #### 2,000",
    "How far below zero?||<<3-8=-5>> #### -5",
]
PROBLEMS = [
    {
        "question": "John cuts his grass.  How much?",
        "steps": ["<<4-2=2>>", "<<2/.5=4>>", "<<100*3=300>>"],
        "answer": "300",
    },
    {"question": "Old cars’ dates: when was the third made?", "steps": [""], "answer": "2,000"},
    {"question": "How far below zero?", "steps": ["<<3-8=-5>>"], "answer": "-5"},
]
RAW = "".join(f"{line}\n" for line in LINES).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a3909a9\nsize 87805358\n"
EXAMPLE = {
    "test_example": {
        "question": "Tumpuses are gorpuses. Alex is a tumpus.",
        "query": "True or false: Alex is happy.",
        "chain_of_thought": [f"Sentence {number}." for number in range(1, 12)],
        "answer": "True",
    }
}


@pytest.fixture
def tree(tmp_path):
    """Copy the scripts next to an empty data folder; RAW stands in for the published validation file."""
    shutil.copytree(SOURCES, tmp_path / "preprocessing", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "preprocessing" / "gsm_icot.sums").write_text(
        f"valid {len(RAW)} {hashlib.sha256(RAW).hexdigest()} http://127.0.0.1:9/nobody\n"
    )
    return tmp_path


def run(tree, *argv, path=None):
    """Run a script of the tree's preprocessing folder with bash or python."""
    program = "bash" if argv[0].endswith(".bash") else sys.executable
    path = path or f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [program, f"preprocessing/{argv[0]}", *map(str, argv[1:])],
        cwd=tree,
        env=os.environ | {"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def files(folder):
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def assert_error(result, *parts):
    """Assert exit code 2 and a short message with all parts."""
    assert result.returncode == 2, result.stderr
    message = result.stderr[result.stderr.rindex("error: ") :]
    assert all(part in message for part in parts) and message.count("\n") <= 3, message


# GSM8k


def test_gsm_convert():
    assert gsm_icot.convert(RAW.decode(), "raw") == PROBLEMS
    assert gsm_icot.convert(RAW.decode().rstrip("\n"), "raw") == PROBLEMS
    assert gsm_icot.convert(RAW.decode().replace("\n", "\r\n"), "raw") == PROBLEMS
    assert gsm_icot.convert("a\u2028b\x85c||<<1+1=2>> #### 2\n", "raw")[0]["question"] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (RAW + b"No solution here\n", ["line 4", "'||'", "'####'", "an answer"]),
        (RAW + b"No mark||<<1+1=2>>\n", ["line 4", "'####'"]),
        (RAW + b"||<<1+1=2>> #### 2\n", ["line 4", "a question"]),
        (RAW[:-3], ["line 3", "an answer"]),
        (LINES[0].encode() + b"\n\n" + RAW, ["line 2"]),
        (b"", ["line 1"]),
        (RAW + b"caf\xe9||<<1+1=2>> #### 2\n", ["line 4", "0xe9", "UTF-8"]),
        (POINTER, ["git-lfs pointer"]),
        (None, ["gsm_valid.txt", "No such file"]),
    ],
)
def test_gsm_invalid_input_keeps_old_output(tree, raw, parts):
    data = tree / "data"
    (data / "gsm_valid.json").write_text("old")
    if raw is not None:
        (data / "gsm_valid.txt").write_bytes(raw)
    before = files(data)
    assert_error(run(tree, "gsm_icot.py", "valid"), "gsm_valid.txt", "gsm_icot.bash", *parts)
    assert files(data) == before and (data / "gsm_valid.json").read_text() == "old"


def test_gsm_from_folder(tree):
    source = tree / "my downloads"
    source.mkdir()
    (source / "valid.txt").write_bytes(RAW)
    result = run(tree, "gsm_icot.bash", "--from", source, "valid")
    assert result.returncode == 0 and "3 problems, 1 without steps" in result.stdout, result.stderr
    assert json.loads((tree / "data/gsm_valid.json").read_text()) == PROBLEMS
    shutil.rmtree(source)
    assert run(tree, "gsm_icot.bash", "valid").returncode == 0  # already complete: nothing is downloaded
    assert files(tree / "data") == ["gsm_valid.json", "gsm_valid.txt"]


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (RAW[:50], f"has 50 bytes instead of {len(RAW)}"),
        (RAW.replace(b"300", b"301"), "SHA-256"),
        (POINTER, "git-lfs pointer"),
        (None, "has no valid.txt"),
    ],
)
def test_gsm_invalid_download_leaves_no_files(tree, raw, part):
    source = tree / "source"
    source.mkdir()
    if raw is not None:
        (source / "valid.txt").write_bytes(raw)
    assert_error(run(tree, "gsm_icot.bash", "--from", source, "valid"), part, "source")
    assert files(tree / "data") == []


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--from", "nowhere"], "no such folder"),
        (["--from"], "--from needs"),
        (["trian"], "no split 'trian'"),
    ],
)
def test_gsm_invalid_arguments(tree, argv, part):
    assert_error(run(tree, "gsm_icot.bash", *argv), part)


class Breaking(http.server.BaseHTTPRequestHandler):
    """Serve RAW as /valid.txt, but cut off the first response; support range requests only if `ranges`."""

    ranges = True
    log: list

    def do_GET(self):
        """Answer a request."""
        wanted = self.headers.get("Range") if self.ranges else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.log.append(start)
        if self.path != "/valid.txt":
            self.send_error(404)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(RAW) - 1}/{len(RAW)}")
        self.send_header("Content-Length", str(len(RAW) - start))
        self.end_headers()
        self.wfile.write(RAW[start:] if len(self.log) > 1 else RAW[:70])

    def log_message(self, *args):
        """Keep the test output clean."""


@pytest.fixture
def serve():
    """Return a function: serve(ranges) -> (URL, list of requested start positions)."""
    servers = []

    def start(ranges):
        handler = type("Handler", (Breaking,), {"ranges": ranges, "log": []})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/", handler.log

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def path_with(folder, *programs):
    """Create a PATH with only these programs, the script's other dependencies, and this Python."""
    folder.mkdir()
    needs = "bash dirname mkdir grep head wc cut rm mv cp sleep cat sha256sum shasum"
    for program in [*needs.split(), *programs]:
        if shutil.which(program):
            (folder / program).symlink_to(shutil.which(program))
    (folder / "python").symlink_to(sys.executable)
    return folder


@pytest.mark.parametrize("program", ["curl", "wget"])
@pytest.mark.parametrize("ranges", [True, False])
def test_gsm_resumes_interrupted_download(tree, serve, program, ranges):
    if not shutil.which(program):
        pytest.skip(f"no {program} here")
    address, log = serve(ranges)
    path = path_with(tree / "bin", program)
    result = run(tree, "gsm_icot.bash", "--from", address, "valid", path=path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tree / "data/gsm_valid.json").read_text()) == PROBLEMS
    assert files(tree / "data") == ["gsm_valid.json", "gsm_valid.txt"]
    assert log[0] == 0 and (log[1] == 70) == ranges


def test_gsm_failed_download_leaves_no_files(tree, serve):
    address, _ = serve(True)
    result = run(tree, "gsm_icot.bash", "--from", f"{address}missing", "valid")
    assert_error(result, f"{address}missing/valid.txt", "--from FOLDER")
    assert files(tree / "data") == []
    result = run(tree, "gsm_icot.bash", "--from", address, path=path_with(tree / "bin"))
    assert_error(result, "no split 'train'")
    assert_error(run(tree, "gsm_icot.bash", "--from", address, "valid", path=tree / "bin"), "neither curl nor wget")


# ProntoQA


def prontoqa_file(path, count=9201, **changes):
    """Write a generator output whose last example has `changes`."""
    examples = {f"example{number}": EXAMPLE for number in range(1, count)}
    examples[f"example{count}"] = {"test_example": EXAMPLE["test_example"] | changes}
    path.write_text(json.dumps(examples))


def test_prontoqa_convert_example():
    problem = prontoqa.convert_example(EXAMPLE)
    assert list(problem) == ["question", "steps", "answer"]
    assert problem["question"] == ("Tumpuses are gorpuses. Alex is a tumpus. True or false: Alex is happy.")
    assert problem["steps"] == [
        "Sentence 1. Sentence 2.",
        "Sentence 3. Sentence 4.",
        "Sentence 5. Sentence 6.",
        "Sentence 7. Sentence 8.",
        "Sentence 9. Sentence 10.",
        "Sentence 11.",
    ]
    assert problem["answer"] == "True"


def test_prontoqa_splits_in_file_order(tree):
    prontoqa_file(tree / "data/5hop_0shot_random.json", answer="False")
    result = run(tree, "prontoqa.py")
    assert result.returncode == 0, result.stderr
    splits = [json.loads((tree / f"data/prontoqa_{name}.json").read_text()) for name in ("train", "valid", "test")]
    assert [len(split) for split in splits] == [9000, 200, 1]
    assert splits[0][0] == prontoqa.convert_example(EXAMPLE) and splits[2][0]["answer"] == "False"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"chain_of_thought": ["One."] * 10}, ["example9201", "11 strings"]),
        ({"chain_of_thought": ["One."] * 10 + [None]}, ["example9201", "11 strings"]),
        ({"query": None}, ["example9201", "'query'"]),
        ({"count": 9200}, ["9,200 problems"]),
    ],
)
def test_prontoqa_invalid_examples_write_nothing(tree, changes, parts):
    prontoqa_file(tree / "raw.json", **changes)
    assert_error(run(tree, "prontoqa.py", "raw.json", "--out", "new"), "raw.json", "prontoqa.bash", *parts)
    assert not (tree / "new").exists()


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b'{"example1": {"test_exam', "invalid or incomplete JSON"),
        (b'{"\xff": 1}', "UTF-8"),
        (b"[]", "object"),
        (None, "No such"),
    ],
)
def test_prontoqa_invalid_files(tree, raw, part):
    path = tree / "data/5hop_0shot_random.json"
    if raw is not None:
        path.write_bytes(raw)
    before = files(tree / "data")
    assert_error(run(tree, "prontoqa.py"), str(path), "prontoqa.bash", part)
    assert files(tree / "data") == before


@pytest.fixture
def generator(tree):
    """Create a fake generator, and an environment that claims to have numpy and scipy."""
    python = tree / "data/prontoqa_env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    folder = tree / "generator"
    folder.mkdir()
    prontoqa_file(folder / "prepared.json")
    (folder / "run_experiment.py").write_text(
        "import pathlib, sys\n"
        "print('a warning')\n"
        "assert sys.argv[sys.argv.index('--num-trials') + 1] == '10000'\n"
        "pathlib.Path('prepared.json').rename('5hop_0shot_random.json')\n"
    )
    return folder


def test_prontoqa_with_generator_folder(tree, generator):
    result = run(tree, "prontoqa.bash", "generator")
    assert result.returncode == 0 and "9,000 problems" in result.stdout, result.stderr
    splits = ["prontoqa_test.json", "prontoqa_train.json", "prontoqa_valid.json"]
    assert files(tree / "data") == ["5hop_0shot_random.json", "prontoqa_env", *splits]
    shutil.rmtree(generator)
    assert run(tree, "prontoqa.bash").returncode == 0  # converts the existing generator output again


def test_prontoqa_generator_failure(tree, generator):
    (generator / "run_experiment.py").write_text("raise SystemExit('no luck')\n")
    assert_error(run(tree, "prontoqa.bash", "generator"), "generator failed", "no luck")
    assert files(tree / "data") == ["prontoqa_env", "prontoqa_generator.log"]
    assert_error(run(tree, "prontoqa.bash", "data"), "run_experiment.py")


# Writing


def test_write_json_failure_keeps_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    write_json(path, [1, {"a": "é"}])
    assert path.read_text() == '[1,{"a":"\\u00e9"}]'
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, [2])
    assert files(tmp_path) == ["data.json"] and json.loads(path.read_text())[0] == 1
    with pytest.raises(DataError, match="invalid or incomplete JSON"):
        prontoqa.read_json(SOURCES / "gsm_icot.sums", "")
