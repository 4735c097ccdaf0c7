"""Fuzz every reader of files and args: input must be accepted or rejected with a UserError naming the file or key.

    python tests/stress/fuzz.py --examples 10000

Hypothesis mutates valid files and command lines, byte by byte and value by value. Prints a table; for a traceback, also
the smallest example, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pyarrow  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pyarrow import parquet  # noqa: E402

from coconut import Coconut, check_model  # noqa: E402
from components import checkpoint  # noqa: E402
from components.checkpoint_manager import drop_optimizer_state, latest_checkpoint  # noqa: E402
from components.data_sources import read_problems  # noqa: E402
from components.export import read_description  # noqa: E402
from components.files import verify_manifest  # noqa: E402
from components.metrics import MetricLogger  # noqa: E402
from components.pretrained import load_pretrained  # noqa: E402
from components.tokenization import check_tokens, tokenize_problems  # noqa: E402
from config import Config, UserError, load_config  # noqa: E402
from curriculum import END, LATENT, PAUSE, START, evaluation_stage  # noqa: E402
from evaluate import OpenedCheckpoint  # noqa: E402
from helpers import make_problems, save_model, write_json  # noqa: E402

# --- inputs -----------------------------------------------------------------------------------------------------------

DIGITS, HEX = b"9" * 5000, b"0x" + b"f" * 5000
ODD_TEXT = [b"", b"\0", b"\xff", b"\n", b"\r", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"x" * 300, b"/" * 5000, DIGITS]
ODD_JSON = [b"[" * 5000, b'{"a":' * 5000, b"1e999", b"NaN", b'"\\ud800"', b"null", b"[]", b"{}", b"-1", b'"', b"}{"]
ODD_YAML = [HEX, b"[" * 500, b"{a: " * 500, b"2001-99-99", b"2001-01-01T00:00:00+99:99", b".nan", b"1:1:1", b"~"]
ODD_YAML += [b"!!int a", b"!!int ''", b"!!float ''", b"!!bool a", b"!!timestamp a", b"!!binary \xc3\xa9", b"!!set [1]"]
ODD_YAML += [b"!!python/object/apply:os.getcwd []", b"&a [*a]", b"*a", b"<<: 1\n", b"? [a]\n", b'"\\ud800"', b'"\\0"']
ODD_YAML += [b'"\\U00110000"', b"base: ", b'base: "\\0"\n', b"base: config.yaml\n", b"- a\n", b"%TAG ! a\n", b": "]
ODD_YAML += [b"a: &a [" + b"1," * 20 + b"]\nb: &b [" + b"*a," * 20 + b"]\nname: [" + b"*b," * 20 + b"]\n"]
ODD_VALUES = [None, True, -1, 0, 3, 1.5, "", "a", "<|latent|>", [], {}, [1], {"a": 1}, [[]], "\ud800", "\0", "x" * 300]


@st.composite
def mutated(draw, content: bytes, fragments: list[bytes]) -> bytes:
    """Replace one to three slices of the content by odd ones."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 3, 8, len(content)])))
        piece = draw(st.sampled_from(ODD_TEXT + fragments) | st.binary(max_size=8))
        content = content[:start] + piece + content[end:]
    return content


@st.composite
def replaced(draw, value):
    """Replace a part of a JSON value, or all of it, by an odd one."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(ODD_VALUES))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 9)) == 0:
        return {k: value[k] for k in keys if k != key} if isinstance(value, dict) else [v for v in value if v != key]
    new = draw(replaced(value[key]))
    return {**value, key: new} if isinstance(value, dict) else [*value[:key], new, *value[key + 1 :]]


def json_files(value) -> st.SearchStrategy[bytes]:
    """JSON files of the value, mutated as text or as values."""
    return mutated(json.dumps(value).encode(), ODD_JSON) | replaced(value).map(lambda v: json.dumps(v).encode())


@st.composite
def command_lines(draw) -> list[str]:
    """One to three key=value args."""
    key = st.sampled_from([*Config().resolved(), "base", "", "--lr", "lrr", "\0"])
    value = st.sampled_from(ODD_TEXT + ODD_YAML).map(os.fsdecode) | st.text(max_size=12)
    word = st.builds("{}={}".format, key, value) | value
    return draw(st.lists(word, min_size=1, max_size=3))


def saved(value) -> bytes:
    """Return the bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@st.composite
def torch_files(draw, value) -> bytes:
    """Files of torch.save: mutated as bytes, in their pickle, or with odd values."""
    kind = draw(st.sampled_from(["bytes", "pickle", "value"]))
    if kind == "bytes":
        return draw(mutated(saved(value), []))
    if kind == "value":
        odd = [torch.zeros(()), torch.zeros(3, 3), torch.zeros(0), torch.tensor([1j]), torch.zeros(2, 2).to_sparse()]
        odd += [torch.full((2,), torch.nan), torch.zeros(1).expand(10**13, 16), torch.zeros(2, device="meta")]
        prefix = draw(st.sampled_from(["", "", "module.", "_orig_mod.", "base_causallm.", "module.base_causallm."]))
        value = {prefix + name: tensor for name, tensor in value.items()}
        key = st.sampled_from([*value, "a", 1, "base_causallm.a", "base_causallm.", "module.", None])
        return saved({**value, draw(key): draw(st.sampled_from([*odd, *ODD_VALUES]))})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(value))) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, draw(mutated(content, [b"cos\ngetcwd\n"])) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


