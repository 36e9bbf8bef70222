"""``uqff run`` and ``python -m uqff.run``: what is printed, and what every rank exits with."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.parallel.models import TinyCase, write
from uqff.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # of torch, see test_model.py
    pytest.mark.long,
]

PROMPT = "t5 t9 t17 t30"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(TinyCase("qwen2", "q8_0", (1, 2, 0), tied=True), tmp_path_factory.mktemp("run"))[0]


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output, errors of ``uqff run``."""
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_text_and_json_say_the_same(model: Path) -> None:
    """Words of the tokenizer; ids and log probabilities beside them."""
    code, text, _ = run(model, "--prompt", PROMPT, "--tokens", 5)
    assert code == 0
    code, document, _ = run(model, "--prompt", PROMPT, "--tokens", 5, "--json", "--device", "cpu")
    assert code == 0
    told = json.loads(document)
    assert told["prompt_ids"] == [5, 9, 17, 30]
    assert text == told["text"] + "\n"
    assert told["tokens"] == [f"t{id_}" for id_ in told["ids"]]
    assert len(told["logprobs"]) == 5
    assert all(value < 0 for value in told["logprobs"])
    assert (told["finish_reason"], told["world_size"]) == ("length", 1)


def test_a_token_that_ends_the_text(model: Path, tmp_path: Path) -> None:
    """The configuration names it; it is told, but not part of the text."""
    ids = json.loads(run(model, "--prompt", PROMPT, "--tokens", 5, "--json")[1])["ids"]
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[2]]}))
    told = json.loads(run(copy, "--prompt", PROMPT, "--tokens", 5, "--json")[1])
    assert told["ids"] == ids[: ids.index(ids[2]) + 1]
    assert told["text"] == " ".join(told["tokens"][:-1])
    assert told["finish_reason"] == "stop"


def test_chat_template_unless_raw(model: Path, tmp_path: Path) -> None:
    """A template, from either place, gets the prompt as a user's message; ``--raw`` leaves it aside."""
    copy = shutil.copytree(model, tmp_path / "model")
    message, end = "{{ 't7 ' if m.role == 'user' }}{{ m.content }}", "{{ ' t8' if add_generation_prompt }}"
    template = "{% for m in messages %}" + message + "{% endfor %}" + end
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "chat_template": template, "pad_token": None})
    )
    assert json.loads(run(copy, "--prompt", PROMPT, "--json")[1])["prompt_ids"] == [7, 5, 9, 17, 30, 8]
    assert json.loads(run(copy, "--prompt", PROMPT, "--json", "--raw")[1])["prompt_ids"] == [5, 9, 17, 30]
    (copy / "chat_template.jinja").write_text("t4")
    assert json.loads(run(copy, "--prompt", PROMPT, "--json")[1])["prompt_ids"] == [4]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "tpu"], 1, "uqff: no such device"),
        pytest.param(
            ["--device", "cuda"],
            1,
            "uqff: no such device here: expected cpu, got cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device"),
        ),
        (["--prompt", ""], 1, "uqff: prompt is empty: expected at least one token"),
        (["--tokens", "0"], 2, "Invalid value for '--tokens'"),
        (["--dtype", "int8"], 2, "Invalid value for '--dtype': 'int8' is not one of 'f32', 'f16', 'bf16'."),
    ],
)
def test_calls_that_are_wrong(model: Path, arguments: list[str], code: int, message: str) -> None:
    got, _, errors = run(model, "--prompt", PROMPT, *arguments)
    assert (got, message in errors) == (code, True), errors


def test_names_of_dtypes(model: Path) -> None:
    """Torch's mean the same as the short ones."""
    short, long = (
        run(model, "--prompt", PROMPT, "--tokens", 1, "--dtype", name, "--json")[1] for name in ("bf16", "bfloat16")
    )
    assert json.loads(short)["logprobs"] == json.loads(long)["logprobs"]
    assert (
        json.loads(short)["logprobs"]
        != json.loads(run(model, "--prompt", PROMPT, "--tokens", 1, "--json")[1])["logprobs"]
    )


def test_no_such_model(tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere", "--prompt", PROMPT)[0] == 2


def test_torchrun(model: Path) -> None:
    """Two ranks, started as the documentation says: rank 0 alone prints, the same tokens as one process."""
    alone = json.loads(run(model, "--prompt", PROMPT, "--tokens", 5, "--json")[1])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command = [
        *torchrun,
        "-m",
        "uqff.run",
        str(model),
        "--prompt",
        PROMPT,
        "--tokens",
        "5",
        "--json",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT, env=environment())
    told = json.loads(done.stdout)
    assert (told["ids"], told["tokens"], told["world_size"]) == (alone["ids"], alone["tokens"], 2)
    assert told["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-5)


def test_every_rank_exits_with_an_error(model: Path, tmp_path: Path) -> None:
    """Rank 1 has a file that is cut short: both end, with 1 and a message that says so."""
    copy = shutil.copytree(model, tmp_path / "cut")
    with open(copy / "0-0.uqff", "r+b") as file:
        file.truncate(5000)
    port = str(free_port())
    ranks = []
    for rank, path in enumerate((model, copy)):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [
            sys.executable,
            "-m",
            "uqff.run",
            str(path),
            "--prompt",
            PROMPT,
            "--timeout",
            "60",
            "--device",
            "cpu",
        ]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], errors
    assert "uqff: rank 0 of 2: opening model" in errors[0]
    assert "failed on rank 1" in errors[0]
    assert "uqff: rank 1 of 2: header runs past the end of the file" in errors[1]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "UQFF_KERNELS": "reference", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])
