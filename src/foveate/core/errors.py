"""The one exception tree. Every message names the thing, what it got, what it may be, and the next step.

FoveateError
├── BadParameter        a mechanism was built with a value outside of its bounds
├── BadInput            a text, file, shape or table that cannot be used
├── UnknownName         no mechanism, model or option of that name (with a suggestion)
├── NotOnInterface      the model's attention cannot be reached through transformers' interface
├── NothingObserved     a mechanism was attached and no attention call reached it
├── NotLanded           an edit was tried on a model and changes nothing, or not what it says
├── NotSupported        this combination has no implementation; the message says which one has
├── TooBig              the run would not fit in the memory allowed
├── Diverged            a loss or gradient of a training is no number
└── LoadError           a model or tokenizer could not be opened
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadInput",
    "BadParameter",
    "Diverged",
    "FoveateError",
    "LoadError",
    "NotLanded",
    "NotOnInterface",
    "NotSupported",
    "NothingObserved",
    "TooBig",
    "UnknownName",
    "unknown",
]


class FoveateError(Exception):
    """Base of all errors that foveate raises on purpose; the command line prints them as one line, exit code 2."""


class BadParameter(FoveateError, ValueError):
    """A mechanism was built with a value outside of its declared bounds."""


class BadInput(FoveateError, ValueError):
    """A text, file, shape or table that cannot be used as it is."""


class UnknownName(FoveateError, KeyError):
    """No mechanism, model or option has this name."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class NotOnInterface(FoveateError):
    """The model's attention does not go through transformers' AttentionInterface."""


class NothingObserved(FoveateError):
    """A mechanism was attached, and no attention call reached it."""


class NotLanded(FoveateError):
    """An edit was tried on a small input: it changes nothing where it should, or something else than it says."""


class NotSupported(FoveateError):
    """A combination that has no implementation."""


class TooBig(FoveateError):
    """The run would not fit in the memory that it may use."""


class Diverged(FoveateError):
    """A loss or a gradient is no number: training stopped before it could reach the weights."""


class LoadError(FoveateError):
    """A model or tokenizer could not be opened."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """Builds the error for a misspelt name, with the nearest known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(names)}."
    return UnknownName(f"no {kind} is called {name!r}; {guess}{' ' + hint if hint else ''}")
