"""From a hub name, a folder, one of our checkpoints or an official file to a model and its tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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

from coconut import Coconut
from components.distributed import Processes
from components.export import DESCRIPTION
from config import Config, UserError, abbreviated
from curriculum import END, LATENT, METHODS, PAUSE, START

PREFIX = "base_causallm."  # of a language model's names in official files of a Coconut module
NO_TOKENS = (-1, -1, -1)  # in place of the markers' ids


@dataclass
class Pretrained:
    """A language model ready for a method, its tokenizer, and what its checkpoint says of itself (or {})."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: dict

    def token_id(self, token: str) -> int:
        """The id of an added token."""
        return self.tokenizer.convert_tokens_to_ids(token)

    def prompt_ids(self, method: str) -> list[int]:
        """The ids of the start marker, the placeholder and the end marker in a method's prompts."""
        placeholder = PAUSE if METHODS[method].placeholder == "pause" else LATENT
        return [self.token_id(token) for token in (START, placeholder, END)]

    def coconut(self) -> Coconut:
        """The model as a Coconut module."""
        ids = (self.token_id(token) for token in (LATENT, START, END))
        return Coconut(self.lm, *ids, self.tokenizer.eos_token_id)


def load_pretrained(config: Config, load_path: str | Path | None) -> Pretrained:
    """Loads load_path, or what the config's model_id names, or builds the latter from scratch.

    A checkpoint directory brings its architecture and tokenizer; an official file brings weights for model_id's.
    The markers are added to the tokenizer, and for methods that use them the model gets the rows it lacks. Weights are
    float32. Raises UserError for whatever cannot be loaded.
    """
    folder, key, is_checkpoint = source(config, load_path)
    with loading(folder, key):
        tokenizer = load_tokenizer(folder, config)
        lm = load_model(folder, config, is_checkpoint)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_id: the tokenizer of {folder!r} has no eos token, which ends every answer")
    known = {token for token in (START, END, LATENT, PAUSE) if token in tokenizer.get_vocab()}
    description = read_description(folder)
    known = set(description.get("token_ids", known))
    own_tokens = len(tokenizer)
    add_tokens(tokenizer, config.method)
    if load_path and not is_checkpoint:
        known |= load_official_file(lm, tokenizer, Path(load_path), own_tokens)
    check_model(lm, tokenizer, key)
    if METHODS[config.method].markers:
        add_rows(lm, tokenizer, known, config.new_token_init)
    return Pretrained(lm, tokenizer, description)


def load_on_rank0(config: Config, load_path: str | Path | None, processes: Processes) -> Pretrained:
    """What `load_pretrained` returns, but for the weights, which the main process alone reads: the model of the others
    is on the meta device, where it takes no memory. Every process calls it, and all raise the UserError of one."""
    mine = []

    def load() -> tuple[int, bool]:
        mine.append(load_pretrained(config, load_path))
        embedding, head = mine[0].lm.get_input_embeddings(), mine[0].lm.get_output_embeddings()
        return len(embedding.weight), head.weight is embedding.weight

    rows, tied = processes.run_on_rank0(load)
    return processes.run_on_all_ranks(lambda: mine[0] if mine else build_on_meta(config, load_path, rows, tied))


def build_on_meta(config: Config, load_path: str | Path | None, rows: int, tied: bool) -> Pretrained:
    """The same as `load_pretrained` returns with a model on the meta device, of which it reads no more than the
    architecture. rows: of its embedding; tied: whether the head has the same weights."""
    folder, key, _ = source(config, load_path)
    trust = {"trust_remote_code": config.trust_remote_code}
    with loading(folder, key):
        tokenizer = load_tokenizer(folder, config)
        architecture = AutoConfig.from_pretrained(folder, **trust, tie_word_embeddings=tied)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(architecture, **trust).float()
        if len(lm.get_input_embeddings().weight) != rows:
            lm.resize_token_embeddings(rows, mean_resizing=False)
    add_tokens(tokenizer, config.method)
    return Pretrained(lm, tokenizer, read_description(folder))


