"""The one door to models. No other file touches one.

`attach` registers an attention function and its mask function with transformers for as long as its context lives,
points the model's configurations at them, and takes everything back on the way out, also after an exception.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from foveate.core.cache import RaggedLayer, adopt, ragged_layers
from foveate.core.errors import BadInput, NothingObserved, NotOnInterface, NotSupported
from foveate.core.mask import Mask
from foveate.core.masking import as_mask, build_mask
from foveate.core.mechanism import Edit, HeadEdit, Mechanism, Metric, ModelMetric, Pattern, Policy
from foveate.core.policy import compress
from foveate.core.reductions import Match, Reduction
from foveate.core.results import Results, collect
from foveate.core.rows import Engine, Layer, Rows, View
from foveate.core.rows import attend as attend_rows

__all__ = ["Attached", "attach", "attention_layers", "overheard"]

ACTIVE: weakref.WeakKeyDictionary[torch.nn.Module, Attached] = weakref.WeakKeyDictionary()
COUNTER = itertools.count()
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "o", "dense", "wo")


@contextmanager
def attach(model: PreTrainedModel, *mechanisms: Mechanism, engine: Engine = "auto") -> Iterator[Attached]:
    """Binds mechanisms to a model for the length of a `with` block.

    Metrics observe, edits and patterns act, in the order in which they are given, and a KV policy says which keys stay
    in the cache; an `attach` inside another one adds to its stack. On leaving, the model computes bit for bit what it
    did before. A cache that a policy compressed can be used again only while something is attached.

    Args:
        model: A transformers model whose attention goes through `AttentionInterface`.
        mechanisms: Metrics, edits, head edits, patterns and at most one KV policy.
        engine: Which way of the row engine to use.

    Yields:
        What is attached; `attached.results` holds what the metrics found.

    Raises:
        NotOnInterface: the model's attention cannot be reached; says why and what works.
        NothingObserved: on leaving, when an edit or a pattern was given and no attention call came by.
    """
    for m in mechanisms:
        if not isinstance(m, Metric | Edit | HeadEdit | Pattern | Policy):
            hint = (
                f"; run it with {type(m).__name__}(...).measure(model, tokenizer)" if isinstance(m, ModelMetric) else ""
            )
            raise BadInput(f"{m!r} cannot be attached: not a Metric, Edit, HeadEdit, Pattern or Policy{hint}")
    outer = ACTIVE.get(model)
    with ExitStack() as stack:
        if outer is None:
            attached = Attached(model, engine=engine)
            stack.enter_context(bound(attached))
        else:
            attached = Attached(model, engine=outer.engine, layers=outer.layers, parent=outer)
            outer.inner.append(attached)
            stack.callback(outer.inner.remove, attached)
        attached.mechanisms = mechanisms
        policies = [m for m in (outer or attached).stacked() if isinstance(m, Policy)]
        if len(policies) > 1:
            raise BadInput(f"one KV policy at a time; {len(policies)} are attached: {policies}")
        yield attached
        landed = (outer or attached).holding
        if attached.calls and not landed and any(isinstance(m, Policy) for m in mechanisms):
            raise NothingObserved(
                f"{policies[0]!r} had nothing to act on: {type(model).__name__} ran without a KV cache of its own; use "
                "`model.generate`, or leave use_cache on"
            )
        if attached.calls == 0 and any(not isinstance(m, Metric) for m in mechanisms):
            raise NothingObserved(
                f"{', '.join(type(m).__name__ for m in mechanisms)}: no attention call of {type(model).__name__} "
                "came by while attached, so nothing was changed; run the model inside the `with` block"
            )


def attention_layers(model: torch.nn.Module) -> dict[torch.nn.Module, Layer]:
    """The attention modules of a model, in order, found by what their code calls.

    Raises:
        NotOnInterface: there are none.
    """
    found = [(name, m) for name, m in model.named_modules() if on_interface(m)]
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise NotOnInterface(
            f"{type(model).__name__} ({kind}) computes attention in code of its own, not through transformers' "
            "AttentionInterface, so it cannot be observed without rewriting it. Models on the interface work "
            "(llama, mistral, qwen, gemma, phi3, granite, olmo, gpt2, opt, bert, vit, clip, whisper, t5, bart, …)"
        )
    return {m: Layer(n, name) for n, (name, m) in enumerate(found)}


def on_interface(module: torch.nn.Module) -> bool:
    """Whether this module's forward itself asks the interface for its attention function."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def output_projection(module: torch.nn.Module, inner: int) -> Tensor | None:
    """The weight that takes the concatenated heads back to the model's width, as [model_dim, inner].

    None where the model keeps it outside of the module that computes attention (BERT).
    """
    for name in OUTPUT_PROJECTIONS:
        child = getattr(module, name, None)
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            # GPT-2's Conv1D stores its weight transposed
            weight = weight if isinstance(child, torch.nn.Linear) else weight.T
            if weight.shape[1] == inner:
                return weight
    return None


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
        cache: Weak reference to the cache of the running call, under a KV policy.
        holding: Bytes that its layers held after their last call.
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
    holding: dict[int, int] = field(default_factory=dict)

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
        view = partial(
            View,
            query,
            scale=scaling if scaling is not None else query.shape[3] ** -0.5,
            softcap=softcap,
            sinks=s_aux,
            bias=position_bias,
            dropout=dropout if module.training else 0.0,
            projection=output_projection(module, query.shape[1] * value.shape[3]),
            layer=layer,
        )
        out = self.run(view(key, value, mask)).out if cache is None else self.look_back(cache, view, key, value, mask)
        return out.transpose(1, 2).contiguous(), None

    def look_back(
        self, cache: RaggedLayer, view: Callable[..., View], key: Tensor, value: Tensor, mask: Mask
    ) -> Tensor:
        """Attention over a ragged cache and what came with the call; then the policy has its say."""
        policy, layers = self.policy, ragged_layers(self.cache())
        first, rows = not cache.filled, None
        call = view(key, value, mask if first else Mask.full(key.shape[2], key.shape[2]))
        if first:
            rows = self.run(call, policy)
            out = rows.out
        else:
            cache.settle(mask.valid)
            store = cache.store
            if self.idle and call.bias is None and not call.needs_grad and not store.kernel_refuses(mask):
                self.calls_seen()
                out = store.attend(call.q, mask, call.scale, call.softcap, call.sinks)
            else:
                out = self.run(view(*store.by_position(mask, call.grouped))).out
        at = layers.index(cache)
        if policy is None:
            cache.settle(mask.valid)
        else:
            compress(policy, layers, at, call, mask, rows)
        self.holding[at] = cache.bytes_held()
        return out

    def run(self, view: View, policy: Policy | None = None) -> Rows:
        """One pass of the row engine for the whole stack; its head outputs are edited."""
        everyone = self.stack()
        if self.trail is not None and not view.layer.cross:
            view.tokens = self.trail.of(view)
        mechanisms = [(a, n, m) for a in everyone for n, m in enumerate(a.mechanisms)]
        metrics = [
            (a, n, m) for a, n, m in mechanisms if isinstance(m, Metric) and all(can(r, view) for r in m.needs())
        ]
        patterns = [m for _, _, m in mechanisms if isinstance(m, Pattern)]
        if len(patterns) > 1:
            raise BadInput(f"one pattern at a time; {len(patterns)} are attached: {patterns}")
        asked = () if policy is None or policy.limits.whole else policy.needs()
        rows = attend_rows(
            view,
            [*(r for _, _, m in metrics for r in m.needs()), *asked],
            edits=[m for _, _, m in mechanisms if isinstance(m, Edit)],
            pattern=patterns[0].select if patterns else None,
            engine=self.engine,
        )
        self.calls_seen()
        for _, _, m in mechanisms:
            if isinstance(m, HeadEdit):
                rows.out = m.edit(rows, rows.out)
        if metrics:
            rows.before = self.last if self.last is not None and self.last.layer.index == view.layer.index - 1 else None
            with torch.no_grad():
                for a, n, m in metrics:
                    at = (n, view.layer.index)
                    a.states[at] = m.update(a.states[at] if at in a.states else m.start(view.layer), rows)
            rows.before = None
            self.last = rows.samples()
        return rows

    def calls_seen(self) -> None:
        for a in self.stack():
            a.calls += 1

    # ------------------------------------------------------------ the cache

    @property
    def policy(self) -> Policy | None:
        """The KV policy of the stack, if there is one."""
        return next((m for m in self.stacked() if isinstance(m, Policy)), None)

    @property
    def idle(self) -> bool:
        """Whether nothing wants to see or change rows."""
        return all(isinstance(m, Policy) for m in self.stacked())

    def cache_of(self, key: Tensor) -> RaggedLayer | None:
        """The ragged layer that these keys were handed on by; None where the call has no such cache.

        Raises:
            NotSupported: the model changed its keys between its cache and its attention.
        """
        layers = ragged_layers(self.cache())
        for layer in layers:
            if layer.latest is not None and layer.latest() is key:
                return layer
        if any(layer.pending is not None for layer in layers):
            raise NotSupported(
                f"{type(self.model).__name__} changes its keys after caching them, so a KV policy cannot tell whose "
                "they are; run it without a policy"
            )
        return None

    def meet(self, cache: Any) -> None:
        """Takes over the cache that a call brings along, where a policy wants it or an earlier one has been there."""
        if self.policy is None and not ragged_layers(cache):
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