@st.composite
def tables(draw) -> bytes:
    """Parquet files: mutated valid ones, and tables with odd columns."""
    sink = io.BytesIO()
    if draw(st.booleans()):
        parquet.write_table(pyarrow.Table.from_pylist(make_problems(3)), sink)
        return draw(mutated(sink.getvalue(), [b"PAR1"]))
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 2], "int32").buffers()[1], pyarrow.py_buffer(b"\xff\xfe")]
    )
    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    odd = [not_utf8, far, far.cast(pyarrow.int64()).cast(pyarrow.duration("us")), pyarrow.nulls(1)]
    odd += [pyarrow.array([v]) for v in ("a", 1, 1.5, [1], ["a"], [None], [["a"]], {"a": 1}, b"\xff", " ", "\0")]
    names = draw(st.lists(st.sampled_from(["question", "answer", "steps", "odd"]), max_size=5))
    columns = [draw(st.sampled_from(odd)) for _ in names]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names), sink)
    return sink.getvalue()


@st.composite
def model_folders(draw, names: list[str]) -> dict[str, bytes | None]:
    """Changes to one to three files of a model's folder: missing, empty, or with the content of another kind."""
    contents = st.sampled_from([None, None, b"", b"{}", b"[]", b"\xff", b"version https://git-lfs.github.com/spec/v1"])
    return draw(st.dictionaries(st.sampled_from([*names, "adapter_config.json"]), contents, min_size=1, max_size=3))


MARKERS = [
    START,
    END,
    LATENT,
    PAUSE,
    "<|",
    "latent|>",
    "<|endoftext|>",
    "<<",
    "\ud800",
    "\0",
    "\n",
    " ",
    "1+2",
    "é" * 99,
]
QUESTIONS = st.lists(st.sampled_from(MARKERS) | st.text(max_size=5), max_size=4).map("".join)


# --- readers ----------------------------------------------------------------------------------------------------------


