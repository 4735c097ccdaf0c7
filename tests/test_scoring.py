"""The output that a problem is trained on is right, and others are not, whatever the tokenizer does to texts."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from components.tokenization import TEXTS, tokenize_chunk
from config import Config
from evaluate import normalize, predict
from helpers import EOS, byte_tokenizer

WORDS = ["###", "#", "a", "b", "tom", "is", "1", "2", "18", "1000", "+", "=", ".", ",", "an", "é", "e", "\u0301"]


def wrapped(model, vocabulary_extra=(), normalizer=None, pre_tokenizer=None, decoder=None, **options):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, **options)


def numbered(tokens) -> dict[str, int]:
    return {token: id for id, token in enumerate(dict.fromkeys(tokens))}


def lowercase_bytes():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def nfc_bytes():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def special_bytes():
    tokenizer = byte_tokenizer(bos=True, pad=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["Tom", "18"]})
    return tokenizer


def word_level():
    vocabulary = numbered(["[UNK]", EOS, *WORDS])
    split = pre_tokenizers.WhitespaceSplit()
    return wrapped(models.WordLevel(vocabulary, unk_token="[UNK]"), pre_tokenizer=split, unk_token="[UNK]")


def word_piece():
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = numbered(["[UNK]", EOS, *letters, *("##" + letter for letter in letters if letter.isalnum())])
    return wrapped(
        models.WordPiece(vocabulary, unk_token="[UNK]"),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
        unk_token="[UNK]",
    )


def sentence_piece():
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    return wrapped(
        models.Unigram([(piece, -float(id)) for id, piece in enumerate(pieces)], unk_id=0, byte_fallback=True),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        unk_token="<unk>",
    )


def cleaning_bytes():
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


KINDS = [byte_tokenizer, lowercase_bytes, nfc_bytes, special_bytes, word_level, word_piece, sentence_piece]
KINDS.append(cleaning_bytes)
PIECES = ["a", "B", "Tom", "is", "1", "18", "1,000", ".", " .", "#", "#1", "C#", "#### 4", "###", " ", "\n", "n't"]
PIECES += ["e\u0301", "é", "▁", "=", "+", "<|bos|>", "[UNK]", "\u2028", "😀"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join) | st.text(max_size=5)


def output(problem: dict, tokenizer, method: str) -> list[int]:
    """What a model generates that has learned the problem's training sequence by heart."""
    row = tokenize_chunk({name: [problem[name]] for name in TEXTS}, [0], tokenizer)
    steps = [id for step in row["steps_tokenized"][0] for id in step] if method == "cot" else []
    ids = steps + row["answer_tokenized"][0]
    return ids[: ids.index(tokenizer.eos_token_id) + 1]


def loosely(text: str) -> str:
    """A text without what tokenizers and the comparison may ignore."""
    return "".join(normalize(unicodedata.normalize("NFKD", text)).casefold().split())


@pytest.mark.parametrize("method", ["cot", "coconut"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_output_that_was_trained_is_right_and_another_answer_is_not(kind, method):
    tokenizer, config = kind(), Config({"method": method})

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(TEXT | TEXT.map(lambda text: text + EOS + "1"), st.lists(TEXT, max_size=2), TEXT)
    def check(answer, steps, other):
        problem = {"question": "q", "answer": answer, "steps": steps}
        prediction = predict(problem, 0, output(problem, tokenizer, method), 0, tokenizer, config)
        assert prediction["correct"] is True
        assert method != "cot" or prediction["cot_match"] is True
        wrong = output(problem | {"answer": other}, tokenizer, method)
        assume(other.count("#") <= answer.count("#") and EOS not in answer)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, other)]
        skip = not {*ids[0]} & {*tokenizer.all_special_ids}  # officially special tokens do not count
        texts = [tokenizer.decode(row, skip_special_tokens=skip) for row in ids]
        assume(loosely(texts[0]) != loosely(texts[1]))
        assert predict(problem, 0, wrong, 0, tokenizer, config)["correct"] is False

    check()


@pytest.mark.parametrize("answer", ["7", "1,000", "-3", "Tom is a lorpus.", " 7 ", "True"])
@pytest.mark.parametrize("text", ["### 7", "### 1000", "a#7", "### -3", "### Tom is a lorpus.", "True", "# True"])
def test_ordinary_answers_are_compared_as_officially(answer, text):
    tokenizer = byte_tokenizer()
    problem = {"question": "q", "answer": answer, "steps": []}
    new = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    official = "#" in text and text.split("#")[-1].replace(",", "").strip() == answer.replace(",", "").strip()
    assert predict(problem, 0, new, 0, tokenizer, Config({"method": "no_cot"}))["correct"] is official
