"""Read and validate problems from a JSON list, JSON lines, Parquet or the Hugging Face hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path

import pyarrow
from pyarrow import parquet

from components.errors import reason
from config import FIELDS, HUB, HUB_FORM, HUB_PATH, UserError, abbreviated, has_lone_surrogate, listed
from curriculum import END, LATENT, PAUSE, START

GZIP = b"\x1f\x8b"  # first bytes of such a file
SHAPE = '{{"{question}": "...", "{answer}": "...", "{steps}": ["...", ...]}}'


def read_problems(
    paths: str | list[str], max_size: int | None = None, need_steps: bool = True, columns: dict[str, str] | None = None
) -> list[dict]:
    """Read the first max_size problems of one or several sources.

    Args:
        paths: files, whose content tells their format, gzipped or not, or data sets of the hub (HUB_FORM).
        max_size: None reads all.
        need_steps: False takes problems without the field too; they get no steps.
        columns: the names of FIELDS in the sources where they differ.

    Returns:
        Dicts with question (str), answer (str) and steps (list of str); other fields are dropped.

    Raises:
        UserError: names the source, the problem's index (from 0) and the field.
    """
    return list(islice(chain.from_iterable(checked(path, need_steps, columns) for path in listed(paths)), max_size))


def checked(path: str, need_steps: bool, columns: dict[str, str] | None) -> Iterator[dict]:
    """Yield the problems of one source; see `read_problems`."""
    names, default, index = name_fields(columns), {} if need_steps else {"steps": []}, -1
    for index, problem in enumerate(read_source(path, columns)):
        if isinstance(problem, dict):
            problem = default | {field: problem[name] for field, name in names.items() if name in problem}
        if error := problem_error(problem):
            raise UserError(f"{path}: problem {index}: {error}; a problem is {SHAPE.format(**names)}")
        yield problem
    if index < 0:
        raise UserError(f"{path}: expected a list of problems {SHAPE.format(**names)}, got an empty list")


def name_fields(columns: dict[str, str] | None) -> dict[str, str]:
    """Return the name in the data of each of FIELDS."""
    return {field: field for field in FIELDS} | (columns or {})


def locate_problem(paths: str | list[str], index: int, columns: dict[str, str] | None) -> str:
    """Name the file, and the index in it, of a problem of one or several sources."""
    for path in listed(paths)[:-1]:
        if index < (size := sum(1 for _ in read_source(path, columns))):
            return f"{path}: problem {index}"
        index -= size
    return f"{listed(paths)[-1]}: problem {index}"


def read_source(path: str, columns: dict[str, str] | None = None) -> Iterable:
    """Read the problems of a source without checking them or renaming their fields."""
    names = name_fields(columns)
    if path.startswith(HUB):
        table = hub_dataset(path).with_format("arrow")
        found = [name for name in names.values() if name in table.column_names]
        return table_rows(table.select_columns(found).iter(batch_size=1000), names)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the data: {error.strerror}") from error
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a valid gzip file: {error}") from error
    if content.startswith(b"PAR1"):
        return parquet_rows(content, path, names)
    try:
        return json_rows(content.decode("utf-8-sig"), path, names)
    except UnicodeDecodeError as error:
        kind = "UTF-16 text" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else f"other (byte {error.start})"
        raise UserError(f"{path}: not UTF-8 but {kind}; save the file as UTF-8") from error


def json_rows(text: str, path: str, names: dict[str, str]) -> Iterable:
    """Parse the problems of a JSON list, or of JSON lines."""
    try:
        problems = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", None) == "Extra data" and text.lstrip().startswith("{"):
            return json_lines(text, path)
        raise UserError(f"{path}: not valid JSON: {error}; expected a list of {SHAPE.format(**names)}") from error
    if isinstance(problems, dict) and names["question"] in problems:  # a single JSON line
        return [problems]
    if not isinstance(problems, list):
        raise UserError(f"{path}: expected a list of problems {SHAPE.format(**names)}, got {type(problems).__name__}")
    return problems


def json_lines(text: str, path: str) -> Iterator:
    """Parse the problems of JSON lines; empty lines are skipped."""
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for index, (number, line) in enumerate(lines):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            why = f"{error.msg} at column {error.colno}" if hasattr(error, "msg") else error
            raise UserError(f"{path}: problem {index} (line {number}): not valid JSON: {why}") from error


def parquet_rows(content: bytes, path: str, names: dict[str, str]) -> Iterator[dict]:
    """Read the problems of a Parquet file."""
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        found = [name for name in names.values() if name in file.schema_arrow.names]
        yield from table_rows(file.iter_batches(columns=found), names)
    except (OSError, pyarrow.ArrowException, ValueError, ArithmeticError) as error:  # also texts that are not UTF-8
        raise UserError(f"{path}: not a valid Parquet file: {error}") from error


def table_rows(tables: Iterable, names: dict[str, str]) -> Iterator[dict]:
    """Convert Arrow tables to dicts, one per row; where the column of steps holds a string, its lines are the steps."""
    steps = names["steps"]
    for table in tables:
        for row in table.to_pylist():
            if isinstance(row.get(steps), str):
                lines = row[steps].replace("\r\n", "\n").removesuffix("\n")
                row[steps] = lines.split("\n") if row[steps] else []
            yield row


def hub_dataset(path: str):
    """Load the datasets.Dataset of a hub path; SPLIT defaults to train."""
    import datasets  # slow to import

    form = HUB_PATH.fullmatch(path)
    if not form:
        raise UserError(f"{path}: expected {HUB_FORM}")
    try:
        return datasets.load_dataset(form["name"], form["config"], split=form["split"] or "train")
    except Exception as error:  # the libraries raise all kinds for a data set that is missing or out of reach
        raise UserError(
            f"{path}: cannot be loaded from the hub: {reason(error)}; check the name, the split and the network "
            "(HF_HUB_OFFLINE allows only what was downloaded before), or give a file"
        ) from error


def data_name(paths: str | list[str]) -> str:
    """Return the name of a data set in file names: the first file's without its ending, +N for N more files."""
    first, *more = listed(paths)
    return Path(first).stem + (f"+{len(more)}" if more else "")