def can(reduction: Reduction, view: View) -> bool:
    """Whether a reduction has a meaning on this call: token links need token ids, positions one sequence."""
    if view.layer.cross and reduction.one_sequence:
        return False
    return not (isinstance(reduction, Match) and reduction.link in ("token", "follower") and view.tokens is None)


# ---------------------------------------------------------------- binding and taking off


@contextmanager
def bound(attached: Attached) -> Iterator[None]:
    """The model with our functions in place; everything is put back on the way out."""
    model = attached.model
    attached.layers = attention_layers(model)
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
        for handle in hooks(attached):
            stack.callback(handle.remove)
        ACTIVE[model] = attached
        stack.callback(ACTIVE.pop, model)
        yield
    attached.last = None


def all_configs(model: torch.nn.Module) -> Iterator[Any]:
    """Every configuration object that a part of the model may ask for its attention implementation."""

    def below(config: Any) -> Iterator[Any]:
        yield config
        for key in getattr(config, "sub_configs", {}):
            sub = getattr(config, key, None)
            if sub is not None:
                yield from below(sub)

    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            yield from below(config)


def hooks(attached: Attached) -> Iterator[Any]:
    """Hooks that see which token ids are embedded, and which attention calls look at another sequence."""
    model = attached.model
    sizes = {getattr(c, "vocab_size", None) for c in all_configs(model)}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module.register_forward_pre_hook(partial(model_called, attached), with_kwargs=True)
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings in sizes:
            yield module.register_forward_pre_hook(partial(embedding_called, attached))
    for module in attached.layers:
        parameters = inspect.signature(type(module).forward).parameters
        if other := [p for p in ("key_value_states", "encoder_hidden_states") if p in parameters]:
            place = list(parameters).index(other[0]) - 1
            hook = partial(attention_called, attached, other[0], place)
            yield module.register_forward_pre_hook(hook, with_kwargs=True)


