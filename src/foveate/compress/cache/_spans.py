r"""The search of a mixture of spans: profile each KV head under each line, extrapolate, solve, validate.

    loss_h(line, N) = 1/2 E_y \sum_i ( \sum_q g_iq (o'_iq - o_iq) )^2 / rows        q: the query heads of KV head h
    min  \sum_h loss_h(line_h)    so that    mean_h entries(line_h, N) <= keep N    for each N

o' are the head outputs of a row whose head sees the sinks and its span only, its weights renormalised; g is the
gradient of -log p(y) at the head outputs, with y drawn from what the model itself predicts. One backward pass gives g
for all heads, and o' of all spans comes from one cumulated sum over each row, so no head is ever run alone. To second
order in o' - o the sum is the Kullback-Leibler divergence from the predictions of the full model, in nats per token.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse, stats
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.core.attach import attach
from foveate.core.budget import Budget
from foveate.core.errors import BadInput
from foveate.core.mechanism import Edit, HeadEdit
from foveate.core.places import Head
from foveate.core.recording import frozen
from foveate.core.rows import RowBlock, Rows, View
from foveate.core.unheard import unheard

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Found", "Search", "Spans", "assign", "entries", "extrapolated", "grid", "moved", "sight"]

Rule = tuple[float, float]
# rows behind the prompt: a quarter of the text, and no more logits at once than these
SHARE, MOST_ROWS = 4, 256
# shares of the text that a line may grow by
BETAS = 8
BLOCK_ROWS = 32
MOST = 1 << 24


# ---------------------------------------------------------------- what a line keeps


def entries(lines: Float[Tensor, "lines 2"], seen: Int[Tensor, " texts"], budget: Budget) -> Int[Tensor, "texts lines"]:
    """What a head of each line holds of texts of so many tokens, whatever the budget caps."""
    alpha, beta = lines.unbind(1)
    span = (alpha + beta * seen[:, None].double() + 1e-9).floor().to(seen.dtype)
    least = seen.clamp_max(budget.least)[:, None]
    return torch.minimum(torch.maximum(span + budget.sinks, least), seen[:, None])


def sight(lines: Float[Tensor, "lines 2"], prompt: int, rows: int, budget: Budget) -> Int[Tensor, "rows lines"]:
    """How many of the last tokens, its own among them, each row behind a prompt sees besides the sinks.

    The rows come one by one; between two rounds of dropping what is held grows by one with each.
    """
    n = torch.arange(rows)
    since = n % budget.every if budget.every else n
    round_at = prompt + n - since
    return entries(lines, round_at + budget.waiting, budget) - budget.waiting + since[:, None] + 1 - budget.sinks


def grid(lengths: Sequence[int]) -> tuple[Rule, ...]:
    """Lines alpha + beta N that are from 0 to N at each of these lengths: beta in eighths, alpha in as many steps."""
    low, high = min(lengths), max(lengths)
    step = max(1, low // BETAS)
    alphas = {*range(-low, high + 1, step), step // 2, step // 4}
    betas = [n / BETAS for n in range(BETAS + 1)]
    return tuple(
        (float(a), b) for a in sorted(alphas) for b in betas if all(0 <= a + b * length <= length for length in lengths)
    )


@dataclass(frozen=True, eq=False)
class Spans(Edit):
    """The rows of one call see the sinks and their heads' spans only: what a cache with these lines shows them.

    Args:
        lines: (alpha, beta) by layer and KV head; a head that is not named sees everything.
        budget: Sinks, and the rhythm of dropping.
    """

    lines: dict[Head, Rule] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)

    def acts(self, layer: int) -> bool:
        return any(at == layer for at, _ in self.lines)

    def edit(
        self, block: RowBlock, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        view, mask = block.view, block.view.mask
        # a cache shows everything where the line is the whole text
        own = [self.lines.get((view.layer.index, head), (0.0, 1.0)) for head in range(view.kv_heads)]
        near = sight(torch.tensor(own, dtype=torch.float64), int(mask.place[0, 0]), view.queries, self.budget)
        near = near.to(weights.device)[block.index].T.repeat_interleave(view.grouped, 0)
        place = mask.key_place[:, None, None, block.first : block.last]
        seen = (place < self.budget.sinks) | (block.distance < near[:, :, None])
        left = torch.where(seen, weights, 0.0)
        return left / kept_mass(view, weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True))


def kept_mass(view: View, whole: Tensor, left: Tensor) -> Tensor:
    """What weights are divided by when only some of a row are left; what a learned sink takes stays in the sum."""
    if view.sinks is not None:
        left = left + (1 - whole).clamp_min(0.0)
    return left.clamp_min(torch.finfo(left.dtype).tiny)


# ---------------------------------------------------------------- profile


def moved(
    view: View, gradient: Float[Tensor, "batch heads query value_dim"], lines: Float[Tensor, "lines 2"], budget: Budget
) -> Float[Tensor, "batch kv_heads query lines"]:
    """By how much the loss changes, to first order, when a row sees its span: g (o' - o), over the heads that share it.

    Args:
        view: The call of the rows behind the prompt, which the full model made.
        gradient: Gradient of the loss at its head outputs.
        lines: Candidates.
        budget: Sinks, and the rhythm of dropping.
    """
    mask = view.mask
    near = sight(lines, int(mask.place[0, 0]), view.queries, budget).to(view.q.device)
    found = []
    for a in range(0, view.queries, BLOCK_ROWS):
        b = min(view.queries, a + BLOCK_ROWS)
        index = torch.arange(a, b, device=view.q.device)
        # in double: what is left of a sharp row may be very little
        block = RowBlock(view, index, *mask.span(a, b), torch.float64)
        p, v = block.weights, view.v[:, :, block.first : block.last].double()
        g = gradient[:, :, a:b].double().unflatten(1, (view.kv_heads, -1))
        both = torch.stack([p, (g @ v[:, :, None].mT).flatten(1, 2) * p])
        sinks = min(max(int(mask.text_begin[0]) + budget.sinks - block.first, 0), p.shape[-1])
        # the newest first: only what is left is summed, and nothing is taken from a sum again
        ends = torch.nn.functional.pad(both.flip(-1).cumsum(-1).flip(-1), (0, 1))
        first = (mask.position[index, None] + 1 - near[a:b] - block.first).clamp(sinks, p.shape[-1])
        left = ends.gather(-1, first.expand(*both.shape[:3], -1, -1)) + both[..., :sinks].sum(-1, keepdim=True)
        whole = both.sum(-1, keepdim=True)
        change = left[1] / kept_mass(view, whole[0], left[0]) - whole[1]
        found.append(change.unflatten(1, (view.kv_heads, -1)).sum(2))
    return torch.cat(found, 2)


@dataclass(frozen=True, eq=False)
class Probes(HeadEdit):
    """Adds nothing to the head outputs of each layer; the gradient at what is added is the gradient at them.

    Args:
        zeros: What is added, by layer.
        views: The calls.
    """

    zeros: dict[int, Tensor] = field(default_factory=dict)
    views: dict[int, View] = field(default_factory=dict)

    def edit(
        self, rows: Rows, out: Float[Tensor, "batch heads query value_dim"]
    ) -> Float[Tensor, "batch heads query value_dim"]:
        at = rows.layer.index
        self.views[at] = rows.view
        self.zeros[at] = torch.zeros_like(out, requires_grad=True)
        return out + self.zeros[at]


@dataclass(frozen=True, eq=False)
class Stretch:
    """A stretch of text, its prompt read by the full model.

    Args:
        ids: All tokens.
        cache: The full model's cache behind the prompt.
        rows: How many of its last tokens stand behind the prompt.
    """

    ids: Int[Tensor, "1 length"]
    cache: DynamicCache
    rows: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: Sequence[int]) -> Stretch:
        """Reads the prompt: all but the last quarter."""
        made = torch.tensor([ids], device=model.device)
        rows = min(MOST_ROWS, len(ids) // SHARE)
        cache = DynamicCache(config=model.config)
        model.base_model(input_ids=made[:, :-rows], past_key_values=cache, use_cache=True)
        return cls(made, cache, rows)

    def logits(self, model: Any) -> Float[Tensor, "rows vocabulary"]:
        """What the model predicts behind each token that follows the prompt, from a cache that stays as it is."""
        cache = copy.deepcopy(self.cache)
        return model(input_ids=self.ids[:, -self.rows :], past_key_values=cache, use_cache=True).logits[0].float()


def profiled(
    model: Any, stretch: Stretch, lines: Float[Tensor, "lines 2"], budget: Budget, draw: torch.Generator
) -> dict[Head, Float[Tensor, " lines"]]:
    """The loss of each KV head under each line, in nats per token."""
    probes = Probes()
    with frozen(model), attach(model, probes, trial=False):
        log_p = stretch.logits(model).log_softmax(-1)
        y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=draw).to(log_p.device)
        gradients = torch.autograd.grad(-log_p.gather(1, y).sum(), list(probes.zeros.values()))
    found: dict[Head, Tensor] = {}
    with torch.no_grad():
        for (layer, view), gradient in zip(probes.views.items(), gradients, strict=True):
            change = moved(view, gradient, lines, budget)[0]
            for head, own in enumerate((0.5 * change.square().mean(1)).cpu()):
                found[layer, head] = own
    return found


def extrapolated(
    losses: Float[Tensor, "lengths heads lines"], lengths: Sequence[int], to: int
) -> Float[Tensor, "heads lines"]:
    """The losses at a length that was not profiled: N to the power that all heads together follow under each line.

    Heads are too noisy for powers of their own: a solver takes the lines whose losses were extrapolated to nothing. The
    powers stay within -1 and 1; one length says nothing of others, its losses stay as they are.
    """
    x = torch.tensor(lengths, dtype=torch.float64).log2()
    away = x - x.mean()
    together = losses.sum(1).clamp_min(torch.finfo(torch.float64).tiny).log2()
    power = (away @ together / away.square().sum().clamp_min(1e-9)).clamp(-1.0, 1.0)
    return (losses * 2 ** ((math.log2(to) - x)[:, None, None] * power)).mean(0)


# ---------------------------------------------------------------- solve


def assign(
    losses: Float[Tensor, "heads lines"], held: Int[Tensor, "lengths lines"], lengths: Sequence[int], keep: float
) -> Int[Tensor, " heads"]:
    """The line of each KV head: the least sum of losses at which the mean share that is held stays within `keep`.

    Args:
        losses: Of each head under each line.
        held: Entries that a head of each line holds, at each length that the budget must hold at.
        lengths: These lengths.
        keep: Mean share of the text over the heads.

    Raises:
        BadInput: no assignment holds so little; says the least that one can.
    """
    heads, lines = losses.shape
    cost = losses.numpy() / max(float(losses.max()), 1e-300)
    one_each = sparse.kron(sparse.eye(heads), np.ones((1, lines)))
    spent = sparse.csr_array(np.tile(held.numpy(), (1, heads)))
    most = np.floor(keep * heads * np.asarray(lengths) + 1e-9)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent, -np.inf, most)]
    # the solver's own tolerances are absolute
    found = solved(1e4 * cost.ravel(), limits)
    if found.x is None:
        raise too_little(held, lengths, keep, heads)
    chosen = torch.from_numpy(found.x.reshape(heads, lines).argmax(1))
    # a head for which shorter is no worse gets the shortest: the solver stops within its tolerance
    mine = losses.gather(1, chosen[:, None])
    no_worse = (losses <= mine + 1e-9 * losses.max()) & (held[:, None] <= held[:, chosen, None]).all(0)
    return torch.where(no_worse, held.sum(0), held.sum() + 1).argmin(1)


@unheard()
def least_share(held: Int[Tensor, "lengths lines"], lengths: Sequence[int], heads: int | None = None) -> float:
    """The least mean share that can be met at all lengths.

    Args:
        held: Entries that a head of each line holds.
        lengths: The lengths.
        heads: How many KV heads share out the lines among them; None: as many as it takes.
    """
    count, lines = heads or 1, held.shape[1]
    share = held.double() / torch.tensor(lengths)[:, None] / count
    # how many heads have each line, and in the last column the share
    spent = np.hstack([share.numpy(), -np.ones((len(lengths), 1))])
    all_heads = np.append(np.ones(lines), 0.0)
    found = milp(
        np.append(np.zeros(lines), 1.0),
        constraints=[LinearConstraint(spent, -np.inf, 0), LinearConstraint(all_heads, count, count)],
        integrality=np.append(np.full(lines, heads is not None), False),
        bounds=Bounds(0, np.append(np.full(lines, count), 1.0)),
    )
    return float(found.x[-1])


def too_little(held: Int[Tensor, "lengths lines"], lengths: Sequence[int], keep: float, heads: int | None) -> BadInput:
    """The error for a budget that no assignment meets."""
    least = math.ceil(1e4 * (least_share(held, lengths, heads) - 1e-9)) / 1e4
    return BadInput(
        f"keep={keep:g}: no assignment of these {held.shape[1]} lines holds so little of {listed(lengths)} tokens, the "
        f"least is {least:g}; keep so much, or give longer texts, fewer sinks, a smaller `every` or shorter spans"
    )


@unheard()
def solved(cost: np.ndarray, limits: list[LinearConstraint]) -> OptimizeResult:
    """HiGHS's answer for binary choices."""
    return milp(
        cost,
        constraints=limits,
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3, "time_limit": 60.0},
    )


