"""What the preprocessing scripts share: the data folder, reading, atomic writing, tokenizers, clear errors."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


class DataError(ValueError):
    """A file or an argument that the user has to change; the message says what, where and the remedy."""


def read_text(path: Path, remedy: str) -> str:
    """The text of a UTF-8 file; DataError, ending with `remedy`, where it cannot be read or decoded."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.\n{remedy}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8.\n{remedy}") from error


def read_json(path: Path, remedy: str) -> dict | list:
    """The content of a JSON file; DataError, ending with `remedy`, where it is unreadable or cut off."""
    try:
        return json.loads(read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not complete JSON: {error}.\n{remedy}") from error


def write_json(path: Path, content: dict | list) -> None:
    """Write compact JSON beside `path` and move it there: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(content, separators=(",", ":")), encoding="ascii")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """Writes a tokenizer whose tokens are these words, the answer's mark and the special ones."""
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
    """Call `main`; what the user has to mend becomes a short message and exit code 2."""
    try:
        main()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
