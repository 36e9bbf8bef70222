"""Perplexity and distances from a reference: the definitions, windows, kept logits, ranks, and the command."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import uqff
from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import VOCABULARY, TinyCase
from tests.parallel.ranks import run_ranks
from uqff.cli import main
from uqff.errors import FormatError, UnsupportedError
from uqff.evaluation.measures import Predictions, top_tokens
from uqff.evaluation.windows import TextWindows
from uqff.progress import Step

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

IDS = [3 + (7 * at * at + at // 3) % (VOCABULARY - 3) for at in range(100)]
CONTEXT, FIRST = 32, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``checkpoint``, a coarse ``model`` of it, and a ``text``."""
    made = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(TinyCase("llama", "q8_0", (1, 2, 0)), made / "checkpoint")
    uqff.quantize_model(made / "checkpoint", made / "model", ["q4_0"])
    (made / "text").write_text(" ".join(f"t{each}" for each in IDS))
    return made


def found_by_hand(folder: Path) -> dict[str, Any]:
    """What the definitions give, written out for one prediction after another."""
    rows = []
    models = [uqff.load_model(folder / name, dtype=torch.float32) for name in ("model", "checkpoint")]
    for begin in range(0, len(IDS) - CONTEXT + 1, CONTEXT):
        window = IDS[begin : begin + CONTEXT]
        with torch.inference_mode():
            kept = CONTEXT - FIRST
            q, p = (m(torch.tensor([window]), logits_to_keep=kept).logits[0].double().numpy() for m in models)
        for at in range(kept - 1):
            token = window[FIRST + at + 1]
            ln_q, ln_p = (each - each.max() - math.log(np.exp(each - each.max()).sum()) for each in (q[at], p[at]))
            common = {*np.argsort(-ln_q)[:5].tolist()} & {*np.argsort(-ln_p)[:5].tolist()}
            kld = float((np.exp(ln_p) * (ln_p - ln_q)).sum())
            rows.append((-ln_q[token], -ln_p[token], kld, ln_q.argmax() == ln_p.argmax(), len(common) / 5))
    nll, base, kld, same, top = np.array(rows, float).T
    n = len(rows)

    def error(values: Any) -> float:
        return float(values.std() / math.sqrt(n - 1))

    ordered, dp = np.sort(kld), np.exp(-nll) - np.exp(-base)
    ranks = [0.95 * (n - 1) + sign * math.sqrt(n * 0.95 * 0.05) for sign in (1, -1)]
    high, low = np.interp(ranks, np.arange(n), ordered)
    ratio = math.exp(nll.mean() - base.mean())
    return {
        "n": n,
        "perplexity": (math.exp(nll.mean()), math.exp(nll.mean()) * error(nll)),
        "ln_ratio": ((nll - base).mean(), error(nll - base)),
        "ratio": (ratio, ratio * error(nll - base)),
        "correlation": np.corrcoef(nll, base)[0, 1],
        "kld": (kld.mean(), error(kld)),
        "kld 95": (np.percentile(kld, 95), (high - low) / 2),
        "dp": (dp.mean(), error(dp)),
        "dp_rms": (math.sqrt((dp * dp).mean()), error(dp * dp) / 2 / math.sqrt((dp * dp).mean())),
        "log_prob_rms": (
            math.sqrt(((nll - base) ** 2).mean()),
            error((nll - base) ** 2) / 2 / math.sqrt(((nll - base) ** 2).mean()),
        ),
        "same_top": (same.mean(), math.sqrt(same.mean() * (1 - same.mean()) / (n - 1))),
        "top": (top.mean(), error(top)),
    }


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"text": folder / "text", "context": CONTEXT, "first": FIRST, **more}


