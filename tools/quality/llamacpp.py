"""Perplexity and KL divergence of GGUF types beside llama.cpp's own, on the small Llama.

    python -m tools.quality.llamacpp --python .venvs/xllamacpp-VERSION/bin/python --model SMALL --types q8_0,q4_0

The same weights, in UQFF and converted to GGUF, predict the same windows, here and in llama.cpp. Both are compared with
this package's float32 model by the same definitions. llama.cpp rounds activations to blocks of eight bits for all types
but plain ones, which adds to its divergence, as it does here with `arithmetic="engine"`: differences from that are told
in standard errors.
"""

from __future__ import annotations

import json
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
from tools.quality import corpus, llamacpp_job
from uqff.conversion import gguf_of_uqff
from uqff.evaluation.evaluate import text_windows, window_logits
from uqff.evaluation.measures import Predictions, Reference
from uqff.evaluation.windows import TextWindows


def theirs(python: Path, file: Path, cut: TextWindows, vocabulary: int, folder: Path) -> list[torch.Tensor]:
    """Log probabilities of each window by llama.cpp, float32 ``[predictions, vocabulary]``."""
    job = {"file": str(file), "windows": [list(each) for each in cut], "first": cut.first, "vocabulary": vocabulary}
    (folder / "job.json").write_text(json.dumps(job))
    script = str(Path(llamacpp_job.__file__).resolve())
    command = [str(python), script, str(folder / "job.json"), str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise click.ClickException(f"llama.cpp ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [torch.tensor(each) for each in json.loads((folder / "out.json").read_text())]


def measured(logits: list[torch.Tensor], true: list[torch.Tensor], cut: TextWindows) -> Predictions:
    """What is measured of all windows."""
    parts = []
    for at, (own, base) in enumerate(zip(logits, true, strict=True)):
        targets = torch.tensor(cut.targets(at))

        def reference(part: slice, base: torch.Tensor = base, targets: torch.Tensor = targets) -> Reference:
            return Reference.of(base[part], targets[part])

        parts.append(Predictions.of(own, targets, cut.first, reference))
    return Predictions.joined(parts)


def own_measured(made: Path, arithmetic: Any, true: list[torch.Tensor], cut: TextWindows) -> Predictions:
    """What is measured of a model of ours."""
    own: Any = uqff.load_model(made, dtype=torch.float32, arithmetic=arithmetic)
    return measured([window_logits(own, each, cut.first) for each in cut], true, cut)


@click.command()
@click.option("--python", type=click.Path(exists=True, path_type=Path), required=True, help="That has xllamacpp.")
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True, help="The small Llama.")
@click.option("--types", default="unquant,q8_0,q4_0", show_default=True)
@click.option("--context", default=128, show_default=True)
@click.option("--windows", default=4, show_default=True)
def main(python: Path, model: Path, types: str, context: int, windows: int) -> None:
    """Measure types here and in llama.cpp."""
    table = Table(title=f"{windows} windows of {context} tokens")
    for column in ("type", "KLD", "with rounded activations", "llama.cpp's", "differ by", "perplexity", "llama.cpp's"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", uqff.FallbackWarning)
        folder = Path(name)
        text = corpus.write("evaluate", folder / "text", 400_000)
        cut = text_windows(model, None, text, context=context, most=windows)
        plain: Any = uqff.load_model(model, dtype=torch.float32)
        true = [window_logits(plain, each, cut.first) for each in cut]
        for kind in types.split(","):
            uqff.quantize_model(model, folder / kind, kind, measure=False, promote=False)
            gguf_of_uqff(folder / kind, folder / f"{kind}.gguf")
            here, rounded = (own_measured(folder / kind, arithmetic, true, cut) for arithmetic in ("exact", "engine"))
            size = true[0].shape[1]
            there = measured(theirs(python, folder / f"{kind}.gguf", cut, size, folder), true, cut)
            found = [each.distances for each in (here, rounded, there)]
            exact, a, b = [each for each in found if each is not None]
            numbers = [f"{each.kld.value:.4g} ± {each.kld.error or 0:.2g}" for each in (exact, a, b)]
            spread = ((a.kld.error or 0) ** 2 + (b.kld.error or 0) ** 2) ** 0.5
            far = f"{(b.kld.value - a.kld.value) / spread:+.2f} errors" if spread else "-"
            perplexities = [f"{each.perplexity.value:.4f}" for each in (here, there)]
            table.add_row(kind, *numbers, far, *perplexities)
            click.echo(f"{kind}: {numbers}, {far}, {perplexities}")
    Console().print(table)


if __name__ == "__main__":
    main()
