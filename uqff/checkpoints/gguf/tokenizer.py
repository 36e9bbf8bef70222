"""The tokenizer of a GGUF file as ``tokenizer.json``, and back.

Two kinds can be rebuilt: byte pair encoding over bytes (``gpt2``), whose merges the file has, if it names a way of
cutting texts that is known here (:mod:`uqff.checkpoints.gguf.pretokenizers`); and SentencePiece's byte pair encoding
(``llama``), whose merges follow from the scores: of all pairs of tokens that make a token, the best one is merged
first.  Back goes only the former: ``tokenizer.json`` has no scores.  Whatever cannot be rebuilt is said, never guessed.

Authority: llama.cpp, ``conversion/base.py`` (``_set_vocab_gpt2``), ``src/llama-vocab.cpp``; transformers,
``convert_slow_tokenizer.py`` (``generate_merges``, ``LlamaConverter``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from uqff.checkpoints.gguf.pretokenizers import pre_tokenizer_of_document, pre_tokenizer_of_name
from uqff.container.document import is_present, read_json, read_text
from uqff.errors import FormatError, UnsupportedError, UqffError
from uqff.gguf.reader import GgufFile
from uqff.gguf.schema import Array, Value, ValueType
from uqff.limits import (
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    MAX_TOKEN_TEXT,
    MAX_TOKEN_TYPES,
    MAX_TOKENS,
    MAX_TOKENS_TEXT,
)

__all__ = ["token_ids", "tokenizer_files", "tokenizer_metadata"]

PREFIX: Final = "tokenizer.ggml"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``tokenizer.ggml.token_type``."""

SPACE: Final = "\u2581"
"""What SentencePiece writes for a space."""

_IDS: Final = (ValueType.U32, ValueType.I32, ValueType.U64, ValueType.I64)


class _Vocabulary:
    """The tokenizer's metadata, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.model = self.get("model", ValueType.TEXT)
        self.tokens: list[Any] = self.array("tokens", ValueType.TEXT)
        self.types: list[int] = self.array("token_type", ValueType.I32, ValueType.U32) or [NORMAL] * len(self.tokens)
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.types) != len(self.tokens):
            raise self.error("token_type", f"{len(self.tokens)} types", len(self.types))
        if len(self.ids) != len(self.tokens):
            raise self.error("tokens", "no token twice", f"{len(self.tokens) - len(self.ids)} twice")
        odd = sum(type in (UNKNOWN, CONTROL, USER_DEFINED) for type in self.types)
        if odd > MAX_TOKEN_TYPES:
            raise self.error("token_type", f"at most {MAX_TOKEN_TYPES} that are not ordinary", odd)

    def get(self, key: str, *types: ValueType) -> Any:
        return self.file.get_value(f"{PREFIX}.{key}", *types)

    def array(self, key: str, *types: ValueType) -> list[Any]:
        array = self.get(key, ValueType.ARRAY)
        if array is None:
            return []
        if array.type not in types:
            raise self.error(key, " or ".join(type.name.lower() for type in types), array.type.name.lower())
        if array.count > MAX_TOKENS:
            raise self.error(key, f"at most {MAX_TOKENS}", array.count)
        values: list[Any] = array.values()
        return values

    def token(self, name: str) -> str | None:
        """The token that is called ``name``, such as ``bos``; None if the file names none."""
        number = self.get(f"{name}_token_id", *_IDS)
        if number is None:
            return None
        if not 0 <= number < len(self.tokens):
            raise self.error(f"{name}_token_id", f"below {len(self.tokens)}", number)
        return str(self.tokens[number])

    def error(self, key: str, expected: object, got: object) -> FormatError:
        path = str(self.file.paths[0])
        return FormatError("not a tokenizer", file=path, field=f"{PREFIX}.{key}", expected=expected, got=got)


def tokenizer_files(file: GgufFile, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The files of a GGUF file's tokenizer.

    Args:
        file: the GGUF file.
        config: the model's configuration.

    Returns:
        File names to JSON values, and what could not be made, in sentences.
    """
    documents: dict[str, Any] = {}
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    if special:
        documents["generation_config.json"] = special
    try:
        vocabulary = _Vocabulary(file)
        tokenizer = _document(vocabulary)
    except UqffError as error:
        return documents, [f"no tokenizer.json ({error}); give the model's own (--assets)"]
    if isinstance(tokenizer, str):
        return documents, [f"no tokenizer.json: {tokenizer}; give the model's own (--assets)"]
    documents["tokenizer.json"] = tokenizer
    documents["tokenizer_config.json"] = _settings(vocabulary, config)
    template = file.get_value("tokenizer.chat_template", ValueType.TEXT)
    if template is None:
        return documents, ["the file has no chat template"]
    documents["tokenizer_config.json"]["chat_template"] = template
    return documents, []


