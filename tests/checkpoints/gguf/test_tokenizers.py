"""Tokenizers of GGUF files: what ours makes of texts is what the tokenizer did that the metadata was taken from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf as package
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from uqff.checkpoints import open_gguf
from uqff.checkpoints.gguf.pretokenizers import (
    PRE_TOKENIZERS,
    PreTokenizer,
    pre_tokenizer_of_document,
    pre_tokenizer_of_name,
)
from uqff.checkpoints.gguf.tokenizer import tokenizer_files, tokenizer_metadata
from uqff.errors import FormatError
from uqff.gguf.schema import Array

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 o'clock.",
    "Größe, naïveté, déjà vu: 10 000 €!\n\n\tIndented text;   many   spaces   \r\n",
    "def f(x):\n    return x ** 2  # the square\n",
    "ＦＵＬＬ width, e\u0301 composed, 日本語のテキスト, эти слова, HTTPServer iPhone",
    "You're she'll WE'VE I'd 'tis 1 22 333 4444",
]
TEXTS = [*CORPUS, "", " ", "  leading", "trailing  ", "\n\n", "unseen ☃ and \x00\x7f", "<s> in a text </s>", "<tool>x"]
SPECIAL = ["<s>", "</s>"]
CONFIG = {"max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}


def trained(cutting: PreTokenizer) -> Tokenizer:
    """A tokenizer of a known way of cutting, made by the tokenizers library from its own parts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=cutting.whole_words))
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps: list[Any] = [
        digits if step == "digits" else pre_tokenizers.Split(Regex(step), "isolated") for step in cutting.steps
    ]
    pattern = cutting.steps in ((), ("digits",))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern)]
    )
    if cutting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with nothing but a tokenizer, by the gguf package."""
    writer = package.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter would store of a byte-level tokenizer."""
    document = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [3 if token in SPECIAL else 4 if token == "<tool>" else 1 for token in tokens]
    merges = [" ".join(merge) for merge in document["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def rebuilt(path: Path) -> tuple[Tokenizer, dict[str, Any], list[str]]:
    with open_gguf(path) as file:
        documents, missing = tokenizer_files(file, CONFIG)
    return Tokenizer.from_str(json.dumps(documents["tokenizer.json"])), documents, missing


@pytest.mark.parametrize("cutting", PRE_TOKENIZERS, ids=lambda cutting: cutting.names[0])
def test_texts_become_the_same_tokens(tmp_path: Path, cutting: PreTokenizer) -> None:
    """And the tokens the same texts; the token for the beginning comes in front where llama.cpp puts it."""
    original = trained(cutting)
    path = write(tmp_path / "t.gguf", metadata_of(original, cutting.names[0]))
    ours, _, missing = rebuilt(path)
    assert missing == ["the file has no chat template"]
    for text in TEXTS:
        expected = original.encode(text).ids
        assert ours.encode(text).ids == [0] * cutting.begins + expected, text
        assert ours.decode(expected) == original.decode(expected)
    assert ours.get_vocab() == original.get_vocab()


@pytest.mark.parametrize("cutting", PRE_TOKENIZERS, ids=lambda cutting: cutting.names[0])
def test_there_and_back(tmp_path: Path, cutting: PreTokenizer) -> None:
    """The metadata that is made of the tokenizer.json is that which it was made of."""
    metadata = metadata_of(trained(cutting), cutting.names[0])
    metadata |= {"add_bos_token": True, "add_eos_token": False, "tokenizer.chat_template": "{{ x }}"}
    _, documents, missing = rebuilt(write(tmp_path / "t.gguf", metadata))
    assert missing == []
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document))
    pairs, notes = tokenizer_metadata(tmp_path, {**CONFIG, "vocab_size": len(metadata["tokens"])})
    assert notes == []
    found = {key.removeprefix("tokenizer.ggml."): value.value for key, value in pairs}
    assert {k: v.values() if isinstance(v, Array) else v for k, v in found.items()} == metadata