def content_digest(path: str | list[str]) -> str:
    """Compute the SHA-256 of the content of one or several sources. Raises UserError if one cannot be read."""
    path, *more = listed(path)
    if more:
        return hashlib.sha256("".join(map(content_digest, (path, *more))).encode()).hexdigest()
    files = [file["filename"] for file in hub_dataset(path).cache_files] if path.startswith(HUB) else [path]
    form = HUB_PATH.fullmatch(path)
    digest = hashlib.sha256(((form and form["slice"]) or "").encode())  # the files are those of the whole split
    for name in files:
        try:
            status = os.stat(name)
            digest.update(file_sha256(name, status.st_ino, status.st_size, status.st_ctime_ns))
        except OSError as error:
            raise UserError(f"{path}: cannot read the data: {error.strerror}") from error
    return digest.hexdigest()


@cache
def file_sha256(name: str, *_status: int) -> bytes:
    """Hash a file, once in a process as long as its status stays the same."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def problem_error(problem) -> str | None:
    """Return what is wrong with one problem of a source, or None."""
    if not isinstance(problem, dict):
        return f"expected an object, got {type(problem).__name__}"
    for name in FIELDS:
        if name not in problem:
            return f'has no "{name}"'
    if not isinstance(problem["steps"], list):
        return f'"steps": expected a list, got {abbreviated(problem["steps"])}'
    texts = {"question": problem["question"], "answer": problem["answer"]}
    texts |= {f"steps[{i}]": step for i, step in enumerate(problem["steps"])}
    for name, text in texts.items():
        if not isinstance(text, str):
            return f'"{name}": expected a string, got {abbreviated(text)}'
        if has_lone_surrogate(text):
            return f'"{name}" contains a lone surrogate, which is not a character'
        if "<|" in text and (marker := next((m for m in (START, END, LATENT, PAUSE) if m in text), None)):
            return f'"{name}" contains {marker}, which only the curriculum may insert'
    return None if problem["question"].strip() else '"question" is empty'
