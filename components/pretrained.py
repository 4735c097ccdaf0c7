"""Loading a model and its tokenizer from a hub name, a folder, a checkpoint or an official file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file

from components.distributed import Processes
from components.errors import reason
from components.export import read_description
from components.tokenization import NO_ROW
from config import Config, UserError
from curriculum import ALL_STEPS, END, LATENT, METHODS, PAUSE, START, evaluation_stage, num_placeholders

PREFIX = "base_causallm."  # of the names in official files of a Coconut module
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of names in files
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")  # GPT-2's causal mask, which files of old versions hold


@dataclass
class Pretrained:
    """A language model with the rows its method needs, its tokenizer, and its coconut.json ({} if it has none).

    source: the config key and the folder or hub name that the architecture and tokenizer are from, for messages.
    """

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: dict
    source: str

    def token_id(self, token: str) -> int:
        """Return the id of an added token."""
        return self.tokenizer.convert_tokens_to_ids(token)

    def sequence_tokens(self, method: str) -> dict[str, int | bool]:
        """Return the keyword arguments by which the data set functions of dataset.py make a method's sequences."""
        placeholder = PAUSE if METHODS[method].placeholder == "pause" else LATENT
        ids = {"start_id": START, "latent_id": placeholder, "end_id": END}
        ids = {name: self.token_id(token) for name, token in ids.items()}
        return ids | {"no_special_marker": not METHODS[method].markers}


def load_pretrained(config: Config, load_path: str | Path | None) -> Pretrained:
    """Load load_path, or what the config's model_id names, or build the latter from scratch; weights are float32.

    A checkpoint folder brings its architecture and tokenizer; an official file brings weights for model_id's.
    The markers are added to the tokenizer, and for methods that use them the model gets the rows it lacks.
    Raises UserError for whatever cannot be loaded.
    """
    folder, key, is_checkpoint = model_source(config, load_path)
    check_not_sharded(Path(load_path or folder), "load_model_path" if load_path else key)
    with loading(folder, key):
        if not os.path.isdir(folder):
            print(
                f"{key}: loading {folder} from the Hugging Face hub or its cache; without a network it takes half a "
                "minute until that fails, and no time with HF_HUB_OFFLINE=1",
                flush=True,
            )
            cached_file(folder, "config.json")  # raises at the first file that cannot be had, not after several
        if find_adapter_config_file(folder):
            merge = "with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
            raise UserError(f"{key}: {folder!r} holds LoRA or other adapters, not a whole model; merge them {merge}")
        tokenizer = load_tokenizer(folder, config)
        lm = load_model(folder, config, is_checkpoint)
        description = read_description(folder, revision="main")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_id: the tokenizer of {folder!r} has no eos token, which must end every answer")
    known = {token for token in (START, END, LATENT, PAUSE) if token in tokenizer.get_vocab()}
    known = set(description.get("token_ids", known))
    own_tokens = len(tokenizer)
    add_tokens(tokenizer, config.method)
    if load_path and not is_checkpoint:
        own_rows, is_coconut = load_official_file(lm, tokenizer, Path(load_path), own_tokens)
        known |= own_rows
        if is_coconut:
            check_coconut_file(config, str(load_path), known)
    if METHODS[config.method].markers:
        add_rows(lm, tokenizer, known, config.new_token_init)
    source = f"{key}: {folder!r}"
    check_special_tokens(tokenizer, len(lm.get_input_embeddings().weight), source)
    return Pretrained(lm, tokenizer, description, source)


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, source: str) -> None:
    """Raise UserError if the model has no embedding, of `rows`, for eos or for the token that pads batches."""
    for name, token in {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}.items():
        if token >= rows:
            text = tokenizer.convert_ids_to_tokens(token)
            raise UserError(f"{source}: its {name} token {text!r} has id {token}, {NO_ROW.format(rows=rows)}")


def load_on_rank0(config: Config, load_path: str | Path | None, processes: Processes) -> Pretrained:
    """Load like `load_pretrained` with the weights on rank 0 only; elsewhere the model is on the meta device.

    Called by every rank; a UserError of one is raised on all.
    """
    loaded = []

    def load() -> tuple[int, bool]:
        loaded.append(load_pretrained(config, load_path))
        embedding, head = loaded[0].lm.get_input_embeddings(), loaded[0].lm.get_output_embeddings()
        return len(embedding.weight), head.weight is embedding.weight

    rows, tied = processes.run_on_rank0(load)
    return processes.run_on_all_ranks(lambda: loaded[0] if loaded else build_on_meta(config, load_path, rows, tied))


