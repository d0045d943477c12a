"""What stands on a model's modules while something is attached, besides its attention function.

Hooks that see which token ids are embedded, which cache a call brings along and which attention calls look at another
sequence; that hand the residual stream and the routers of experts to their edits; and that listen for metrics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from foveate.core.errors import NotSupported
from foveate.core.mechanism import Stream
from foveate.core.rows import View

if TYPE_CHECKING:
    from foveate.core.attach import Attached

__all__ = ["Trail", "all_configs", "blocks", "hooks", "new_cache", "overheard", "routers"]


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


def hooks(attached: Attached) -> Iterator[Callable[[], Any]]:
    """Puts up everything that stands on modules; gives what takes each of it down again."""
    model = attached.model
    sizes = {getattr(c, "vocab_size", None) for c in all_configs(model)}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module.register_forward_pre_hook(partial(model_called, attached), with_kwargs=True).remove
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings in sizes:
            yield module.register_forward_pre_hook(partial(embedding_called, attached)).remove
    for module in attached.layers:
        parameters = inspect.signature(type(module).forward).parameters
        if other := [p for p in ("key_value_states", "encoder_hidden_states") if p in parameters]:
            place = list(parameters).index(other[0]) - 1
            hook = partial(attention_called, attached, other[0], place)
            yield module.register_forward_pre_hook(hook, with_kwargs=True).remove
    for block, layer in attached.blocks.items():
        yield block.register_forward_hook(partial(block_called, attached, layer)).remove
    for router, layer in attached.routers.items():
        plain = router.forward
        router.forward = partial(router_called, attached, layer, router, plain)
        yield partial(router.__dict__.pop, "forward")


# ---------------------------------------------------------------- the residual stream


def blocks(model: torch.nn.Module, attention: dict[torch.nn.Module, int]) -> dict[torch.nn.Module, int]:
    """The modules that add one layer each to the residual stream, with the number of their (first) attention.

    They are the members of the outermost list of modules around each attention.
    """
    names = {m: n for n, m in model.named_modules()}
    found: dict[torch.nn.Module, int] = {}
    for module, layer in attention.items():
        parts = names[module].split(".")
        for depth in range(1, len(parts) + 1):
            above = model.get_submodule(".".join(parts[: depth - 1])) if depth > 1 else model
            if isinstance(above, torch.nn.ModuleList):
                found.setdefault(model.get_submodule(".".join(parts[:depth])), layer)
                break
    return found


def block_called(attached: Attached, layer: int, module: torch.nn.Module, args: tuple, output: Any) -> Any:
    edits = list(attached.residual_edits())
    if not edits:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    known = attached.places.get(layer)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or known is None or known[0].shape[1] != hidden.shape[1]:
        raise NotSupported(
            f"{type(attached.model).__name__} gives no residual stream behind layer {layer} that can be edited "
            f"({type(module).__name__} returns {type(hidden).__name__}); edit its heads instead"
        )
    place, real = known
    for edit in edits:
        new = edit.edit(Stream(hidden, place, real, layer))
        attached.landed(edit, layer, hidden, new)
        hidden = new.to(hidden.dtype)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


# ---------------------------------------------------------------- experts


def routers(model: torch.nn.Module, blocks: dict[torch.nn.Module, int]) -> dict[torch.nn.Module, int]:
    """The modules that choose experts, with the number of the layer that they are in."""
    counts = set()
    for config in all_configs(model):
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            counts.add(getattr(config, key, None))
    found = {}
    for block, layer in blocks.items():
        for name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            called = name.rpartition(".")[2] in ("gate", "router") or "Router" in type(module).__name__
            if called and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] in counts - {None}:
                found[module] = layer
    return found


class RouterLogits(TorchFunctionMode):
    """Hands on what a router computes from its own weight, edited; all routers do that by `linear`."""

    def __init__(self, attached: Attached, layer: int, weight: Tensor) -> None:
        super().__init__()
        self.attached, self.layer, self.weight, self.done = attached, layer, weight, False

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if self.done or function is not torch.nn.functional.linear or args[1].shape != self.weight.shape:
            return made
        self.done = True
        flat: Float[Tensor, "tokens experts"] = made.reshape(-1, made.shape[-1])
        for edit in self.attached.expert_edits():
            new = edit.edit(self.layer, flat)
            self.attached.landed(edit, self.layer, flat, new)
            flat = new.to(flat.dtype)
        return flat.reshape(made.shape)


def router_called(attached: Attached, layer: int, router: Any, plain: Callable, *args: Any, **kwargs: Any) -> Any:
    if not any(True for _ in attached.expert_edits()):
        return plain(*args, **kwargs)
    with RouterLogits(attached, layer, router.weight) as mode:
        made = plain(*args, **kwargs)
    if not mode.done:
        raise NotSupported(f"{type(router).__name__} of layer {layer} does not compute its logits by `linear`")
    return made


# ---------------------------------------------------------------- calls of the model


def model_called(attached: Attached, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if attached.paused:
        return None
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
    elif attached.compresses and wants_cache(attached, module, kwargs):
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
    ids = args[0] if args and not attached.paused else None
    if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
        attached.trail = attached.trails.setdefault(id(module), Trail())
        attached.trail.pending = ids


def attention_called(
    attached: Attached, name: str, place: int, module: torch.nn.Module, args: tuple, kwargs: dict
) -> None:
    other = kwargs.get(name, args[place] if place < len(args) else None)
    (attached.crossing.discard if other is None else attached.crossing.add)(module)


# ---------------------------------------------------------------- listening, and token ids


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
    """The token ids behind the keys of a cache: what was embedded, call after call.

    Args:
        pending: What the running call embedded, until its first attention has asked for it.
        seen: All of them so far.
    """

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
