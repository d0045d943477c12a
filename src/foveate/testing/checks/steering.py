"""Edits on whole models, and the kinds that see no attention call: the residual stream, experts, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import ExpertEdit, Mechanism, PromptEdit, ResidualEdit, Stream
from foveate.core.places import spans_of
from foveate.testing import tiny
from foveate.testing.checks.measuring import Numbers, same
from foveate.testing.checks.running import EDITS, INSIDE, Skip, check, expect

LENGTH = 33
NEW = 4
WIDTH = 32
EXPERTS = 4
FAMILIES = ("llama", "gpt2", "mistral", "gemma2", "gpt_oss", "bert")
TEXTS = (
    "What is 2 + 2?",
    "Paris is the capital of France. Rome is that of Italy.\n\nQuestion: What is the capital of Italy?\nAnswer:",
    " two lines,\nand blanks around \n",
    "{braces} 100 % of $names and \\1 are no templates",
    "Größe: 3 µm, 東京",
)


# ---------------------------------------------------------------- on whole models


@check(*INSIDE)
def identity(m: Mechanism) -> None:
    """At the declared setting it changes nothing."""
    nothing = replace(m, **declared_identity(m))
    for name in some(m):
        model, given = tiny.model(name), texts(name, m, padding="left")
        real = given["attention_mask"].bool()
        got, want = ({"logits": logits(model, one, [given])["logits"][real]} for one in (nothing, None))
        same(got, want, f"{name}, at {m.identity} against the plain model", 1e-5)


@check(*INSIDE)
def landing(m: Mechanism) -> None:
    """It moves the logits, unless this is the setting at which it does not."""
    if m.nothing:
        raise Skip("this setting is the identity")
    for name in some(m):
        model, given = tiny.model(name), texts(name, m)
        moved = float((logits(model, m, [given])["logits"] - logits(model, None, [given])["logits"]).abs().max())
        expect(moved > 1e-5, f"{name}: the logits move by {moved:.3g}: it does not land")


@check(*INSIDE)
def padding(m: Mechanism) -> None:
    """A padded row gives what the same row gives alone."""
    padded_as_alone(m, some(m))


def padded_as_alone(m: Mechanism, families: Sequence[str]) -> None:
    """Fails unless each row of a padded batch gives what it gives alone, in all of these families."""
    for name in families:
        model = tiny.model(name)
        for side in ("left", "right"):
            given = texts(name, m, padding=side)
            got = logits(model, m, [given])["logits"]
            for row, real in enumerate(given["attention_mask"].bool()):
                want = logits(model, for_row(m, row), [only(given, row)])
                where = f"{name}, {side}-padded, row {row} against the row alone"
                same({"logits": got[row : row + 1, real]}, want, where)


@check(*INSIDE)
def batch(m: Mechanism) -> None:
    """Other rows of the batch change nothing."""
    for name in some(m):
        model, given = tiny.model(name), texts(name, m)
        got = logits(model, m, [given])["logits"]
        want = logits(model, for_row(m, 0), [only(given, 0)])
        same({"logits": got[:1]}, want, f"{name}, beside other texts")


@check(*INSIDE)
def chunks(m: Mechanism) -> None:
    """A text read in chunks gives what one prefill gives."""
    in_steps(m, (0, 8, 21, LENGTH), "three chunks against one prefill")


@check(*INSIDE)
def decode(m: Mechanism) -> None:
    """A text decoded token by token gives what one prefill gives."""
    in_steps(m, (0, 4, *range(5, 15)), "token by token against one prefill")


def in_steps(m: Mechanism, cuts: Sequence[int], what: str) -> None:
    """Fails unless a text that comes in pieces gives what it gives in one."""
    for name in some(m):
        model, ids = tiny.model(name), texts(name, m)["input_ids"][:, : cuts[-1]]
        steps = [{"input_ids": ids[:, a:b]} for a, b in pairwise(cuts)]
        same(logits(model, m, steps), logits(model, m, [{"input_ids": ids}]), f"{name}, {what}")


@check(*INSIDE)
def repeatable(m: Mechanism) -> None:
    """The same input gives the same numbers, whatever the global random state."""
    for name in some(m):
        model, given, found = tiny.model(name), texts(name, m), []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                found.append(logits(model, m, [given]))
        same(found[1], found[0], f"{name}, the second time", tolerance=0.0)


@check(*EDITS)
def trial(m: Mechanism) -> None:
    """On entering `attach`, its proof of landing passes on models of many families."""
    if m.nothing:
        raise Skip("this setting is the identity")
    unable = {}
    families = tiny.mixtures() if isinstance(m, ExpertEdit) else FAMILIES
    for name in families:
        try:
            with torch.no_grad(), attach(tiny.model(name), m) as attached:
                attached.model(**texts(name, m))
        except NotSupported as error:
            unable[name] = str(error)
    if len(unable) == len(families):
        raise Skip(f"no tiny model supports it: {unable[families[0]]}")


@check(*EDITS)
def on_models(m: Mechanism) -> None:
    """In `generate`, a left-padded row of a batch gets the tokens and logits that it gets alone."""
    for name in tiny.mixtures() if isinstance(m, ExpertEdit) else ("llama", "gpt2", "mistral"):
        model, given = tiny.model(name), texts(name, m, padding="left")
        given.pop("position_ids", None)
        batched = generated(model, m, given)
        for row in range(len(given["input_ids"])):
            one = only(given, row)
            one.pop("position_ids", None)
            where = f"{name}, row {row} of a padded batch against the row alone, generated"
            same({k: x[row : row + 1] for k, x in batched.items()}, generated(model, for_row(m, row), one), where)


@torch.no_grad()
def generated(model: Any, m: Mechanism, given: dict[str, Tensor]) -> Numbers:
    """The tokens that a model adds, and their logits."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    with attach(model, m, trial=False):
        out = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    return {"tokens": out.sequences[:, -NEW:], "logits": torch.stack(out.logits, 1)}