def token_ids(file: GgufFile, texts: Iterable[str]) -> dict[str, int]:
    """The numbers of tokens, by their texts.

    Raises:
        UnsupportedError: one is not there.
        FormatError: the tokenizer's metadata is not right.
    """
    ids = _Vocabulary(file).ids
    found = {text: ids.get(text) for text in texts}
    for text, number in found.items():
        if number is None:
            raise UnsupportedError(
                "a token of images is not there; give the model's own configuration (--assets)",
                file=str(file.paths[0]),
                field=f"{PREFIX}.tokens",
                expected=text,
                got=f"{len(ids)} others",
            )
    return {text: number for text, number in found.items() if number is not None}


def _settings(vocabulary: _Vocabulary, config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    tokens = {f"{short}_token": vocabulary.token(name) for name, short in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in tokens.items() if token is not None},
    }


def _document(vocabulary: _Vocabulary) -> dict[str, Any] | str:
    """The ``tokenizer.json``, or why there is none."""
    if not vocabulary.tokens:
        return "the file has no vocabulary"
    if vocabulary.model == "gpt2":
        return _bytes_document(vocabulary)
    if vocabulary.model == "llama":
        return _pieces_document(vocabulary)
    return f"tokenizers of type {vocabulary.model} are not known here"


def _bytes_document(vocabulary: _Vocabulary) -> dict[str, Any] | str:
    name, merges = vocabulary.get("pre", ValueType.TEXT), vocabulary.array("merges", ValueType.TEXT)
    cutting = pre_tokenizer_of_name(name)
    if cutting is None:
        return f"texts are cut in a way that is not known here ({name})"
    if not merges:
        return "the file has no merges"
    model = _bpe(vocabulary, merges, ignore_merges=cutting.whole_words)
    visible = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    document = _skeleton(vocabulary, model, begins=cutting.begins, otherwise=visible)
    document["normalizer"] = {"type": "NFC"} if cutting.composed else None
    document["pre_tokenizer"] = cutting.document()
    document["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return document


def _pieces_document(vocabulary: _Vocabulary) -> dict[str, Any] | str:
    scores = vocabulary.array("scores", ValueType.F32)
    if len(scores) != len(vocabulary.tokens):
        return "the file has no scores of its tokens"
    unknown = vocabulary.token("unknown")
    model = _bpe(vocabulary, _merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    document = _skeleton(vocabulary, model, begins=True, otherwise=None)
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    strip: list[dict[str, Any]] = []
    if vocabulary.get("add_space_prefix", ValueType.BOOL) is not False:
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
        strip.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    document["normalizer"] = {"type": "Sequence", "normalizers": spaces}
    document["decoder"] = {"type": "Sequence", "decoders": decoders}
    return document


def _merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[str]:
    """All pairs of tokens that make a token, the pair of the token with the highest score first."""
    ids, found = vocabulary.ids, []
    longest, total = max(map(len, vocabulary.tokens)), sum(map(len, vocabulary.tokens))
    if longest > MAX_TOKEN_TEXT:
        raise vocabulary.error("tokens", f"at most {MAX_TOKEN_TEXT} characters in one", longest)
    if total > MAX_TOKENS_TEXT:
        raise vocabulary.error("tokens", f"at most {MAX_TOKENS_TEXT} characters in all", total)
    for token, score, type in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if type not in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, -len(left), -len(right), ids[token], left, right))
    return [f"{left} {right}" for *_, left, right in sorted(found)]


def _bpe(vocabulary: _Vocabulary, merges: Sequence[str], **options: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**model, **options, "vocab": vocabulary.ids, "merges": list(merges)}