def build_on_meta(config: Config, load_path: str | Path | None, rows: int, tied: bool) -> Pretrained:
    """Build what `load_pretrained` returns with a model on the meta device, from its architecture alone.

    rows: of its embedding; tied: whether the head shares the embedding's weights.
    """
    folder, key, _ = model_source(config, load_path)
    trust = {"trust_remote_code": config.trust_remote_code}
    with loading(folder, key):
        tokenizer = load_tokenizer(folder, config)
        architecture = AutoConfig.from_pretrained(folder, **trust, tie_word_embeddings=tied)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(architecture, **trust).float()
        if len(lm.get_input_embeddings().weight) != rows:
            lm.resize_token_embeddings(rows, mean_resizing=False)
        description = read_description(folder, revision="main")
    add_tokens(tokenizer, config.method)
    return Pretrained(lm, tokenizer, description, f"{key}: {folder!r}")


def model_source(config: Config, load_path: str | Path | None) -> tuple[str, str, bool]:
    """Return the folder or hub name of the architecture, the config key that names it, and whether it is load_path."""
    is_checkpoint = bool(load_path) and Path(load_path).is_dir()
    return (str(load_path), "load_model_path", True) if is_checkpoint else (config.model_id, "model_id", False)


@contextmanager
def loading(folder: str, key: str) -> Iterator[None]:
    """Turn whatever fails while a model is loaded into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise all kinds for a missing, damaged or unreachable model
        why = reason(error)
        if "trust_remote_code" in str(error):
            why = "it has code of its own, which runs only with trust_remote_code: True; read that code first"
        elif not os.path.isdir(folder):
            why += f" Check the name and the network, or set {key} to a folder that holds the model"
        elif lacking := [name for name in ("config.json", "tokenizer_config.json") if not Path(folder, name).exists()]:
            why += f" The folder has no {' and no '.join(lacking)}"
        raise UserError(f"{key}: {folder!r} cannot be loaded: {why}") from error


def check_not_sharded(path: Path, key: str) -> None:
    """Raise UserError for a checkpoint of torch.distributed.checkpoint (DCP), or one of its files."""
    if any(part.suffix == ".distcp" for part in (path, *path.glob("*"))):
        folder = path.parent if path.is_file() else path
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE"
        raise UserError(
            f"{key}: {str(path)!r} is a sharded checkpoint of torch.distributed.checkpoint; convert it with {command}, "
            "and set load_model_path to a file of the model's state dict alone"
        )


def load_tokenizer(folder: str, config: Config) -> PreTrainedTokenizerBase:
    """Load and try the tokenizer of a folder or hub name: some damage to its files shows in use only."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    tokenizer([config.new_token_init, ""])
    return tokenizer


def load_model(folder: str, config: Config, is_checkpoint: bool) -> PreTrainedModel:
    """Load a causal language model in float32, with random weights if the config says from_scratch."""
    trust = {"trust_remote_code": config.trust_remote_code}
    if config.from_scratch and not is_checkpoint:
        architecture = AutoConfig.from_pretrained(folder, **trust)
        return AutoModelForCausalLM.from_config(architecture, **trust).float()
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **trust}
    lm, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    unexpected = info["unexpected_keys"] if is_checkpoint else []  # hub models may have unused heads
    what = f"{'load_model_path' if is_checkpoint else 'model_id'}: {folder!r}"
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]  # a tuple since 5
    check_names(what, info["missing_keys"], unexpected, mismatched)
    if lm.get_input_embeddings().weight is not lm.get_output_embeddings().weight:
        lm.config.tie_word_embeddings = False  # else a new row would tie what the files hold apart
    return lm


def load_official_file(lm: PreTrainedModel, tokenizer, path: Path, own_tokens: int) -> tuple[set[str], bool]:
    """Load an official checkpoint file into the model.

    Returns the added tokens that the file has rows for, and whether a Coconut module saved it.

    own_tokens: the tokenizer's size without the added tokens; every file must have rows for these. A file of a Coconut
    module has the markers' rows; in a plain one only rows beyond the model's own can be theirs, since some models
    have more rows than tokens.
    """
    state, is_coconut = load_state_file(path)
    first = 0 if is_coconut else len(lm.get_input_embeddings().weight)
    load_state(lm, state, str(path), own_tokens)
    rows = len(lm.get_input_embeddings().weight)
    known = {t for t in (START, END, LATENT, PAUSE) if first <= tokenizer.get_vocab().get(t, rows) < rows}
    return known, is_coconut


def check_coconut_file(config: Config, path: str, known: set[str]) -> None:
    """Warn where an official Coconut file is used without thoughts, or at a stage that nobody chose.

    Raises UserError for the evaluation of a method whose tokens, all but those in `known`, the file has no rows for.
    """
    what = f"load_model_path: {path!r} is an official Coconut file"
    missing = [token for token in METHODS[config.method].tokens if token not in known]
    if config.only_eval and missing:
        raise UserError(f"{what}, without {', '.join(missing)}; method {config.method} must be trained, or set coconut")
    if not METHODS[config.method].markers:
        print(f"warning: {what}, but method {config.method} uses it without thoughts", flush=True)
    elif config.only_eval and not config.resume:
        stage = evaluation_stage(config, {})
        thoughts = num_placeholders(stage, ALL_STEPS, config, training=False)
        remedy = "for one that was saved after N epochs, set resume to N - 1"
        print(f"warning: {what}, which holds no stage: stage {stage}, {thoughts} thoughts; {remedy}", flush=True)