# ---------------------------------------------------------------- search


def listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


@dataclass(frozen=True, eq=False)
class Found:
    """The lines that a search found, and the evidence for them.

    Losses are Kullback-Leibler divergences from the full model's predictions, in nats per token of the rows behind a
    prompt. `real` and `even` were measured on texts of a length, and of a part of the text, that no choice was made on.

    Args:
        search: How it was searched.
        heads: Layer and number of each KV head.
        candidates: Lines that were tried.
        profile: Estimated loss of each head under each line at the profiled lengths.
        chosen: The candidate that each head got.
        predicted: Loss at the unseen length that the sum over heads foresees.
        real: Loss at the unseen length with the lines as masks, of each text.
        even: The same with one span for all heads that holds as much.
        surprise: Mean loss of the text's own tokens: of the full model, with the lines, and with one span.
    """

    search: Search
    heads: tuple[Head, ...]
    candidates: tuple[Rule, ...]
    profile: Float[Tensor, "lengths heads lines"]
    chosen: tuple[int, ...]
    predicted: float
    real: tuple[float, ...]
    even: tuple[float, ...]
    surprise: tuple[float, float, float]

    @cached_property
    def lines(self) -> tuple[tuple[int, int, float, float], ...]:
        """(layer, KV head, alpha, beta) of each KV head."""
        return tuple((*head, *self.candidates[n]) for head, n in zip(self.heads, self.chosen, strict=True))

    @property
    def gain(self) -> tuple[float, float, float]:
        """How much less the loss is than with one span for all, with its 95 % interval over the texts."""
        return interval([e - r for e, r in zip(self.even, self.real, strict=True)])

    def share(self, length: int) -> float:
        """The mean share of a text of this length that the lines hold."""
        lines = torch.tensor([line[2:] for line in self.lines], dtype=torch.float64)
        return float(entries(lines, torch.tensor([length]), self.search.budget).double().mean()) / length

    def table(self) -> pd.DataFrame:
        """The profile: length, layer, head, alpha, beta, entries held, loss, and whether the line was chosen."""
        import pandas as pd

        lines = torch.tensor(self.candidates, dtype=torch.float64)
        held = entries(lines, torch.tensor(self.search.lengths), self.search.budget).tolist()
        rows = [
            (length, *head, *line, held[a][c], float(self.profile[a, b, c]), c == self.chosen[b])
            for a, length in enumerate(self.search.lengths)
            for b, head in enumerate(self.heads)
            for c, line in enumerate(self.candidates)
        ]
        return pd.DataFrame(rows, columns=["length", "layer", "head", "alpha", "beta", "held", "loss", "chosen"])

    def record(self) -> dict[str, Any]:
        """Everything but the profile, as plain numbers that JSON can hold."""
        s = self.search
        at = dict.fromkeys((*s.lengths, *s.held_at, s.beyond))
        return {
            "keep": s.keep,
            "lengths": list(s.lengths),
            "unseen": s.beyond,
            "samples": s.samples,
            "sinks": s.sinks,
            "every": s.every,
            "seed": s.seed,
            "lines": [list(line) for line in self.lines],
            "share held": {str(length): round(self.share(length), 4) for length in at},
            "loss at the unseen length": {
                "predicted": self.predicted,
                "real": dict(zip(("value", "low", "high"), interval(self.real), strict=True)),
                "one span for all": dict(zip(("value", "low", "high"), interval(self.even), strict=True)),
                "gain": dict(zip(("value", "low", "high"), self.gain, strict=True)),
            },
            "loss of the text": dict(zip(("full", "lines", "one span for all"), self.surprise, strict=True)),
        }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with Student's 95 % interval."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()), -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


