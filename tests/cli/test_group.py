"""The command line as a whole: its table of commands, errors, exit codes, pipes, and how little it imports."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import uqff
from tests.support.tiny_files import GOLDEN, ROOT, unquant, write_file
from uqff.cli import COMMANDS, TASKS, LazyGroup, main

FILE = GOLDEN / "qwen2-f32" / "q4k-0.uqff"


def test_version() -> None:
    """The version of the package."""
    assert CliRunner().invoke(main, ["--version"]).output == f"uqff {uqff.__version__}\n"


def test_help_lists_the_table() -> None:
    """By tasks, each command once, with its line."""
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    width = max(map(len, COMMANDS))
    assert sorted(name for names in TASKS.values() for name in names) == sorted(COMMANDS)
    listed = [
        [f"{task}:", *(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names)] for task, names in TASKS.items()
    ]
    assert result.output.endswith("\n\n".join("\n".join(lines) for lines in listed) + "\n")


def test_a_command_that_is_spelt_otherwise() -> None:
    """The one that is meant is named."""
    for name, hint in (
        ("quantise", " Did you mean 'quantize'?"),
        ("dequantise", " Did you mean 'dequantize'?"),
        ("xyzzy", ""),
    ):
        result = CliRunner().invoke(main, [name, "x"])
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: No such command '{name}'.{hint}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's script asks this very program, which then answers with commands, options, values and paths."""
    monkeypatch.setattr("click.shell_completion.BashComplete._check_version", lambda *_: None)  # of the bash here
    script = CliRunner().invoke(main, ["completion", shell])
    assert script.exit_code == 0
    assert f"_UQFF_COMPLETE={shell}_complete" in script.output

    def answers(*words: str) -> set[str]:
        line = " ".join(("uqff", *words))
        environment = {"_UQFF_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        if shell == "fish":
            environment["COMP_CWORD"] = words[-1]
        done = CliRunner().invoke(main, [], env=environment, prog_name="uqff")
        return set(re.split(r"[\n,\t]", done.output))

    assert {"inspect", "push"} <= answers("")
    assert {"--deep", "--strict"} <= answers("verify", "--")
    assert {"uqff", "gguf"} <= answers("convert", "--to", "")
    assert "file" in answers("inspect", "mod")
    assert {"q4_0", "q4_1", "q4k"} == answers("quantize", "SRC", "OUT", "--isq", "q4") - {"plain", "", "_"}
    assert "q8_0" in answers("run", "MODEL", "--isq", "")
    assert "q4_0" in answers("plan", "SRC", "--types", "q8_0,q4_")  # "q8_0,q4_0", but for the comma


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_agrees_with_the_commands(name: str) -> None:
    """Every entry can be imported, and its line is the command's own."""
    assert isinstance(main, LazyGroup)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.get_short_help_str(limit=1000) == COMMANDS[name][1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in COMMANDS),
        ["inspect", str(FILE)],
        ["verify", str(FILE)],
        ["checksum", str(FILE)],
        ["checksum", "--layers", str(FILE)],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported(arguments: list[str]) -> None:
    """It takes seconds, and these answer in tenths of one; numba neither."""
    script = (
        "import sys\n"
        "from uqff.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print('imported:', sorted({'torch', 'numba', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert done.stderr == ""


def test_help_imports_no_command() -> None:
    """Commands to come may be heavy; the table is enough for --help."""
    script = (
        "import sys\n"
        "from uqff.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('uqff.cli.') or name == 'rich'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_completion_of_a_name_imports_no_command() -> None:
    """A shell asks at every press of TAB; so many modules would make it wait."""
    script = (
        "import sys\n"
        "from uqff.cli import main\n"
        "try:\n    main([], prog_name='uqff')\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('uqff.cli.') or name == 'rich'])\n"
    )
    asked = {"_UQFF_COMPLETE": "zsh_complete", "COMP_WORDS": "uqff ", "COMP_CWORD": "1"}
    call = [sys.executable, "-c", script]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ | asked)
    *answer, imported = done.stdout.splitlines()
    assert answer == [text for names in TASKS.values() for name in names for text in ("plain", name, COMMANDS[name][1])]
    assert imported == "[]"


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["inspect"], ["verify"], ["inspect", "no/such/file"]])
def test_a_wrong_call_is_2(arguments: list[str]) -> None:
    """Nothing on the standard output but help."""
    assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_that_cannot_be_read_is_2(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system is no violation."""
    path = write_file(tmp_path / "m.uqff", {"0": unquant([1.0])})

    def refuse(_path: object) -> None:
        raise PermissionError(13, "Permission denied", "a\x1b[31m.uqff")

    monkeypatch.setattr("uqff.container.file.MappedFile", refuse)
    result = CliRunner().invoke(main, [command, str(path)])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "uqff: Permission denied: a\\x1b[31m.uqff\n")


def test_control_c_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback, no "Aborted!": the shell's own code for it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uqff.container.file.MappedFile", interrupt)
    result = CliRunner().invoke(main, ["inspect", str(FILE)])
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.skipif(os.name != "posix", reason="SIGPIPE is POSIX")
@pytest.mark.parametrize("arguments", [["inspect", str(FILE), "--json"], ["--help"], ["inspect", "--help"]])
def test_a_closed_pipe_is_quiet(arguments: list[str]) -> None:
    """`uqff inspect ... | head` says nothing when head has seen enough; so does what click prints by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uqff", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_the_script_of_a_checkout() -> None:
    """tools/inspect_uqff.py is `uqff inspect`, from anywhere."""
    script = [sys.executable, str(ROOT / "tools" / "inspect_uqff.py"), str(FILE)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    assert done.stdout == CliRunner().invoke(main, ["inspect", str(FILE)]).output


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_output_fits_the_encoding(encoding: str) -> None:
    """Bars are blocks or, where there are none, number signs; nothing cannot be printed."""
    result = CliRunner(charset=encoding).invoke(main, ["inspect", str(FILE), "0"])
    assert result.exit_code == 0
    text = result.stdout_bytes.decode(encoding)
    assert ("█" in text, "#" in text) == (encoding == "utf-8", encoding == "ascii")
    assert ("u32 × ndim" in text, "u32 \\xd7 ndim" in text) == (encoding == "utf-8", encoding == "ascii")


@pytest.mark.skipif(os.name != "posix", reason="a closed standard output is POSIX")
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["checksum"], ["checksum", "--layers"]])
def test_a_closed_output_is_quiet(command: list[str]) -> None:
    """`uqff verify FILE >&-` wants the exit code alone."""
    call = [sys.executable, "-m", "uqff", *command, str(FILE)]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *call], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="closed descriptors are POSIX")
