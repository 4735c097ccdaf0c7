"""Problems as token ids in Arrow files: tokenized once, kept in a cache, and mapped into memory by every process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
from tqdm import tqdm

from components.data_sources import content_digest, read_problems
from components.distributed import Processes
from components.files import atomic_directory, make_private, verify_manifest
from components.prefetch import cores, prefetch
from config import UserError

if TYPE_CHECKING:  # it is slow to import, and not needed to refuse a config
    from datasets import Dataset

RULES = 1  # by which problems are read and tokenized: whoever changes what comes out counts up, so that it is made anew
CHUNK = 1000  # problems that are tokenized in one go, and that lie together in a file
DATA = "data.arrow"
TEXTS = ["question", "answer", "steps"]
TOKENS = ["question_tokenized", "steps_tokenized", "answer_tokenized", "idx"]


def load_tokenized(
    sources: list[tuple[str, int | None]], tokenizer, folder: str | None, processes: Processes
) -> list[Dataset]:
    """The data sets of some sources, each a path and the number of problems to take (None: all); see `tokenize_chunk`.

    The first process of each node makes what is not in the cache folder yet (None: a temporary one); all map it into
    memory. Every process calls this. Raises UserError in all of them for what is wrong with a source.
    """
    from datasets import Dataset

    with ExitStack() as temporary:
        files = processes.run_on_each_node(lambda: prepare(sources, tokenizer, folder, temporary))
        opened = [Dataset.from_file(str(file)) for file in files]
        processes.all_gather_object(None)  # all have opened them: what lies in a temporary folder may lose its name
    return opened


def default_cache() -> str:
    """The cache folder of datasets."""
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def prepare(sources: list, tokenizer, folder: str | None, temporary: ExitStack) -> list[Path]:
    """The Arrow files of some sources, made where they are missing; in a temporary folder where `folder` takes none."""
    complaint = None if getattr(tokenizer, "is_fast", False) else "the tokenizer is none that can be told from others"
    if folder is not None and complaint is None:
        try:
            return cached_files(sources, tokenizer, Path(folder))
        except OSError as error:
            complaint = str(error)
    if folder is not None:
        advice = "so this run goes on without it; data_cache names another folder"
        print(f"warning: the cache of tokenized data in {folder} cannot be used ({complaint}), {advice}", flush=True)
    try:
        return cached_files(sources, tokenizer, Path(temporary.enter_context(tempfile.TemporaryDirectory())))
    except OSError as error:
        raise UserError(f"data_cache: no folder takes the tokenized data, a temporary one neither: {error}") from error


def cached_files(sources: list, tokenizer, folder: Path) -> list[Path]:
    """The Arrow files of some sources in a folder. What is missing or damaged there is made, when all is read."""
    entries = [folder / cache_name(path, size, tokenizer) for path, size in sources]
    missing = {entry: source for entry, source in zip(entries, sources, strict=True) if verify_manifest(entry)}
    problems = {entry: read_problems(*source) for entry, source in missing.items()}  # mistakes, before any is written
    if missing:
        make_private(folder)
        with locked(folder):
            for entry, (path, _) in missing.items():
                make_entry(entry, problems.pop(entry), tokenizer, path)
    return [entry / DATA for entry in entries]


def cache_name(path: str, max_size: int | None, tokenizer) -> str:
    """The name under which a tokenized source is kept: another for other content, tokenizer or rules."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    parts = [RULES, content_digest(path), max_size, tokenizer.eos_token_id, backend]
    return "coconut-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs from making files in a cache folder meanwhile: they wait, and then find them made."""
    with open(folder / "coconut.lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that tokenizes data into {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # workers that are just ending hold the file, too


def make_entry(entry: Path, problems: list[dict], tokenizer, title: str) -> None:
    """Tokenizes problems into a new directory of the cache, unless another run did so in the meantime."""
    complaint = verify_manifest(entry)
    if complaint is None:
        return
    if entry.exists():
        print(f"warning: {entry} is damaged ({complaint}), so it is made again", flush=True)
    with atomic_directory(entry) as partial, open(partial / DATA, "wb") as file:
        write_tokenized(file, problems, tokenizer, title)


def tokenize_problems(problems: list[dict], tokenizer) -> Dataset:
    """Problems as a data set in memory; see `tokenize_chunk`."""
    from datasets import Dataset

    sink = pyarrow.BufferOutputStream()
    write_tokenized(sink, problems, tokenizer, "problems")
    return Dataset.from_buffer(sink.getvalue())


def write_tokenized(sink, problems: list[dict], tokenizer, title: str) -> None:
    """Writes problems and their tokens as an Arrow stream. All cores tokenize, with a progress bar if it takes long."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not go with processes
    starts = range(0, len(problems), CHUNK)

    def make(start: int) -> pyarrow.RecordBatch:
        columns = tokenize_chunk(problems[start : start + CHUNK], start, tokenizer)
        return pyarrow.RecordBatch.from_pydict(columns, schema())

    bar = tqdm(total=len(problems), desc=f"tokenizing {title}", unit="problem", delay=1)
    with pyarrow.ipc.new_stream(sink, schema()) as writer, bar:
        for batch in prefetch(make, starts, workers=cores() if len(starts) > 1 else 0):
            writer.write_batch(batch)
            bar.update(batch.num_rows)


def schema() -> pyarrow.Schema:
    """The columns of a tokenized source."""
    text, tokens = pyarrow.string(), pyarrow.list_(pyarrow.int32())
    types = [text, text, pyarrow.list_(text), tokens, pyarrow.list_(tokens), tokens, pyarrow.int64()]
    return pyarrow.schema(list(zip([*TEXTS, *TOKENS], types, strict=True)))


def tokenize_chunk(problems: list[dict], first: int, tokenizer) -> dict[str, Sequence]:
    """Columns of texts and token ids of problems: question_tokenized, steps_tokenized (a list for each step) and
    answer_tokenized.

    The question takes the tokenizer's special tokens (bos, if it adds one); steps and answer do not. Each piece ends
    its line; the answer follows "### " and ends with eos. idx counts from `first`.
    """

    def encode(texts: list[str], special: bool = False) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []

    columns = {name: [problem[name] for problem in problems] for name in TEXTS}
    columns["question_tokenized"] = encode([question + "\n" for question in columns["question"]], special=True)
    tokenized = iter(encode([step + "\n" for steps in columns["steps"] for step in steps]))
    columns["steps_tokenized"] = [[next(tokenized) for _ in steps] for steps in columns["steps"]]
    answers = encode(["### " + answer for answer in columns["answer"]])
    columns["answer_tokenized"] = [[*answer, tokenizer.eos_token_id] for answer in answers]
    columns["idx"] = range(first, first + len(problems))
    return columns