@torch.no_grad()
def logits(model: Any, m: Mechanism | None, steps: Sequence[dict[str, Tensor]]) -> Numbers:
    """The logits of a text that comes in so many calls with one cache, with a mechanism attached or without."""
    found, cache = [], None
    with attach(model, m, trial=False) if m is not None else nullcontext():
        for given in steps:
            out = model(**given, past_key_values=cache, use_cache=len(steps) > 1)
            cache = out.past_key_values
            found.append(out.logits)
    return {"logits": torch.cat(found, 1)}


def some(m: Mechanism) -> Sequence[str]:
    """Tiny models that differ in what they hand on from layer to layer."""
    return tiny.mixtures() if isinstance(m, ExpertEdit) else ("llama", "gpt2", "gpt_oss")


def texts(name: str, m: Mechanism, padding: tiny.Padding | None = None) -> dict[str, Tensor]:
    """Random texts: two, or as many as the mechanism has spans for."""
    return tiny.inputs(
        name, batch=max(2, *(len(getattr(m, s)) for s in spans_of(m)), 0), length=LENGTH, padding=padding
    )


def only(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One text of a batch, without its padding."""
    real = given["attention_mask"][row].bool()
    return {"input_ids": given["input_ids"][row : row + 1, real]}


def for_row(m: Mechanism, row: int) -> Mechanism:
    """The mechanism for one row of the batch: where it has a span for each, that of the row."""
    each = {s: getattr(m, s) for s in spans_of(m)}
    return replace(m, **{s: (found[row],) for s, found in each.items() if len(found) > 1})


def declared_identity(m: Mechanism) -> dict[str, Any]:
    """The setting at which it changes nothing."""
    if m.identity is None:
        raise Skip("it declares no `identity`, a setting at which it changes nothing")
    return m.identity


# ---------------------------------------------------------------- the one method by itself


def streams(m: ResidualEdit, seed: int = 0) -> list[Stream]:
    """The residual stream behind two layers: two texts or more, all but the first padded in front and behind."""
    rng = torch.Generator().manual_seed(seed)
    rows = max(2, *(len(getattr(m, s)) for s in spans_of(m)), 0)
    place = torch.arange(LENGTH, dtype=torch.int32).expand(rows, -1) - 3 * (torch.arange(rows) > 0).int()[:, None]
    real = (place >= 0) & ((place < LENGTH - 8) | (torch.arange(rows) == 0)[:, None])
    return [
        Stream(torch.randn(rows, LENGTH, WIDTH, generator=rng, dtype=torch.float64), place, real, layer)
        for layer in (0, 1)
    ]


@check(ResidualEdit)
def gradients(m: ResidualEdit) -> None:
    """The derivative of the new hidden states is the one that finite differences give."""
    for stream in streams(m):
        rng = torch.Generator().manual_seed(3)
        weigh, along = (torch.randn(stream.hidden.shape, generator=rng, dtype=torch.float64) for _ in range(2))
        weigh = weigh * stream.real[..., None]

        def loss(hidden: Tensor, stream: Stream = stream, weigh: Tensor = weigh) -> Tensor:
            return (m.edit(replace(stream, hidden=hidden)).double() * weigh).sum()

        leaf = stream.hidden.clone().requires_grad_()
        (got,) = torch.autograd.grad(loss(leaf), leaf)
        expect(bool(got.isfinite().all()), f"layer {stream.layer}: the gradient is not finite")
        step = 1e-4
        ends = [loss(stream.hidden + sign * step * along) for sign in (1, -1)]
        want, found = float(ends[0] - ends[1]) / (2 * step), float((got * along).sum())
        close = abs(found - want) <= 1e-3 * max(1.0, abs(want))
        expect(close, f"layer {stream.layer}: the derivative is {found:.6g}, finite differences say {want:.6g}")


@check(ResidualEdit)
def poison(m: ResidualEdit) -> None:
    """Garbage in the rows of padding does not come through."""
    for stream in streams(m):
        clean = m.edit(stream)
        dirty = m.edit(replace(stream, hidden=stream.hidden.where(stream.real[..., None], torch.nan)))
        got, want = ({"hidden states": x[stream.real]} for x in (dirty, clean))
        same(got, want, f"layer {stream.layer}, with NaN in the padding")


@check(*INSIDE)
def dtypes(m: Mechanism) -> None:
    """bfloat16 gives nearly what the same numbers in float32 give."""
    for n in (0, 1):
        if isinstance(m, ResidualEdit):
            stream = streams(m)[n]
            narrow = stream.hidden.bfloat16()
            got, want = (m.edit(replace(stream, hidden=x)) for x in (narrow, narrow.float()))
        elif isinstance(m, ExpertEdit):
            narrow = torch.randn(LENGTH, EXPERTS, generator=torch.Generator().manual_seed(n)).bfloat16()
            got, want = (m.edit(n, x) for x in (narrow, narrow.float()))
        same({"numbers": got}, {"numbers": want}, f"layer {n}, bfloat16 against float32", tolerance=0.03)


# ---------------------------------------------------------------- prompts


@check(PromptEdit)
def _identity(m: PromptEdit) -> None:
    """At the declared setting it changes nothing."""
    nothing = replace(m, **declared_identity(m))
    for text in TEXTS:
        made = nothing.edit(text)
        expect(made == text, f"at {m.identity}, {text!r} becomes {made!r}")


@check(PromptEdit)
def _landing(m: PromptEdit) -> None:
    """It changes a text, unless this is the setting at which it does not."""
    if m.nothing:
        raise Skip("this setting is the identity")
    expect(any(m.edit(text) != text for text in TEXTS), f"none of {len(TEXTS)} texts changes: it does not land")


@check(PromptEdit)
def _repeatable(m: PromptEdit) -> None:
    """The same text gives the same text."""
    for text in TEXTS:
        first, second = m.edit(text), replace(m).edit(text)
        expect(first == second, f"{text!r} becomes {first!r} and then {second!r}")


@check(PromptEdit)
def keeps_text(m: PromptEdit) -> None:
    """A text comes out, and the one that came in stands in it as it was."""
    for text in TEXTS:
        made = m.edit(text)
        expect(isinstance(made, str), f"{text!r} becomes {type(made).__name__}, which is no text")
        expect(text in made, f"{text!r} is not in what it becomes: {made!r}")


@check(PromptEdit)
def empty_text(m: PromptEdit) -> None:
    """An empty text is refused."""
    for text in ("", " \n\t"):
        try:
            made = m.edit(text)
        except BadInput:
            continue
        expect(False, f"the empty text {text!r} becomes {made!r}, and is not refused with BadInput")
