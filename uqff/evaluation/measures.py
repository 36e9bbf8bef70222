r"""What is measured of predictions, each with its standard error.

Of each prediction, with the reference's probabilities p, the model's q, both over the whole vocabulary, and the token t
that follows in the text::

    nll           -ln q(t)
    KLD           Σ p (ln p - ln q)
    difference    ln q(t) - ln p(t)
    Δp            q(t) - p(t)
    same top      whether p and q are largest at the same token
    top 5         how many of the five tokens of largest p are among those of largest q, of five

Over n predictions, where m(x) is the mean of x and s(x) = √((m(x²) - m(x)²) / (n - 1)) its standard error::

    perplexity          exp(m(nll))                    error: perplexity · s(nll)
    ln ratio            m(nll) - m(nll of p)           error: √(s(nll)² + s(nll of p)² - 2 cov)
    RMS of x            √m(x²)                         error: s(x²) / (2 · RMS)
    share y             m(y)                           error: √(y (1 - y) / (n - 1))
    percentile f        linear between the neighbours of rank f · (n - 1)
                        error: half the distance of the values √(n f (1 - f)) ranks below and above

These are the definitions of ``llama-perplexity --kl-divergence``, which has no errors of percentiles, no top 5 and no
difference of logarithms.  Predictions count as independent; those of one window are not quite.

Authority: llama.cpp, ``tools/perplexity/perplexity.cpp`` (``kl_divergence``, ``mean_and_uncertainty``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PERCENTILES", "TOP", "Distances", "Estimate", "Predictions", "Reference"]

Float64s = npt.NDArray[np.float64]

PERCENTILES = (0.1, 1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9)
"""Those that are told, besides the smallest and the largest."""

TOP = 5
"""How many of the likeliest tokens are compared."""

_ROWS = 1 << 22
"""Probabilities that are float64 at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; None where there is none."""

    value: float
    error: float | None

    @property
    def document(self) -> dict[str, float | None]:
        """As JSON, which has neither infinities nor NaN: None instead."""
        value, error = self.value, self.error
        return {
            "value": value if math.isfinite(value) else None,
            "error": error if error is not None and math.isfinite(error) else None,
        }


@dataclass(frozen=True)
class Reference:
    """What is known of the reference's predictions.

    Attributes:
        log_probs: ln p, float64 ``[n, vocabulary]``.
        nll: of the text's tokens, float64 ``[n]``.
        top: the likeliest tokens, the first of them in front, int64 ``[n, TOP]``.
    """

    log_probs: torch.Tensor
    nll: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> Reference:
        """From logits ``[n, vocabulary]`` and tokens int64 ``[n]``."""
        log_probs = logits.double().log_softmax(-1)
        return cls(log_probs, _nll(log_probs, targets), top_tokens(logits))


@dataclass(frozen=True)
class Predictions:
    """What is measured of each of some predictions; arrays of the same length.

    Attributes:
        position: in its window, of the token that predicts.
        nll: -ln q(t).
        base: -ln p(t), empty without a reference, as the following.
        kld: the divergence.
        same_top: 1 or 0.
        top: how many of the top five are in both, of five.
    """

    position: npt.NDArray[np.int64]
    nll: Float64s
    base: Float64s
    kld: Float64s
    same_top: Float64s
    top: Float64s

    @classmethod
    def of(
        cls,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first: int,
        reference: Callable[[slice], Reference] | None = None,
    ) -> Predictions:
        """Measure the predictions of a window, in float64.

        Args:
            logits: of the model, ``[n, vocabulary]``.
            targets: the tokens that follow, int64 ``[n]``.
            first: position of the first of them.
            reference: gives what is known of the reference for some of them; None if there is no reference.
        """
        rows = max(1, _ROWS // logits.shape[1])
        made = [
            cls._some(logits[at : at + rows], targets[at : at + rows], first + at, reference and reference(part))
            for at in range(0, len(logits), rows)
            for part in [slice(at, min(at + rows, len(logits)))]
        ]
        return cls.joined(made)

    @classmethod
    def _some(cls, logits: torch.Tensor, targets: torch.Tensor, first: int, reference: Reference | None) -> Predictions:
        position = np.arange(first, first + len(logits))
        if reference is None:
            none = np.empty(0)
            nll = _nll(logits.double().log_softmax(-1), targets)
            return cls(position, nll.numpy(force=True), none, none, none, none)
        own, p = Reference.of(logits, targets), reference.log_probs
        terms = p.exp() * (p - own.log_probs)  # of p = 0, nothing: -inf · 0 is none
        kld = torch.where(p == -torch.inf, 0.0, terms).sum(-1)
        common = (own.top[:, :, None] == reference.top[:, None, :]).sum((1, 2))
        parts = (own.nll, reference.nll, kld, own.top[:, 0] == reference.top[:, 0], common.double() / own.top.shape[1])
        return cls(position, *(part.double().numpy(force=True) for part in parts))

    @classmethod
    def joined(cls, parts: list[Predictions]) -> Predictions:
        """Several in a row."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def within(self, start: int, stop: int) -> Predictions:
        """Those at positions ``start`` to before ``stop``."""
        mask = (self.position >= start) & (self.position < stop)
        arrays = [getattr(self, each.name) for each in fields(self)]
        return Predictions(*(array[mask] if len(array) else array for array in arrays))

    def __len__(self) -> int:
        """How many."""
        return len(self.nll)

    @property
    def perplexity(self) -> Estimate:
        """Of the model."""
        return _exp(_mean(self.nll))

    @property
    def distances(self) -> Distances | None:
        """From the reference; None if there is none."""
        return Distances.of(self) if len(self.base) else None