def load_state_file(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Read the weights in an official file, by the language model's own names, and whether a Coconut module saved them.

    The official Coconut module prefixes every name with base_causallm. and holds the input embedding a second time.
    Files are read with weights_only, so one that contains code is refused.
    """
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise UserError(f"load_model_path: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"load_model_path: {str(path)!r} is not a state dict, a mapping from names to tensors")
    state = {".".join(part for part in name.split(".") if part not in WRAPPERS): t for name, t in state.items()}
    if adapters := [name for name in state if ".lora_" in name]:
        raise UserError(f"load_model_path: {str(path)!r} holds LoRA adapters ({name_some(adapters)}); merge them first")
    is_coconut = any(name.startswith(PREFIX) for name in state)
    if is_coconut:
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return state, is_coconut


def read_tensors(path: Path):
    """Read a torch file of tensors and plain values. Raises ValueError for any other; none of its code is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises all kinds for a file that is damaged or not a pickle
        cause = error.__context__ or error  # torch wraps the unpickler's in advice to execute the code
        raise ValueError(
            f"{str(path)!r} is damaged or not a file of plain weights (a torch state dict); other pickles are refused, "
            f"since they can execute code. {reason(cause)}"
        ) from error


def load_state(lm: PreTrainedModel, state: dict[str, Tensor], path: str, own_tokens: int) -> None:
    """Load a state dict into the model, whose vocabulary is resized to its number of rows; every name must fit."""
    table = lm.get_input_embeddings()
    name = next(name for name, value in lm.named_parameters() if value is table.weight)
    rows = len(state[name]) if name in state and state[name].ndim == 2 else len(table.weight)
    if rows < min(own_tokens, len(table.weight)):
        raise UserError(f"load_model_path: {path!r} has {rows} rows in {name}, but the tokenizer {own_tokens} tokens")
    if rows != len(table.weight):
        lm.resize_token_embeddings(rows, mean_resizing=False)
    own, loaded = lm.state_dict(), {}
    for name in (name for name in state if name in own):  # a tied weight may come under either name, or both
        first = loaded.setdefault(own[name].data_ptr(), name)
        if first != name and not torch.equal(state[first], state[name]):
            remedy = "give a model_id with tie_word_embeddings: false in its config.json"
            raise UserError(f"load_model_path: {path!r}: {first} and {name} differ, but the model ties them; {remedy}")
    missing = [name for name, value in own.items() if value.data_ptr() not in loaded]
    mismatched = [name for name in state if name in own and state[name].shape != own[name].shape]
    check_names(f"load_model_path: {path!r}", missing, [name for name in state if name not in own], mismatched)
    lm.load_state_dict(state, strict=False)


def check_names(what: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> None:
    """Raise UserError if weights do not fit a model: those that it lacks, that it has no use for, of other shapes."""
    unexpected = [name for name in unexpected if not name.endswith(OLD_BUFFERS)]
    sides = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    if found := [f"{side}: {name_some(sorted(names))}" for side, names in sides.items() if names]:
        raise UserError(f"{what}: the weights do not fit the model; {'; '.join(found)}")


def name_some(names: list) -> str:
    """Return the first few names of a list, and how many there are."""
    return ", ".join(str(name) for name in names[:4]) + (f" ... ({len(names)})" if len(names) > 4 else "")


def add_tokens(tokenizer: PreTrainedTokenizerBase, method: str) -> None:
    """Add the markers, and <|pause|> for the methods that use it; the pad token is eos where there is none."""
    pause = [PAUSE] if PAUSE in METHODS[method].tokens else []
    tokenizer.add_tokens([START, END, LATENT, *pause])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def add_rows(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: set[str], init: str) -> None:
    """Give the model rows (embedding and head) for the added tokens that it does not know.

    A new row is a copy of the row of the token `init`, or the mean row where `init` is not one token. Other rows stay.
    """
    old = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    added = {token: tokenizer.get_vocab().get(token) for token in (START, END, LATENT, PAUSE)}
    new = [id for token, id in added.items() if id is not None and (token not in known or id >= old)]
    source = tokenizer(init, add_special_tokens=False)["input_ids"]
    one = len(source) == 1 and source[0] not in (tokenizer.unk_token_id, *new)
    with torch.no_grad():
        for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            row = table.weight[source[0]] if one else table.weight[:old].mean(0)  # (hidden,)
            table.weight[new] = row.expand(len(new), -1).clone()  # (new, hidden)
