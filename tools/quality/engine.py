"""Divergences of files of every effort beside the engine's own, on the small Llama.

    python -m tools.quality.engine --python .venvs/mistralrs-0.9.5/bin/python --model SMALL --files q4k:calibrated,mix

The same files predict the same tokens, here and in mistral.rs. Both are compared with this package's float32 model by
the same definitions; here also in the engine's arithmetic, which rounds activations to eight bits for GGUF types.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import uqff
from tools.interop.client import ENVIRONMENT
from tools.quality import corpus, engine_job
from tools.quality.row import EFFORTS
from uqff.evaluation.evaluate import text_windows, window_logits
from uqff.evaluation.measures import Estimate, Predictions, Reference
from uqff.evaluation.windows import TextWindows
from uqff.planning.topology import topology
from uqff.quantization.recipe import parse_recipe

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""The text as it is: the engine answers nothing without a template."""
BITS, MIXED = 4.5, "q3k,q4k,q5k,q6k"
"""Of the mix: how many, and of which types."""
CALIBRATED = 32
"""Windows."""


class Asked:
    """The predictions that both are asked for: those after tokens that their text gives back.

    Attributes:
        texts: of each prediction, what comes before it, and how many tokens that is.
        rows: of each window, which of its predictions.
        targets: of each window, the tokens that follow.
    """

    def __init__(self, model: Path, cut: TextWindows) -> None:
        """Choose them."""
        from transformers import AutoTokenizer

        tokens: Any = AutoTokenizer.from_pretrained(model)
        self.texts: list[tuple[str, int]] = []
        self.rows, self.targets = [], []
        for at, window in enumerate(cut):
            kept = []
            for row, end in enumerate(range(cut.first + 1, len(window))):
                text = tokens.decode(window[:end], clean_up_tokenization_spaces=False)
                if tokens(text)["input_ids"] == list(window[:end]):
                    self.texts.append((text, end))
                    kept.append(row)
            self.rows.append(torch.tensor(kept))
            self.targets.append(torch.tensor(cut.targets(at))[self.rows[-1]])

    def of(self, logits: list[torch.Tensor]) -> list[torch.Tensor]:
        """The rows of those predictions."""
        return [each[rows] for each, rows in zip(logits, self.rows, strict=True)]

    def measured(self, logits: list[torch.Tensor], true: list[torch.Tensor]) -> Estimate:
        """The mean divergence."""
        parts = []
        for own, base, targets in zip(logits, true, self.targets, strict=True):

            def reference(part: slice, base: torch.Tensor = base, targets: torch.Tensor = targets) -> Reference:
                return Reference.of(base[part], targets[part])

            parts.append(Predictions.of(own, targets, 0, reference))
        far = Predictions.joined(parts).distances
        assert far is not None
        return far.kld


def theirs(python: Path, made: Path, asked: Asked, vocabulary: int, folder: Path) -> list[torch.Tensor]:
    """Log probabilities by mistral.rs, of each window."""
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    files = sorted(each.name for each in made.glob("*.uqff"))
    job = {"model": str(made), "files": files, "texts": asked.texts, "vocabulary": vocabulary}
    (folder / "job.json").write_text(json.dumps(job))
    command = [
        str(python),
        str(Path(engine_job.__file__).resolve()),
        str(folder / "job.json"),
        str(folder / "out.json"),
    ]
    environment = {**ENVIRONMENT, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        raise click.ClickException(f"mistral.rs ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    rows = torch.tensor(json.loads((folder / "out.json").read_text()))
    if not torch.isfinite(rows).all():
        raise click.ClickException("mistral.rs gave no log probabilities of some tokens")
    return list(rows.split([len(each) for each in asked.rows]))


def make(model: Path, out: Path, name: str, known: dict[str, Any]) -> None:
    """Quantise the model to ``TYPE:EFFORT``, or to ``mix``."""
    kind, _, effort = name.partition(":")
    if kind == "mix":
        plan = uqff.plan_types(model, bits=BITS, kinds=MIXED.split(","), imatrix=known["imatrix"])
        uqff.quantize_model(model, out, "q4k", measure=False, recipe=parse_recipe(topology(plan.types)))
        return
    how = EFFORTS[effort or "plain"]
    given = {key: known[key] if value is True else value for key, value in how.items()}
    uqff.quantize_model(model, out, kind, measure=False, **given)


@click.command()
@click.option("--python", type=click.Path(exists=True, path_type=Path), required=True, help="That has mistralrs 0.9.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True, help="The small Llama.")
@click.option("--files", default="afq4:best,q4_0:importance,q4k:calibrated,mxfp4:calibrated,mix", show_default=True)
@click.option("--context", default=128, show_default=True)
@click.option("--windows", default=4, show_default=True)
def main(python: Path, model: Path, files: str, context: int, windows: int) -> None:
    """Measure files here and in mistral.rs."""
    columns = ("file", "KLD", "in the engine's arithmetic", "mistral.rs's", "differ by")
    table = Table(*columns)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", uqff.FallbackWarning)
        folder = Path(name)
        texts = {part: corpus.write(part, folder / part, 400_000) for part in ("calibrate", "evaluate")}
        cut = text_windows(model, None, texts["evaluate"], context=context, most=windows)
        asked = Asked(model, cut)
        hessian = folder / "hessian"
        options: dict[str, Any] = {"text": texts["calibrate"], "context": context, "windows": CALIBRATED}
        known = {"imatrix": uqff.calibrate(model, hessian=hessian, **options), "hessian": hessian}
        plain: Any = uqff.load_model(model, dtype=torch.float32)
        true = asked.of([window_logits(plain, each, cut.first) for each in cut])
        click.echo(f"{len(asked.texts)} predictions of {windows} windows")
        for at, file in enumerate(files.split(",")):
            made = folder / str(at)
            make(model, made, file, known)
            found = []
            for arithmetic in ("exact", "engine"):
                own: Any = uqff.load_model(made, dtype=torch.float32, arithmetic=arithmetic)
                found.append(asked.measured(asked.of([window_logits(own, each, cut.first) for each in cut]), true))
            found.append(asked.measured(theirs(python, made, asked, true[0].shape[1], folder), true))
            spread = ((found[0].error or 0) ** 2 + (found[2].error or 0) ** 2) ** 0.5
            numbers = [f"{each.value:.5f} ± {each.error or 0:.5f}" for each in found]
            far = f"{(found[2].value - found[0].value) / spread:+.2f} errors"
            table.add_row(file, *numbers, far)
            click.echo(f"{file}: {numbers}, {far}")
    Console().print(table)


if __name__ == "__main__":
    main()
