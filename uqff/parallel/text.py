"""The tokenizer of a model directory, and which tokens end a text.

A model directory comes from anywhere, so nothing in it is executed and nothing in it leads elsewhere: ``transformers``
gets vocabulary files and the options of :data:`OPTIONS`, never the directory, whose configuration may name a Python
file beside it (``auto_map``) or a path of its own choice (``vocab_file``).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from uqff.container.document import is_present, read_json, read_text
from uqff.errors import FormatError, UnsupportedError, UqffError, located
from uqff.limits import MAX_CONFIG_BYTES
from uqff.models.architectures import architecture_of
from uqff.models.assets import CONFIG_NAME
from uqff.models.growth import check_growth
from uqff.models.template import render

__all__ = ["CLASSES", "OPTIONS", "Text"]

TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")

OPTIONS: Final = (
    *TOKENS,
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "legacy",
)
"""What is taken from the ``tokenizer_config.json`` of a directory without ``tokenizer.json``: nothing that names a
file or a class."""

CLASSES: Final = {
    "GPT2Tokenizer": ("vocab.json", "merges.txt"),
    "LlamaTokenizer": ("tokenizer.model",),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
}
"""Classes of ``transformers`` that make a tokenizer of vocabulary files, and the files."""

USUAL: Final = {
    "Llama": "LlamaTokenizer",
    "Mistral": "LlamaTokenizer",
    "Qwen2": "Qwen2Tokenizer",
    "Qwen3": "Qwen2Tokenizer",
    "Qwen3-MoE": "Qwen2Tokenizer",
}
"""The class of an architecture's tokenizer, where ``tokenizer_config.json`` names none."""

BESIDE: Final = ("added_tokens.json", "special_tokens_map.json")
"""Files of tokens that a tokenizer without ``tokenizer.json`` has beside its vocabulary."""