@dataclass(frozen=True)
class Search:
    """How lines are searched.

    Half of the text is for the profile, a quarter to choose among the solver's answers, a quarter to measure.

    Args:
        keep: Mean share of the cache over the KV heads.
        lengths: Lengths, in tokens, of the texts that are profiled.
        at: Lengths that the budget must hold at; None: all of `lengths`, and `unseen`.
        spans: (alpha, beta) to choose from; None: what `grid` gives for these lengths, and one span for all.
        samples: Texts of each length, and as many for each use of the unseen one.
        unseen: Length at which the result is tried; None: twice the longest of `lengths`.
        sinks: First tokens that every head keeps.
        every: In decoding, entries are dropped after so many new tokens.
        seed: Of the texts, and of what is drawn from the model's predictions.

    Raises:
        BadInput: a number that cannot be.
    """

    keep: float = 0.25
    lengths: tuple[int, ...] = (512, 1024)
    at: tuple[int, ...] | None = None
    spans: tuple[Rule, ...] | None = None
    samples: int = 8
    unseen: int | None = None
    sinks: int = 4
    every: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise BadInput(f"keep={self.keep}: give a mean share of the cache, above 0 and at most 1")
        if not self.lengths or len(set(self.lengths)) != len(self.lengths) or min(self.lengths) < 2 * SHARE:
            raise BadInput(f"lengths={self.lengths}: give lengths in tokens, each {2 * SHARE} or more and none twice")
        if self.beyond in self.lengths or self.beyond < 2 * SHARE:
            raise BadInput(
                f"unseen={self.unseen}: give a length of {2 * SHARE} or more tokens that is not among the profiled "
                f"{listed(self.lengths)}"
            )
        if not self.held_at or min(self.held_at) < 1:
            raise BadInput(f"at={self.at}: give lengths that the budget must hold at, each 1 or more")
        for name, number, least in (("samples", self.samples, 1), ("sinks", self.sinks, 0), ("every", self.every, 0)):
            if number < least:
                raise BadInput(f"{name}={number}: give {least} or more")
        for line in self.candidates:
            if not (abs(line[0]) <= MOST and 0 <= line[1] <= 1):
                raise BadInput(f"spans: {line} is no line; give (alpha, beta), alpha in tokens, beta from 0 to 1")
        if not self.candidates:
            raise BadInput("spans=(): there is nothing to choose from; give (alpha, beta), or None for the usual grid")

    @property
    def beyond(self) -> int:
        """The length at which the result is tried."""
        return 2 * max(self.lengths) if self.unseen is None else self.unseen

    @property
    def held_at(self) -> tuple[int, ...]:
        """The lengths that the budget must hold at."""
        return (*self.lengths, self.beyond) if self.at is None else self.at

    @cached_property
    def candidates(self) -> tuple[Rule, ...]:
        """The lines to choose from."""
        if self.spans is not None:
            return self.spans
        return tuple(dict.fromkeys((*grid((*self.lengths, self.beyond)), self.even)))

    @property
    def even(self) -> Rule:
        """The line that holds as much when all heads have it."""
        return -float(self.sinks), self.keep

    @property
    def budget(self) -> Budget:
        """The budget of a policy with the lines that are found: the spans say how many."""
        return Budget(MOST, sinks=self.sinks, recent=1, every=self.every)

    def run(self, model: Any, tokenizer: Any, text: str, progress: Callable[[int, int], None] | None = None) -> Found:
        """Searches lines for the KV heads of a model. The model comes out as it went in.

        The solver answers for the mean of the losses at the profiled lengths, and for those extrapolated to the unseen
        one. Of these two and one span for all, that whose real loss at the unseen length is least is taken.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            text: What it reads. Heads that nothing in it makes look back are given short spans.
            progress: Called with the texts done and all texts.

        Raises:
            BadInput: a text that is too short, lengths that the model cannot read, or a budget that cannot be met.
        """
        profile_parts, choice_texts, last_texts = self.texts(model, tokenizer, text)
        lines = torch.tensor(self.candidates, dtype=torch.float64)
        held = entries(lines, torch.tensor(self.held_at), self.budget)
        # before minutes go into the profile
        if least_share(held, self.held_at) > self.keep + 1e-9:
            raise too_little(held, self.held_at, self.keep, None)
        done, of = 0, sum(map(len, profile_parts)) + len(choice_texts) + len(last_texts)

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, of)

        draw = torch.Generator().manual_seed(self.seed)
        by_length, heads = [], tuple[Head, ...]()
        for texts in profile_parts:
            sums: dict[Head, Tensor] = {}
            for ids in texts:
                for head, own in profiled(model, Stretch.of(model, ids), lines, self.budget, draw).items():
                    sums[head] = sums.get(head, 0.0) + own / self.samples
                step()
            heads = tuple(sums)
            by_length.append(torch.stack(list(sums.values())))
        profile = torch.stack(by_length)
        foreseen = extrapolated(profile, self.lengths, self.beyond)
        tables = (profile.mean(0), foreseen)
        plans = [tuple(assign(t, held, self.held_at, self.keep).tolist()) for t in tables]
        if self.even in self.candidates:
            plans.append((self.candidates.index(self.even),) * len(heads))

        def named(plan: Sequence[int]) -> dict[Head, Rule]:
            return {head: self.candidates[n] for head, n in zip(heads, plan, strict=True)}

        first = [self.tried(model, ids, [named(plan) for plan in plans], step) for ids in choice_texts]
        totals = [sum(text[1 + n][0] for text in first) for n in range(len(plans))]
        best = plans[totals.index(min(totals))]
        last = [self.tried(model, ids, [named(best), dict.fromkeys(heads, self.even)], step) for ids in last_texts]
        full, ours, one = (float(np.mean([text[n][1] for text in last])) for n in range(3))
        return Found(
            self,
            heads,
            self.candidates,
            profile,
            best,
            float(foreseen[torch.arange(len(heads)), list(best)].sum()),
            tuple(text[1][0] for text in last),
            tuple(text[2][0] for text in last),
            (full, ours, one),
        )

    @torch.no_grad()
    def tried(
        self, model: Any, ids: Sequence[int], plans: Sequence[dict[Head, Rule]], step: Callable[[], None]
    ) -> list[tuple[float, float]]:
        """Of the full model, and with each plan as masks: the divergence from the full model, the loss of the text."""
        stretch = Stretch.of(model, ids)
        full = stretch.logits(model).log_softmax(-1)
        said = stretch.ids[0, 1 - stretch.rows :, None]
        found = [(0.0, float(-full[:-1].gather(1, said).mean()))]
        for plan in plans:
            with attach(model, Spans(plan, self.budget), trial=False):
                log_p = stretch.logits(model).log_softmax(-1)
            apart = (full.exp() * (full - log_p)).sum(-1).mean()
            found.append((float(apart), float(-log_p[:-1].gather(1, said).mean())))
        step()
        return found

    def texts(
        self, model: Any, tokenizer: Any, text: str
    ) -> tuple[list[list[list[int]]], list[list[int]], list[list[int]]]:
        """Stretches for the profile, by length; those to choose on; those to measure on.

        Raises:
            BadInput: a text that is too short, or lengths that the model cannot read.
        """
        most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(*self.lengths, self.beyond)
        if most is not None and longest > most:
            raise BadInput(
                f"lengths={self.lengths}, unseen={self.beyond}: {type(model).__name__} reads {most} tokens; give "
                "shorter ones"
            )
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        need = max(2 * max(self.lengths), 4 * self.beyond)
        if len(ids) < need:
            raise BadInput(
                f"a text of {len(ids)} tokens is too short for lengths={self.lengths} and unseen={self.beyond}: give "
                f"one of {need} or more"
            )
        half, quarter = len(ids) // 2, len(ids) // 4
        rng = random.Random(self.seed)

        def cut(part: list[int], length: int) -> list[list[int]]:
            room = length - len(begin)
            starts = [rng.randrange(len(part) - room + 1) for _ in range(self.samples)]
            return [begin + part[a : a + room] for a in starts]

        profile = [cut(ids[:half], length) for length in self.lengths]
        choice, last = ids[half : half + quarter], ids[half + quarter :]
        return profile, cut(choice, self.beyond), cut(last, self.beyond)