def model_called(attached: Attached, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # ids of an earlier call, or of another tower, are not those of this one; a model that embeds its ids itself and
    # hands the embeddings on to its language model is still the same call
    if module is attached.model or kwargs.get("inputs_embeds") is None:
        attached.trail = None
    at = place_of_cache(type(module).forward)
    if at is None:
        return None
    cache = args[at] if at < len(args) else kwargs.get("past_key_values")
    if cache is not None:
        attached.meet(cache)
    elif attached.policy is not None and wants_cache(attached, module, kwargs):
        # the model would make one of its own inside, where nobody can reach it
        cache = new_cache(module.config)
        attached.meet(cache)
        return args[:at], kwargs | {"past_key_values": cache}
    return None


@lru_cache
def place_of_cache(forward: Callable) -> int | None:
    """Where a model's forward takes its cache among its arguments; None where it takes none."""
    names = list(inspect.signature(forward).parameters)
    return names.index("past_key_values") - 1 if "past_key_values" in names else None


def wants_cache(attached: Attached, module: torch.nn.Module, kwargs: dict) -> bool:
    """Whether a model that was given no cache is about to make one."""
    asked = kwargs.get("use_cache")
    if asked is None:
        asked = getattr(module.config.get_text_config(decoder=True), "use_cache", False)
    return bool(asked) and any(getattr(m, "is_causal", False) for m in attached.layers)


def new_cache(config: Any) -> Cache:
    """The cache that a model of this configuration makes for itself."""
    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def embedding_called(attached: Attached, module: torch.nn.Module, args: tuple) -> None:
    ids = args[0] if args else None
    if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
        attached.trail = attached.trails.setdefault(id(module), Trail())
        attached.trail.pending = ids


def attention_called(
    attached: Attached, name: str, place: int, module: torch.nn.Module, args: tuple, kwargs: dict
) -> None:
    other = kwargs.get(name, args[place] if place < len(args) else None)
    (attached.crossing.discard if other is None else attached.crossing.add)(module)


@contextmanager
def overheard(
    attached: Attached, makers: Callable[[torch.nn.Module], bool]
) -> Iterator[dict[torch.nn.Module, tuple[Tensor, torch.nn.Module | None]]]:
    """What goes into each attention module, for metrics that ask how a model uses its weights.

    Args:
        attached: What is attached; its model is listened to for as long as the `with` block lasts.
        makers: Which modules to tell as the makers of what goes in.

    Yields:
        For each attention module that was called, its hidden states and the module whose output they are, if it is
        one of the makers.
    """
    found: dict[torch.nn.Module, tuple[Tensor, torch.nn.Module | None]] = {}
    made: dict[int, tuple[Tensor, torch.nn.Module]] = {}

    def entered(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            found[module] = x, made[x.data_ptr()][1] if x.data_ptr() in made else None

    def left(module: torch.nn.Module, args: tuple, output: Any) -> None:
        # the tensor is kept, so that its address cannot be given to another one
        if isinstance(output, Tensor):
            made[output.data_ptr()] = output, module

    with ExitStack() as stack:
        for module in attached.layers:
            stack.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
        for module in attached.model.modules():
            if makers(module):
                stack.callback(module.register_forward_hook(left).remove)
        yield found


@dataclass
class Trail:
    """The token ids behind the keys of a cache: what was embedded, call after call."""

    pending: Tensor | None = None
    seen: Tensor | None = None

    def of(self, view: View) -> Tensor | None:
        """Token ids of the keys of this call, or None where they cannot be known (embeddings given, prefix tuning)."""
        mask, ids = view.mask, self.pending
        start = int(mask.position[0]) + mask.key_offset
        if ids is not None and ids.shape[1] == view.queries:
            self.pending = None
            if start == 0:
                self.seen = ids
            elif self.seen is not None and len(self.seen) == len(ids) and self.seen.shape[1] >= start:
                self.seen = torch.cat([self.seen[:, :start], ids], 1)
            else:
                self.seen = None
        if self.seen is None or self.seen.shape[1] != start + view.queries:
            return None
        tokens = self.seen[:, mask.key_offset :]
        # a static cache is longer than what has been written to it
        return torch.nn.functional.pad(tokens, (0, view.keys - tokens.shape[1]), value=-3)
