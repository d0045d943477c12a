r"""One attention module around any rule, recurrence or mixer: `Attention(dim, heads, kv_heads, rule=…)`.

q, k, v = W_q x, W_k c, W_v c,    c = x, or another sequence,    out = W_o concat_h(rule(q_h, k_h, v_h))
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import states
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.mixer import Mixer
from foveate.core.recurrence import Heads, Recurrence
from foveate.core.reductions import Last
from foveate.core.rows import Layer, View, attend
from foveate.core.rule import Operator, Sizes
from foveate.core.standing import Standing, auxiliary_loss, called, check_form, state_layer, use_cache

__all__ = ["Attention", "auxiliary_loss", "rotated"]


class Attention(nn.Module):
    """Attention of any rule, as a module of a model of your own.

    Its state dict has the names of Llama's: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `rule` for what the rule
    learns. A mixer has its own projections in `rule` and none of these.

    Example:
        A key-value cache is transformers' own:

        >>> import torch
        >>> from transformers import DynamicCache
        >>> import foveate
        >>> attention = foveate.nn.Attention(32, heads=4, kv_heads=2, rope=10_000.0)
        >>> x, cache = torch.randn(1, 5, 32), DynamicCache()
        >>> whole = attention(x)
        >>> first = attention(x[:, :4], cache=cache)
        >>> bool(torch.allclose(attention(x[:, 4:], cache=cache), whole[:, 4:], atol=1e-5))
        True

    Args:
        dim: Width of the input and of the output.
        heads: Query heads.
        kv_heads: Key-value heads; None: as many as query heads.
        rule: The rule, recurrence or mixer, or its name.
        rope: Base of the rotary positions, 10000 in Llama; None: no positions.
        head_dim: Width of a head; None: dim / heads.
        causal: Whether no token sees a later one (never in cross-attention).
        window: Keys that a token sees, itself included; None: all.
        bias: Whether the projections have a bias.
        dropout: Probability of dropping a weight in training.
        context_dim: Width of another sequence that the keys and values come from; None: the input's own.
        layer: Number of the layer, which is its place in a cache.

    Raises:
        BadInput: sizes that do not divide; a rule without the form that is asked for.
        UnknownName: no rule is called so.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        rule: Operator | str = "softmax",
        rope: float | None = None,
        *,
        head_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        operator = called(rule)
        check_sizes(dim, heads, kv_heads, head_dim)
        width = head_dim or dim // heads
        if rope is not None and (width % 2 or rope <= 0):
            raise BadInput(f"rotary positions turn pairs of numbers by a base above 0: head_dim {width}, rope {rope}")
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout={dropout}: give a probability from 0 to below 1")
        if window is not None and window < 1:
            raise BadInput(f"window={window}: a token sees at least itself, so give 1 or more")
        check_form(operator, causal and context_dim is None)
        self.sizes = Sizes(dim, heads, kv_heads, width, layer)
        self.causal, self.window, self.rope, self.dropout = causal, window, rope, dropout
        self.crosses = context_dim is not None
        if isinstance(operator, Mixer | Recurrence) and (self.crosses or window is not None):
            what = f"context_dim={context_dim}" if self.crosses else f"window={window}"
            raise BadInput(f"{type(operator).__name__} mixes the tokens of one sequence, all of them; leave {what} out")
        if isinstance(operator, Recurrence) and dropout:
            raise BadInput(
                f"{type(operator).__name__} forms no weights that could be dropped; leave dropout={dropout} out"
            )
        if not isinstance(operator, Mixer):
            source = context_dim or dim
            if not isinstance(operator, Recurrence) or operator.reads_queries:
                self.q_proj = nn.Linear(dim, heads * width, bias=bias)
            self.k_proj = nn.Linear(source, kv_heads * width, bias=bias)
            self.v_proj = nn.Linear(source, kv_heads * width, bias=bias)
            self.o_proj = nn.Linear(heads * width, dim, bias=bias)
        self.rule = None if getattr(operator, "default", False) else Standing(operator, self.sizes)

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key context_dim"] | None = None,
        *,
        mask: Bool[Tensor, "batch key"] | Bool[Tensor, "#batch #heads query key"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch query dim"]:
        """The output for each token of x; zeros before the output's bias for one that sees nothing.

        Args:
            x: The input.
            context: Another sequence that the keys and values come from, where the module was made for one.
            mask: True for the keys that are no padding, those in the cache included; or which keys each query may
                look at, besides the order in time.
            cache: A transformers cache, read and added to. Of another sequence it is filled once, then read.

        Raises:
            BadInput: shapes that do not fit; a cache that another rule has filled.
        """
        self.check(x, context)
        standing = self.rule
        operator = None if standing is None else standing.operator
        past = 0 if cache is None else cache.get_seq_length(self.sizes.layer)
        if standing is not None and isinstance(operator, Mixer):
            return standing.mix(x, self.seen(x, past + x.shape[1], mask), cache)
        if standing is not None and isinstance(operator, Recurrence):
            layer = None if cache is None else state_layer(cache, self.sizes.layer, operator)
            out = standing.flow(self.recurrent(x, mask, past), layer)
        else:
            view = self.viewed(x, context, mask, cache)
            out = (attend(view) if standing is None else standing.attend(view)).out
        return self.o_proj(out.transpose(1, 2).flatten(2))

    # ---------------------------------------------------------------- what stands in it, seen from outside

    def view(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key context_dim"] | None = None,
        *,
        mask: Bool[Tensor, "batch key"] | Bool[Tensor, "#batch #heads query key"] | None = None,
    ) -> View:
        """The attention call that these inputs are: `core.rows.attend` of it gives outputs and reductions.

        Raises:
            BadInput: what stands in the module has no rows.
        """
        self.check(x, context)
        if self.rule is not None and isinstance(self.rule.operator, Mixer | Recurrence):
            raise BadInput(
                f"{self.rule.operator!r} has no attention call with rows; take a rule, as softmax or sigmoid"
            )
        return self.viewed(x, context, mask)

    def heads(self, x: Float[Tensor, "batch query dim"], mask: Bool[Tensor, "batch query"] | None = None) -> Heads:
        """What a recurrence gets of these texts; `rule.scan(…)` of it is what the states engine computes.

        Raises:
            BadInput: no recurrence stands in the module.
        """
        if self.rule is None or not isinstance(self.rule.operator, Recurrence):
            name = "softmax attention" if self.rule is None else repr(self.rule.operator)
            raise BadInput(f"{name} is no recurrence; make the module with one, as elu or gated_delta")
        self.check(x, None)
        return self.recurrent(x, mask)

    def weights(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key context_dim"] | None = None,
        *,
        mask: Bool[Tensor, "batch key"] | Bool[Tensor, "#batch #heads query key"] | None = None,
    ) -> Float[Tensor, "batch heads query key"]:
        """What each token's head outputs take of each value, for looking: memory is quadratic in the length.

        Of a recurrence, of each value as it is written. Rows of padding are zeros. What happens to head outputs behind
        the weights is not in them.

        Raises:
            BadInput: a mixer, whose tokens have no weights of values.
            NotSupported: a recurrence of which one scan is only a part.
        """
        operator = None if self.rule is None else self.rule.operator
        if isinstance(operator, Mixer):
            raise BadInput(f"{operator!r} forms no weights of values; look at its outputs")
        if isinstance(operator, Recurrence):
            if not operator.one_scan:
                raise NotSupported(f"the weights of {operator!r} are not those of one scan; look at its outputs")
            self.check(x, context)
            heads = self.recurrent(x, mask)
            return torch.where(heads.tokens.real[:, None, :, None], states.weights(operator.scan(heads)), 0.0)
        rows = Last(x.shape[1])
        found = attend(self.view(x, context, mask=mask), (rows,))[rows]
        every = found.weights.new_zeros(*found.weights.shape[:2], x.shape[1], found.weights.shape[3])
        return every.index_copy(2, found.index, found.weights)

    # ---------------------------------------------------------------- its parts

    def viewed(self, x: Tensor, context: Tensor | None, mask: Tensor | None, cache: Any = None) -> View:
        """The attention call, its new keys and values put into the cache."""
        standing, source = self.rule, x if context is None else context
        past = 0 if cache is None else cache.get_seq_length(self.sizes.layer)
        if cache is not None:
            use_cache(cache, self.sizes.layer, None if standing is None else standing.operator)
        # what comes from another sequence is filled once
        filled = self.crosses and past > 0
        seen = self.seen(x, past if filled else past + source.shape[1], mask)
        if context is None:
            x = source = without_padding(x, mask, past)
        elif not filled:
            source = without_padding(source, mask)
        q = self.heads_of(self.q_proj(x))
        if filled:
            k, v = cache.layers[self.sizes.layer].keys, cache.layers[self.sizes.layer].values
        else:
            k, v = self.heads_of(self.k_proj(source)), self.heads_of(self.v_proj(source))
            if not self.crosses:
                q, k = self.placed(q, seen), self.placed(k, seen)
            if standing is not None:
                v = standing.as_rule.write(standing.learned, v, source).to(v.dtype)
            if cache is not None:
                k, v = cache.update(k, v, self.sizes.layer)
        view = View(q, k, v, seen, dropout=self.dropout if self.training else 0.0, projection=self.o_proj.weight)
        view.layer, view.training = Layer(self.sizes.layer, "attention", self.crosses), self.training
        if standing is not None:
            view.rule, view.learned, view.hidden = standing.as_rule, standing.learned, x
        return view

    def recurrent(self, x: Tensor, mask: Tensor | None, past: int = 0) -> Heads:
        """The projections of new tokens, as the module's recurrence gets them."""
        assert self.rule is not None
        seen, x = self.seen(x, past + x.shape[1], mask), without_padding(x, mask, past)
        k, v = self.placed(self.heads_of(self.k_proj(x)), seen), self.heads_of(self.v_proj(x))
        if hasattr(self, "q_proj"):
            q = self.placed(self.heads_of(self.q_proj(x)), seen)
        else:
            q = k.repeat_interleave(self.sizes.heads // self.sizes.kv_heads, 1)
        return self.rule.heads(q, k, v, x, seen)

    def placed(self, x: Float[Tensor, "batch heads length head_dim"], seen: Mask) -> Tensor:
        """Queries or keys with their rotary positions, where the module has any."""
        return x if self.rope is None else rotated(x, seen.place.clamp_min(0), self.rope)

    def heads_of(self, x: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch heads length head_dim"]:
        """A projection, head by head."""
        return x.unflatten(-1, (-1, self.sizes.head_dim)).transpose(1, 2)

    def seen(self, x: Tensor, keys: int, mask: Tensor | None) -> Mask:
        """Which keys each token of x may see.

        Raises:
            BadInput: a mask of another shape or kind.
        """
        queries, causal = x.shape[1], self.causal and not self.crosses
        whole = partial(Mask.of_padding, queries=queries, keys=keys, causal=causal, window=self.window, device=x.device)
        if mask is None:
            return whole(None)
        wanted = f"[{x.shape[0]}, {keys}], or [{x.shape[0]} or 1, {self.sizes.heads} or 1, {queries}, {keys}]"
        fits = tuple(mask.shape) == (x.shape[0], keys) or (
            mask.ndim == 4
            and mask.shape[0] in (1, x.shape[0])
            and mask.shape[1] in (1, self.sizes.heads)
            and tuple(mask.shape[2:]) == (queries, keys)
        )
        if mask.dtype != torch.bool or not fits:
            raise BadInput(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be bool (True: may look) of {wanted}")
        if mask.ndim == 2:
            return whole(mask)
        order = whole(None)
        allowed = order.allowed(torch.arange(queries, device=x.device), 0, keys)
        return Mask.from_tensor(mask & allowed, order.position)

    def check(self, x: Tensor, context: Tensor | None) -> None:
        """Raises `BadInput` where inputs do not fit the module."""
        if x.ndim != 3 or x.shape[2] != self.sizes.width:
            raise BadInput(f"x is {tuple(x.shape)}; it must be [batch, query, {self.sizes.width}]")
        if context is not None and not self.crosses:
            raise BadInput("a second sequence for a module that was made without context_dim; make it with its width")
        if context is None and self.crosses:
            raise BadInput("this module takes its keys from a second sequence (context_dim); give it as `context`")
        if context is not None and (context.ndim != 3 or context.shape[0] != x.shape[0]):
            raise BadInput(f"context is {tuple(context.shape)}; it must be [{x.shape[0]}, key, context_dim]")

    def extra_repr(self) -> str:
        s = self.sizes
        return f"{s.width}, heads={s.heads}, kv_heads={s.kv_heads}, rope={self.rope}, causal={self.causal}"


def check_sizes(dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    """Raises `BadInput` where the sizes of a layer do not fit each other."""
    if min(dim, heads, kv_heads, 1 if head_dim is None else head_dim) < 1:
        raise BadInput(f"dim={dim}, heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}: all must be 1 or more")
    if head_dim is None and dim % heads:
        raise BadInput(f"dim={dim} is no multiple of heads={heads}; take another number of heads, or give head_dim")
    if heads % kv_heads:
        raise BadInput(f"heads={heads} is no multiple of kv_heads={kv_heads}: each key-value head serves equally many")


def without_padding(x: Tensor, mask: Tensor | None, past: int = 0) -> Tensor:
    """Zeros for padding: whatever stands there must not come through, and 0 x NaN is NaN."""
    return torch.where(mask[:, past:, None], x, 0.0) if mask is not None and mask.ndim == 2 else x


def rotated(
    x: Float[Tensor, "batch heads length head_dim"], place: Int[Tensor, "#batch length"], base: float
) -> Float[Tensor, "batch heads length head_dim"]:
    """Rotary positions: the pair (i, i + d/2) turned by place * base^(-2i/d), as Llama does (RoFormer, eq. 34)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (place[..., None].float() * speed)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
