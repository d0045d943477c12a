"""Coordinate search over the parameters of an edit: scalars first, then layers, then heads in the order of response."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from foveate.core.attach import attention_layers
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import Edit, HeadEdit, Mechanism
from foveate.core.params import Bounds, bounds_of
from foveate.core.places import Heads, Indices, Values, placed, spans_of
from foveate.finding.judging import Judge
from foveate.finding.responding import responses
from foveate.tasks import Prepared, Scores, loss
from foveate.tasks.scoring import ask

__all__ = ["OBJECTIVES", "Found", "Try", "search"]

OBJECTIVES: dict[str, Callable[[Scores], float]] = {
    "probability": lambda s: float(s.probability.mean()),
    "accuracy": lambda s: s.accuracy + 1e-3 * float(s.probability.mean()),
    "entropy": lambda s: -float(s.entropy.mean()),
}
"""What is made large: mean probability of the right choice; accuracy; confidence, which needs no labels."""
RESPONDENTS = 48
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)


@dataclass(frozen=True)
class Try:
    """One evaluation.

    Args:
        what: What was changed.
        mechanism: With what.
        objective: What came of it.
        kept: Whether it was the best so far.
    """

    what: str
    mechanism: Mechanism
    objective: float
    kept: bool


@dataclass(eq=False)
class Found:
    """What a search came to.

    Args:
        mechanism: The best one.
        objective: Its objective on the training examples.
        plain: The objective without any edit.
        tries: Every evaluation, in order.
        response: How each head responds to the edit, [layers, heads], where that could be told.
    """

    mechanism: Mechanism
    objective: float
    plain: float
    tries: list[Try] = field(default_factory=list)
    response: torch.Tensor | None = None

    @property
    def helps(self) -> bool:
        """Whether anything was better than no edit, on the training examples."""
        return self.objective > self.plain


class Spent(Exception):
    """The evaluations are used up."""


def search(
    judge: Judge,
    mechanism: Mechanism,
    evaluations: int = 40,
    objective: str = "probability",
    seed: int = 0,
    heads: bool = True,
    progress: Callable[[int, int, float], None] | None = None,
) -> Found:
    """The parameters at which an edit serves a task best, on the judge's examples.

    The scalars with a declared grid are tried value by value, twice round. Then, where the edit can be restricted to
    layers or heads: the share of the heads that respond most strongly to it, either way; then single layers without
    it, the ones that respond worst first. An edit that never beats no edit at all comes back at its best all the same:
    see `helps`.

    Args:
        judge: The model and the training examples.
        mechanism: The edit, at the setting to begin with.
        evaluations: How often all examples may be scored.
        objective: One of `OBJECTIVES`.
        seed: Order of what has no other order.
        heads: Whether to search layers and heads at all.
        progress: Called after each evaluation with how many are done, how many there may be, and the best objective.

    Raises:
        BadInput: the edit has nothing that can be searched, or there are fewer than two evaluations.
    """
    if objective not in OBJECTIVES:
        raise BadInput(f"objective {objective!r} must be one of {', '.join(OBJECTIVES)}")
    if evaluations < 2:
        raise BadInput(f"{evaluations} evaluations: at least 2 are needed, one without the edit and one with it")
    measure = OBJECTIVES[objective]
    plain = measure(judge.score())
    found = Found(mechanism, measure(judge.score(mechanism, trial=True)), plain)
    found.tries.append(Try("as given", mechanism, found.objective, True))
    scalars, places = searched(mechanism)
    if not scalars and not places:
        raise BadInput(f"{type(mechanism).__name__} has no parameter that can be searched: none has a declared grid")

    def attempt(what: str, candidate: Mechanism) -> None:
        if any(t.mechanism == candidate for t in found.tries):
            return
        # the run without an edit was one, too
        if len(found.tries) + 1 >= evaluations:
            raise Spent
        value = measure(judge.score(candidate))
        better = value > found.objective
        found.tries.append(Try(what, candidate, value, better))
        if better:
            found.mechanism, found.objective = candidate, value
        if progress is not None:
            progress(len(found.tries) + 1, evaluations, max(found.objective, plain))

    try:
        for _ in range(2):
            for name, values in scalars.items():
                for value in values:
                    attempt(
                        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}",
                        changed(found, name, value),
                    )
            if heads and places and found.response is None and isinstance(mechanism, Edit | HeadEdit):
                found.response = told(judge, found.mechanism, objective)
                for what, candidate in by_response(found.mechanism, places, found.response):
                    attempt(what, candidate)
        if heads and places:
            for layer in worst_first(judge, found, seed):
                attempt(f"without layer {layer}", without(judge, found, places, layer))
    except Spent:
        pass
    return found


def changed(found: Found, name: str, value: Any) -> Mechanism:
    """The best so far with another value; heads that are set apart go along."""
    m = found.mechanism
    values = values_field(m)
    table = getattr(m, values[0]) if values else ()
    if values and values[1] == name and table:
        # the common value is left where it is: the heads that carry the edit get the new one
        return dataclasses.replace(m, **{values[0]: tuple((at, h, value) for at, h, _ in table)})
    return dataclasses.replace(m, **{name: value})


def searched(m: Mechanism) -> tuple[dict[str, tuple[Any, ...]], dict[str, Bounds]]:
    """The scalars with the values to try, and the fields that restrict the edit to layers or heads."""
    scalars: dict[str, tuple[Any, ...]] = {}
    places: dict[str, Bounds] = {}
    for name, (_, bounds) in bounds_of(type(m)).items():
        if isinstance(bounds, Heads | Values) or (isinstance(bounds, Indices) and bounds.what == "layer"):
            places[name] = bounds
        elif type(bounds) is Bounds and (bounds.grid or bounds.choices):
            scalars[name] = bounds.grid or bounds.choices
    return scalars, places


def values_field(m: Mechanism) -> tuple[str, str] | None:
    """The field with numbers for single heads, and the scalar that it stands in for: the one with the same bounds."""
    found = bounds_of(type(m))
    for name, (_, bounds) in found.items():
        if isinstance(bounds, Values):
            for scalar, (_, other) in found.items():
                if type(other) is Bounds and (other.low, other.high) == (bounds.low, bounds.high):
                    return name, scalar
    return None


def told(judge: Judge, m: Mechanism, objective: str) -> torch.Tensor | None:
    """The response of each head, from some of the examples; None where it cannot be told."""
    some: list[tuple[Mechanism, Prepared]] = []
    left = RESPONDENTS
    for span, prepared, _ in judge.groups((), bool(spans_of(m))):
        if left > 0:
            some.append((placed(m, span and (span,)), prepared[:left]))
            left -= len(some[-1][1])
    # what is searched without labels must not look at them here either
    lose = unsure if objective == "entropy" else partial(loss, normalise=judge.normalise)
    try:
        return responses(judge.model, some, lose)
    except NotSupported:
        return None


def unsure(model: Any, prepared: Prepared) -> torch.Tensor:
    """Mean entropy of the next token behind the prompts."""
    return ask(model, prepared, len(prepared)).entropy[list(prepared.layout.ends)].mean()


def by_response(
    m: Mechanism, places: dict[str, Bounds], response: torch.Tensor | None
) -> Iterator[tuple[str, Mechanism]]:
    """The edit in the heads that respond best, and turned round in those that respond worst."""
    if response is None:
        return
    order = [(int(n) // response.shape[1], int(n) % response.shape[1]) for n in response.flatten().argsort()]
    ranked = [h for h in order if not response[h].isnan()]
    values = values_field(m)
    names = [name for name, bounds in places.items() if isinstance(bounds, Heads)]
    for share in SHARES:
        count = max(1, round(share * len(ranked)))
        best, worst = sorted(ranked[-count:]), sorted(ranked[:count])
        if values:
            name, scalar = values
            value, rest = getattr(m, scalar), (m.identity or {}).get(scalar)
            if rest is None:
                return
            here = {scalar: rest, name: tuple((at, h, value) for at, h in best)}
            yield f"in the {count} heads that respond best", dataclasses.replace(m, **here)
            turned = mirrored(value, rest)
            if turned is not None:
                here = {scalar: rest, name: tuple((at, h, turned) for at, h in worst)}
                yield f"turned round in the {count} heads that respond worst", dataclasses.replace(m, **here)
        elif names:
            yield f"in the {count} heads that respond best", dataclasses.replace(m, **{names[0]: tuple(best)})


def mirrored(value: float, rest: float) -> float | None:
    """The value that does the opposite: the inverse around 1, the negative around 0."""
    if rest == 1 and value > 0:
        return 1 / value
    return -value if rest == 0 else None


def worst_first(judge: Judge, found: Found, seed: int) -> list[int]:
    """The layers, those whose heads respond worst first; in a random order where no response is known."""
    order = list(range(len(attention_layers(judge.model))))
    random.Random(seed).shuffle(order)
    if found.response is not None:
        total = found.response.nan_to_num(0.0).sum(1)
        order.sort(key=lambda at: float(total[at]))
    return order


def without(judge: Judge, found: Found, places: dict[str, Bounds], layer: int) -> Mechanism:
    """The best so far, in all layers that it is in but one."""
    m, values = found.mechanism, values_field(found.mechanism)
    count = len(attention_layers(judge.model))
    width = found.response.shape[1] if found.response is not None else judge.model.config.num_attention_heads
    for name, bounds in places.items():
        now = getattr(m, name)
        if isinstance(bounds, Indices):
            rest = tuple(n for n in (now or range(count)) if n != layer)
        elif isinstance(bounds, Heads):
            everyone = now or tuple((at, h) for at in range(count) for h in range(width))
            rest = tuple(h for h in everyone if h[0] != layer)
        elif values and (still := (m.identity or {}).get(values[1])) is not None:
            table = {(at, h): v for at, h, v in now if at != layer}
            if getattr(m, values[1]) != still:
                table |= {(layer, h): still for h in range(width)}
            return dataclasses.replace(m, **{name: tuple((*k, v) for k, v in sorted(table.items()))})
        else:
            continue
        # nowhere at all would be everywhere
        return dataclasses.replace(m, **{name: rest}) if rest else m
    return m
