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
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from curriculum import METHODS

OFFICIAL_METHODS = ("coconut", "cot", "no_thoughts", "no_cot")  # the official code selects a method by four booleans
SPLIT_PATHS = ("train_path", "val_path")
BATCH_KEYS = ("batch_size_training", "gradient_accumulation_steps", "global_batch_size")
FIELDS = ("question", "answer", "steps")  # of a problem
ABOVE_0 = math.ulp(0.0)  # the least value of a key that must be positive
HUB = "hub:"  # prefix of a path that names a data set of the Hugging Face hub
HUB_FORM = "hub:OWNER/NAME[:CONFIG][:SPLIT], where SPLIT may be a slice such as test[:10]"
HUB_PATH = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>\w+(?P<slice>\[-?\d*%?:-?\d*%?\])?))?",
    re.ASCII,
)
TYPE_NAMES = {bool: "a bool", int: "an int", float: "a float", str: "a string", types.NoneType: "None"}
TYPE_NAMES |= {list[str]: "a list of strings", dict[str, str]: "a mapping of strings"}


class UserError(ValueError):
    """A user's mistake. The message names the key or file, the value and the remedy; run.py exits with code 2."""


def option(default, doc: str, low: float = -math.inf, high: float = math.inf, choices: tuple = (), free: bool = False):
    """Define a config key: its default, meaning and valid values.

    Args:
        free: a resumed run may change the key, since it does not affect what is trained.
    """
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices, "free": free})