def test_files_beside_the_tokenizer(tmp_path: Path) -> None:
    """Names of the special tokens and the chat template."""
    metadata = metadata_of(trained(PRE_TOKENIZERS[0]), "gpt-2")
    _, documents, _ = rebuilt(write(tmp_path / "t.gguf", {**metadata, "tokenizer.chat_template": "{{ messages }}"}))
    assert documents["generation_config.json"] == {"bos_token_id": 0, "eos_token_id": 1}
    settings = documents["tokenizer_config.json"]
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert settings["chat_template"] == "{{ messages }}"
    assert "unk_token" not in settings


JOINED = ["▁t", "he", "▁the", "in", "er", "▁a", "ing", "▁▁", "on", "▁c", "at", "▁cat", "ca", "th", "hing", "▁thing"]
RANKED = [*JOINED, *"▁abcdefghinorst"]
"""Pieces, the best first."""

PIECES = {
    "<unk>": (2, 0.0),
    "<s>": (3, 0.0),
    "</s>": (3, 0.0),
    **{f"<0x{byte:02X}>": (6, 0.0) for byte in range(256)},
    **{piece: (1, -float(rank)) for rank, piece in enumerate(RANKED)},
}


def sentencepiece(text: str) -> list[str]:
    """SentencePiece's byte pair encoding, by its definition: join the neighbours that make the best piece, the leftmost
    of equals, until none do; a character that is no piece becomes its bytes.
    """
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = [(PIECES[a + b][1], -at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in PIECES]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    out: list[str] = []
    for piece in pieces:
        out += [piece] if piece in PIECES else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return out


def pieces_metadata() -> dict[str, Any]:
    return {
        "model": "llama",
        "tokens": list(PIECES),
        "token_type": [kind for kind, _ in PIECES.values()],
        "scores": [score for _, score in PIECES.values()],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.mark.parametrize(
    "text", ["the cat", "a thing in the cat", "hinging  the", " at", "größe ☃", "tthhee", "catcatching on a thing"]
)
def test_sentencepiece(tmp_path: Path, text: str) -> None:
    """Merges made of the scores do what the scores say; unknown characters are bytes; decoding gives the text back."""
    ours, _, _ = rebuilt(write(tmp_path / "t.gguf", pieces_metadata()))
    encoded = ours.encode(text)
    assert encoded.tokens == ["<s>", *sentencepiece(f" {text}")]
    assert ours.decode(encoded.ids) == text


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    metadata = {**pieces_metadata(), "add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    ours, _, _ = rebuilt(write(tmp_path / "t.gguf", metadata))
    assert ours.encode("the cat").tokens == [*sentencepiece("the cat"), "</s>"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bert"}, "tokenizers of type bert are not known here"),
        ({"pre": "martian"}, "cut in a way that is not known here (martian)"),
        ({"merges": ()}, "the file has no merges"),
        ({"bos_token_id": 10_000}, "field tokenizer.ggml.bos_token_id"),
        ({"token_type": [1]}, "field tokenizer.ggml.token_type"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "field tokenizer.ggml.tokens"),
        ({"tokens": 3}, "metadata has another type"),
    ],
    ids=str,
)
def test_what_cannot_be_rebuilt_is_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """No tokenizer.json, and a sentence that says why and what to do."""
    metadata = {**metadata_of(trained(PRE_TOKENIZERS[1]), "llama-bpe"), **change}
    if not metadata["merges"]:
        del metadata["merges"]
    with open_gguf(write(tmp_path / "t.gguf", metadata)) as file:
        documents, missing = tokenizer_files(file, CONFIG)
    assert "tokenizer.json" not in documents
    assert words in missing[0]
    assert "--assets" in missing[0]


def test_a_tokenizer_that_goes_back_as_tokens_only(tmp_path: Path) -> None:
    """llama.cpp's kind ``none``: the table of tokens, not how texts become them; numbers without a token filled up."""
    document = json.loads(Tokenizer(models.WordLevel({"a": 0, "b": 2}, "a")).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    pairs, notes = tokenizer_metadata(tmp_path, {"vocab_size": 4})
    found = dict(pairs)
    assert found["tokenizer.ggml.model"].value == "none"
    assert found["tokenizer.ggml.tokens"].value.values() == ["a", "[PAD1]", "b", "[PAD3]"]
    assert found["tokenizer.ggml.token_type"].value.values() == [1, 5, 1, 5]
    assert len(notes) == 1
    (tmp_path / "tokenizer.json").unlink()
    pairs, notes = tokenizer_metadata(tmp_path, {"vocab_size": 4, "bos_token_id": 3, "eos_token_id": 4})
    expected = {"tokenizer.ggml.model": "none", "tokenizer.ggml.bos_token_id": 3}
    assert {key: value.value for key, value in pairs} == expected
    assert notes == ["no tokenizer in the GGUF file: there is no tokenizer.json"]


@pytest.mark.parametrize("document", [{}, {"model": 3}, *({"model": {"vocab": v}} for v in ({"a": "x"}, {"a": 9}, 1))])
def test_a_tokenizer_that_is_none(tmp_path: Path, document: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FormatError):
        tokenizer_metadata(tmp_path, {"vocab_size": 4})


def test_ways_of_cutting_are_recognised() -> None:
    """Each by its own document and by all its names; a near miss is not."""
    for cutting in PRE_TOKENIZERS:
        assert pre_tokenizer_of_document(cutting.document()) is cutting
        assert [pre_tokenizer_of_name(name) for name in cutting.names] == [cutting] * len(cutting.names)
    near = PRE_TOKENIZERS[1].document()
    near["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    for document in (None, {}, {"type": "Sequence", "pretokenizers": []}, near, {"type": "Whitespace"}):
        assert pre_tokenizer_of_document(document) is None


@pytest.mark.parametrize("single", [[3], [None, {}], ["SpecialToken", 5]])
def test_a_post_processor_that_is_none(single: list[Any], tmp_path: Path) -> None:
    """The file is named."""
    document = json.loads(Tokenizer(models.WordLevel({"a": 0, "b": 2}, "a")).to_str())
    document["post_processor"] = {"type": "TemplateProcessing", "single": single}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="not a tokenizer") as caught:
        tokenizer_metadata(tmp_path, {"vocab_size": 4})
    assert caught.value.file == str(tmp_path / "tokenizer.json")


def test_a_template_that_is_not_unicode(tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0, "b": 2}, "a")).to_str())
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(FormatError, match="text is not Unicode") as caught:
        tokenizer_metadata(tmp_path, {"vocab_size": 4})
    assert (caught.value.file, caught.value.offset) == (str(tmp_path / "chat_template.jinja"), 2)