class Text:
    """The tokenizer of a model directory, and which tokens end a text.

    Attributes:
        stop: the end-of-text tokens of ``generation_config.json``, or else of ``config.json``, and of the tokenizer.
        begin: the token that the tokenizer puts in front of every text; None if it puts none.
    """

    def __init__(self, directory: Path) -> None:
        """Read it. No code in the directory runs.

        Raises:
            UnsupportedError: ``transformers`` is not installed, or the tokenizer is of a class that is not known.
            FormatError: the directory has no tokenizer that can be read.
        """
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError as error:
            raise UnsupportedError(
                "running a model needs transformers (pip install 'uqff-format[run]')", got=str(error)
            ) from None
        plain, self._directory = directory / "tokenizer.json", directory
        with _refused("tokenizer cannot be read", directory):
            config = _json(directory, "tokenizer_config.json")
            self._tokenizer: Any = (
                PreTrainedTokenizerFast(tokenizer_file=str(plain), **_special_tokens(config))
                if is_present(plain)
                else _of_vocabulary(directory, config)
            )
            _check_parts(self._tokenizer)
            self._tokenizer.chat_template = _chat_template(directory, config)
            self.stop = frozenset(_stop_ids(directory) | _ids(self._tokenizer.eos_token_id))
            bos = self._tokenizer.bos_token_id
            self.begin: int | None = bos if bos is not None and self._tokenizer("")["input_ids"][:1] == [bos] else None

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The ids of a prompt.

        As in the engine, the prompt is one message of a user, put into the chat template if the directory has one.

        Args:
            prompt: the text.
            raw: take the text as it is, chat template or not.

        Raises:
            FormatError: the chat template fails, or the tokenizer does.
        """
        text, special = prompt, True
        if not raw and self._tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            try:
                text = render(self._tokenizer.chat_template, {**self._variables(), "messages": message})
            except UqffError as error:
                error.problem += "; --raw does without"
                raise error.within(file=str(self._directory)) from None
            bos = self._tokenizer.bos_token
            special = not (bos and text.startswith(bos))  # a template that writes it must not get it twice
        with _refused("tokenizer fails", self._directory):
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _variables(self) -> dict[str, Any]:
        """What ``transformers`` gives to a chat template beside the messages."""
        return {**self._tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": True}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        with _refused("tokenizer fails", self._directory):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        with _refused("tokenizer fails", self._directory):
            return [str(self._tokenizer.decode([one])) for one in ids]


@contextlib.contextmanager
def _refused(problem: str, directory: Path) -> Iterator[None]:
    """Whatever comes out of ``transformers``, Jinja and ``tokenizers`` is about the directory's files.

    A panic of ``tokenizers`` is no Exception to Python.
    """
    try:
        with located(file=directory):
            yield
    except (UqffError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise FormatError(problem, file=str(directory), got=str(error) or type(error).__name__) from error


def _check_parts(tokenizer: Any) -> None:
    """Before any text is read: what it says itself of its parts, which are of no more than the file holds."""
    made = getattr(tokenizer, "backend_tokenizer", None)
    for field in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(made, field, None)
        if part is not None:
            check_growth(json.loads(part.__getstate__()), field)


def _json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    return read_json(path, MAX_CONFIG_BYTES) if is_present(path) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens, beside a ``tokenizer.json`` that says everything else.

    Read here, because ``transformers`` chooses a class by the model's configuration, which then rebuilds the tokenizer
    by its own rules, and stumbles over the ``null`` that the engine writes for what is absent.
    """
    options = {name: config.get(name) for name in TOKENS}
    options = {name: each["content"] if isinstance(each, dict) else each for name, each in options.items()}
    return {name: each for name, each in options.items() if each is not None}


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template by which a prompt becomes a message."""
    jinja, template = directory / "chat_template.jinja", config.get("chat_template")
    if is_present(jinja):
        return read_text(jinja, MAX_CONFIG_BYTES)
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if not isinstance(template, str | None):
        raise FormatError("not a template", field="chat_template", expected="a text", got=type(template).__name__)
    return template


def _of_vocabulary(directory: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer of a directory without ``tokenizer.json``."""
    import transformers

    name = config.get("tokenizer_class") or USUAL.get(architecture_of(_json(directory, CONFIG_NAME)).title)
    name = str(name).removesuffix("Fast")
    if name not in CLASSES:
        raise UnsupportedError(
            "no tokenizer.json, and the tokenizer's class is not known",
            field="tokenizer_class",
            expected=f"one of {', '.join(CLASSES)}",
            got=name,
        )
    missing = [file for file in CLASSES[name] if not is_present(directory / file)]
    if missing:
        raise FormatError(
            "no tokenizer", expected=f"tokenizer.json, or {' and '.join(CLASSES[name])}", got=f"no {missing[0]}"
        )
    made: Any = getattr(transformers, f"{name}Fast", None) or getattr(transformers, name)
    with tempfile.TemporaryDirectory(prefix="uqff-tokenizer-") as folder:
        for file in CLASSES[name]:
            shutil.copyfile(directory / file, Path(folder, file))
        texts = {file: _json(directory, file) for file in BESIDE if is_present(directory / file)}
        texts = {file: _only_options(each) if file == BESIDE[1] else each for file, each in texts.items()}
        texts["tokenizer_config.json"] = {**_only_options(config), "tokenizer_class": name}
        for file, values in texts.items():
            Path(folder, file).write_text(json.dumps(values), "utf-8")
        return made.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _only_options(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in OPTIONS if values.get(name) is not None}


def _stop_ids(directory: Path) -> set[int]:
    for name in ("generation_config.json", CONFIG_NAME):
        found = _ids(_json(directory, name).get("eos_token_id"))
        if found:
            return found
    return set()


def _ids(value: Any) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if type(each) is not int:
            raise FormatError("not the number of a token", field="eos_token_id", expected="an integer", got=repr(each))
    return set(ids)