@dataclass(init=False)
class Config:
    """All keys of a run. `Config({"cot": True})` takes any subset of them; the rest keeps its defaults.

    Raises UserError with all unknown keys, wrong types and values out of range at once. What depends on the run
    (missing keys and files, contradictions) is checked by `load_config`.
    """

    # general
    project: str = option("coconut", "project name for the logger", free=True)
    name: str | None = option(None, "name of the run; its directory is save_path/name", free=True)
    save_path: str = option("checkpoints", "directory of all runs", free=True)
    only_eval: bool = option(False, "only evaluate load_model_path on val_path", free=True)
    debug: bool = option(False, "nothing is written; first 5,000 training, 32 validation problems", free=True)
    verbose: bool = option(False, "print the whole config at the start", free=True)
    samples: int = option(0, "number of answers to print in each validation", low=0, free=True)
    logger: str = option("wandb", "logger besides metrics.jsonl", choices=("wandb", "tensorboard", "none"), free=True)
    # method
    method: str | None = option(None, "training method, a row of the paper's Table 1", choices=(None, *METHODS))
    coconut: bool = option(False, "official spelling of method: coconut")
    cot: bool = option(False, "official spelling of method: cot")
    no_thoughts: bool = option(False, "official spelling of method: no_thoughts")
    no_cot: bool = option(False, "official spelling of method: no_cot")
    # curriculum
    c_thought: int = option(1, "continuous thoughts per removed step", low=0)
    epochs_per_stage: int = option(1, "epochs per stage", low=1)
    max_latent_stage: int = option(0, "stages that each remove one more step; a last one without steps follows", low=0)
    pad_latent_to_max: bool = option(True, "problems with fewer steps than max_latent_stage get as many thoughts")
    uniform_prob: float = option(0.0, "probability that a training example takes a random stage", low=0, high=1)
    # curriculum of icot (Deng et al. 2024)
    remove_per_epoch: float = option(8, "step tokens removed per epoch, spread evenly over it", low=0)
    remove_all_when_remove_beyond: int = option(39, "number of removed tokens from which on all are removed", low=1)
    removal_smoothing_lambda: float | None = option(
        4, "remove o more tokens with probability ~ exp(-lambda o) (None: no more)", low=ABOVE_0
    )
    # model
    model_id: str = option("openai-community/gpt2", "hub name or directory of the base model")
    from_scratch: bool = option(False, "random weights for the architecture in model_id's config.json")
    load_model_path: str | None = option(
        None, "checkpoint to evaluate or start from: directory, run, official file, hub name"
    )
    new_token_init: str = option("<<", "token whose embedding initializes new tokens (mean embedding if not one token)")
    lora_rank: int | None = option(None, "rank of LoRA adapters (None: train all weights); needs peft", low=1)
    trust_remote_code: bool = option(False, "allow a model to run its own code", free=True)
    verify: bool = option(True, "check a checkpoint against its manifest before loading it: reads it twice", free=True)
    # data
    train_path: str | list[str] | None = option(  # noqa: RUF009
        None, "training problems: JSON (lines), Parquet or hub:OWNER/NAME[:CONFIG][:SPLIT], or a list of them"
    )
    val_path: str | list[str] | None = option(  # noqa: RUF009
        None, "validation or test problems, likewise; a hub path needs its SPLIT", free=True
    )
    columns: dict[str, str] | None = option(  # noqa: RUF009
        None, "names of fields in the data where they differ, such as {question: problem}", choices=(None, *FIELDS)
    )
    data_cache: str | None = option(None, "directory for tokenized data (None: the cache of datasets)", free=True)
    data_workers: int | None = option(
        None, "processes that make batches (None: 1 for one GPU, else 0)", low=0, free=True
    )
    # training
    seed: int = option(0, "random seed of new weights, data order, dropout and stage mixing", low=0, high=2**63 - 1)
    num_epochs: int = option(1, "number of epochs, with those that resume skips", low=1, high=10**6, free=True)
    resume: int = option(0, "finished epochs to skip; only_eval tests the stage that follows them", low=0, free=True)
    batch_size_training: int = option(32, "problems per process and forward pass", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", low=1)
    global_batch_size: int | None = option(
        None, "problems per optimizer step over all processes; sets gradient_accumulation_steps", low=1
    )
    group_by_length: bool = option(False, "group problems of similar length: less padding, another order")
    lr: float = option(1e-4, "AdamW's learning rate", low=ABOVE_0)
    weight_decay: float = option(0.01, "AdamW's weight decay", low=0)
    warmup_steps: int = option(0, "optimizer steps of linear learning-rate warmup", low=0)
    max_grad_norm: float | None = option(None, "clip the gradient to this norm (None: no clipping)", low=ABOVE_0)
    reset_optimizer: bool | str = option(
        False, "reset the optimizer state when the stage switches, or every_epoch", choices=(False, True, "every_epoch")
    )
    bf16: bool = option(False, "bfloat16 autocast over float32 weights")
    tf32: bool = option(False, "TF32 for float32 matrix products on a GPU: faster, 10-bit mantissa")
    gradient_checkpointing: bool | str = option(
        False,
        "recompute the activations of every mlp or block in the backward pass: less memory, more time",
        choices=(False, "mlp", "block"),
        free=True,
    )
    compile: bool = option(False, "torch.compile the training passes: slow to start; needs a C++ compiler", free=True)
    parallel: str = option(
        "auto", "replicate (ddp) or shard (fsdp) the model over processes", choices=("auto", "ddp", "fsdp"), free=True
    )
    # validation and checkpoints
    eval_every_epochs: int = option(1, "validate after every so many epochs, and after the last", low=1, free=True)
    eval_max_problems: int | None = option(
        None, "first problems of val_path to validate on (None: all); only_eval takes all", low=1, free=True
    )
    batch_size_eval: int | None = option(None, "batch size in validation (None: batch_size_training)", low=1, free=True)
    max_new_tokens: int | None = option(
        None, "maximum number of generated tokens (None: 64 where val_path contains gsm, else 128)", low=1, free=True
    )
    numeric_answers: bool = option(False, "numbers of equal value, such as 18 and 18.0, are equal answers", free=True)
    save_only_improve: bool = option(False, "keep only checkpoints that improve accuracy, and the newest", free=True)
    save_every_steps: int | None = option(None, "also save every so many optimizer steps", low=1, free=True)
    keep_checkpoints: int | None = option(None, "newest checkpoints to keep besides best (None: all)", low=1, free=True)
    analyze: bool = option(False, "run scripts/analyze.py on best and val_path at the end", free=True)

    def __init__(self, values: dict | None = None):
        if errors := self.update(values or {}):
            raise UserError(format_errors(errors))

    def update(self, values: dict) -> list[str]:
        """Set the keys whose values are valid. Returns an error message for each of the others."""
        options, hints, errors = {f.name: f.metadata for f in fields(self)}, typing.get_type_hints(Config), []
        for key, value in values.items():
            if key not in options:
                key = key if isinstance(key, str) else abbreviated(key)
                nearest = difflib.get_close_matches(key, options, n=1)
                advice = f"did you mean {nearest[0]}?" if nearest else "docs/config.md lists all keys"
                errors.append(f"{key}: unknown key; {advice}")
                continue
            try:
                value = convert(value, hints[key], options[key])
                setattr(self, key, expand(value) if key in PATH_KEYS and value else value)
            except ValueError as error:
                errors.append(f"{key}: {error}")
        named = [name for name in OFFICIAL_METHODS if getattr(self, name)]
        if self.method is None and len(named) == 1:
            self.method = named[0]
        return errors

    @property
    def run_directory(self) -> Path:
        """The directory of the run: save_path/name."""
        return Path(self.save_path, self.name)

    @property
    def answer_limit(self) -> int:
        """Maximum number of generated tokens."""
        return self.max_new_tokens or (64 if "gsm" in str(self.val_path) else 128)

    def accumulation_steps(self, world_size: int) -> int:
        """Number of forward passes per optimizer step. Raises UserError if global_batch_size cannot be split evenly."""
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
        """Return all keys except the four booleans, which `method` replaces: the content of config.yaml."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OFFICIAL_METHODS}


FREE_KEYS = {f.name for f in fields(Config) if f.metadata["free"]}  # those that a resumed run may change


def listed(paths: str | list[str]) -> list[str]:
    """Return the sources of a data set, which may be a single one."""
    return paths if isinstance(paths, list) else [paths]


def expand(path: str | list[str]) -> str | list[str]:
    """Replace a leading ~ and the $VARIABLES of a path, or of several, as a shell does; unknown ones stay."""
    if isinstance(path, list):
        return [expand(part) for part in path]
    return os.path.expandvars(os.path.expanduser(path))


def convert(value, hint: type | types.UnionType, option: Mapping):
    """Convert the value of a key to its type `hint`. Raises ValueError unless it is as the key's `option` says."""
    doc, low, high, choices = (option[name] for name in ("doc", "low", "high", "choices"))
    kinds = typing.get_args(hint) or (hint,)
    if value == "None" and types.NoneType in kinds:  # as official YAML files spell it
        value = None
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            value = float(str(value))  # YAML 1.1 reads 1e-4 as a string; float(10**400) would overflow
    if type(value) not in [typing.get_origin(kind) or kind for kind in kinds]:
        raise ValueError(f"expected {' or '.join(map(TYPE_NAMES.get, kinds))}, got {abbreviated(value)} ({doc})")
    if isinstance(value, list):
        return [convert(item, str, option) for item in value]
    if isinstance(value, dict):  # the choices are those of its keys
        free = option | {"choices": ()}
        return {convert(name, str, option): convert(item, str, free) for name, item in value.items()}
    if isinstance(value, str) and ("\0" in value or has_lone_surrogate(value)):
        raise ValueError(f"{abbreviated(value)} contains a null byte or a lone surrogate; remove it ({doc})")
    if choices and value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ValueError(f"unknown value {abbreviated(value)}; choose one of {names}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        finite = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
        if not finite or not low <= value <= high:
            at_least = "above 0" if low == ABOVE_0 else f"at least {low}"
            bounds = at_least if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{abbreviated(value)} is out of range; expected a finite number, {bounds} ({doc})")
    return value


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """Load the config of a run: defaults < YAML file < `key=value` overrides. Raises UserError with all errors."""
    given, errors = parse_overrides(overrides)
    values, config = read_yaml(path) | given, Config()
    errors += config.update(values)
    errors += find_errors(config, values)
    if errors:
        raise UserError(format_errors(errors))
    return config


def format_errors(errors: list[str]) -> str:
    """Format several error messages as one."""
    return "\n".join(["the config has errors:", *(f"  - {error}" for error in errors)])


def parse_overrides(overrides: list[str]) -> tuple[dict, list[str]]:
    """Parse `key=value` words. Returns the values and the error messages."""
    values, errors = {}, []
    words = [word for word in overrides if re.match(r"(--)?\w+=", word)]
    if len(words) < len(overrides):
        line = " ".join(overrides)
        meant = re.sub(r" *= *", "=", re.sub(r"(?<!\S)--(\w+) (?=[^-=])", r"\1=", line))
        errors.append(f"{line}: expected key=value" + (f"; write {meant}" if meant != line else ", such as lr=1e-3"))
    for word in words:
        key, _, text = word.removeprefix("--").partition("=")
        try:
            values[key] = parse_yaml(text)
        except ValueError:
            errors.append(f"{key}: {abbreviated(text)} is not a YAML value; quote it")
    return values, errors


def read_yaml(path: str | Path, chain: tuple[Path, ...] = ()) -> dict:
    """Read the mapping in a YAML file, on top of the one in the file that its `base` key names (relative to the file).

    Args:
        chain: the files whose `base` keys led here.
    """
    path = Path(path)
    if chain and os.path.realpath(path) in map(os.path.realpath, chain):
        raise UserError(f"{path}: circular base keys: {' -> '.join(map(str, (*chain, path)))}; remove one")
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_yaml(text)
    except OSError as error:
        by = f", which base in {chain[-1]} names" if chain else ""
        raise UserError(f"{path}: cannot read the config{by}: {error.strerror}; args/ has ready-made ones") from error
    except ValueError as error:
        raise UserError(f"{path}: the config is not valid YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of 'key: value', got {type(values).__name__}")
    lines = {}  # of each key
    for key, _ in yaml.compose(text, Loader=yaml.SafeLoader).value:
        if (first := lines.setdefault(str(key.value), key.start_mark.line + 1)) != key.start_mark.line + 1:
            where = f"in lines {first} and {key.start_mark.line + 1}"
            raise UserError(f"{path}: {abbreviated(key.value)} is given twice, {where}; remove one of them")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base or has_lone_surrogate(base):
        raise UserError(f"{path}: base: expected the path of a YAML file from this one, got {abbreviated(base)}")
    return read_yaml(path.parent / expand(base), (*chain, path)) | values


def parse_yaml(text: str):
    """Parse YAML of plain types. Raises ValueError with the reason."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # PyYAML raises all kinds for values such as 2001-99-99, !!bool a or [[[[...
        raise ValueError(f"a value cannot be read: {error!s:.200}") from error


def find_errors(config: Config, given: dict) -> list[str]:
    """Find contradictions, missing keys and missing files in a config whose values are valid by themselves.

    Args:
        given: the values before they were checked; an invalid one is not reported as missing.
    """
    errors = []
    methods = sorted({name for name in OFFICIAL_METHODS if getattr(config, name)} | ({config.method} - {None}))
    if len(methods) > 1:
        errors.append(f"method: two methods at once ({', '.join(methods)}); choose one")
    elif not methods and given.get("method") in (None, "None"):
        errors.append(f"method: none chosen; choose one of {', '.join(METHODS)}")
    if not config.only_eval and config.resume >= config.num_epochs:
        errors.append(f"resume: {config.resume} leaves nothing of num_epochs {config.num_epochs}; raise num_epochs")
    for key in ("lora_rank", "compile"):
        if getattr(config, key) and config.parallel == "fsdp":
            errors.append(f"parallel: fsdp cannot be combined with {key}; use ddp")
    if config.compile and config.gradient_checkpointing:
        errors.append("gradient_checkpointing: cannot be combined with compile; disable one of them")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if config.compile and not config.only_eval and not shutil.which(compiler):
        errors.append(f"compile: no C++ compiler {compiler}; install it, set CXX to another, or set compile: False")
    kind, other = ("run with only_eval", "load_model_path") if config.only_eval else ("run", "train_path")
    nothing = (None, "", "None")
    errors += [
        f"{key}: missing; every {kind} needs it"
        for key in ("name", "val_path", other)
        if any(value in nothing for value in listed(given.get(key)) or nothing)
    ]
    name = config.name
    if name and (Path(name).name != name or name == ".." or len(name.encode()) > 255):
        rule = "expected a plain directory name of at most 255 bytes"
        errors.append(f"name: {rule}, got {abbreviated(name)}; directories belong in save_path")
    errors += missing_packages(config)
    paths = [(key, path) for key in PATH_KEYS for path in listed(getattr(config, key))]
    return errors + [error for key, path in paths if (error := path_error(key, path, config))]


def missing_packages(config: Config) -> list[str]:
    """Return an error message for each optional package that a training run needs and that is not installed."""
    needs = {  # key -> (package, the value that needs none)
        "logger": (config.logger, "none"),
        "lora_rank": (config.lora_rank and "peft", None),
        "analyze": (config.analyze and "matplotlib", False),
    }
    return [
        f"{key}: the package {package} is not installed; pip install {package}, or set {key}: {off}"
        for key, (package, off) in needs.items()
        if package != off and not config.only_eval and importlib.util.find_spec(package) is None
    ]


REMEDIES = {  # for paths that do not exist
    "model_id": "give a hub name or an existing directory",
    "load_model_path": "train that run first, or give another checkpoint",
    "train_path": "preprocessing/ makes the data files (see data/README.md)",
    "val_path": "preprocessing/ makes the data files (see data/README.md)",
}
SUPERSEDED = ("load_model_path", "model_id")  # by the run's own checkpoint, unless it has lora_rank
PATH_KEYS = ("save_path", "data_cache", *REMEDIES)


def path_error(key: str, value: str | None, config: Config) -> str | None:
    """Return an error message if a path of a key is a placeholder, a malformed hub path or a missing file, or None."""
    if not value or (key == "train_path" and config.only_eval):
        return None
    if "YOUR_" in value:
        return f"{key}: {value!r} is a placeholder; put your own path there"
    if key in SPLIT_PATHS and value.startswith(HUB):
        form = HUB_PATH.fullmatch(value)
        if not form:
            return f"{key}: expected {HUB_FORM}, got {value!r}"
        if key == "val_path" and not form["split"]:
            return f"{key}: {value!r} names no split; add one, such as {value}:validation"
        return None
    try:
        os.stat(Path(value, config.name or "") if key == "save_path" else value)
    except (FileNotFoundError, NotADirectoryError):
        if key in SUPERSEDED and has_own_checkpoint(config):
            return None  # needed only if no such checkpoint is complete, which shows when they are read
        if "$" in value:
            return f"{key}: {value!r} does not exist, and names a variable that is not set"
        on_hub = (key == "model_id" and value[0] not in "./") or (key == "load_model_path" and is_hub_name(value))
        where = "" if os.path.isabs(value) else f" in {os.getcwd()}"
        return f"{key}: {value!r} does not exist{where}; {REMEDIES[key]}" if key in REMEDIES and not on_hub else None
    except OSError as error:  # a name that is too long, a directory without permission
        return f"{key}: {abbreviated(value)} cannot be used: {error.strerror}; choose another path"
    return None


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist can be meant as OWNER/NAME on the Hugging Face hub."""
    named = re.fullmatch(r"([\w-][\w.-]*)/(?!best$|last$)[\w-][\w.-]*", path, re.ASCII)
    return named is not None and not os.path.exists(named[1])


def has_own_checkpoint(config: Config) -> bool:
    """Whether a run would resume from what its directory holds, without what it began from."""
    if not config.name or config.only_eval or config.debug or config.lora_rank:
        return False
    with suppress(OSError):  # a name that is too long, which is reported by itself
        return any(config.run_directory.glob("checkpoint_*"))
    return False


def abbreviated(value) -> str:
    """Format a value for a message, shortened however large, deep or often repeated its parts are."""
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