def test_all_streams_may_be_closed() -> None:
    """The exit code is that of the work, and no file gets the number of a stream, into which C code would write."""
    call = [sys.executable, "-m", "uqff", "checksum", str(FILE)]
    done = subprocess.run(["sh", "-c", '"$@" <&- 2>&-', "sh", *call], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout.split()[1:]) == (0, [FILE.name.encode()])
    script = (
        "import os, sys\n"
        "from uqff.cli import main\n"
        f"main(['inspect', {str(FILE)!r}], standalone_mode=False)\n"
        "null = os.stat(os.devnull)\n"
        "sys.exit(sum(os.path.samestat(os.fstat(number), null) << number for number in range(3)))\n"
    )
    call = [sys.executable, "-c", script]
    assert subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *call], check=False).returncode == 0b111


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("UQFF_NUM_THREADS", "0", "a positive integer"),
        ("UQFF_NUM_THREADS", "many", "a positive integer"),
        ("UQFF_KERNELS", "cuda", "'numba' or 'reference'"),
        ("UQFF_MMAP", "no", "'0' or '1'"),
    ],
)
def test_variables_that_say_nonsense_are_2(
    variable: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, no traceback."""
    monkeypatch.setenv(variable, text)
    result = CliRunner().invoke(main, ["checksum", str(FILE)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"uqff: {variable}: expected {expected}, got {text!r}\n"


def test_too_little_memory_is_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, no traceback."""

    def exhaust(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("uqff.container.file.MappedFile", exhaust)
    result = CliRunner().invoke(main, ["inspect", str(FILE)])
    assert (result.exit_code, result.output) == (2, "uqff: out of memory\n")


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux says")
def test_a_file_that_is_cut_while_it_is_copied_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mapped memory that is written and has gone, the system says "Bad address", which nobody understands."""
    source = tmp_path / "cut"
    source.write_bytes(bytes(2 * mmap.PAGESIZE))

    def copy(*_: object) -> None:
        with open(source, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped, open(tmp_path / "out", "wb") as out:
            file.truncate(0)
            os.write(out.fileno(), mapped)

    monkeypatch.setattr("uqff.container.file.MappedFile", copy)
    result = CliRunner().invoke(main, ["inspect", str(FILE)])
    assert (result.exit_code, result.output) == (2, "uqff: a file has become shorter while it was read\n")


OPTIONS = {
    "--json": {"inspect", "checksum", "dequantize", "diff", "quantize", "report", "verify"},
    "--force": {"dequantize", "quantize"},
    "--quiet": {"dequantize", "quantize"},
    "--shard-size": {"dequantize", "quantize"},
    "--dtype": {"dequantize", "quantize"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_one_meaning_have_one_name(option: str) -> None:
    """Every command that shows or writes has them."""
    assert isinstance(main, LazyGroup)
    commands = {name: main.get_command(click.Context(main), name) for name in COMMANDS}
    having = {
        name
        for name, command in commands.items()
        if command is not None and any(option in parameter.opts for parameter in command.params)
    }
    assert having >= OPTIONS[option]


def test_the_process_ends_with_the_codes_and_the_whole_output(tmp_path: Path) -> None:
    """What ends the process at once loses nothing: exit codes, megabytes through a pipe, text on both streams."""

    def process(*arguments: object) -> tuple[int, bytes, bytes]:
        done = subprocess.run([sys.executable, "-m", "uqff", *map(str, arguments)], capture_output=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = process("--version")
    assert (code, out, err) == (0, f"uqff {uqff.__version__}\n".encode(), b"")
    code, out, err = process("checksum", tmp_path, "--layers")
    assert (code, out) == (1, b"")
    assert err.startswith(b"uqff: no .uqff file in the directory")
    assert process("nonsense")[0] == 2
    layer = uqff.quantize(torch.zeros(1, 32), "q8_0")
    uqff.save(dict.fromkeys(range(3000), layer), tmp_path / "many.uqff")
    code, out, err = process("inspect", tmp_path / "many.uqff", "--json")
    assert (code, err) == (0, b"")
    assert len(out) > 1_000_000
    assert len(json.loads(out)["layers"]) == 3000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["inspect", str(FILE)]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    """Also for what click prints by itself."""
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "uqff", *arguments]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "uqff: No space left on device\n")


@pytest.mark.parametrize("module", ["click", "uqff.cli.inspect", "numpy"])
def test_control_c_while_something_is_imported_is_quiet(module: str) -> None:
    """Imports take most of the time of a short command."""
    script = (
        "import runpy, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['uqff', 'inspect', {str(FILE)!r}]\n"
        "runpy.run_module('uqff', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
