"""Shared by the preprocessing scripts: data folder, reading, atomic writing, tokenizers, error messages."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


class DataError(ValueError):
    """An error for the user: the message says what is wrong, where, and how to fix it."""


def read_text(path: Path, remedy: str) -> str:
    """Read a UTF-8 file; raise DataError, ending with `remedy`, if that fails."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.\n{remedy}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        utf16 = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        what = "the file is UTF-16," if utf16 else f"byte 0x{error.object[error.start]:02x} is"
        raise DataError(f"{path}, line {line}: {what} not UTF-8.\n{remedy}") from error


def read_json(path: Path, remedy: str) -> dict | list:
    """Read a JSON file; raise DataError, ending with `remedy`, if that fails."""
    try:
        return json.loads(read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: invalid or incomplete JSON: {error}.\n{remedy}") from error


def write_json(path: Path, content: dict | list) -> None:
    """Write compact JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(content, separators=(",", ":")), encoding="ascii")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a word-level tokenizer with these words, the answer mark and the special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*words, "### ", "<|unknown|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+\s?"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|unknown|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; report a user's error briefly and exit with code 2."""
    try:
        main()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
