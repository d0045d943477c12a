r"""Span mass: which part of the text looks at which.

    m(A > B) = \frac{1}{|A|} \sum_{i \in A} \sum_{j \in B} p_ij

for spans A, B of the text: the roles of a chat, a question and its document, a few shots and the answer.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError

from foveate.core.accumulate import Cells, Estimate
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, BadParameter
from foveate.core.mechanism import Metric
from foveate.core.params import check_bounds
from foveate.core.reductions import OnKeys, Reduction
from foveate.core.rows import Layer, Rows

__all__ = ["SpanMass", "role_spans"]

Span = tuple[str, int, int]


@dataclass(frozen=True)
class SpanMass(Metric):
    """Mean mass from the rows of each span to the keys of each span, `span_mass:FROM>TO`.

    Args:
        spans: Name, first token and one past the last token of each span, padding counted; they may overlap,
            and need not cover the text. None by default: then there is nothing to tell. For the roles of a
            chat: `role_spans`.

    Example:
        The second word looks at the first: `same` with half of its mass, at the copies of its letters; `induction`
        with three quarters, at the letters after these (the last one is followed by the blank).

        >>> import foveate
        >>> from foveate.measure import SpanMass
        >>> from foveate.testing import handmade
        >>> model = handmade.model()
        >>> spans = SpanMass(spans=(("one", 1, 5), ("two", 6, 10)))
        >>> with foveate.attach(model, spans) as attached:
        ...     _ = model(handmade.ids("abcd abcd"))
        >>> handmade.named(attached.results.heads, "span_mass:two>one", layer=1)
        {'first': 0.0, 'same': 0.5, 'induction': 0.75, 'stop': 0.0}
    """

    spans: tuple[Span, ...] = ()

    card: ClassVar = Card(
        title="Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language Models "
        "Using Only Attention Maps",
        year=2024,
        family="spans",
        needs=Needs.WEIGHTS,
        equation="m(A > B) = mean over i in A of sum_{j in B} p_ij",
        differs="the paper's lookback ratio compares the mean weight per token of two spans; ours is the "
        "mass on each of any number of spans, of which that ratio follows by division",
        use="to see who reads whom in a chat, or whether an answer looks at the document",
        misleads="a span with a sink in it draws mass that has nothing to do with its content, and a longer "
        "span draws more",
    )
    known_failures: ClassVar = {"padding": "spans count tokens as they were handed over, padding included"}
    test_params: ClassVar = ({"spans": (("start", 0, 3), ("rest", 3, 9), ("overlap", 2, 5))},)

    def __post_init__(self) -> None:
        check_bounds(self)
        names = []
        for span in self.spans if isinstance(self.spans, tuple) else (self.spans,):
            good = isinstance(span, tuple) and len(span) == 3 and isinstance(span[0], str)
            good = good and all(isinstance(n, int) and not isinstance(n, bool) for n in span[1:])
            if not good or not 0 <= span[1] < span[2]:
                raise BadParameter(f"SpanMass: {span!r} is no span; write (name, start, stop) with 0 <= start < stop")
            names.append(span[0])
        if len(set(names)) < len(names):
            raise BadParameter(f"SpanMass: two spans have the same name; got {', '.join(names)}")

    def needs(self) -> tuple[Reduction, ...]:
        return (self.to,) if self.spans else ()

    @property
    def to(self) -> OnKeys:
        """Mass on the keys of each span."""
        return OnKeys(tuple((start, stop) for _, start, stop in self.spans))

    def start(self, layer: Layer) -> dict[str, Cells]:
        return {}

    def update(self, state: dict[str, Cells], rows: Rows) -> dict[str, Cells]:
        mask = rows.view.mask
        place = mask.position + mask.key_offset
        for name, start, stop in self.spans:
            inside = torch.nonzero((place >= start) & (place < stop))[:, 0]
            # all targets side by side, as if they were heads
            mass = rows[self.to][:, :, inside].permute(0, 3, 1, 2).flatten(1, 2)
            state.setdefault(name, Cells()).add(mass, mask.rows[:, inside], place[inside])
        return state

    def result(self, state: dict[str, Cells]) -> dict[str, Estimate]:
        found = {}
        for source, cells in state.items():
            e = cells.mean()
            parts = (t.reshape(len(self.spans), -1) for t in (e.value, e.low, e.high))
            for (target, _, _), *numbers in zip(self.spans, *parts, strict=True):
                found[f"span_mass:{source}>{target}"] = Estimate(*numbers)
        return found


def role_spans(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[Span, ...]:
    """The spans of a chat's turns, as the tokenizer's chat template writes them.

    Each turn goes by its role, with a number from its second appearance on: `user`, `assistant`, `user_2`.
    What the template puts in front of a first turn that is no system prompt (a start token, a system prompt
    of its own) is the span `template`.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: The chat, as `apply_chat_template` takes it.

    Raises:
        BadInput: the tokenizer has no chat template or no offsets, or its template rewrites earlier turns.
    """
    if not messages:
        raise BadInput("role_spans needs at least one message")
    if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
        raise BadInput("role_spans needs a fast tokenizer with a chat template; give the spans yourself instead")

    def written(part: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False)

    texts = [written(messages[: n + 1]) for n in range(len(messages))]
    for n, (before, after) in enumerate(pairwise(texts)):
        if not after.startswith(before):
            raise BadInput(f"the chat template rewrites turn {n + 1} when a later one comes; give the spans yourself")
    # the first turn is as long as it is behind another one, where nothing is put in front of it
    lead, own = [{"role": "system", "content": "x"}], 0
    if messages[0]["role"] != "system":
        try:
            own = len(texts[0]) - (len(written([*lead, messages[0]])) - len(written(lead)))
        except TemplateError:
            # a template that takes no system prompt does not invent one either
            own = 0
    edges = [max(0, own), *(len(t) for t in texts)]
    offsets = tokenizer(texts[-1], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    at = [bisect_left([start for start, _ in offsets], edge) for edge in edges]
    spans: list[Span] = [("template", 0, at[0])]
    times: dict[str, int] = {}
    for message, (start, stop) in zip(messages, pairwise(at), strict=True):
        role = message["role"]
        times[role] = times.get(role, 0) + 1
        spans.append((role if times[role] == 1 else f"{role}_{times[role]}", start, stop))
    return tuple(s for s in spans if s[1] < s[2])
