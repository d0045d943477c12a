"""The one door to models, beside `converting.py`, which changes them for good. No other file touches one.

`attach` registers an attention function and its mask function with transformers for as long as its context lives,
points the model's configurations at them, and takes everything back on the way out, also after an exception.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from foveate.core.cache import RaggedLayer, adopt, ragged_layers
from foveate.core.calls import call_of, standing_in
from foveate.core.errors import BadInput, NothingObserved, NotOnInterface, NotSupported
from foveate.core.hooks import Trail, all_configs, blocks, hooks, routers
from foveate.core.landing import Trial, proved
from foveate.core.mask import Mask
from foveate.core.masking import as_mask, build_mask
from foveate.core.mechanism import (
    Edit,
    ExpertEdit,
    HeadEdit,
    Mechanism,
    Metric,
    ModelMetric,
    Parts,
    Pattern,
    Policy,
    PromptEdit,
    Pruner,
    ResidualEdit,
    Schedule,
    Tilt,
)
from foveate.core.places import check_places, spans_of
from foveate.core.policy import Policies, chosen, compress
from foveate.core.prefix import PrefixLayer, prefix_layers
from foveate.core.recurrence import Recurrence
from foveate.core.reductions import Match, Reduction
from foveate.core.removing import Gone, Removal, among_left, gone_ones, make_room, removed
from foveate.core.results import Results, collect
from foveate.core.rows import Engine, Layer, Rows, View
from foveate.core.rows import attend as attend_rows
from foveate.core.rule import Rule
from foveate.core.standing import Mixed, Standing, flowed

__all__ = ["Attached", "attach", "attention_layers"]

ACTIVE: weakref.WeakKeyDictionary[torch.nn.Module, Attached] = weakref.WeakKeyDictionary()
COUNTER = itertools.count()
ATTACHABLE = (Metric, Edit, HeadEdit, ResidualEdit, ExpertEdit, Pattern, Policy, Pruner, Schedule)


@contextmanager
def attach(
    model: PreTrainedModel, *mechanisms: Mechanism, engine: Engine = "auto", trial: dict[str, Any] | bool = True
) -> Iterator[Attached]:
    """Binds mechanisms to a model for the length of a `with` block.

    Metrics observe, edits and patterns act, and a KV policy says which keys stay in the cache; an `attach` inside
    another one adds to its stack. Whatever the order in which they are given, tilts act before edits of scores, these
    before edits of weights, then head edits and at last edits of the residual stream; among their like, in the order
    in which they are given. A pruner's parts are out before anything else looks at the model. A schedule computes the
    calls whose rows nobody reads or changes. On leaving, the model
    computes bit for bit what it did before. A cache that a policy compressed can be used again only while something is
    attached.

    On entering, what acts is tried on a small input: each mechanism must move the output, and by what the dense
    reference says.

    Args:
        model: A transformers model whose attention goes through `AttentionInterface`.
        mechanisms: Metrics, edits of any kind but those of prompts, KV policies that do not do the same, and at most
            one pattern, one pruner and one schedule.
        engine: Which way of the row engine to use.
        trial: The small input, as arguments of the model; True makes one, False leaves the trial out.

    Yields:
        What is attached; `attached.results` holds what the metrics found.

    Raises:
        NotOnInterface: the model's attention cannot be reached; says why and what works.
        NotLanded: on entering, when an edit changes nothing in a layer that it names, or nothing at all, or something
            else than its definition says.
        BadInput: a layer or head that the model has not; two mechanisms that contradict each other.
        NothingObserved: on leaving, when something was to act and no call came by that it could act on.
    """
    for m in mechanisms:
        if not isinstance(m, ATTACHABLE):
            hint = ""
            if isinstance(m, ModelMetric):
                hint = f"; run it with {type(m).__name__}(...).measure(model, tokenizer)"
            elif isinstance(m, PromptEdit):
                hint = "; it changes a text, before there are tokens: call its .edit(text)"
            raise BadInput(
                f"{m!r} cannot be attached: not a Metric, an edit, a Pattern, a Policy, a Pruner or a Schedule{hint}"
            )
    outer = ACTIVE.get(model)
    with ExitStack() as stack:
        layers = attention_layers(model) if outer is None else outer.layers
        names_its_places(model, layers, mechanisms, None if outer is None else outer.removal)
        agree([*(outer.stacked() if outer else ()), *mechanisms])
        removal = None
        for pruner in (m for m in mechanisms if isinstance(m, Pruner) and m.parts() != Parts()):
            if outer is not None:
                raise BadInput(
                    f"{type(pruner).__name__} inside of another `attach`, whose mechanisms have counted the parts "
                    "already: give it to the outermost one"
                )
            numbers = {module: layer.index for module, layer in layers.items()}
            inputs = trial if isinstance(trial, dict) else None
            removal = stack.enter_context(removed(model, numbers, pruner.parts(), inputs))
            # nothing may hold what was taken out
            del numbers
            layers = attention_layers(model)
            names_its_places(model, layers, [m for m in mechanisms if m is not pruner], removal)
        has_its_parts(model, layers, mechanisms)
        if trial is not False:
            with ExitStack() as pause:
                if outer is not None:
                    outer.paused = True
                    pause.callback(setattr, outer, "paused", False)
                proved(model, mechanisms, None if trial is True else trial, partial(tried, model, engine))
        if outer is None:
            attached = Attached(model, engine=engine, layers=layers, removal=removal)
            stack.enter_context(bound(attached))
        else:
            attached = Attached(model, engine=outer.engine, layers=outer.layers, parent=outer)
            outer.inner.append(attached)
            stack.callback(outer.inner.remove, attached)
        attached.mechanisms = mechanisms
        yield attached
        left(attached, outer or attached)


def names_its_places(
    model: PreTrainedModel,
    layers: dict[torch.nn.Module, Layer],
    mechanisms: Sequence[Mechanism],
    removal: Removal | None = None,
) -> None:
    """Raises `BadInput` where a mechanism names a layer or a head that the model has not, or has no more."""
    heads = [getattr(getattr(m, "config", None), "num_attention_heads", None) for m in layers]
    counts = [n if isinstance(n, int) else None for n in heads]
    for layer, left in removal.heads.items() if removal else ():
        counts[layer] = left
    for m in mechanisms if (mixed := mixed_in(layers)) else ():
        if isinstance(m, Policy) or gone_ones(m, mixed):
            raise BadInput(
                f"{type(m).__name__} acts on rows of attention, which layers {', '.join(map(str, mixed))} of "
                f"{type(model).__name__} have not: a mixer or a recurrence stands there"
            )
    gone = gone_from(layers)
    for m in mechanisms if gone else ():
        if isinstance(m, Policy):
            among_left(m, gone)
        elif named := gone_ones(m, gone):
            raise BadInput(
                f"{type(m).__name__} names layers {', '.join(map(str, named))} of {type(model).__name__}, whose "
                "attention has been taken out; leave them out"
            )
    for m in mechanisms:
        check_places(m, len(layers), counts, type(model).__name__)


def has_its_parts(
    model: PreTrainedModel, layers: dict[torch.nn.Module, Layer], mechanisms: tuple[Mechanism, ...]
) -> None:
    """Raises `NotSupported` where a mechanism acts on something that the model has not."""
    streams: dict[torch.nn.Module, int] | None = None
    for m in mechanisms:
        if isinstance(m, ResidualEdit | ExpertEdit):
            if streams is None:
                streams = blocks(model, {module: layer.index for module, layer in layers.items()})
            if not streams:
                raise NotSupported(
                    f"{type(model).__name__} has no residual stream that can be reached: it keeps its layers in no "
                    "list of modules"
                )
            if isinstance(m, ExpertEdit) and not routers(model, streams):
                raise NotSupported(f"{type(model).__name__} has no experts to choose from: it is no mixture of experts")


def agree(mechanisms: list[Mechanism]) -> None:
    """Raises `BadInput` where two mechanisms contradict each other."""
    Policies.of([m for m in mechanisms if isinstance(m, Policy)])
    for kind in (Pattern, Pruner, Schedule):
        if len(same := [m for m in mechanisms if isinstance(m, kind)]) > 1:
            raise BadInput(f"one {kind.__name__.lower()} at a time; {len(same)} are attached: {same}")
    seen: dict[tuple, Mechanism] = {}
    for m in mechanisms:
        for place in sorted(m.sets(), key=str):
            if place in seen:
                what = " ".join(f"{name} {number}" for name, number in zip(place[::2], place[1::2], strict=True))
                raise BadInput(
                    f"{type(seen[place]).__name__} and {type(m).__name__} both set {what}, and contradict each other; "
                    "leave one of them out"
                )
            seen[place] = m


def left(attached: Attached, whole: Attached) -> None:
    """Raises `NothingObserved` where something was to act and had nothing to act on."""
    model, mechanisms = attached.model, attached.mechanisms
    policies = [m for m in mechanisms if isinstance(m, Policy)]
    if attached.calls and not whole.holding and policies:
        raise NothingObserved(
            f"{policies[0]!r} had nothing to act on: {type(model).__name__} ran without a KV cache of its own; use "
            "`model.generate`, or leave use_cache on"
        )
    if attached.calls == 0 and any(not isinstance(m, Metric) for m in mechanisms):
        raise NothingObserved(
            f"{', '.join(type(m).__name__ for m in mechanisms)}: no attention call of {type(model).__name__} "
            "came by while attached, so nothing was changed; run the model inside the `with` block"
        )
    for m in mechanisms:
        for name in spans_of(m):
            first = min((a for a, _ in getattr(m, name)), default=0)
            if first > 0 and first >= whole.longest:
                raise NothingObserved(
                    f"{type(m).__name__}({name}=…): token {first} was never seen; the longest text that came by while "
                    f"attached has {whole.longest} tokens, so nothing was changed there"
                )


@contextmanager
def tried(model: PreTrainedModel, engine: Engine, mechanisms: tuple[Mechanism, ...], trial: Trial) -> Iterator[None]:
    """The model with some mechanisms attached that a trial looks at."""
    with bound(Attached(model, mechanisms, engine, attention_layers(model), trial=trial)):
        yield


def attention_layers(model: torch.nn.Module) -> dict[torch.nn.Module, Layer]:
    """The attention modules of a model, in order, found by what their code calls.

    What stands for one that was taken out, or in the place of one, is counted, so that the others keep their numbers.

    Raises:
        NotOnInterface: there are none.
    """
    found = [(name, m) for name, m in model.named_modules() if on_interface(m) or is_gone(m) or isinstance(m, Mixed)]
    if all(is_gone(m) for _, m in found):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise NotOnInterface(
            f"{type(model).__name__} ({kind}) computes attention in code of its own, not through transformers' "
            "AttentionInterface, so it cannot be observed without rewriting it. Models on the interface work "
            "(llama, mistral, qwen, gemma, phi3, granite, olmo, gpt2, opt, bert, vit, clip, whisper, t5, bart, …)"
        )
    return {m: Layer(n, name) for n, (name, m) in enumerate(found)}


def is_gone(module: torch.nn.Module) -> bool:
    """Whether this module stands for an attention that was taken out."""
    return isinstance(module, Gone) and module.kind == "attention"


def gone_from(layers: dict[torch.nn.Module, Layer]) -> tuple[int, ...]:
    """Numbers of the layers whose attention was taken out."""
    return tuple(layer.index for module, layer in layers.items() if is_gone(module))


def mixed_in(layers: dict[torch.nn.Module, Layer]) -> tuple[int, ...]:
    """Numbers of the layers that have no rows of attention: a mixer or a recurrence stands there."""
    return tuple(layer.index for module, layer in layers.items() if not has_rows(module))


def has_rows(module: torch.nn.Module) -> bool:
    """Whether this module computes attention by rows."""
    standing = standing_in(module)
    return standing is None or isinstance(standing.operator, Rule)


def on_interface(module: torch.nn.Module) -> bool:
    """Whether this module's forward itself asks the interface for its attention function."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@dataclass(eq=False)
