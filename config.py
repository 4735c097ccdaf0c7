"""The config of a run: its keys, what they mean, and the checks that they pass before anything is built."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import reprlib
import shutil
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from curriculum import METHODS

OFFICIAL_METHODS = ("coconut", "cot", "no_thoughts", "no_cot")  # the official code names a method by four booleans
SPLIT_PATHS = ("train_path", "val_path")
HUB = "hub:"  # begins a path that names a data set of the Hugging Face hub


class UserError(ValueError):
    """A user's mistake: its message says what and where it is and how to mend it; run.py exits with code 2."""


def option(
    default, doc: str, low: float | None = None, high: float | None = None, choices: tuple = (), free: bool = False
):
    """Define a config key: its default, its meaning, the values it takes, and whether it is free.

    free: a continued run may change the key, since it does not alter what is trained.
    """
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices, "free": free})


@dataclass(init=False)
class Config:
    """Every key of a run. `Config({"cot": True})` takes any subset, the rest keeps its default.

    Raises ValueError with all problems at once for unknown keys, wrong types and values out of range. What only
    a run can know (missing files, contradictions, missing keys) is checked by `load_config`.
    """

    # general
    project: str = option("coconut", "project name for the logger", free=True)
    name: str | None = option(None, "name of the run; its directory is save_path/name", free=True)
    save_path: str = option("checkpoints", "directory of all runs", free=True)
    only_eval: bool = option(False, "only load a model and test it on val_path (needs load_model_path)", free=True)
    debug: bool = option(
        False, "try-out: nothing is written; the first 5,000 training, 32 validation problems", free=True
    )
    logger: str = option(
        "wandb", "where metrics go besides metrics.jsonl", choices=("wandb", "tensorboard", "none"), free=True
    )
    # method
    method: str | None = option(None, "what to train, a row of the paper's Table 1", choices=(None, *METHODS))
    coconut: bool = option(False, "official spelling of method: coconut")
    cot: bool = option(False, "official spelling of method: cot")
    no_thoughts: bool = option(False, "official spelling of method: no_thoughts")
    no_cot: bool = option(False, "official spelling of method: no_cot")
    # curriculum
    c_thought: int = option(1, "continuous thoughts for each removed step", low=0)
    epochs_per_stage: int = option(1, "epochs of each stage", low=1)
    max_latent_stage: int = option(0, "stages after the initial one; then one more without any steps", low=0)
    pad_latent_to_max: bool = option(True, "as many thoughts for problems with fewer steps than stages")
    uniform_prob: float = option(0.0, "probability that an example trains a random stage", low=0, high=1)
    # curriculum of icot (Deng et al. 2024)
    remove_per_epoch: float = option(8, "step tokens removed in each epoch, spread evenly over it", low=0)
    remove_all_when_remove_beyond: int = option(39, "removed tokens at which all that are left go too", low=1)
    removal_smoothing_lambda: float | None = option(4, "o more go with probability ~ exp(-lambda o)", low=0)
    # model
    model_id: str = option("openai-community/gpt2", "hub name or folder of the model to start from")
    from_scratch: bool = option(False, "build the model from model_id's config.json with random weights")
    load_model_path: str | None = option(None, "checkpoint (directory or official file) to evaluate or to start from")
    new_token_init: str = option("<<", "the markers' new rows start as this token's; the mean row if it is not one")
    lora_rank: int | None = option(None, "train low-rank adapters of this rank (None: all weights); needs peft", low=1)
    trust_remote_code: bool = option(False, "let a hub model run code of its own", free=True)
    verify: bool = option(
        True, "check a checkpoint that is loaded against its manifest; False saves reading it twice", free=True
    )
    # data
    train_path: str | None = option(None, "training problems: JSON, JSON lines, Parquet or hub:OWNER/NAME[:SPLIT]")
    val_path: str | None = option(None, "validation or test problems, likewise; of the hub, name the SPLIT", free=True)
    data_cache: str | None = option(
        None, "folder that keeps tokenized data (None: the cache folder of datasets)", free=True
    )
    data_workers: int | None = option(
        None, "processes that make batches ahead (None: 1 for a GPU, else 0)", low=0, free=True
    )
    # training
    seed: int = option(0, "random seed of weights, order, dropout and stage mixing", low=0, high=2**63 - 1)
    num_epochs: int = option(1, "number of epochs", low=1, high=10**6, free=True)
    resume: int = option(
        0, "finished epochs to skip at the start; for only_eval, the epoch that fixes the stage", low=0, free=True
    )
    batch_size_training: int = option(32, "problems per process and forward pass", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", low=1)
    global_batch_size: int | None = option(
        None, "problems per optimizer step of all processes; sets gradient_accumulation_steps", low=1
    )
    group_by_length: bool = option(False, "steps of problems of similar length: less padding, another order")
    lr: float = option(1e-4, "AdamW's learning rate", low=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", low=0)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", low=0)
    max_grad_norm: float | None = option(None, "clip the gradient to this norm (None: never)", low=0)
    reset_optimizer: bool | str = option(
        False,
        "forget AdamW's moments when the stage switches; every_epoch: always",
        choices=(False, True, "every_epoch"),
    )
    bf16: bool = option(False, "bfloat16 autocast over float32 weights")
    tf32: bool = option(False, "multiply float32 matrices in TF32 on a GPU: faster, 10 bits of mantissa")
    gradient_checkpointing: bool | str = option(
        False,
        "less memory, more time: keep of each mlp or block its input alone, and compute it again for the gradient",
        choices=(False, "mlp", "block"),
        free=True,
    )
    compile: bool = option(
        False,
        "torch.compile the training passes (never sharded); needs a C++ compiler, and minutes at first",
        free=True,
    )
    parallel: str = option(
        "auto",
        "several processes: a copy of the model in each (ddp) or shards (fsdp)",
        choices=("auto", "ddp", "fsdp"),
        free=True,
    )
    # validation and checkpoints
    batch_size_eval: int | None = option(
        None, "problems per process in validation (None: batch_size_training)", low=1, free=True
    )
    max_new_tokens: int | None = option(
        None, "longest answer (None: 64 where val_path contains gsm, else 128)", low=1, free=True
    )
    save_only_improve: bool = option(
        False, "keep only checkpoints that improved accuracy, and the newest to go on from", free=True
    )
    save_every_steps: int | None = option(
        None, "also save within an epoch, after so many optimizer steps", low=1, free=True
    )
    keep_checkpoints: int | None = option(None, "newest checkpoints to keep besides best (None: all)", low=1, free=True)
    analyze: bool = option(False, "at the end, scripts/analyze.py on best and val_path; needs matplotlib", free=True)

    def __init__(self, values: dict | None = None):
        if problems := self.update(values or {}):
            raise UserError(report(problems))

    def update(self, values: dict) -> list[str]:
        """Takes over the values that are sound and returns one line for each that is not."""
        options, hints, problems = {f.name: f for f in fields(self)}, typing.get_type_hints(Config), []
        for key, value in values.items():
            if key not in options:
                key = key if isinstance(key, str) else abbreviated(key)
                near = difflib.get_close_matches(key, options, n=1, cutoff=0)[0]
                problems.append(f"{key}: unknown key; the nearest known one is {near}")
                continue
            try:
                setattr(self, key, check_value(value, hints[key], options[key].metadata))
            except ValueError as error:
                problems.append(f"{key}: {error}")
        named = [name for name in OFFICIAL_METHODS if getattr(self, name)]
        if self.method is None and len(named) == 1:
            self.method = named[0]
        return problems

    @property
    def run_directory(self) -> Path:
        """The directory of the run: save_path/name."""
        return Path(self.save_path, self.name)

    @property
    def answer_limit(self) -> int:
        """The number of new tokens at which an answer is cut off."""
        return self.max_new_tokens or (64 if "gsm" in (self.val_path or "") else 128)

    def accumulation_steps(self, world_size: int) -> int:
        """Number of forward passes per optimizer step on each of `world_size` processes.

        Raises:
            UserError: global_batch_size is not a multiple of what the processes take at once.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        steps, rest = divmod(self.global_batch_size, self.batch_size_training * world_size)
        if rest:
            raise UserError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of batch_size_training "
                f"{self.batch_size_training} x {world_size} processes; change one of them"
            )
        return steps

    def problems_per_step(self, world_size: int) -> int:
        """Number of problems per optimizer step, over all `world_size` processes."""
        return self.batch_size_training * self.accumulation_steps(world_size) * world_size

    def resolved(self) -> dict:
        """All keys but the four booleans, which `method` replaces: what config.yaml holds."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OFFICIAL_METHODS}


FREE_KEYS = {f.name for f in fields(Config) if f.metadata["free"]}  # those that a continued run may change


def report(problems: list[str]) -> str:
    """Several problems as one message."""
    return "\n".join(["the configuration has problems:", *(f"  - {problem}" for problem in problems)])


def check_value(value, hint, metadata: Mapping):
    """The value as the type `hint` says, or a ValueError that names it, the expectation and the key's meaning."""
    doc, low, high, choices = (metadata[name] for name in ("doc", "low", "high", "choices"))
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value == "None" and types.NoneType in kinds:  # official YAML files write the word
        value = None
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        value = to_float(value)  # YAML 1.1 reads 1e-4 as a string
    if type(value) not in kinds:
        names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{abbreviated(value)} is no {names} ({doc})")
    if isinstance(value, str) and ("\0" in value or has_lone_surrogate(value)):
        raise ValueError(f"{abbreviated(value)} holds a null byte or half a character ({doc})")
    if choices and value not in choices:
        raise ValueError(f"{abbreviated(value)} is none of {', '.join(str(c) for c in choices if c is not None)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        above, below = low is None or value >= low, high is None or value <= high
        sane = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
        if not (above and below and sane):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{abbreviated(value)} is out of range: a finite number, {bounds} ({doc})")
    return value


def to_float(value):
    """value as a float where it reads as one, else unchanged, so that the type check names it."""
    try:
        return float(value)
    except ValueError:
        return value
    except OverflowError:
        return math.inf


def abbreviated(value) -> str:
    """Format a value for a message: short, however large, deep or often repeated its parts are."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # Python formats no integer of more than 4,300 digits
        return "a number with too many digits"


def has_lone_surrogate(text: str) -> bool:
    """Whether a text contains half of a surrogate pair, which UTF-8 cannot encode."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """The config of a run: defaults < YAML < key=value words. Raises UserError with all problems at once."""
    values, (given, problems) = read_yaml(path), read_words(overrides)
    values |= given
    config = Config()
    problems += config.update(values)
    problems += run_problems(config, given=values)
    if problems:
        raise UserError(report(problems))
    return config


def parse_yaml(text: str):
    """Parse YAML of plain types. Raises ValueError with the reason."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # PyYAML raises all kinds for values such as 2001-99-99, !!bool a or [[[[...
        raise ValueError(f"a value cannot be read: {error!s:.200}") from error


def read_words(words: list[str]) -> tuple[dict, list[str]]:
    """The values in key=value words, and a line for each word that is none."""
    values, problems = {}, []
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            problems.append(f"{word}: not a key=value word")
            continue
        try:
            values[key.removeprefix("--")] = parse_yaml(text)
        except ValueError:
            problems.append(f"{key}: {abbreviated(text)} is not a YAML value; quote it")
    return values, problems


def read_yaml(path: str | Path, inside: tuple[Path, ...] = ()) -> dict:
    """The mapping in a YAML file, on top of that in the file which its `base` key names (relative to the file)."""
    path = Path(path)
    if inside and os.path.realpath(path) in map(os.path.realpath, inside):
        raise UserError(f"{path}: the base keys lead back to this file: {' -> '.join(map(str, (*inside, path)))}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}. args/ holds ready ones.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the config is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: the config is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: the config must be lines of 'key: value', this is {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base or has_lone_surrogate(base):
        raise UserError(f"{path}: base: {abbreviated(base)} is no path; name a YAML file, relative to this one")
    return read_yaml(path.parent / base, (*inside, path)) | values


def run_problems(config: Config, given: dict) -> list[str]:
    """What makes a well-formed config unfit for a run: contradictions, missing keys, missing files."""
    problems = []
    named = [name for name in OFFICIAL_METHODS if getattr(config, name)]
    if len({*named, config.method} - {None}) > 1:
        both = ", ".join(sorted({*named, config.method} - {None}))
        problems.append(f"method: two methods at once ({both}); choose one")
    elif config.method is None and given.get("method") in (None, "None"):
        problems.append(f"method: none chosen; set method to one of {', '.join(METHODS)}")
    if config.only_eval and not config.load_model_path:
        problems.append("load_model_path: only_eval needs a checkpoint to evaluate; set it, or only_eval: False")
    if not config.only_eval and config.resume >= config.num_epochs:
        problems.append(f"resume: {config.resume} leaves nothing of num_epochs {config.num_epochs}; raise num_epochs")
    for key in ("lora_rank", "compile"):
        if getattr(config, key) and config.parallel == "fsdp":
            problems.append(f"parallel: fsdp does not go with {key}; use ddp")
    if config.compile and config.gradient_checkpointing:
        problems.append("gradient_checkpointing: does not go with compile; drop one of them")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if config.compile and not config.only_eval and not shutil.which(compiler):
        problems.append(f"compile: no C++ compiler {compiler}; install it, or name another in CXX, or compile: False")
    needed = ("name", "val_path") if config.only_eval else ("name", *SPLIT_PATHS)
    problems += [f"{key}: missing; a run needs it" for key in needed if given.get(key) in (None, "", "None")]
    if config.name and (
        Path(config.name).name != config.name or config.name == ".." or len(config.name.encode()) > 255
    ):
        problems.append(
            f"name: {abbreviated(config.name)} must be a plain directory name, of 255 bytes at most; directories "
            "belong into save_path"
        )
    problems += missing_packages(config)
    return problems + [p for key in PATH_KEYS for p in path_problem(key, config)]


def missing_packages(config: Config) -> list[str]:
    """A line for each optional package that a training run asks for and that is not installed."""
    asked = {"logger": config.logger if config.logger != "none" else None}  # each key with the package that it needs
    asked |= {"lora_rank": config.lora_rank and "peft", "analyze": config.analyze and "matplotlib"}
    return [
        f"{key}: the package {package} is not installed; pip install {package}, or do without ({key}: {off})"
        for (key, package), off in zip(asked.items(), ("none", "None", "False"), strict=True)
        if package and not config.only_eval and importlib.util.find_spec(package) is None
    ]


PATH_KEYS = ("save_path", "data_cache", "model_id", "load_model_path", *SPLIT_PATHS)


def path_problem(key: str, config: Config) -> list[str]:
    """At most one line: the placeholder or missing file that a path key of the config names."""
    value = getattr(config, key)
    if not value or (key == "train_path" and config.only_eval):
        return []
    if "YOUR_" in value:
        return [f"{key}: {value!r} is a placeholder; put your own path there"]
    if key in SPLIT_PATHS and value.startswith(HUB):
        return hub_problem(key, value)
    try:
        os.stat(Path(value, config.name or "") if key == "save_path" else value)
    except (FileNotFoundError, NotADirectoryError):
        local = key not in ("save_path", "data_cache") and (key != "model_id" or value.startswith((".", "/", "~")))
        return [f"{key}: {value!r} does not exist; {REMEDIES[key]}"] if local else []
    except OSError as error:  # a name that is too long, a folder that this user may not enter
        return [f"{key}: {abbreviated(value)} cannot be used: {error.strerror}; choose another path"]
    return []


def hub_problem(key: str, value: str) -> list[str]:
    """At most one line: what is wrong with a path that names a data set of the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", value.removeprefix(HUB), re.ASCII):
        return [f"{key}: {value!r} is not of the form hub:OWNER/NAME[:SPLIT]"]
    if key == "val_path" and value.count(":") == 1:
        return [f"{key}: {value!r} names no split; add one, such as {value}:validation"]
    return []


REMEDIES = {
    "model_id": "give a hub name or an existing folder",
    "load_model_path": "train that run first, or give another checkpoint",
    "train_path": "preprocessing/ makes the data files (see data/README.md)",
    "val_path": "preprocessing/ makes the data files (see data/README.md)",
}
