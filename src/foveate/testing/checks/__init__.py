"""The common checks: what every mechanism promises, whoever wrote it.

    check_mechanism(MyMetric)                     every check that fits, for every entry of `test_params`
    check_mechanism(MyMetric(window=3))           this one setting
    check_mechanism(MyMetric, only=["padding"])   one check

A check that a mechanism cannot pass is declared on its class, with the reason:

    known_failures: ClassVar = {"chunks": "looks at columns, which a chunk has not seen to their end"}

Strictly: a declared failure that passes is an error too.

The checks stand in files by what they are about, and run in this order:

    words        what a mechanism says of itself
    truth        one truth, many ways to it
    leaks        nothing leaks
    calls        however the rows come in
    acting       those that act on a model, and what remains of them
    steering     edits on whole models, and those of the residual stream, of experts and of prompts
    models       those that run the model themselves
    policies     those that say what stays in a KV cache
    prune        those that take parts out of a model
    exact        those that compute attention exactly, in an order of their own
    replacing    those that stand in the place of attention

Checks for a kind of mechanism of its own are one more file here and one more import below.
"""

# isort: off
from foveate.testing.checks import (
    words,
    truth,
    leaks,
    calls,
    acting,
    steering,
    models,
    policies,
    prune,
    exact,
    replacing,
)
# isort: on

from foveate.testing.checks.models import COLUMNS
from foveate.testing.checks.running import (
    CHECKS,
    CheckFailed,
    Outcome,
    annotations_off,
    check_mechanism,
    checks_for,
    chosen,
    examine,
)

__all__ = [
    "CHECKS",
    "COLUMNS",
    "CheckFailed",
    "Outcome",
    "acting",
    "annotations_off",
    "calls",
    "check_mechanism",
    "checks_for",
    "chosen",
    "exact",
    "examine",
    "leaks",
    "models",
    "policies",
    "prune",
    "replacing",
    "steering",
    "truth",
    "words",
]