class Place:
    """A folder with the files of a valid run, and the readers to fuzz."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        save_model(self.model)
        data = write_json(folder / "data.json", make_problems(2))
        values = {"name": "r", "method": "coconut", "max_latent_stage": 1, "model_id": str(self.model)}
        values |= {"train_path": data, "val_path": data, "logger": "none"}
        (folder / "sound.yaml").write_text(yaml.safe_dump(values))
        self.config = Config(values)
        self.lm_state = transformers.AutoModelForCausalLM.from_pretrained(self.model).state_dict()
        self.checkpoint = folder / "run" / "checkpoint_1"
        self.checkpoint.mkdir(parents=True)
        self.opened = None

    def kinds(self) -> dict[str, tuple[st.SearchStrategy, Callable]]:
        """Return for each kind of input its strategy and the function that reads an example."""
        config = (self.folder / "sound.yaml").read_bytes()
        lines = "\n".join(json.dumps(p) for p in make_problems(2)).encode()
        ids = {"<|start-latent|>": 258, "<|end-latent|>": 259, "<|latent|>": 260}
        description = {"method": "coconut", "stage": 1, "improved": True, "token_ids": ids}
        manifest = {"coconut.json": {"bytes": 2, "sha256": "00"}, "optimizer.safetensors": {"bytes": 0, "sha256": ""}}
        training = {"state": {"run_id": "a", "epoch": 1}, "random_states": [{"cpu": torch.zeros(4).byte()}]}
        return {
            "command line": (command_lines(), self.command_line),
            "config": (mutated(config, ODD_YAML), self.config_file),
            "JSON list": (json_files(make_problems(2)), self.data_file),
            "JSON lines": (mutated(lines, ODD_JSON), self.data_file),
            "Parquet": (tables(), self.data_file),
            "metrics.jsonl": (mutated(lines, ODD_JSON), self.metrics),
            "coconut.json": (json_files(description), self.description),
            "manifest.json": (json_files(manifest), self.manifest),
            "official file": (torch_files(self.lm_state), self.official_file),
            "training_state.pt": (torch_files(training), self.training_state),
            **{name: self.model_file(name) for name in ("tokenizer.json", "tokenizer_config.json", "config.json")},
            "model.safetensors": self.model_file("model.safetensors"),
            "model folder": (model_folders(os.listdir(self.model)), self.model_folder),
            "question": (QUESTIONS, self.question),
        }

    def command_line(self, words: list[str]) -> None:
        load_config(str(self.folder / "sound.yaml"), words)

    def config_file(self, content: bytes) -> None:
        path = self.folder / "config.yaml"
        path.write_bytes(content)
        load_config(str(path))

    def data_file(self, content: bytes) -> None:
        path = self.folder / "file"
        path.write_bytes(content)
        must_name("file", read_problems, str(path))

    def metrics(self, content: bytes) -> None:
        (self.folder / "metrics.jsonl").write_bytes(content)
        MetricLogger(self.folder, self.config, "id", keep_bytes=100).close()

    def description(self, content: bytes) -> None:
        (self.checkpoint / "coconut.json").write_bytes(content)
        description = must_name("coconut.json", read_description, str(self.checkpoint))
        evaluation_stage(self.config, description)
        {token for token in ("<|latent|>",) if token in set(description.get("token_ids", ()))}

    def manifest(self, content: bytes) -> None:
        """A manifest that does not match makes a damaged checkpoint, which is skipped."""
        (self.checkpoint / "manifest.json").write_bytes(content)
        (self.checkpoint / "optimizer.safetensors").touch()
        latest_checkpoint(self.checkpoint.parent)
        drop_optimizer_state(self.checkpoint)
        if verify_manifest(self.checkpoint):
            raise UserError("damaged")

    def official_file(self, content: bytes) -> None:
        path = self.folder / "official.pt"
        path.write_bytes(content)
        must_name("load_model_path", load_pretrained, self.config, path)

    def training_state(self, content: bytes) -> None:
        (self.checkpoint / checkpoint.TRAINING_STATE).write_bytes(content)
        must_name("checkpoint_1", checkpoint.read_training_state, self.checkpoint)

    def model_file(self, name: str) -> tuple[st.SearchStrategy, Callable]:
        sound = (self.model / name).read_bytes()
        strategy = json_files(json.loads(sound)) if name.endswith(".json") else mutated(sound, ODD_JSON)
        return strategy, lambda content: self.model_folder({name: content})

    def model_folder(self, changes: dict[str, bytes | None]) -> None:
        """Load a copy of the model in which files have other contents, or (None) are missing."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            files = {path.name: path.read_bytes() for path in self.model.iterdir()} | changes
            for name, content in files.items():
                if content is not None:
                    Path(folder, name).write_bytes(content)
            config = Config(self.config.resolved() | {"model_id": folder})
            pretrained = must_name("model_id", load_pretrained, config, None)
            must_name("model_id", check_model, pretrained.lm, pretrained.tokenizer.eos_token_id, "model_id")
            data, rows = tokenize_problems(make_problems(2), pretrained.tokenizer), len(pretrained.tokenizer)
            must_name("model_id", check_tokens, data, pretrained.tokenizer, rows, "model_id", "data.json")

    def question(self, text: str) -> None:
        """Ask a checkpoint, which is opened once; each of its marks is in the prompt as often as the stage says."""
        if self.opened is None:
            pretrained = load_pretrained(self.config, None)
            model = Coconut.wrap(pretrained.lm, pretrained.tokenizer)
            self.opened = OpenedCheckpoint("checkpoint", pretrained, model, self.config, stage=1)
        [prompt] = must_name("question", self.opened.prompts, [text])
        ids = self.opened.pretrained.sequence_tokens("coconut")
        assert [prompt["input_ids"].count(ids[key]) for key in ("start_id", "latent_id", "end_id")] == [1, 1, 1]


def must_name(name: str, read: Callable, *args):
    """Return read(*args); a UserError must contain the name."""
    try:
        return read(*args)
    except UserError as error:
        assert name in str(error), f"does not name {name}: {error}"
        raise


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def fuzz(strategy: st.SearchStrategy, read: Callable, examples: int) -> Counter:
    """Run deterministic examples; count the accepted and refused ones.

    Raises: any error other than UserError, from the smallest example that Hypothesis finds.
    """
    tried = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def try_example(example):
        try:
            read(example)
            tried["accepted"] += 1
        except UserError:
            tried["refused"] += 1

    try_example()
    return tried


def main() -> int:
    """Fuzz all kinds; return 1 if there was a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="in total")
    parser.add_argument("--kinds", nargs="+", help="default: all")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))  # a config.json of a huge model is refused, not built
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    rows, failures, started = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as devnull:
        kinds = Place(Path(folder)).kinds()
        kinds = {kind: kinds[kind] for kind in args.kinds or kinds}
        for number, (kind, (strategy, read)) in enumerate(kinds.items()):
            examples = args.examples * (number + 1) // len(kinds) - args.examples * number // len(kinds)
            stdout, sys.stdout = sys.stdout, devnull  # warnings of damaged files
            try:
                tried = fuzz(strategy, read, examples)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                tried, failure = Counter(), "".join(traceback.format_exception(error))
                failures.append(f"{kind}:\n{failure}")
            finally:
                sys.stdout = stdout
            failed = int(bool(failures) and failures[-1].startswith(f"{kind}:\n"))
            rows.append((kind, sum(tried.values()), tried["refused"], tried["accepted"], failed))
            print(f"{kind:>22} {rows[-1][1:]} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"{'kind':>22}{'examples':>10}{'refused':>10}{'accepted':>10}{'tracebacks':>12}")
    for kind, *counts in [*rows, ("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))]:
        print(f"{kind:>22}{counts[0]:>10}{counts[1]:>10}{counts[2]:>10}{counts[3]:>12}")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
