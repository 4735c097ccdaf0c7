"""Make a tokenizer and the config of a small GPT-2 for your own data, to train from scratch.

    python scripts/make_model.py data/mine_train.json args/mine_model                      one token per word
    python scripts/make_model.py data/mine_train.json args/mine_model --bpe 2000           byte-level BPE, for real text
    python scripts/make_model.py data/mine_train.json data/mine_valid.json args/mine_model --layers 2 --width 64

Then set `model_id: args/mine_model` and `from_scratch: True`. With one token per word, give all splits: a word that
none of the files has becomes <|unknown|>. --bpe SIZE trains a vocabulary of up to SIZE tokens, which spell any text.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]

from common import write_tokenizer  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from components.data_sources import read_problems  # noqa: E402
from components.tokenization import ANSWER_PREFIX  # noqa: E402
from config import UserError  # noqa: E402

EOS = "<|endoftext|>"
HEAD = 32  # width of an attention head


def pieces(problem: dict) -> list[str]:
    """Return the texts that are tokenized one by one, as in training."""
    return [f"{line}\n" for line in [problem["question"], *problem["steps"]]] + [ANSWER_PREFIX + problem["answer"]]


def write_bpe(folder: Path, texts: list[str], size: int) -> None:
    """Train and write a byte-level BPE tokenizer with at most `size` tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size <= len(alphabet):
        raise UserError(f"--bpe {size}: too small; {len(alphabet)} bytes and {EOS} need {len(alphabet) + 1}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [EOS], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def write_words(folder: Path, texts: list[str]) -> None:
    """Write a tokenizer with a token for each word. Raises UserError for text that words cannot give back."""
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\S+\s?", text))
    lost = next((text for text in texts if "".join(re.findall(r"\S+\s?", text)) != text), None)
    if lost is not None:
        raise UserError(f"{lost!r} has two spaces in a row, or begins with one; remove them, or use --bpe 2000")
    words.pop(ANSWER_PREFIX, None)  # write_tokenizer adds it
    write_tokenizer(folder, list(words))


def make_model(sources: list[str], folder: Path, layers: int, width: int, bpe: int | None) -> dict:
    """Write the tokenizer and config.json into a new folder and return the config.

    Raises UserError if the folder exists, or for data or sizes that do not fit.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; remove it or choose another folder")
    if width < HEAD or width % HEAD or layers < 1:
        raise UserError(f"--layers {layers} --width {width}: expected 1 layer or more, and a multiple of {HEAD}")
    problems = [pieces(problem) for source in sources for problem in read_problems(source, need_steps=False)]
    texts = [text for problem in problems for text in problem]
    write_bpe(folder, texts, bpe) if bpe is not None else write_words(folder, texts)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    longest = max(sum(len(tokenizer.encode(text).ids) for text in problem) for problem in problems)
    eos = tokenizer.token_to_id(EOS)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": tokenizer.get_vocab_size()}
    positions = 1 << (longest + 31).bit_length()  # a power of two, with room for thoughts
    config |= {"n_positions": positions, "n_layer": layers, "n_embd": width}
    config |= {"n_head": width // HEAD, "initializer_range": 0.1}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config |= {"bos_token_id": eos, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return config


def main(argv: list[str] | None = None) -> int:
    """Make the model folder that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="DATA", help="data files, as for train_path")
    parser.add_argument("folder", type=Path, metavar="OUT", help="new folder for the tokenizer and config.json")
    parser.add_argument("--layers", type=int, default=2, help="number of layers (2)")
    parser.add_argument("--width", type=int, default=64, help=f"hidden size, a multiple of {HEAD} (64)")
    parser.add_argument("--bpe", type=int, metavar="SIZE", help="byte-level BPE with up to SIZE tokens")
    args = parser.parse_args(argv)
    try:
        config = make_model(args.data, args.folder, args.layers, args.width, args.bpe)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {config['vocab_size']} tokens, {config['n_positions']} positions")
    print(f"train with: model_id={args.folder} from_scratch=True")
    return 0


if __name__ == "__main__":
    sys.exit(main())