def _skeleton(vocabulary: _Vocabulary, model: dict[str, Any], *, begins: bool, otherwise: Any) -> dict[str, Any]:
    """A tokenizer without the parts that its kind decides."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": type != USER_DEFINED}
        for number, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    first = vocabulary.token("bos") if _flag(vocabulary, "add_bos_token", begins) else None
    last = vocabulary.token("eos") if _flag(vocabulary, "add_eos_token", False) else None
    around = _template(vocabulary, first, last) if first or last else otherwise
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": around,
        "decoder": None,
        "model": model,
    }


def _flag(vocabulary: _Vocabulary, key: str, default: bool) -> bool:
    value = vocabulary.get(key, ValueType.BOOL)
    return default if value is None else bool(value)


def _template(vocabulary: _Vocabulary, first: str | None, last: str | None) -> dict[str, Any]:
    def around(text: str, number: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [
            {"SpecialToken": {"id": first, "type_id": number}},
            {"Sequence": {"id": text, "type_id": number}},
            {"SpecialToken": {"id": last, "type_id": number}},
        ]
        return [part for part in parts if next(iter(part.values()))["id"] is not None]

    special = {
        token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in (first, last) if token
    }
    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}


def tokenizer_metadata(directory: Path, config: Mapping[str, Any]) -> tuple[list[tuple[str, Value]], list[str]]:
    """The metadata of a model directory's tokenizer.

    Args:
        directory: with ``tokenizer.json`` and ``tokenizer_config.json``.
        config: the model's configuration.

    Returns:
        Metadata pairs, and what could not be made, in sentences.
    """
    path = directory / "tokenizer.json"
    if not is_present(path):
        numbers = {name: config.get(f"{name}_token_id") for name in ("bos", "eos")}
        known = {name: n for name, n in numbers.items() if type(n) is int and 0 <= n < config["vocab_size"]}
        pairs = [(f"{PREFIX}.model", Value(ValueType.TEXT, "none"))]  # llama.cpp loads no file that does not say
        pairs += [(f"{PREFIX}.{name}_token_id", Value(ValueType.U32, n)) for name, n in known.items()]
        return pairs, ["no tokenizer in the GGUF file: there is no tokenizer.json"]
    document = read_json(path, MAX_HEADER_BYTES)
    try:
        tokens, types = _token_table(document, config["vocab_size"], str(path))
        model, notes = _model_metadata(document)
        table = {
            "tokens": Value(ValueType.ARRAY, Array.of(ValueType.TEXT, tokens)),
            "token_type": Value(ValueType.ARRAY, Array.of(ValueType.I32, types)),
        }
        begins, ends = _ends(document.get("post_processor"))
    except UqffError:
        raise
    except Exception as exc:
        raise FormatError("not a tokenizer", file=str(path), got=f"{type(exc).__name__} {exc}") from exc
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path, MAX_CONFIG_BYTES) if is_present(settings_path) else {}
    ids = _special_ids(settings, config, tokens)
    ends_added = {"add_bos_token": Value(ValueType.BOOL, begins), "add_eos_token": Value(ValueType.BOOL, ends)}
    found = [(f"{PREFIX}.{key}", value) for key, value in {**model, **table, **ids, **ends_added}.items()]
    template = _chat_template(directory, settings)
    if template is not None:
        found.append(("tokenizer.chat_template", Value(ValueType.TEXT, template)))
    return found, notes


def _model_metadata(document: Mapping[str, Any]) -> tuple[dict[str, Value], list[str]]:
    """The kind of tokenizer, and how it cuts and merges; ``none``, which llama.cpp knows, if it is another kind."""
    model, cutting = document["model"], pre_tokenizer_of_document(document.get("pre_tokenizer"))
    normalizer = document.get("normalizer")
    simple = normalizer is None or normalizer.get("type") == "NFC"
    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
    apart = all(len(part) == 2 and not any(" " in piece for piece in part) for part in parts)
    if model.get("type") != "BPE" or model.get("byte_fallback") or cutting is None or not simple or not apart:
        return {"model": Value(ValueType.TEXT, "none")}, [
            "the GGUF file has tokens but no way to make them of texts: "
            "tokenizer.json is no byte pair encoding over bytes that is known here"
        ]
    merges = Array.of(ValueType.TEXT, [" ".join(part) for part in parts])
    return {
        "model": Value(ValueType.TEXT, "gpt2"),
        "pre": Value(ValueType.TEXT, cutting.names[0]),
        "merges": Value(ValueType.ARRAY, merges),
    }, []


def _token_table(document: Mapping[str, Any], count: int, path: str) -> tuple[list[str], list[int]]:
    """Tokens and their types by number; numbers that no token has are filled up as llama.cpp does."""
    tokens = [f"[PAD{number}]" for number in range(count)]
    types = [UNUSED] * count
    added = [(token["content"], token["id"], token.get("special")) for token in document.get("added_tokens") or ()]
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # of Unigram: pairs of token and score, in order
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    table = [(token, number, NORMAL) for token, number in vocabulary.items()]
    table += [(token, number, CONTROL if special else USER_DEFINED) for token, number, special in added]
    for token, number, kind in table:
        if not 0 <= number < count:
            raise FormatError(
                "token outside of the vocabulary", file=path, field=token, expected=f"below {count}", got=number
            )
        tokens[number], types[number] = token, kind
    return tokens, types


def _special_ids(settings: Mapping[str, Any], config: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Value]:
    """The numbers of the special tokens, by the tokens themselves or else by the configuration."""
    numbers, ids = {token: number for number, token in enumerate(tokens)}, {}
    for name, short in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        token, number = settings.get(f"{short}_token"), config.get(f"{short}_token_id")
        text = token.get("content") if isinstance(token, Mapping) else token
        number = numbers.get(text, number) if isinstance(text, str) else number
        if type(number) is int and 0 <= number < len(tokens):
            ids[f"{name}_token_id"] = Value(ValueType.U32, number)
    return ids


def _ends(processor: Any) -> tuple[bool, bool]:
    """Whether a text gets a special token in front, and one behind."""
    if not isinstance(processor, Mapping):
        return False, False
    if processor.get("type") == "Sequence":
        ends = [_ends(each) for each in processor.get("processors") or ()]
        return any(first for first, _ in ends), any(last for _, last in ends)
    single = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
    if not isinstance(single, list) or not single:
        return False, False
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if is_present(path) and path.stat().st_size <= MAX_CONFIG_BYTES:
        return read_text(path, MAX_CONFIG_BYTES)
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
