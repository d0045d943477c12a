"""Taking parts out of a model: the attention or the feed-forward of a layer, or single heads.

A layer adds two branches to the residual stream, each with a norm in front of it or behind it. The parts are found by
what a small run shows: the attention is what asks the interface, the feed-forward is what else has matrices and gives
back the shape that it was given, and a norm belongs to the branches that alone read it or feed it. What is gone is
replaced by a module that has no parameters and says nothing; its layer has no KV cache any more. Whatever is counted
afterwards, layers keep the numbers of the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DummyLayer, DynamicCache

from foveate.core.budget import Budget
from foveate.core.errors import BadInput, NotSupported
from foveate.core.hooks import blocks
from foveate.core.landing import APART, apart, first, small_input
from foveate.core.mechanism import Mechanism, Parts, Policy
from foveate.core.params import bounds_of
from foveate.core.places import Heads, Indices, Layers, Values, Vectors

__all__ = [
    "KINDS",
    "Branch",
    "Gone",
    "Kind",
    "Removal",
    "among_left",
    "answer",
    "branches",
    "gone_ones",
    "leave_out",
    "make_room",
    "removed",
]

Kind = Literal["attention", "feed_forward"]
KINDS: tuple[Kind, ...] = ("attention", "feed_forward")
# attributes of attention modules that count heads, and KV heads
COUNTS = (("num_heads", "num_attention_heads"), ("num_key_value_heads", "num_kv_heads"))


class Gone(nn.Module):
    """Stands where a part was and says nothing: zeros of the shape that it is given, which take no memory.

    Args:
        kind: What it stands for.
        outputs: How many things the part gave back, the hidden states first; 0: these alone.
    """

    def __init__(self, kind: Kind, outputs: int = 0):
        super().__init__()
        self.kind, self.outputs = kind, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros."""
        given = args[0] if args else kwargs["hidden_states"]
        nothing = given.new_zeros(()).expand_as(given)
        return (nothing, *[None] * (self.outputs - 1)) if self.outputs else nothing


# ---------------------------------------------------------------- finding the parts


@dataclass(frozen=True, eq=False)
class Branch:
    """What a layer adds to the residual stream in one go.

    Args:
        kind: Its attention or its feed-forward.
        layer: Number of the layer.
        block: The module that adds the layer.
        stands: Names of the branch's modules in the block, with what stands there once it is gone.
    """

    kind: Kind
    layer: int
    block: nn.Module
    stands: tuple[tuple[str, nn.Module], ...]


@dataclass(eq=False)
class Call:
    """One call of a child of a block.

    Args:
        name: Its name in the block.
        module: The child.
        given: The hidden states that it got.
        made: The hidden states that it gave.
        outputs: How many things it gave back; 0: no tuple.
    """

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor
    outputs: int

    @property
    def same_shape(self) -> bool:
        """Whether it gives back the shape that it gets, as what is added to a stream must."""
        return self.given.shape == self.made.shape


def branches(
    model: Any, layers: Mapping[nn.Module, int], inputs: dict[str, Any] | None = None
) -> tuple[dict[tuple[Kind, int], Branch], list[tuple[nn.Module, str, frozenset[tuple[Kind, int]]]]]:
    """The branches of a model that can be taken out, by kind and layer, and the norms that may go with them.

    Args:
        model: The model.
        layers: Its attention modules, with their numbers.
        inputs: A small input; None: one is made.

    Returns:
        The branches, and for each norm its block, its name there, and the branches that it belongs to.
    """
    of_block = blocks(model, dict(layers))
    calls: dict[nn.Module, list[Call]] = {block: [] for block in of_block}
    with ExitStack() as stack:
        for block in of_block:
            for name, child in block.named_children():
                answer(stack, child, partial(heard, calls[block], name, child, child.forward))
        run(model, small_input(model) if inputs is None else inputs)
    found: dict[tuple[Kind, int], Branch] = {}
    norms = []
    for block, layer in of_block.items():
        members: dict[tuple[Kind, int], list[Call]] = {}
        for call in calls[block]:
            if call.module in layers and call.same_shape:
                members["attention", layers[call.module]] = [call]
        rest = [c for c in calls[block] if c.module not in layers]
        if wide := [c for c in rest if any(p.ndim > 1 for p in c.module.parameters())]:
            members["feed_forward", layer] = wide
        for key, own in members.items():
            stands = stand_ins(key[0], own)
            if stands and not any(isinstance(c.module, Gone) for c in own):
                found[key] = Branch(*key, block, stands)
        for norm in rest:
            once = sum(c.module is norm.module for c in rest) == 1
            if norm in wide or not once or not any(True for _ in norm.module.parameters()):
                continue
            readers = {c.name for c in calls[block] if c.given is norm.made}
            of = {k for k, own in members.items() if any(c.name in readers or c.made is norm.given for c in own)}
            if of and readers <= {c.name for k in of for c in members[k]}:
                norms.append((block, norm.name, frozenset(of)))
    return found, norms


