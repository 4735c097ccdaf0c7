"""Reading problems from a JSON list, JSON lines, Parquet or the hub, and what each of them must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow
from pyarrow import parquet

from config import HUB, UserError, abbreviated, has_lone_surrogate
from curriculum import END, LATENT, PAUSE, START

FIELDS = ("question", "answer", "steps")
SHAPE = '{"question": "...", "answer": "...", "steps": ["...", ...]}'


def read_problems(path: str, max_size: int | None = None) -> list[dict]:
    """The first max_size problems of a source: dicts with question (str), answer (str) and steps (list of str).

    path: a file (its content tells the format) or hub:OWNER/NAME[:SPLIT]. What else the problems hold is left out.
    Raises UserError that names the source, the problem's index (from 0) and the field.
    """
    problems = []
    for index, problem in enumerate(islice(read_source(path), max_size)):
        if complaint := validate_problem(problem):
            raise UserError(f"{path}: problem {index}: {complaint}; expected {SHAPE}")
        problems.append({name: problem[name] for name in FIELDS})
    if not problems:
        raise UserError(f"{path}: expected a list of problems {SHAPE}, found an empty list")
    return problems


def read_source(path: str) -> Iterable:
    """The problems of a source as they are there."""
    if path.startswith(HUB):
        table = hub_dataset(path).with_format("arrow")
        present = [name for name in FIELDS if name in table.column_names]
        return table_rows(table.select_columns(present).iter(batch_size=1000))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the data: {error.strerror}") from error
    if content.startswith(b"PAR1"):
        return parquet_rows(content, path)
    try:
        return json_rows(content.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def json_rows(text: str, path: str) -> Iterable:
    """The problems of a JSON list, or of JSON lines."""
    try:
        problems = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", None) == "Extra data" and text.lstrip().startswith("{"):
            return json_lines(text, path)
        raise UserError(f"{path}: not valid JSON: {error}; expected a list of {SHAPE}") from error
    if isinstance(problems, dict) and "question" in problems:  # JSON lines, of which there is one
        return [problems]
    if not isinstance(problems, list):
        raise UserError(f"{path}: expected a list of problems {SHAPE}, found {type(problems).__name__}")
    return problems


def json_lines(text: str, path: str) -> Iterator:
    """The problems of JSON lines; empty lines are passed over."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for index, (number, line) in enumerate(lines):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if hasattr(error, "msg") else error
            raise UserError(f"{path}: problem {index} (line {number}): not valid JSON: {reason}") from error


def parquet_rows(content: bytes, path: str) -> Iterator[dict]:
    """The problems of a Parquet file."""
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        present = [name for name in FIELDS if name in file.schema_arrow.names]
        yield from table_rows(file.iter_batches(columns=present))
    except (OSError, pyarrow.ArrowException, ValueError, ArithmeticError) as error:  # also texts that are not UTF-8
        raise UserError(f"{path}: not a sound Parquet file: {error}") from error


def table_rows(tables: Iterable) -> Iterator[dict]:
    """The rows of Arrow tables; a string of lines in the column `steps` stands for the list of the lines."""
    for table in tables:
        for row in table.to_pylist():
            if isinstance(row.get("steps"), str):
                row["steps"] = row["steps"].splitlines()
            yield row


def hub_dataset(path: str):
    """The datasets.Dataset that hub:OWNER/NAME[:SPLIT] names; without SPLIT its train split."""
    import datasets  # slow to import

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the libraries raise all kinds for a data set that is missing or cannot be reached
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: cannot be loaded from the hub: {reason}; check name, split and network (HF_HUB_OFFLINE leaves "
            f"only what was downloaded before), or give a file"
        ) from error


def content_digest(path: str) -> str:
    """A checksum of all that a source holds. Raises UserError where it cannot be read."""
    files = [file["filename"] for file in hub_dataset(path).cache_files] if path.startswith(HUB) else [path]
    digest = hashlib.sha256()
    for name in files:
        try:
            with open(name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot read the data: {error.strerror}") from error
    return digest.hexdigest()


def validate_problem(problem) -> str | None:
    """What is wrong with one problem of a source, or None."""
    if not isinstance(problem, dict):
        return f"is no object but {type(problem).__name__}"
    for name in FIELDS:
        if name not in problem:
            return f'has no "{name}"'
    if not isinstance(problem["steps"], list):
        return f'"steps" is no list but {abbreviated(problem["steps"])}'
    texts = {"question": problem["question"], "answer": problem["answer"]}
    texts |= {f"steps[{i}]": step for i, step in enumerate(problem["steps"])}
    for name, text in texts.items():
        if not isinstance(text, str):
            return f'"{name}" is no string but {abbreviated(text)}'
        if has_lone_surrogate(text):
            return f'"{name}" holds half a surrogate pair, which is no character'
        if "<|" in text and (marker := next((m for m in (START, END, LATENT, PAUSE) if m in text), None)):
            return f'"{name}" holds {marker}, which only the curriculum may insert'
    return None if problem["question"].strip() else '"question" is empty'