def test_definitions(folder: Path) -> None:
    """Every number is the one that a direct computation in float64 gives, up to the order of sums."""
    hand = found_by_hand(folder)
    told: list[Step] = []
    found = uqff.evaluate(folder / "model", reference=folder / "checkpoint", progress=told.append, **options(folder))
    far = found.distances
    assert far is not None
    assert len(found.predictions) == hand.pop("n") == 3 * 19
    assert far.correlation == pytest.approx(hand.pop("correlation"), rel=1e-9)
    assert 0.02 < far.kld.value < 2, "a model that differs"
    pairs = {name: getattr(far, name) for name in hand if hasattr(far, name)}
    pairs |= {"perplexity": found.perplexity, "kld 95": far.kld_percentiles[95.0]}
    assert pairs.keys() == hand.keys()
    for name, estimate in pairs.items():
        assert (estimate.value, estimate.error) == pytest.approx(hand[name], rel=1e-9), name
    assert [(each.start, each.stop, each.count) for each in found.buckets] == [
        (12, 16, 12),
        (16, 21, 15),
        (21, 26, 15),
        (26, 31, 15),
    ]
    assert sum(b.count * (b.distances.kld.value if b.distances else 0) for b in found.buckets) == pytest.approx(
        far.kld.value * len(found.predictions)
    )
    assert told[-1] == Step("evaluate", "window 3", 3, 3, 96, 96, "tokens")


