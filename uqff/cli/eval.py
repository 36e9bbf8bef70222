"""``uqff eval``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from uqff.cli.options import DtypeChoice, model_path, on_ranks, rank_options
from uqff.cli.progress import shown_progress

if TYPE_CHECKING:
    from uqff.evaluation.evaluate import Evaluation
    from uqff.evaluation.measures import Distances, Estimate

__all__ = ["eval_"]


@click.command("eval", short_help="Measure a model: perplexity, and how far it is from a reference.")
@click.argument("path", metavar="MODEL", type=click.Path())
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False), help="UTF-8 text to predict.")
@click.option("--reference", metavar="SRC", help="Model that is taken as true: usually the checkpoint.")
@click.option("--logits", type=click.Path(exists=True, dir_okay=False), help="Its predictions, from --keep-logits.")
@click.option(
    "--keep-logits",
    type=click.Path(dir_okay=False),
    help="Keep the reference's predictions in a file; without --reference, MODEL's own. Two bytes a probability.",
)
@click.option("--context", default=512, show_default=True, type=int, help="Tokens of a window.")
@click.option("--stride", type=int, help="Tokens from one window to the next; the context if not given.")
@click.option("--first", type=int, help="Position from which on predictions count; by default half the context.")
@click.option("--windows", type=int, help="How many windows at most.")
@click.option("--buckets", default=4, show_default=True, type=int, help="Ranges of positions that are told apart.")
@click.option("--dtype", type=DtypeChoice(), default="f32", show_default=True, help="Of activations, of both models.")
@rank_options
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw it: an SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def eval_(
    path: str,
    text: str,
    reference: str | None,
    logits: str | None,
    keep_logits: str | None,
    context: int,
    stride: int | None,
    first: int | None,
    windows: int | None,
    buckets: int,
    dtype: str,
    device: str | None,
    timeout: float,
    check_all: bool,
    isq: str | None,
    workers: int | None,
    picture: str | None,
    as_json: bool,
) -> None:
    """Measure how well MODEL predicts a text, and how far its predictions are from a reference's.

    MODEL is a model directory, DIR:TYPE, a .uqff file, or a checkpoint, which --isq quantises while it is loaded. The
    same is true of --reference. Tokens are those of MODEL's tokenizer.

    Windows and columns are those of llama-perplexity --kl-divergence, so that numbers compare: every window's first
    half is context only. Columns that it has not: log p, top 5, errors of percentiles. --stride makes windows overlap.

    On several ranks, each reading its share only, and rank 0 printing:

        python -m torch.distributed.run --nproc-per-node 2 -m uqff eval MODEL --text FILE
    """
    path, isq = model_path(path, isq, "MODEL")
    if reference is not None:
        reference, _ = model_path(reference, None, "--reference")

    from uqff.codes import LOADED_DTYPES
    from uqff.container.atomic import check_outputs
    from uqff.evaluation.evaluate import evaluate
    from uqff.parallel.comm import exchange_device
    from uqff.parallel.consensus import settle

    with on_ranks(device, timeout) as (comm, place), shown_progress(shown=not comm.rank and not as_json) as progress:
        outputs = (None, None) if comm.rank else (keep_logits, picture)
        settle(comm, "looking for outputs", lambda: check_outputs(*outputs), exchange_device(place))
        found = evaluate(
            path,
            text=text,
            reference=reference,
            logits=logits,
            keep_logits=keep_logits,
            context=context,
            stride=stride,
            first=first,
            windows=windows,
            buckets=buckets,
            comm=comm,
            device=place,
            dtype=LOADED_DTYPES[dtype.upper()].torch,
            check="all" if check_all else "sample",
            isq=isq,
            workers=workers,
            progress=progress,
        )
    if comm.rank:
        return
    if picture is not None:
        from uqff.evaluation.picture import write_picture

        write_picture(found, picture)
    if as_json:
        click.echo(json.dumps(found.document, indent=2))
    else:
        _show(found)


def _show(found: Evaluation) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table

    windows = found.windows
    echo_heading(found.model)
    counted = f"positions {windows.first} to {windows.context - 2} of windows of {windows.context}"
    pairs = [("text", f"{len(windows.ids):,} tokens, {len(windows):,} windows, {len(found.predictions):,} predictions")]
    pairs += [("counted", counted), ("reference", found.reference or "none")]
    echo_pairs([*pairs, ("perplexity", _told(found.perplexity))])
    if found.distances is not None:
        print()
        echo_pairs(_pairs(found.distances))
        print()
        rows = [
            ("smallest" if share == 0 else "largest" if share == 100 else f"{share:g} %", _told(kld), _told(dp, 100))
            for (share, kld), dp in zip(
                found.distances.kld_percentiles.items(), found.distances.dp_percentiles.values(), strict=True
            )
        ]
        echo_table([("percentile", "right"), ("KLD", "left"), ("Δp, %", "left")], rows)
    print()
    columns = [("positions", "left"), ("predictions", "right"), ("perplexity", "left")]
    columns += [("KLD", "left"), ("same top, %", "left")] if found.distances is not None else []
    lines = []
    for each in found.buckets:
        line = [f"{each.start} to {each.stop - 1}", f"{each.count:,}", _told(each.perplexity)]
        if each.distances is not None:
            line += [_told(each.distances.kld), _told(each.distances.same_top, 100)]
        lines.append(line)
    echo_table(columns, lines)


def _pairs(far: Distances) -> list[tuple[str, str]]:
    """Names as ``llama-perplexity`` has them, where it has them."""
    return [
        ("Mean PPL(Q)/PPL(base)", _told(far.ratio)),
        ("Mean ln(PPL(Q)/PPL(base))", _told(far.ln_ratio)),
        ("Mean PPL(Q)-PPL(base)", _told(far.difference)),
        ("Mean PPL(base)", _told(far.base_perplexity)),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{100 * far.correlation:.2f} %"),
        ("Mean KLD", _told(far.kld)),
        ("Mean Δp", f"{_told(far.dp, 100)} %"),
        ("RMS Δp", f"{_told(far.dp_rms, 100)} %"),
        ("RMS Δ log p", _told(far.log_prob_rms)),
        ("Same top p", f"{_told(far.same_top, 100)} %"),
        ("Common of top 5", f"{_told(far.top, 100)} %"),
    ]


def _told(estimate: Estimate, factor: float = 1) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error * factor:.2g}"
    return f"{estimate.value * factor:.6g}{error}"
