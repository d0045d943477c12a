"""Whether a change of the model changed its scores: a paired interval, and a paired test."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from foveate.core.errors import BadInput, unknown
from foveate.tasks.scoring import Scores

__all__ = ["MEASURES", "Comparison", "compare"]

MEASURES = ("right", "margin", "log_likelihood", "probability", "entropy")
"""What two scores can be compared in."""
BATCH = 500
"""Resamples that are held at once."""


@dataclass(frozen=True)
class Comparison:
    """The same examples before and after.

    Args:
        what: What is compared: the name of one of the arrays of the scores.
        before: Its mean before.
        after: Its mean after.
        difference: After less before.
        low: Lower end of the 95 % bootstrap interval of the difference.
        high: Upper end.
        p: Two-sided p-value: how often a difference as large comes about if before and after change places by chance.
        n: Number of examples.
    """

    what: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p: float
    n: int


def compare(before: Scores, after: Scores, seed: int = 0, what: str = "right") -> Comparison:
    """Compares two scores of the same examples, example by example.

    Where all examples change by the same amount, a bootstrap knows no spread: the interval is that amount alone, and
    the p-value says how little a few examples mean.

    Args:
        before: Scores of the model as it was.
        after: Scores of the changed model.
        seed: The same seed gives the same interval and p-value.
        what: One of `MEASURES`.

    Raises:
        UnknownName: `what` is none of them.
        BadInput: the scores are of different examples, of one only, or normalised in one of the two.
    """
    if what not in MEASURES:
        raise unknown("measure of scores", what, MEASURES)
    if before.examples != after.examples:
        raise BadInput(
            f"scores of {len(before)} and {len(after)} examples, which are not the same ones in the same order, "
            "cannot be compared; score the same examples before and after."
        )
    if before.normalised != after.normalised:
        raise BadInput("one of the scores is normalised by length and the other is not; score both in the same way.")
    if len(before) < 2:
        raise BadInput(f"{len(before)} examples cannot be compared; score at least two.")
    was, now = (getattr(scores, what).astype(float) for scores in (before, after))
    changes = now - was
    low, high = bootstrap(changes, seed)
    return Comparison(
        what,
        was.mean().item(),
        now.mean().item(),
        changes.mean().item(),
        low,
        high,
        sign_flips(changes, seed),
        len(was),
    )


def bootstrap(changes: Float[np.ndarray, " example"], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean change: bias-corrected and accelerated, or of percentiles where that has no value.

    Resampling the changes is resampling examples with both of their scores.
    """
    if np.ptp(changes) == 0:
        return changes[0].item(), changes[0].item()
    for method in ("BCa", "percentile"):
        # both complain of an interval that is not finite, which is looked at below
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                (changes,), np.mean, method=method, batch=BATCH, random_state=np.random.default_rng(seed)
            ).confidence_interval
        if np.isfinite(found).all():
            break
    return float(found.low), float(found.high)


def sign_flips(changes: Float[np.ndarray, " example"], seed: int) -> float:
    """The p-value of the mean change if each change could as well have been the other way round."""
    # what did not change has no sign; without it the test is exact up to 13 changes
    changed = changes[changes != 0]
    if len(changed) < 2:
        return 1.0  # one change alone could always have been the other one
    return float(
        stats.permutation_test(
            (changed,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            batch=BATCH,
            random_state=np.random.default_rng(seed),
        ).pvalue
    )
