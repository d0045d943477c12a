"""Tasks from files: prompts with known answers, how right a model is on them, and whether a change helped."""

from foveate.tasks.comparing import Comparison, compare
from foveate.tasks.examples import Example, split
from foveate.tasks.preparing import Prepared, prepare
from foveate.tasks.reading import parse_columns, parse_labels, parse_template, read
from foveate.tasks.scoring import Scores, log_likelihoods, loss, score

__all__ = [
    "Comparison",
    "Example",
    "Prepared",
    "Scores",
    "compare",
    "log_likelihoods",
    "loss",
    "parse_columns",
    "parse_labels",
    "parse_template",
    "prepare",
    "read",
    "score",
    "split",
]
