"""Problems as token ids, tokenized once by `map` of datasets into an Arrow file that every process memory-maps."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
from pyarrow import compute

from components.data_sources import content_digest, read_problems
from components.distributed import Processes
from components.files import fsync, make_private
from config import UserError, listed

if TYPE_CHECKING:  # slow to import
    from datasets import Dataset

RULES = 2  # version of how problems are read and tokenized: a change of the result needs another number, so a new file
CHECKED = 1000  # problems of a source whose tokens `check_tokens` decodes
NO_ROW = "but the model has {rows} embeddings; give it rows with resize_token_embeddings, or remove the token"
ANSWER_PREFIX = "### "
TEXTS = ["question", "answer", "steps"]
TOKENS = ["question_tokenized", "steps_tokenized", "answer_tokenized", "idx"]


def load_tokenized(sources: list[tuple], tokenizer, folder: str | None, processes: Processes) -> list[Dataset]:
    """Open the tokenized data of each source, the arguments of `read_problems`, as memory maps.

    Every process calls this. The first one of each node tokenizes what the cache `folder` lacks (None: all of it, into
    temporary files). The columns are those of `tokenize_chunk`. Raises UserError in every process for invalid data.
    """
    from datasets import Dataset

    with ExitStack() as temporary:
        files = processes.run_on_each_node(lambda: find_or_tokenize(sources, tokenizer, folder, temporary))
        opened = [Dataset.from_file(str(file)) for file in files]
        processes.all_gather_object(None)  # an open file outlives its name in the temporary folder
    return opened


def default_cache() -> str:
    """Return the cache folder of datasets."""
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)


def find_or_tokenize(sources: list, tokenizer, folder: str | None, temporary: ExitStack) -> list[Path]:
    """Return the Arrow file of each source, in a temporary folder if there is no cache or it cannot be used."""
    if folder is not None:
        why = "a tokenizer that is not a fast one has no fingerprint"
        try:
            if tokenizer.is_fast:
                return cached_files(sources, tokenizer, Path(folder) / "coconut")
        except OSError as error:
            why = f"{error}; set data_cache to another folder"
        what = f"the cache of tokenized data in {folder} cannot be used, so this run continues without it"
        print(f"warning: {what}: {why}", flush=True)
    try:
        return cached_files(sources, tokenizer, Path(temporary.enter_context(tempfile.TemporaryDirectory())))
    except OSError as error:
        raise UserError(f"data_cache: no room for the tokenized data, nor in a temporary folder: {error}") from error


def cached_files(sources: list, tokenizer, folder: Path) -> list[Path]:
    """Return the Arrow file of each source in a folder, and makes those that are missing or damaged."""
    files = [folder / f"{fingerprint(source, tokenizer)}.arrow" for source in sources]
    missing = {file: source for file, source in zip(files, sources, strict=True) if not can_be_opened(file)}
    if not missing:
        return files
    names = ", ".join(path for paths, *_ in missing.values() for path in listed(paths))
    print(f"reading and tokenizing {names} (about half a second per MB)", flush=True)
    problems = {file: read_problems(*source) for file, source in missing.items()}  # reports mistakes before any write
    make_private(folder)
    partial = folder / "partial"
    with locked(folder):
        try:
            for file, (path, *_) in missing.items():
                if can_be_opened(file):  # made by another run in the meantime
                    continue
                if file.exists():
                    print(f"warning: {file} cannot be opened, so {path} is tokenized again", flush=True)
                tokenize_problems(problems.pop(file), tokenizer, partial / file.name, path)
                fsync(partial / file.name)
                os.replace(partial / file.name, file)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # also what a killed run left there
    return files


def fingerprint(source: tuple, tokenizer) -> str:
    """Return a name that changes with the content of a source, how it is read, the tokenizer and RULES."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    paths, *how = source
    parts = [RULES, content_digest(paths), *how, tokenizer.eos_token_id, backend]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def can_be_opened(file: Path) -> bool:
    """Return whether a file exists and datasets can open it."""
    from datasets import Dataset

    try:
        Dataset.from_file(str(file))
    except Exception:  # a truncated file raises various errors of pyarrow
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one run at a time write to a cache folder; the others wait."""
    with open(folder / "lock", "ab") as file:  # closing it unlocks it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that tokenizes data into {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tokenize_problems(problems: list[dict], tokenizer, file: Path | None = None, title: str = "problems") -> Dataset:
    """Return problems with the columns of `tokenize_chunk`, from a new Arrow file or (None) in memory.

    One process writes one file; a fast tokenizer uses all cores through threads of its own.
    """
    from datasets import Dataset, Features, Value

    text, ids = Value("string"), [Value("int32")]
    types = {"question": text, "answer": text, "steps": [text]}
    problems = Dataset.from_dict({name: [problem[name] for problem in problems] for name in TEXTS}, Features(types))
    types |= {"question_tokenized": ids, "steps_tokenized": [ids], "answer_tokenized": ids, "idx": Value("int64")}
    return problems.map(
        tokenize_chunk,
        with_indices=True,
        batched=True,
        features=Features(types),
        fn_kwargs={"tokenizer": tokenizer},
        cache_file_name=file and str(file),
        load_from_cache_file=False,
        new_fingerprint=file.stem if file else "in-memory",
        desc=f"tokenizing {title}",
    )


def check_tokens(data: Dataset, tokenizer, rows: int, source: str, path: str) -> None:
    """Check the tokenized problems of a path against the tokenizer and the `rows` of the model's embedding.

    Raises UserError for a token without a row, and if half of the characters or more do not come back from the
    tokenizer, as with one whose files are missing; a thousandth is a warning. source: names the model in messages.
    """
    table = data.with_format("arrow")[:]
    for name in TOKENS[:3]:
        ids = table[name]
        while pyarrow.types.is_list(ids.type):
            ids = compute.list_flatten(ids)
        largest = compute.max(ids).as_py() or 0
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(f"{source}: the token {token!r} in {path} has id {largest}, {NO_ROW.format(rows=rows)}")
    written, lost = Counter(), Counter()
    silent = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    for row in data.select(range(0, len(data), -(-len(data) // CHECKED))):
        ids = [row["question_tokenized"], *row["steps_tokenized"], row["answer_tokenized"][:-1]]
        texts = tokenizer.batch_decode([[id for id in part if id not in silent] for part in ids])
        before, after = letters(row["question"], *row["steps"], ANSWER_PREFIX, row["answer"]), letters(*texts)
        written, lost = written + before, lost + (before - after)
    share = lost.total() / written.total()
    some = " ".join(letter for letter, _ in lost.most_common(8))
    if share >= 0.5:
        raise UserError(
            f"{source}: its tokenizer, of {len(tokenizer)} tokens, loses {share:.0%} of the characters in {path}, such "
            f"as {some}; put the tokenizer that the model was trained with into its folder, or choose another model"
        )
    if share >= 0.001:
        print(f"warning: {source}: its tokenizer loses {share:.1%} of the characters in {path}: {some}", flush=True)


def letters(*texts: str) -> Counter:
    """Count the characters of texts, except for what tokenizers normalize: blanks, case and Unicode forms."""
    return Counter("".join(unicodedata.normalize("NFKD", "".join(texts).casefold()).split()))


def tokenize_chunk(problems: dict[str, list], indices: Sequence[int], tokenizer) -> dict[str, list]:
    """Return the token ids of columns of problems as columns: question_tokenized, steps_tokenized (a list for each
    step), answer_tokenized, and idx, the given indices.

    The question takes the tokenizer's special tokens (bos, if it adds one); steps and answer do not. Each piece ends
    its line; the answer follows "### " and ends with eos.
    """

    def encode(texts: list[str], special: bool = False) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []

    steps = iter(encode([step + "\n" for steps in problems["steps"] for step in steps]))
    answers = encode([ANSWER_PREFIX + answer for answer in problems["answer"]])
    return {
        "question_tokenized": encode([question + "\n" for question in problems["question"]], special=True),
        "steps_tokenized": [[next(steps) for _ in range(len(texts))] for texts in problems["steps"]],
        "answer_tokenized": [[*answer, tokenizer.eos_token_id] for answer in answers],
        "idx": list(indices),
    }
