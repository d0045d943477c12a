"""The one door to models. No other file touches one.

`attach` registers an attention function and its mask function with transformers for as long as its context lives,
points the model's configurations at them, and takes everything back on the way out, also after an exception.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from foveate.core.errors import BadInput, NothingObserved, NotOnInterface
from foveate.core.mask import Mask
from foveate.core.mechanism import Edit, HeadEdit, Mechanism, Metric, ModelMetric, Pattern
from foveate.core.reductions import Match, Reduction
from foveate.core.results import Results, collect
from foveate.core.rows import Engine, Layer, Rows, View
from foveate.core.rows import attend as attend_rows

__all__ = ["Attached", "attach", "attention_layers"]

ACTIVE: weakref.WeakKeyDictionary[torch.nn.Module, Attached] = weakref.WeakKeyDictionary()
COUNTER = itertools.count()
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "o", "dense", "wo")


@contextmanager
def attach(model: PreTrainedModel, *mechanisms: Mechanism, engine: Engine = "auto") -> Iterator[Attached]:
    """Binds mechanisms to a model for the length of a `with` block.

    Metrics observe, edits and patterns act, in the order in which they are given; an `attach` inside another one adds
    to its stack. On leaving, the model computes bit for bit what it did before.

    Args:
        model: A transformers model whose attention goes through `AttentionInterface`.
        mechanisms: Metrics, edits, head edits and patterns.
        engine: Which way of the row engine to use.

    Yields:
        What is attached; `attached.results` holds what the metrics found.

    Raises:
        NotOnInterface: the model's attention cannot be reached; says why and what works.
        NothingObserved: on leaving, when an edit or a pattern was given and no attention call came by.
    """
    for m in mechanisms:
        if not isinstance(m, Metric | Edit | HeadEdit | Pattern):
            hint = (
                f"; run it with {type(m).__name__}(...).measure(model, tokenizer)" if isinstance(m, ModelMetric) else ""
            )
            raise BadInput(f"{m!r} cannot be attached: not a Metric, Edit, HeadEdit or Pattern{hint}")
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
        yield attached
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
        mask = as_mask(attention_mask, module, query, key, is_causal, sliding_window, layer.cross)
        view = View(
            query,
            key,
            value,
            mask,
            scale=scaling if scaling is not None else query.shape[3] ** -0.5,
            softcap=softcap,
            sinks=s_aux,
            bias=position_bias,
            dropout=dropout if module.training else 0.0,
            projection=output_projection(module, query.shape[1] * value.shape[3]),
            layer=layer,
        )
        if self.trail is not None and not layer.cross:
            view.tokens = self.trail.of(view)
        return self.run(view).transpose(1, 2).contiguous(), None

    def run(self, view: View) -> Tensor:
        """One pass of the row engine for the whole stack; head outputs, edited."""
        everyone = self.stack()
        mechanisms = [(a, n, m) for a in everyone for n, m in enumerate(a.mechanisms)]
        metrics = [
            (a, n, m) for a, n, m in mechanisms if isinstance(m, Metric) and all(can(r, view) for r in m.needs())
        ]
        patterns = [m for _, _, m in mechanisms if isinstance(m, Pattern)]
        if len(patterns) > 1:
            raise BadInput(f"one pattern at a time; {len(patterns)} are attached: {patterns}")
        rows = attend_rows(
            view,
            [r for _, _, m in metrics for r in m.needs()],
            edits=[m for _, _, m in mechanisms if isinstance(m, Edit)],
            pattern=patterns[0].select if patterns else None,
            engine=self.engine,
        )
        for a in everyone:
            a.calls += 1
        out = rows.out
        for _, _, m in mechanisms:
            if isinstance(m, HeadEdit):
                out = m.edit(rows, out)
        if metrics:
            rows.before = self.last if self.last is not None and self.last.layer.index == view.layer.index - 1 else None
            with torch.no_grad():
                for a, n, m in metrics:
                    at = (n, view.layer.index)
                    a.states[at] = m.update(a.states[at] if at in a.states else m.start(view.layer), rows)
            rows.before = None
            self.last = rows.samples()
        return out


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


def model_called(attached: Attached, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    # ids of an earlier call, or of another tower, are not those of this one; a model that embeds its ids itself and
    # hands the embeddings on to its language model is still the same call
    if module is attached.model or kwargs.get("inputs_embeds") is None:
        attached.trail = None


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


# ---------------------------------------------------------------- masks


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """The mask function beside our attention function: called as `sdpa_mask` is, it gives a `Mask`, no N x N tensor."""
    if isinstance(attention_mask, Mask):
        return attention_mask
    first = int(q_offset)
    position = torch.arange(q_length, device=device) + (first - kv_offset)
    padding, valid = attention_mask, None
    begin = torch.full((1,), -kv_offset, dtype=torch.int32, device=device)
    if padding is not None:
        begin = padding.to(torch.int32).argmax(-1).to(torch.int32) - kv_offset
        if padding.shape[-1] >= first + q_length:
            valid = padding[:, first : first + q_length].bool()
        if bool(padding.all()) and padding.shape[-1] >= kv_length + kv_offset:
            padding, valid = None, None
    if padding is None and mask_function is causal_mask_function:
        mask = Mask.causal_of(q_length, kv_length, device=device, offset=first - kv_offset)
        return replace(mask, key_offset=kv_offset, begin=begin)

    def allowed(a: int, b: int) -> Any:
        return sdpa_mask(
            batch_size,
            b - a,
            kv_length,
            q_offset=first + a,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    return Mask.traced(allowed, q_length, kv_length, device, position, valid, kv_offset, begin)


def as_mask(
    given: Any,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    window: int | None,
    cross: bool,
) -> Mask:
    """A `Mask` from what the model handed over: ours, a tensor of the caller's own, or nothing at all."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(given, Mask):
        # a cross-attention's padding speaks of its keys
        return replace(given, valid=None) if cross and given.valid is not None else given
    if isinstance(given, Tensor):
        return Mask.from_tensor(given)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if causal and queries > 1:
        # as the model's own attention reads a missing mask: the first query stands at the first key
        return Mask.causal_of(queries, keys, window, query.device, offset=0)
    return Mask.full(queries, keys, query.device)