class Attached:
    """What is bound to a model, and what it found so far.

    Args:
        model: The model.
        mechanisms: What was given to `attach`, in the order in which it acts.
        engine: Which way of the row engine is used.
        layers: The attention modules and what is known of them.
        parent: The attachment around this one, if there is one.
        inner: Attachments inside of this one.
        states: States of the metrics, by number of the mechanism and of the layer.
        calls: Attention calls so far.
        trails: Token ids behind the keys, by embedding.
        trail: The one of the running call.
        crossing: Modules whose running call looks at another sequence.
        last: Samples of the layer before.
        cache: Weak reference to the cache of the running call, under a KV policy or with a shared prefix.
        handed: Weak reference to the layer of that cache that took keys last.
        holding: Bytes that its layers held after their last call.
        places: Places of the rows in their texts and which of them are real, by layer, of the running call.
        longest: Tokens of the longest text that came by.
        paused: Whether another attachment is being tried on the model.
        trial: What looks at each call while this one is being tried.
        branches: Caches besides the call's own that are filled from its prompt, each by policies of its own.
        removal: What was taken out of the model.
    """

    model: PreTrainedModel
    mechanisms: tuple[Mechanism, ...] = ()
    engine: Engine = "auto"
    layers: dict[torch.nn.Module, Layer] = field(default_factory=dict)
    parent: Attached | None = None
    inner: list[Attached] = field(default_factory=list)
    states: dict[tuple[int, int], Any] = field(default_factory=dict)
    calls: int = 0
    trails: dict[int, Trail] = field(default_factory=dict)
    trail: Trail | None = None
    crossing: set[torch.nn.Module] = field(default_factory=set)
    last: Rows | None = None
    cache: Callable[[], Any] = field(default=lambda: None)
    handed: Callable[[], Any] = field(default=lambda: None)
    holding: dict[int, int] = field(default_factory=dict)
    places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    longest: int = 0
    paused: bool = False
    trial: Trial | None = None
    branches: Sequence[tuple[Policies, Sequence[RaggedLayer]]] = ()
    removal: Removal | None = None

    @cached_property
    def blocks(self) -> dict[torch.nn.Module, int]:
        """The modules that add one layer each to the residual stream, by an attention that knows where its rows are."""
        return blocks(
            self.model, {m: layer.index for m, layer in self.layers.items() if not isinstance(m, Gone | Mixed)}
        )

    @cached_property
    def routers(self) -> dict[torch.nn.Module, int]:
        """The modules that choose experts."""
        return routers(self.model, blocks(self.model, {m: layer.index for m, layer in self.layers.items()}))

    @cached_property
    def gone(self) -> tuple[int, ...]:
        """Layers whose attention was taken out."""
        return gone_from(self.layers)

    @property
    def results(self) -> Results:
        """What the metrics found so far.

        Raises:
            NothingObserved: the model has not run, or a metric could read none of its layers.
        """
        return collect(self)

    def stack(self) -> list[Attached]:
        """This attachment and those inside it, in the order in which they act."""
        return [self, *itertools.chain.from_iterable(a.stack() for a in self.inner)]

    def stacked(self) -> Iterator[Mechanism]:
        """The mechanisms of the whole stack."""
        return itertools.chain.from_iterable(a.mechanisms for a in self.stack())

    # ------------------------------------------------------------ the attention function

    def call(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """What the model calls instead of its own attention; same arguments, same result."""
        layer = self.layers.get(module)
        if layer is None:
            layer = self.layers[module] = Layer(len(self.layers), type(module).__name__)
        if module in self.crossing and not layer.cross:
            layer = self.layers[module] = replace(layer, cross=True)
        cache = self.cache_of(key)
        keys, offset = (key.shape[2], 0) if cache is None else (cache.seen, cache.seen - query.shape[2])
        mask = as_mask(
            attention_mask, module, query.shape[2], keys, query.device, is_causal, sliding_window, layer.cross, offset
        )
        self.note(layer, mask)
        standing = standing_in(module)
        if standing is not None and isinstance(standing.operator, Recurrence):
            return flowed(standing, query, key, value, mask, scaling), None
        view = call_of(
            module,
            query,
            layer,
            value_dim=value.shape[3],
            scaling=scaling,
            dropout=dropout,
            softcap=softcap,
            s_aux=s_aux,
            position_bias=position_bias,
        )
        if cache is None:
            out = self.run(view(key, value, mask)).out
        elif isinstance(cache, RaggedLayer):
            out = self.look_back(cache, view, key, value, mask)
        else:
            out = self.look_through(cache, view, key, value, mask)
        return out.transpose(1, 2).contiguous(), None

    def note(self, layer: Layer, mask: Mask) -> None:
        """Where the rows of this call stand in their texts, for what needs to know that later."""
        stacked = list(self.stacked())
        if any(isinstance(m, ResidualEdit) for m in stacked):
            real = torch.ones_like(mask.rows) if mask.valid is None else mask.valid
            self.places[layer.index] = mask.place, real
        if not layer.cross and any(spans_of(m) for m in stacked):
            self.longest = max(self.longest, int(mask.place.max()) + 1)

    def residual_edits(self) -> Iterator[ResidualEdit]:
        """What changes the residual stream."""
        return (m for m in self.stacked() if isinstance(m, ResidualEdit)) if not self.paused else iter(())

    def expert_edits(self) -> Iterator[ExpertEdit]:
        """What changes the choice of experts."""
        return (m for m in self.stacked() if isinstance(m, ExpertEdit)) if not self.paused else iter(())

    def landed(self, m: Mechanism, layer: int, before: Tensor, after: Tensor) -> None:
        """Tells a trial what a mechanism changed."""
        if self.trial is not None:
            self.trial.saw(m, layer, before, after)

    def look_back(
        self, cache: RaggedLayer, view: Callable[..., View], key: Tensor, value: Tensor, mask: Mask
    ) -> Tensor:
        """Attention over a ragged cache and what came with the call; then the policies have their say."""
        policies, layers = self.policies, ragged_layers(self.cache())
        first, rows, at = not cache.filled, None, layers.index(cache)
        call = view(key, value, mask if first else among_themselves(key.shape[2], key.device))
        if first:
            rows = self.run(call, (policies, *(theirs for theirs, _ in self.branches)))
            out = rows.out
        else:
            cache.settle(mask.valid)
            store = cache.store
            only = chosen(policies, layers, at, call, mask)
            if (
                self.idle
                and call.rule.plain
                and call.bias is None
                and not call.needs_grad
                and not store.kernel_refuses(mask)
            ):
                self.calls_seen()
                out = store.attend(call.q, mask, call.scale, call.softcap, call.sinks, only)
            else:
                k, v, holes = store.by_position(mask, call.grouped, only)
                mass = store.bias(mask)
                tilt = None if mass is None else Tilt(bias=mass.repeat_interleave(call.grouped, 1))
                out = self.run(view(k, v, holes, tilt=tilt)).out
        for theirs, caches in self.branches:
            caches[at].update(key, value)
            compress(theirs, caches, at, call, mask, rows)
        # those of the branches took the same keys
        self.handed = weakref.ref(cache)
        compress(policies, layers, at, call, mask, rows)
        self.holding[at] = cache.bytes_held()
        return out

    def look_through(
        self, cache: PrefixLayer, view: Callable[..., View], key: Tensor, value: Tensor, mask: Mask
    ) -> Tensor:
        """Attention over what rows share and their own keys; at full length where somebody looks at the rows."""
        call = view(key, value, Mask.full(mask.queries, key.shape[2], key.device))
        if self.idle and not cache.refuses(call, mask):
            self.calls_seen()
            return cache.attend(call, mask)
        if self.trail is not None and self.trail.pending is not None and cache.opening:
            self.trail.seen = cache.tokens(call.batch)
        return self.run(view(*cache.expanded(call, mask))).out

    def run(self, view: View, policies: Sequence[Policies] = ()) -> Rows:
        """One pass of the row engine for the whole stack; its head outputs are edited."""
        everyone = self.stack()
        if self.trail is not None and not view.layer.cross:
            view.tokens = self.trail.of(view)
        mechanisms = [(a, n, m) for a in everyone for n, m in enumerate(a.mechanisms)]
        metrics = [
            (a, n, m) for a, n, m in mechanisms if isinstance(m, Metric) and all(can(r, view) for r in m.needs())
        ]
        patterns = [m for _, _, m in mechanisms if isinstance(m, Pattern)]
        schedules = [m for _, _, m in mechanisms if isinstance(m, Schedule)]
        asked = [need for one in policies for need in one.needs()]
        if view.training and view.rule.trains:
            asked += view.rule.needs()
        rows = attend_rows(
            view,
            [*(r for _, _, m in metrics for r in m.needs()), *asked],
            edits=[m for _, _, m in mechanisms if isinstance(m, Edit)],
            pattern=patterns[0].select if patterns else None,
            schedule=schedules[0] if schedules else None,
            engine=self.engine,
        )
        self.calls_seen()
        if view.training and view.rule.trains and (standing := self.standing(view.layer)) is not None:
            standing.note(rows)
        for _, _, m in mechanisms:
            if isinstance(m, HeadEdit) and m.acts(view.layer.index):
                rows.out = m.edit(rows, rows.out)
        if self.trial is not None:
            self.trial.called(view, rows.out, [m for _, _, m in mechanisms])
        if metrics:
            rows.before = self.last if self.last is not None and self.last.layer.index == view.layer.index - 1 else None
            with torch.no_grad():
                for a, n, m in metrics:
                    at = (n, view.layer.index)
                    a.states[at] = m.update(a.states[at] if at in a.states else m.start(view.layer), rows)
            rows.before = None
            self.last = rows.samples()
        return rows

    def standing(self, layer: Layer) -> Standing | None:
        """What stands in a layer in the place of softmax."""
        return next((standing_in(m) for m, known in self.layers.items() if known.index == layer.index), None)

    def calls_seen(self) -> None:
        for a in self.stack():
            a.calls += 1

    # ------------------------------------------------------------ the cache

    @property
    def policies(self) -> Policies:
        """The KV policies of the stack as one, which counts the layers that have a cache."""
        found = [m for m in self.stacked() if isinstance(m, Policy)]
        return Policies.of([among_left(m, self.gone) for m in found] if self.gone else found)

    @property
    def compresses(self) -> bool:
        """Whether there is a KV policy in the stack."""
        return any(isinstance(m, Policy) for m in self.stacked())

    @property
    def idle(self) -> bool:
        """Whether nothing wants to see or change rows."""
        return all(isinstance(m, Policy | Schedule) for m in self.stacked())

    def cache_of(self, key: Tensor) -> RaggedLayer | PrefixLayer | None:
        """The layer of ours that these keys were handed on by; None where the call has no such cache.

        Raises:
            NotSupported: the model changed its keys between its cache and its attention.
        """
        handed = self.handed()
        if handed is not None and handed.latest() is key:
            return handed
        layers: list[RaggedLayer | PrefixLayer] = [*ragged_layers(self.cache()), *prefix_layers(self.cache())]
        for layer in layers:
            if layer.latest is not None and layer.latest() is key:
                return layer
        if any(layer.pending is not None for layer in layers):
            raise NotSupported(
                f"{type(self.model).__name__} changes its keys after caching them, so a KV policy or a shared prefix "
                "cannot tell whose they are; run it without"
            )
        return None

    def meet(self, cache: Any) -> None:
        """Takes over the cache that a call brings along, where a policy wants it or an earlier one has been there."""
        if self.removal is not None:
            make_room(cache, self.removal.slots, self.model.config)
        if prefix_layers(cache):
            if policies := [m for m in self.stacked() if isinstance(m, Policy)]:
                raise NotSupported(
                    f"{type(policies[0]).__name__} is attached, and a KV policy cannot drop what rows share; leave it "
                    "out, or use model.generate without a shared prefix"
                )
            self.cache = weakref.ref(cache)
            return
        if not self.compresses and not ragged_layers(cache):
            return
        adopt(cache, weakref.ref(self), self.model.config)
        if self.cache() is not cache:
            self.cache = weakref.ref(cache)
            self.holding = {}

    def bytes_held(self) -> int:
        """Bytes of the KV cache that was used last, as of its last call, everything that stays between calls included.

        Raises:
            NothingObserved: no call with a cache under a KV policy has come by.
        """
        if not self.holding:
            raise NothingObserved(
                "no call with a KV cache under a policy has come by; attach a policy and run `model.generate` or pass "
                "`past_key_values`"
            )
        return sum(self.holding.values())


@lru_cache(maxsize=32)
def among_themselves(tokens: int, device: torch.device) -> Mask:
    """The tokens of a call, all of which see each other."""
    return Mask.full(tokens, tokens, device)


def can(reduction: Reduction, view: View) -> bool:
    """Whether a reduction has a meaning on this call: token links need token ids, positions one sequence."""
    if view.layer.cross and reduction.one_sequence:
        return False
    return not (isinstance(reduction, Match) and reduction.link in ("token", "follower") and view.tokens is None)


# ---------------------------------------------------------------- binding and taking off


@contextmanager
def bound(attached: Attached) -> Iterator[None]:
    """The model with our functions in place; everything is put back on the way out."""
    model, outer = attached.model, ACTIVE.get(attached.model)
    name = f"foveate-{next(COUNTER)}"
    configs = list({id(c): c for c in all_configs(model)}.values())
    before = [c.__dict__.get("_attn_implementation_internal") for c in configs]
    with ExitStack() as stack:
        AttentionInterface.register(name, attached.call)
        stack.callback(AttentionInterface._global_mapping.pop, name)
        AttentionMaskInterface.register(name, build_mask)
        stack.callback(AttentionMaskInterface._global_mapping.pop, name)
        for config, implementation in zip(configs, before, strict=True):
            stack.callback(setattr, config, "_attn_implementation_internal", implementation)
            config._attn_implementation_internal = name
        for take_down in hooks(attached):
            stack.callback(take_down)
        ACTIVE[model] = attached
        stack.callback(partial(ACTIVE.__setitem__, model, outer) if outer else partial(ACTIVE.pop, model))
        yield
    attached.last = None