def source(config: Config, load_path: str | Path | None) -> tuple[str, str, bool]:
    """The folder or hub name of the architecture, the config key that names it, and whether it is a checkpoint's."""
    is_checkpoint = bool(load_path) and Path(load_path).is_dir()
    return (str(load_path), "load_model_path", True) if is_checkpoint else (config.model_id, "model_id", False)


@contextmanager
def loading(folder: str, key: str) -> Iterator[None]:
    """Turns what goes wrong while a model is loaded into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise all kinds for a missing, damaged or unreachable model
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            reason = "it has code of its own, which runs only with trust_remote_code: True; read it before you set that"
        raise UserError(f"{key}: {folder!r} cannot be loaded: {reason}") from error


def load_tokenizer(folder: str, config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, tried: some of what is wrong with its files shows only in use."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    tokenizer([config.new_token_init, ""])
    return tokenizer


def load_model(folder: str, config: Config, is_checkpoint: bool) -> PreTrainedModel:
    """The causal language model of a folder or hub name in float32; from_scratch asks for random weights."""
    trust = {"trust_remote_code": config.trust_remote_code}
    if config.from_scratch and not is_checkpoint:
        architecture = AutoConfig.from_pretrained(folder, **trust)
        return AutoModelForCausalLM.from_config(architecture, **trust).float()
    lm, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **trust)
    lost = [*info["missing_keys"], *info["mismatched_keys"]]
    if is_checkpoint:  # must fit exactly; hub models may bring heads that are not used
        lost += info["unexpected_keys"]
    if lost:
        key = "load_model_path" if is_checkpoint else "model_id"
        raise UserError(f"{key}: {folder!r}: weights are missing or unexpected: {name_some(lost)}")
    return lm


@torch.no_grad()
def check_model(lm: PreTrainedModel, tokenizer, key: str = "model_id") -> None:
    """Raises UserError for a model that Coconut would not compute as it is.

    Padded and in several passes with a cache it must give the same logits as alone and at once. That leaves out
    recurrent models, positions that count padding, and logits that are more than the head of the last hidden state
    (scaled or capped, as in Gemma 2, Granite and Cohere).
    """
    was_training = lm.training
    model = Coconut(lm, *NO_TOKENS, tokenizer.eos_token_id).eval()
    input_ids = torch.arange(6)[None] % len(lm.get_input_embeddings().weight)  # (1, 6)
    # Padded on the left as in training, and on the right before three tokens are decoded.
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]])  # (2, 8)
    padded = torch.full_like(attention_mask, tokenizer.eos_token_id)  # (2, 8)
    padded[attention_mask == 1] = input_ids.repeat(1, 2)[0]
    complaint = f"{key}: {type(lm).__name__} cannot take thoughts"
    try:
        expected = lm(input_ids=input_ids, use_cache=False).logits  # (1, 6, vocabulary)
        found = model(padded, attention_mask, min_passes=4).logits[attention_mask == 1]  # (12, vocabulary)
    except Exception as error:  # a model's code may fail on a mask or a cache that it was not written for
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{complaint}: {reason}") from error
    expected = expected.expand(2, -1, -1).flatten(0, 1)  # (12, vocabulary)
    if not torch.allclose(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item()):
        head = "its logits are not its head of the last hidden state"
        raise UserError(f"{complaint}: {head}, or padding or a key-value cache changes them")
    lm.train(was_training)


def load_official_file(lm: PreTrainedModel, tokenizer, path: Path, own_tokens: int) -> set[str]:
    """Loads an official checkpoint file into the model and returns the added tokens that the file has rows for.

    own_tokens: the tokenizer's size without the added tokens, for which every file must have rows. A file of a Coconut
    module has the markers' rows; in a plain one only rows beyond the model's own can be theirs, since some models
    have more rows than tokens.
    """
    state, is_coconut = load_state_file(path)
    first = 0 if is_coconut else len(lm.get_input_embeddings().weight)
    load_state(lm, state, str(path), own_tokens)
    rows = len(lm.get_input_embeddings().weight)
    return {t for t in (START, END, LATENT, PAUSE) if first <= tokenizer.get_vocab().get(t, rows) < rows}


def load_state_file(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The weights in an official file, under the language model's own names, and whether a Coconut module wrote them.

    The official Coconut module puts base_causallm. before every name and holds the input embedding once more. Files
    are read with weights_only, so that a file with code in it is refused.
    """
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise UserError(f"load_model_path: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"load_model_path: {str(path)!r} holds no state dict, a mapping from names to tensors")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if adapters := [name for name in state if ".lora_" in name]:
        raise UserError(f"load_model_path: {str(path)!r} holds LoRA adapters ({name_some(adapters)}); merge them first")
    is_coconut = any(name.startswith(PREFIX) for name in state)
    if is_coconut:
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return state, is_coconut


def read_tensors(path: Path, **options):
    """What a file of torch holds: tensors and plain values. Raises ValueError for any other; none of its code runs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch raises all kinds for a file that is damaged or no pickle
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{str(path)!r} is no file of plain weights (a torch state dict), or it is damaged. Other pickles are "
            f"refused, since they can run code. {reason:.200}"
        ) from error


def load_state(lm: PreTrainedModel, state: dict[str, Tensor], path: str, own_tokens: int) -> None:
    """Loads a state dict into the model, whose vocabulary takes on its number of rows; every name must fit."""
    table = lm.get_input_embeddings()
    name = next(name for name, value in lm.named_parameters() if value is table.weight)
    rows = len(state[name]) if name in state and state[name].ndim == 2 else len(table.weight)
    if rows < min(own_tokens, len(table.weight)):
        raise UserError(f"load_model_path: {path!r} has {rows} rows in {name}, but the tokenizer {own_tokens} tokens")
    try:
        if rows != len(table.weight):
            lm.resize_token_embeddings(rows, mean_resizing=False)
        result = lm.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"load_model_path: {path!r} does not fit the model: {error}") from error
    own = lm.state_dict()
    loaded = {own[name].data_ptr() for name in state if name in own}  # a tied weight is there under its other name
    lost = [name for name in result.missing_keys if own[name].data_ptr() not in loaded] + result.unexpected_keys
    if lost:
        raise UserError(f"load_model_path: {path!r} does not fit the model; missing or unexpected: {name_some(lost)}")


def name_some(names: list) -> str:
    """The first few names of a list, and how many there are."""
    return ", ".join(str(name) for name in names[:4]) + (f" ... ({len(names)})" if len(names) > 4 else "")


def read_description(folder: str | Path) -> dict:
    """The coconut.json of a checkpoint directory; {} for other models."""
    path = Path(folder, DESCRIPTION)
    if not os.path.isfile(path):  # False, and no error, for a name that no file can have
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        check_description(description)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"load_model_path: {str(path)!r} cannot be read: {error}") from error
    return description


def check_description(description) -> None:
    """Raises ValueError unless a coconut.json holds what is asked of it, each of its type."""
    if not isinstance(description, dict):
        raise ValueError(f"it must be a mapping, not {abbreviated(description)}")
    for key, kind in {"token_ids": dict, "stage": int, "improved": bool}.items():
        if key in description and type(description[key]) is not kind:
            raise ValueError(f"{key} must be a {kind.__name__}, not {abbreviated(description[key])}")
    if description.get("stage", 0) < -1:  # -1: saved before the first step
        raise ValueError(f"stage must be at least -1, not {description['stage']}")


def add_tokens(tokenizer: PreTrainedTokenizerBase, method: str) -> None:
    """Adds the markers, and <|pause|> for the methods that use it; the pad token is eos where there is none."""
    pause = [PAUSE] if PAUSE in METHODS[method].tokens else []
    tokenizer.add_tokens([START, END, LATENT, *pause])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def add_rows(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: set[str], init: str) -> None:
    """Gives the model rows (embedding and head) for the added tokens that are not `known` to it.

    A new row is the row of the token `init`, or the mean row where `init` is not one token. Other rows stay.
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