def test_the_likeliest_tokens() -> None:
    """Of equals the lowest ids, also of those that are only beside the five; NaN are the least likely; few tokens."""
    logits = torch.tensor([[1.0, 5, 5, 2, 2, 2, 2, 5], [8, 7, 6, 5, 4, 3, 2, 1], [0] * 8, [-torch.inf] * 8])
    expected = [[1, 2, 7, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert top_tokens(logits).tolist() == expected
    logits[1, 1], logits[2] = torch.nan, torch.nan
    assert top_tokens(logits).tolist() == [expected[0], [0, 2, 3, 4, 5], *expected[2:]]
    assert top_tokens(logits[:2, :3]).tolist() == [[1, 2, 0], [0, 2, 1]]
    rows = torch.randint(0, 9, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    by_hand = [[at for _, at in sorted((-each, at) for at, each in enumerate(row))][:5] for row in rows.tolist()]
    assert top_tokens(rows).tolist() == by_hand


def test_no_reference_no_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found only where there is something to compare them with."""
    monkeypatch.setattr("uqff.evaluation.measures.top_tokens", None)
    made = Predictions.of(torch.zeros(3, 8), torch.tensor([1, 2, 3]), 4)
    assert made.nll.tolist() == [math.log(8)] * 3
    assert made.distances is None


def test_a_model_is_no_distance_from_itself(folder: Path) -> None:
    """Exactly none, with its live predictions; next to none with kept ones, whose tokens and nll are exact."""
    found = uqff.evaluate(folder / "checkpoint", reference=folder / "checkpoint", **options(folder))
    assert found.distances is not None
    assert not found.predictions.kld.any()
    assert (found.distances.ratio.value, found.distances.ratio.error, found.distances.correlation) == (1, 0, 1)
    assert (found.distances.same_top.value, found.distances.top.value) == (1, 1)
    uqff.evaluate(folder / "checkpoint", keep_logits=folder / "own", **options(folder))
    kept = uqff.evaluate(folder / "checkpoint", logits=folder / "own", **options(folder))
    assert kept.distances is not None
    assert (kept.predictions.base == kept.predictions.nll).all()
    assert (kept.distances.same_top.value, kept.distances.top.value) == (1, 1)
    assert abs(kept.predictions.kld).max() < 1e-7


def test_kept_logits_stand_for_the_reference(folder: Path) -> None:
    """The same findings as with the model itself, of that text, those windows and that model only."""
    given = options(folder)
    live = options(folder, reference=folder / "checkpoint")
    first = uqff.evaluate(folder / "model", keep_logits=folder / "kept", **live)
    again = uqff.evaluate(folder / "model", logits=folder / "kept", **live)
    assert first.distances is not None
    assert again.distances is not None
    assert again.reference == str(folder / "checkpoint")
    assert again.distances.same_top == first.distances.same_top
    assert again.distances.kld.value == pytest.approx(first.distances.kld.value, rel=1e-5)
    assert (again.predictions.base == first.predictions.base).all()
    with pytest.raises(FormatError, match="logits of another model"):
        uqff.evaluate(folder / "model", logits=folder / "kept", reference=folder / "model", **given)
    with pytest.raises(FormatError, match="logits of another text, or of other windows"):
        uqff.evaluate(folder / "model", logits=folder / "kept", **options(folder, windows=2))
    save_file(load_file(folder / "kept"), folder / "none")
    with pytest.raises(FormatError, match="no file of logits"):
        uqff.evaluate(folder / "model", logits=folder / "none", **given)


def test_windows() -> None:
    """llama.cpp's by default; overlapping ones count every prediction once."""
    made = TextWindows.of(range(40), 99, context=16)
    assert (len(made), made.first, made.scored) == (2, 8, 7)
    assert [window[:2] for window in made] == [(99, 1), (99, 17)]
    assert made.targets(1) == tuple(range(25, 32))
    overlapping = TextWindows.of(range(40), context=16, stride=4)
    counted = [token for at in range(len(overlapping)) for token in overlapping.targets(at)]
    assert counted == list(range(12, 40))
    shortest = TextWindows.of(range(5), context=2)  # half the context would be its last token, which predicts none
    assert (shortest.first, [shortest.targets(at) for at in range(len(shortest))]) == (0, [(1,), (3,)])
    with pytest.raises(FormatError, match="text is too short: expected at least 16 tokens, got 15"):
        TextWindows.of(range(15), context=16)
    for wrong in ({"context": 1}, {"context": 8, "stride": 9}, {"context": 8, "first": 7}, {"context": 8, "most": 0}):
        with pytest.raises(UnsupportedError, match="no such windows"):
            TextWindows.of(range(40), **wrong)


def measured(comm: Any, folder: str) -> list[float]:
    place = Path(folder)
    found = uqff.evaluate(
        place / "model", reference=place / "checkpoint", comm=comm, keep_logits=place / "ranks", **options(place)
    )
    assert found.distances is not None
    return [found.perplexity.value, found.distances.kld.value, found.distances.log_prob_rms.value]


def test_two_ranks_find_the_same(folder: Path) -> None:
    """Up to the order in which products are added up; rank 0 keeps the logits."""
    one, two = run_ranks(2, measured, str(folder))
    alone = uqff.evaluate(folder / "model", logits=folder / "ranks", **options(folder))
    assert one == two
    assert alone.distances is not None
    assert one == pytest.approx(
        [alone.perplexity.value, alone.distances.kld.value, alone.distances.log_prob_rms.value], rel=1e-3
    )


def test_command(folder: Path) -> None:
    """The columns under the names of llama-perplexity; JSON of the same numbers; a picture that is XML."""
    call = ["eval", str(folder / "model"), "--reference", str(folder / "checkpoint"), "--text", str(folder / "text")]
    call += ["--context", "32", "--device", "cpu"]
    done = CliRunner().invoke(main, [*call, "--json", "--picture", str(folder / "p.svg")], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["windows"] == {"count": 3, "context": 32, "stride": 32, "first": 16}
    assert told["predictions"] == 45
    assert xml.etree.ElementTree.parse(folder / "p.svg").getroot().tag.endswith("svg")
    shown = CliRunner().invoke(main, call, catch_exceptions=False).stdout
    done = CliRunner().invoke(main, [*call, "--picture", str(folder / "nowhere" / "p.svg")])
    assert (done.exit_code, "window" in done.output) == (2, False)  # before the work, not after it
    assert f"No such file or directory: {folder / 'nowhere'}" in done.stderr
    for name in ("Mean KLD", "RMS Δp", "Same top p", "Mean PPL(Q)/PPL(base)", "99.9 %"):
        assert name in shown
    assert f"{told['distances']['kld']['value']:.6g}" in shown
    done = CliRunner().invoke(main, ["eval", str(folder / "model"), "--text", str(folder / "text")])
    assert done.exit_code == 1
    assert "text is too short: expected at least 512 tokens, got 100" in done.stderr
