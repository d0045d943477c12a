"""One prompt, many caches: the model reads a prompt once, and each of many policies keeps of it what it keeps.

Rows of a prompt that comes at once see all of it, whatever is dropped behind them, so what one set of policies keeps
does not depend on any other. Reading dominates the price of a trial; with branches it is paid once for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.core.attach import attach
from foveate.core.cache import RaggedLayer, adopt, ragged_layers
from foveate.core.calls import few_logits
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import Mechanism, Policy
from foveate.core.own_cache import own_length
from foveate.core.policy import Policies
from foveate.core.ragged import Ragged

__all__ = ["Branched", "Whole", "branch", "bytes_held", "joined", "model_bytes"]


@dataclass(frozen=True)
class Whole(Policy):
    """Does none of what policies do: everything that comes by is kept as it is."""


@dataclass(frozen=True, eq=False)
class Branched:
    """A prompt that was read once.

    Args:
        logits: Of its last token.
        full: The cache that keeps all of it.
        caches: One for each set of policies.
    """

    logits: Float[Tensor, "batch vocabulary"]
    full: DynamicCache
    caches: tuple[DynamicCache, ...]


@torch.no_grad()
def branch(
    model: Any, ids: Int[Tensor, "batch tokens"], settings: Sequence[Sequence[Policy]], *beside: Mechanism
) -> Branched:
    """Reads a prompt once and fills a cache for each set of policies, as that set alone would have filled it.

    Args:
        model: A causal language model.
        ids: The prompts, all of one length, without padding.
        settings: The sets of policies.
        beside: What else acts on the model while it reads; no policies.

    Returns:
        The caches. They can be used while something is attached, `Whole()` if nothing is to happen to them.

    Raises:
        BadInput: a set in which two policies do the same.
        NotSupported: a layer is called several times for one prompt, or reads no cache.
    """
    together = [Policies.of(one) for one in settings]
    full = DynamicCache(config=model.config)
    caches = tuple(DynamicCache(config=model.config) for _ in settings)
    # logits of a whole prompt would take more memory than the model
    few = few_logits(model)
    with attach(model, Whole(), *beside, trial=False) as attached:
        for cache in caches:
            adopt(cache, weakref.ref(attached), model.config)
        attached.branches = [(p, ragged_layers(cache)) for p, cache in zip(together, caches, strict=True)]
        out = model(input_ids=ids, past_key_values=full, use_cache=True, **few)
    for n, layer in enumerate(ragged_layers(full)):
        for cache in caches:
            if ragged_layers(cache)[n].seen != layer.seen:
                raise NotSupported(f"{type(model).__name__}: layer {n} fills its cache in several calls per prompt")
    return Branched(out.logits[:, -1], full, caches)


def joined(caches: Sequence[DynamicCache], config: Any) -> DynamicCache:
    """The batch rows of several caches as one cache, one behind the other; they must have seen equally many tokens.

    Args:
        caches: The caches, stored in the same form.
        config: The model's configuration.

    Raises:
        BadInput: no cache, or one that has seen more than another.
    """
    if not caches or len({one.get_seq_length() for one in caches}) > 1:
        seen = sorted({one.get_seq_length() for one in caches})
        raise BadInput(f"caches can be joined that have seen equally many tokens, not {seen or 'none at all'}")
    whole = DynamicCache(config=config)
    adopt(whole, None, config)
    for mine, *theirs in zip(ragged_layers(whole), *map(ragged_layers, caches), strict=True):
        filled(mine, theirs)
    return whole


def filled(mine: RaggedLayer, theirs: Sequence[RaggedLayer]) -> None:
    """Puts the entries of several layers into one."""
    for one in theirs:
        one.settle()
    stores = [one.store for one in theirs if one.store is not None]
    if not stores:
        return
    mine.dtype, mine.device, mine.is_initialized = theirs[0].dtype, theirs[0].device, True
    mine.store = Ragged.joined(stores)
    mine.seen, mine.real = theirs[0].seen, torch.cat([one.real for one in theirs])
    mine.faded = max(one.faded for one in theirs)


def bytes_held(cache: DynamicCache) -> int:
    """Bytes of everything that a cache under policies keeps."""
    return sum(layer.bytes_held() for layer in ragged_layers(cache))


def model_bytes(cache: DynamicCache) -> int:
    """What the keys and values that came by would take in the model's own cache."""
    total = 0
    for layer in ragged_layers(cache):
        if layer.store is not None:
            batch, heads = layer.store.start.shape
            width = layer.store.keys.shape[1] + layer.store.values.shape[1]
            total += batch * heads * own_length(layer.window, layer.seen) * width * layer.store.keys.dtype.itemsize
    return total