def answer(back: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Lets a module answer its calls by another function, until `back` is closed."""
    if (before := module.__dict__.get("forward")) is None:
        back.callback(module.__dict__.pop, "forward")
    else:
        back.callback(setattr, module, "forward", before)
    module.forward = forward


def heard(calls: list[Call], name: str, module: nn.Module, plain: Any, *args: Any, **kwargs: Any) -> Any:
    made = plain(*args, **kwargs)
    given = args[0] if args else kwargs.get("hidden_states")
    hidden = made[0] if isinstance(made, tuple) else made
    if isinstance(given, Tensor) and isinstance(hidden, Tensor):
        calls.append(Call(name, module, given, hidden, len(made) if isinstance(made, tuple) else 0))
    return made


def stand_ins(kind: Kind, calls: Sequence[Call]) -> tuple[tuple[str, nn.Module], ...]:
    """What stands for the modules of a branch; () where they are no branch."""
    if all(c.same_shape for c in calls):
        return tuple((c.name, Gone(kind, c.outputs)) for c in calls)
    leaves = not any(True for c in calls for _ in c.module.children())
    # two matrices that stand in the block itself (OPT): the first hands on, the last says nothing
    if leaves and calls[0].given.shape == calls[-1].made.shape:
        return (*((c.name, nn.Identity()) for c in calls[:-1]), (calls[-1].name, Gone(kind)))
    return ()


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the model gives on a small input; nothing remains of the run."""
    modes = {m: m.training for m in model.modules()}
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            return first(model(**inputs))
        finally:
            for module, training in modes.items():
                module.training = training


# ---------------------------------------------------------------- taking them out


@dataclass(eq=False)
class Removal:
    """Parts that are out of a model.

    Args:
        parts: Which.
        slots: Layers of the KV cache that nobody writes to any more.
        heads: How many heads the layers have left that lost single ones.
        back: What puts everything back.
        lasting: Whether nothing can be put back.
    """

    parts: Parts
    slots: tuple[int, ...] = ()
    heads: dict[int, int] = field(default_factory=dict)
    back: ExitStack = field(default_factory=ExitStack)
    lasting: bool = False

    def release(self) -> None:
        """Lets go of what was taken out, so that its memory is free; it cannot be put back any more."""
        self.back.pop_all()
        self.lasting = True


@contextmanager
def removed(
    model: Any, layers: Mapping[nn.Module, int], parts: Parts, inputs: dict[str, Any] | None = None
) -> Iterator[Removal]:
    """The model without some of its parts, for the length of a `with` block or until it is released.

    Args:
        model: The model.
        layers: Its attention modules, with their numbers.
        parts: What is taken out.
        inputs: A small input to try it on; None: one is made.

    Raises:
        BadInput: no attention would be left, or only some of the heads go that share a key.
        NotSupported: the model's parts cannot be told apart, or it does not run without them.
    """
    removal = Removal(parts)
    try:
        take_out(removal, model, layers, small_input(model) if inputs is None else inputs)
        # nothing may hold what was taken out, so that its memory can be freed
        del layers
        yield removal
    finally:
        if not removal.lasting:
            removal.back.close()


def take_out(removal: Removal, model: Any, layers: Mapping[nn.Module, int], inputs: dict[str, Any]) -> None:
    """Takes everything out that a removal names, and notes how it is put back."""
    parts, back, name = removal.parts, removal.back, type(model).__name__
    modules = {layer: module for module, layer in layers.items()}
    left = [n for n, m in modules.items() if n not in parts.attention and not isinstance(m, Gone)]
    if not left:
        raise BadInput(
            f"attention={sorted(parts.attention)} is the attention of all layers of {name}; leave at least one"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotSupported(
            f"{name} is an encoder with a decoder, whose parts cannot be taken out; take a decoder alone"
        )
    found, norms = branches(model, layers, inputs)
    gone: set[tuple[Kind, int]] = set()
    for kind in KINDS:
        for layer in getattr(parts, kind):
            if (kind, layer) not in found:
                raise NotSupported(unknown_part(model, kind, layer, found))
            gone.add((kind, layer))
    numbers = [getattr(modules[n], "layer_idx", None) for n in parts.attention]
    for key in gone:
        leave_out(back, found[key])
    if slots := sorted(n for n in numbers if isinstance(n, int)):
        removal.slots = tuple(slots)
        without_slots(back, model, removal.slots)
    if parts.heads:
        cut_heads(removal, model, modules, inputs)
    idle = [(block, norm) for block, norm, of in norms if of <= gone]
    if idle:
        before = run(model, inputs)
        with ExitStack() as trial:
            for block, norm in idle:
                swap(trial, block, norm, nn.Identity())
            # a model may read what a norm gives in a way that no call shows
            if torch.equal(before, run(model, inputs)):
                back.push(trial.pop_all())


def unknown_part(model: Any, kind: str, layer: int, found: Mapping[tuple[Kind, int], Branch]) -> str:
    """Why a part cannot be taken out."""
    word, family = kind.replace("_", "-"), getattr(model.config, "model_type", type(model).__name__)
    others = sorted(n for k, n in found if k == kind)
    if others:
        return (
            f"layer {layer} of {type(model).__name__} has no {word} that can be taken out; layers that have: {others}"
        )
    return (
        f"{type(model).__name__} ({family}): its {word} is no branch of a layer that can be told from the rest, so it "
        "cannot be taken out; llama, mistral, qwen, gemma, phi, mixtral, gpt2, opt and their like work"
    )


def leave_out(back: ExitStack, branch: Branch) -> None:
    """Takes a branch out of its block, without its norms."""
    for name, stand in branch.stands:
        swap(back, branch.block, name, stand)


def swap(back: ExitStack, parent: nn.Module, name: str, new: nn.Module) -> None:
    """Puts another module in the place of one, until `back` is closed."""
    old = getattr(parent, name)
    new.train(old.training)
    back.callback(setattr, parent, name, old)
    setattr(parent, name, new)


# ---------------------------------------------------------------- the KV cache


def without_slots(back: ExitStack, model: Any, slots: Sequence[int]) -> None:
    """Tells the model's configuration that these layers have no cache of their own.

    transformers knows layers that read the cache of others; it gives them none, and asks the others for the length.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_sharing_modes", None) is not None:
        raise NotSupported(
            f"{type(model).__name__} shares keys and values between layers, so that attention cannot be taken out; "
            "take out feed-forward parts only"
        )
    if "kv_sharing_modes" in config.__dict__:
        back.callback(setattr, config, "kv_sharing_modes", None)
    else:
        back.callback(config.__dict__.pop, "kv_sharing_modes")
    config.kv_sharing_modes = ["reuse" if n in slots else None for n in range(config.num_hidden_layers)]


def make_room(cache: Any, slots: Sequence[int], config: Any) -> None:
    """Takes the layers out of a cache that nobody writes to, whose length would be taken for that of the text.

    Raises:
        BadInput: the cache was filled by the whole model.
    """
    if not isinstance(cache, Cache):
        return
    if not cache.layers:
        cache.layers.extend(DynamicCache(config=config).layers)
    for n in slots:
        if n >= len(cache.layers) or isinstance(cache.layers[n], DummyLayer):
            continue
        if cache.layers[n].is_initialized and cache.get_seq_length(n) > 0:
            raise BadInput(
                f"this KV cache was filled before the attention of layer {n} was taken out; start with a new cache"
            )
        cache.layers[n] = DummyLayer()


@lru_cache
def among_left(policy: Policy, gone: tuple[int, ...]) -> Policy:
    """A policy that names layers as the whole model counts them, as the layers count that have a cache.

    Args:
        policy: The policy.
        gone: Layers whose attention is gone.

    Raises:
        BadInput: all that it names is gone.
    """

    def left(entries: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple((at - sum(n < at for n in gone), *rest) for at, *rest in entries if at not in gone)

    changed: dict[str, Any] = {}
    for name, (_, bounds) in bounds_of(type(policy)).items():
        value = getattr(policy, name)
        if isinstance(value, Budget) and isinstance(value.heads, tuple):
            changed[name] = dataclasses.replace(value, heads=left(value.heads))
        elif isinstance(bounds, Heads | Values) and value:
            changed[name] = left(value)
            if not changed[name]:
                raise BadInput(
                    f"{type(policy).__name__}({name}=…) names only heads of layers whose attention is gone; leave "
                    f"{name} out, or the layers' attention in"
                )
        elif isinstance(bounds, Indices) and bounds.what == "layer":
            # what a form of storage says of a layer that has no cache is said of nothing
            changed[name] = tuple(at for (at,) in left(tuple((at,) for at in value)))
            if value and not changed[name] and not isinstance(bounds, Layers):
                raise BadInput(
                    f"{type(policy).__name__}({name}=…) names only layers whose attention is gone; leave {name} out, "
                    "or their attention in"
                )
    return dataclasses.replace(policy, **changed) if changed else policy


def gone_ones(mechanism: Mechanism, gone: Sequence[int]) -> list[int]:
    """Layers that a mechanism names, by themselves or by their heads, and whose attention is gone."""
    found: set[int] = set()
    for name, (_, bounds) in bounds_of(type(mechanism)).items():
        if isinstance(bounds, Heads | Values | Vectors):
            found |= {layer for layer, *_ in getattr(mechanism, name)}
        elif isinstance(bounds, Indices) and bounds.what == "layer":
            found |= set(getattr(mechanism, name))
    return sorted(found & set(gone))


# ---------------------------------------------------------------- single heads


def cut_heads(removal: Removal, model: Any, modules: Mapping[int, nn.Module], inputs: dict[str, Any]) -> None:
    """Takes single heads out, and proves that the model then gives what it gives when they say nothing.

    Raises:
        BadInput: heads of a layer whose attention goes, all heads of a layer, or some of those that share a key.
        NotSupported: the heads cannot be told apart in the layer's matrices.
    """
    by_layer: dict[int, set[int]] = {}
    for layer, head in removal.parts.heads:
        by_layer.setdefault(layer, set()).add(head)
    name, cuts = type(model).__name__, {}
    for layer, heads in by_layer.items():
        if layer in removal.parts.attention or isinstance(modules[layer], Gone):
            raise BadInput(f"heads {sorted(heads)} of layer {layer} go with its attention; leave them out of heads")
        cuts[layer] = Cut.of(modules[layer], heads, f"layer {layer} of {name}")
    with ExitStack() as silent:
        for cut in cuts.values():
            swap(silent, cut.module, cut.out, cut.silenced())
        want = run(model, inputs)
    for layer, cut in cuts.items():
        cut.carry_out(removal.back)
        removal.heads[layer] = len(cut.rows[0])
    try:
        off = apart(want, run(model, inputs))
    except (RuntimeError, ValueError, IndexError) as error:
        why = str(error).partition("\n")[0]
        raise NotSupported(
            f"{name} does not run without heads {sorted(removal.parts.heads)} ({why}); silence them with HeadScale"
        ) from error
    if off > APART.get(want.dtype, 1e-3):
        raise NotSupported(
            f"{name} without heads {sorted(removal.parts.heads)} is not what it is when they say nothing ({off:.2g} of "
            "the largest output apart); silence them with HeadScale"
        )


@dataclass(frozen=True, eq=False)
class Cut:
    """Heads of one attention module that go.

    Args:
        module: The module.
        names: Its projections to queries, keys and values.
        out: Its projection of the heads' outputs.
        rows: The heads that stay, for each of the three.
        sizes: Rows per head of each of the three.
    """

    module: nn.Module
    names: tuple[str, ...]
    out: str
    rows: tuple[list[int], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, module: Any, heads: set[int], where: str) -> Cut:
        """How these heads are cut out of a module."""
        names, dim = ("q_proj", "k_proj", "v_proj"), getattr(module, "head_dim", None)
        linear = {n: c for n, c in module.named_children() if isinstance(c, nn.Linear)}
        if dim is None or not all(n in linear for n in names):
            raise NotSupported(
                f"{where} keeps its heads in no matrices q_proj, k_proj and v_proj of their own, so single ones cannot "
                "be cut out; silence them with HeadScale"
            )
        count, kv_heads = (linear[n].out_features // dim for n in names[:2])
        group = count // kv_heads
        if len(heads) == count:
            raise BadInput(f"{where}: these are all of its {count} heads; take its attention out instead")
        for head in sorted(heads):
            shared = set(range(head // group * group, (head // group + 1) * group))
            if not shared <= heads:
                raise BadInput(
                    f"{where}: heads {sorted(shared)} share one key, and go together or not at all; {sorted(heads)} "
                    "are given"
                )
        stay = [h for h in range(count) if h not in heads]
        stay_kv = sorted({h // group for h in stay})
        wide = [
            n for n, c in linear.items() if n not in names and c.in_features == linear["v_proj"].out_features * group
        ]
        if len(wide) != 1:
            raise NotSupported(f"{where}: it cannot be told which matrix takes its heads together; use HeadScale")
        value_dim = linear["v_proj"].out_features // kv_heads
        return cls(module, names, wide[0], (stay, stay_kv, stay_kv), (dim, dim, value_dim))

    @torch.no_grad()
    def silenced(self) -> nn.Linear:
        """The output projection without what these heads say, at its full size."""
        old, kept = getattr(self.module, self.out), self.columns()
        weight = torch.zeros_like(old.weight)
        weight[:, kept] = old.weight[:, kept]
        return linear_of(weight, old.bias)

    def columns(self) -> list[int]:
        """Columns of the output projection that stay."""
        return spread(self.rows[0], self.sizes[2])

    @torch.no_grad()
    def carry_out(self, back: ExitStack) -> None:
        """Puts smaller matrices in the place of the module's own, and smaller counts."""
        module, before = self.module, [getattr(self.module, n) for n in self.names]
        for name, old, rows, size in zip(self.names, before, self.rows, self.sizes, strict=True):
            kept = spread(rows, size)
            swap(back, module, name, linear_of(old.weight[kept], None if old.bias is None else old.bias[kept]))
        old = getattr(module, self.out)
        swap(back, module, self.out, linear_of(old.weight[:, self.columns()], old.bias))
        for counts, rows in zip(COUNTS, self.rows[:2], strict=True):
            for count in counts:
                if isinstance(getattr(module, count, None), int):
                    back.callback(setattr, module, count, getattr(module, count))
                    setattr(module, count, len(rows))


def spread(heads: Sequence[int], size: int) -> list[int]:
    """The rows of heads in a matrix with so many rows for each."""
    return [head * size + n for head in heads for n in range(size)]


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with its own copy of these numbers."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made