@dataclass(frozen=True)
class Distances:
    """How far predictions are from the reference's; see the module for each.

    Attributes:
        base_perplexity: of the reference.
        correlation: of both nll.
        ln_ratio: ln of the perplexities' ratio.
        ratio: of the perplexities.
        difference: of the perplexities.
        kld: mean divergence.
        kld_percentiles: by per cent, also the smallest (0) and the largest (100).
        dp: mean Δp.
        dp_percentiles: likewise.
        dp_rms: root mean square of Δp.
        log_prob_rms: root mean square of ln q(t) - ln p(t).
        same_top: share of predictions whose likeliest token is the same.
        top: mean share of the reference's five likeliest tokens that are among the model's.
    """

    base_perplexity: Estimate
    correlation: float
    ln_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kld: Estimate
    kld_percentiles: dict[float, Estimate]
    dp: Estimate
    dp_percentiles: dict[float, Estimate]
    dp_rms: Estimate
    log_prob_rms: Estimate
    same_top: Estimate
    top: Estimate

    @classmethod
    def of(cls, made: Predictions) -> Distances:
        """Of some predictions, at least one."""
        nll, base = _mean(made.nll), _mean(made.base)
        one, other = _exp(nll), _exp(base)
        n, dp = len(made), np.exp(-made.nll) - np.exp(-made.base)
        cov = float((made.nll * made.base).mean() - made.nll.mean() * made.base.mean()) / (n - 1) if n > 1 else None
        spread = None if nll.error is None or base.error is None else nll.error * base.error
        ln_ratio = Estimate(nll.value - base.value, _combined(nll, base, cov))
        scaled = None if cov is None else one.value * other.value * cov
        return cls(
            base_perplexity=other,
            correlation=cov / spread if cov is not None and spread else 1.0 if not ln_ratio.value else 0.0,
            ln_ratio=ln_ratio,
            ratio=_exp(ln_ratio),
            difference=Estimate(one.value - other.value, _combined(one, other, scaled)),
            kld=_mean(made.kld),
            kld_percentiles=_percentiles(made.kld),
            dp=_mean(dp),
            dp_percentiles=_percentiles(dp),
            dp_rms=_rms(dp),
            log_prob_rms=_rms(made.base - made.nll),
            same_top=_mean(made.same_top),
            top=_mean(made.top),
        )


def top_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens of each row; of equals those of the lowest ids, on every machine, and NaN the least likely.

    Args:
        logits: ``[n, vocabulary]``.

    Returns:
        int64 ``[n, TOP]``, or as many as there are tokens.
    """
    count = min(TOP, logits.shape[1])
    values, found = logits.topk(min(count + 1, logits.shape[1]))
    if values.isnan().any():
        return top_tokens(torch.where(logits.isnan(), -torch.inf, logits))
    found = found[:, :count]
    # Which of equals topk takes is not said: rows that have some among them, or one beside them, are sorted.
    equals = (values[:, 1:] == values[:, :-1]).any(1).nonzero()[:, 0]
    if len(equals):
        found[equals] = logits[equals].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return found


def _nll(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probs.gather(1, targets[:, None])[:, 0]


def _mean(values: Float64s) -> Estimate:
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(max(0.0, float((values * values).mean()) - mean * mean) / (n - 1)))


def _exp(ln: Estimate) -> Estimate:
    value = math.exp(ln.value) if ln.value < 709 else math.inf
    return Estimate(value, None if ln.error is None else value * ln.error)


def _combined(a: Estimate, b: Estimate, covariance: float | None) -> float | None:
    if a.error is None or b.error is None or covariance is None:
        return None
    return math.sqrt(max(0.0, a.error**2 + b.error**2 - 2 * covariance))


def _rms(values: Float64s) -> Estimate:
    mean = _mean(values * values)
    rms = math.sqrt(mean.value)
    return Estimate(rms, None if mean.error is None else 0.5 / rms * mean.error if rms else 0.0)


def _percentiles(values: Float64s) -> dict[float, Estimate]:
    ordered, n = np.sort(values), len(values)

    def at(rank: float) -> float:
        rank = min(max(rank, 0.0), n - 1.0)
        low = int(rank)
        high = min(low + 1, n - 1)
        return float(ordered[low] + (rank - low) * (ordered[high] - ordered[low]))

    made = {0.0: Estimate(float(ordered[0]), None)}
    for each in PERCENTILES:
        share = each / 100
        spread = math.sqrt(n * share * (1 - share))
        rank = share * (n - 1)
        made[each] = Estimate(at(rank), (at(rank + spread) - at(rank - spread)) / 2)
    made[100.0] = Estimate(float(ordered[-1]), None)
    return made