@pytest.mark.parametrize(
    ("tokens", "types", "problem"),
    [
        (["a" * 512, "b", "c"], [1, 1, 1], ""),
        (["a" * 513, "b", "c"], [1, 1, 1], "at most 512 characters in one, got 513"),
        (["a" * 500, "b" * 500, "c"], [1, 1, 1], "at most 1000 characters in all, got 1001"),
        (["a", "b", "c"], [3, 3, 1], "at most 1 that are not ordinary, got 2"),
        (["a", "b", "c", "d"], [1, 1, 1, 1], "at most 3, got 4"),
    ],
)
def test_vocabularies_that_would_take_long(
    tokens: list[str], types: list[int], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is converted; that it gets no tokenizer is said."""
    for name, most in (("MAX_TOKENS", 3), ("MAX_TOKENS_TEXT", 1000), ("MAX_TOKEN_TYPES", 1)):
        monkeypatch.setattr(f"uqff.checkpoints.gguf.tokenizer.{name}", most)
    table = {"model": "llama", "tokens": tokens, "token_type": types, "scores": [0.0] * len(tokens)}
    with open_gguf(write(tmp_path / "a.gguf", table)) as file:
        documents, notes = tokenizer_files(file, CONFIG)
    assert ("tokenizer.json" in documents) is not bool(problem)
    assert problem in notes[0]
