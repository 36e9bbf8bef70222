"""Text and models of a directory: it is data. Nothing in it runs, and little of it is believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.parallel.models import TinyCase, write
from uqff import FormatError, UnsupportedError
from uqff.cli import main
from uqff.parallel.text import Text
from uqff.parallel.transformers_model import known_values, model_type

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

PROMPT = "t5 t9 t17 t30"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(TinyCase("qwen2", "q8_0", (1, 2, 0), tied=True), tmp_path_factory.mktemp("text"))[0]


class Trap:
    """Pickled, it is a program."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sprung,))


def change(path: Path, **values: Any) -> None:
    """Set values of a JSON file."""
    present = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(present | values))


def trapped(model: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a model with all that ``transformers`` might execute, and the file that tells that it did."""
    copy, sprung = Path(shutil.copytree(model, folder / "trapped")), folder / "sprung"
    (copy / "trap.py").write_text(
        f"open({str(sprung)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, GPT2Tokenizer as Tokenizer\n"
        "TokenizerFast = Tokenizer\n"
    )
    for name in ("configuration_trap.py", "modeling_trap.py", "custom_generate/generate.py", "__init__.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(copy / "trap.py", copy / name)
    tokenizer = ["trap.Tokenizer", "trap.TokenizerFast"]
    auto = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model", "AutoTokenizer": tokenizer}
    change(
        copy / "config.json",
        auto_map=auto,
        attn_implementation="trap/kernel",
        _attn_implementation="trap/kernel",
        experts_implementation="trap/kernel",
        quantization_config={"quant_method": "trap"},
        use_kernels=True,
        return_dict=False,
        output_attentions=True,
    )
    change(copy / "generation_config.json", auto_map=auto, custom_generate="custom_generate", eos_token_id=2)
    change(copy / "tokenizer_config.json", auto_map=auto, tokenizer_file="trap.py", vocab_file="trap.py")
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.pkl"):
        (copy / name).write_bytes(pickle.dumps(Trap(sprung)))
    return copy, sprung


def without_tokenizer_json(copy: Path) -> None:
    """Take a tokenizer's one file away, and put a vocabulary of bytes in its place."""
    (copy / "tokenizer.json").unlink()
    letters = {letter: at for at, letter in enumerate("abcdefgh")}
    (copy / "vocab.json").write_text(json.dumps({**letters, "ab": 8, "<|endoftext|>": 9}))
    (copy / "merges.txt").write_text("#version: 0.2\na b\n")


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of ``uqff run``; a question on the terminal would be answered with yes."""
    result = CliRunner().invoke(main, ["run", *map(str, arguments)], input="y\n" * 9)
    return result.exit_code, result.stdout, result.stderr


def test_a_trapped_directory_runs_as_if_it_were_not(model: Path, tmp_path: Path) -> None:
    """The same answer to the last digit, and no code has run."""
    copy, sprung = trapped(model, tmp_path)
    answers = [run(path, "--prompt", PROMPT, "--tokens", 4, "--json") for path in (model, copy)]
    assert [code for code, _, _ in answers] == [0, 0], answers[1][2]
    (true, got), keys = (json.loads(text) for _, text, _ in answers), ("ids", "logprobs", "prompt_ids", "text")
    assert [got[key] for key in keys] == [true[key] for key in keys]
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", None])
def test_a_trapped_directory_without_tokenizer_json(model: Path, tmp_path: Path, name: str | None) -> None:
    """The vocabulary makes the tokenizer, whatever ``auto_map`` names."""
    copy, sprung = trapped(model, tmp_path)
    without_tokenizer_json(copy)
    change(copy / "tokenizer_config.json", tokenizer_class=name, eos_token="<|endoftext|>", init_inputs=["trap.py"])
    assert Text(copy).encode("abcab") == [8, 2, 8]
    code, text, errors = run(copy, "--prompt", "abc", "--tokens", 2, "--json")
    assert code == 0, errors
    assert json.loads(text)["prompt_ids"] == [8, 2]
    assert not sprung.exists()


def test_a_class_that_is_not_known_is_refused(model: Path, tmp_path: Path) -> None:
    """Only ``auto_map`` could say what it is, and that would be code."""
    copy, sprung = trapped(model, tmp_path)
    without_tokenizer_json(copy)
    change(copy / "tokenizer_config.json", tokenizer_class="TrapTokenizer")
    with pytest.raises(UnsupportedError, match="class is not known") as caught:
        Text(copy)
    assert (caught.value.field, caught.value.got) == ("tokenizer_class", "TrapTokenizer")
    code, _, errors = run(copy, "--prompt", "abc")
    assert (code, "TrapTokenizer" in errors) == (1, True)
    assert not sprung.exists()


def test_no_tokenizer_at_all(model: Path, tmp_path: Path) -> None:
    """What would be enough is named."""
    copy = Path(shutil.copytree(model, tmp_path / "bare"))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"):
        Text(copy)


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("tokenizer_config.json", {"chat_template": 7}, "not a template"),
        ("generation_config.json", {"eos_token_id": ["2"]}, "not the number of a token"),
        ("tokenizer_config.json", {"eos_token": {"id": 2}}, "tokenizer cannot be read"),
    ],
)
def test_nonsense_is_one_typed_error(
    model: Path, tmp_path: Path, name: str, values: dict[str, Any], problem: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "odd"))
    change(copy / name, **values)
    with pytest.raises(FormatError, match=problem) as caught:
        Text(copy)
    assert str(copy) in (caught.value.file or "")


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("generation_config.json", b"[]", "not a JSON object"),
        ("generation_config.json", b"{bad", "not JSON"),
        ("generation_config.json", b'{"eos_token_id":[[1]]}', "not the number of a token"),
        ("chat_template.jinja", b"\xff", "text is not Unicode"),
    ],
)
def test_files_that_are_none(model: Path, tmp_path: Path, name: str, raw: bytes, problem: str) -> None:
    """The file is named."""
    copy = Path(shutil.copytree(model, tmp_path / "odd"))
    (copy / name).write_bytes(raw)
    with pytest.raises(FormatError, match=problem) as caught:
        Text(copy)
    assert (caught.value.file or "").startswith(str(copy))


def replaced(pattern: str, content: str, how: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {how: pattern}, "content": content}


USUAL = [{"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁"), {"type": "NFKD"}, {"type": "StripAccents"}]


@pytest.mark.parametrize(
    ("field", "part", "got"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [replaced("t", "t" * 64)] * 3}, "too long"),
        ("normalizer", {"type": "Sequence", "normalizers": [replaced("t", "t" * 64)] * 2}, None),
        ("normalizer", {"type": "Sequence", "normalizers": [replaced("(?=t)", "t", "Regex")] * 13}, "too long"),
        ("normalizer", {"type": "Sequence", "normalizers": [replaced("(?=t)", "t", "Regex")] * 12}, None),
        ("normalizer", {"type": "Sequence", "normalizers": [replaced("ل", "ﷺ"), {"type": "NFKC"}] * 3}, "too long"),
        ("normalizer", {"type": "Sequence", "normalizers": [*USUAL, {"type": "Lowercase"}]}, None),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "t" * 600}] * 2}, "front"),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
                ]
                * 13,
            },
            "too long",
        ),
        ("decoder", {"type": "Sequence", "decoders": [replaced("t", "tt")] * 13}, "too long"),
        ("decoder", {"type": "Sequence", "decoders": [replaced("▁", " "), {"type": "Fuse"}]}, None),
    ],
)
def test_rules_that_make_a_text_long_are_refused(
    model: Path, tmp_path: Path, field: str, part: Any, got: str | None
) -> None:
    """Five replacements of a letter by a hundred, in a file of 2 KB, made a word take all memory."""
    copy = Path(shutil.copytree(model, tmp_path / "long"))
    change(copy / "tokenizer.json", **{field: part})
    if got is None:
        Text(copy)
        return
    with pytest.raises(UnsupportedError, match=f"tokenizer (makes|puts) .*{got}") as caught:
        Text(copy)
    assert (caught.value.field, caught.value.file) == (field, str(copy))


def test_a_panic_of_tokenizers_is_a_typed_error(model: Path, tmp_path: Path) -> None:
    """To Python it is no Exception. What numbers a post-processor adds is for the model to refuse, too."""
    copy = Path(shutil.copytree(model, tmp_path / "panic"))
    first, text = {"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [first, text], "pair": [], "special_tokens": {}}
    change(copy / "tokenizer.json", post_processor=processor)
    with pytest.raises(FormatError, match=r"tokenizer (fails|cannot be read)") as caught:
        Text(copy).encode(PROMPT, raw=True)
    assert caught.value.file == str(copy)
    processor["special_tokens"] = {"[X]": {"id": "[X]", "ids": [10**6], "tokens": ["x"]}}
    change(copy / "tokenizer.json", post_processor=processor)
    code, _, errors = run(copy, "--prompt", PROMPT, "--raw")
    assert code == 1
    assert "token outside of the vocabulary" in errors


@pytest.mark.parametrize(
    ("template", "got"), [("{{ 1 / 0 }}", "division by zero"), ("{{ raise_exception('no') }}", "no")]
)
def test_a_template_that_fails(model: Path, tmp_path: Path, template: str, got: str) -> None:
    """It says why; ``--raw`` does without it. Which bounds it has: ``models/test_template.py``."""
    copy = Path(shutil.copytree(model, tmp_path / "template"))
    change(copy / "tokenizer_config.json", chat_template=template)
    with pytest.raises(FormatError, match="chat template fails; --raw does without") as caught:
        Text(copy).encode(PROMPT)
    assert (caught.value.file, caught.value.got) == (str(copy), got)
    assert Text(copy).encode(PROMPT, raw=True) == [5, 9, 17, 30]


def test_only_known_values_reach_transformers(model: Path) -> None:
    """All that says how to compute, and nothing else."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    more = {"auto_map": {}, "attn_implementation": "a/b", "dtype": "x", "quantization_config": {}, "return_dict": False}
    assert known_values(config | more) == {k: v for k, v in config.items() if k not in ("architectures", "model_type")}


WATCHED = """
import sys
from click.testing import CliRunner
from uqff.cli import main
home, commands = sys.argv[1], [each.split("|") for each in sys.argv[2:]]
RUNS = {"exec", "compile", "import", "ctypes.dlopen", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
seen = []
def watch(event, arguments):
    if event == "socket.connect":
        seen.append((event, repr(arguments)))
    elif event in RUNS:
        places = [getattr(each, "co_filename", each) for each in arguments]
        if any(isinstance(each, str) and home in each for each in places):
            seen.append((event, repr(places)))
sys.addaudithook(watch)
for command in commands:
    done = CliRunner().invoke(main, command, input="y\\n" * 9)
    print(command[0], done.exit_code)
    if done.exit_code:
        print(done.output)
print(seen)
"""


def test_no_command_runs_anything_of_a_directory(model: Path, tmp_path: Path) -> None:
    """Python itself tells of all that it executes, imports, loads or starts: nothing lies in there."""
    copy, sprung = trapped(model, tmp_path)
    out = tmp_path / "trapped" / "out"
    commands = [
        f"inspect|{copy}",
        f"checksum|{copy}|--layers",
        f"dequantize|{copy}|{out}",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED, str(tmp_path / "trapped"), *commands],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"UQFF_KERNELS": "reference"},
    )
    *codes, seen = done.stdout.splitlines()
    assert codes == [f"{command.split('|')[0]} 0" for command in commands], done.stdout + done.stderr
    assert seen == "[]"
    assert not sprung.exists()


def test_a_configuration_without_model_type_is_of_its_class() -> None:
    """Others have the class of Llama, too, and other defaults: heads of 128, for one."""
    assert model_type({"architectures": ["LlamaForCausalLM"]}) == "llama"
    assert model_type({"architectures": ["LlamaForCausalLM"], "model_type": "bert"}) == "llama"
