r"""Spectral norm of each head's query-key product, and the entropy that it leaves possible.

    norm_h  = scale ||W_q^{h\top} W_k^h||_2
    logit_h = scale (||W_q^h G||_2 \sqrt D + ||b_q^h||) (||W_k^h G||_2 \sqrt D + ||b_k^h||)
    sigma   = \sqrt T logit_h,    beta = exp(-sigma \sqrt{T / (T - 1)})
    bound_h = ln(1 + (T - 1) beta) + sigma \sqrt{T (T - 1)} beta / (1 + (T - 1) beta)

`bound_h` is the least entropy that a softmax over T numbers of Euclidean norm sigma can have (the paper's theorem). A
row of scores has at most the norm sigma: what leaves a normalisation layer with gain G over D channels is G times a
vector no longer than sqrt(D), so no score exceeds logit_h, and there are T of them.

A rotation by position may stand between W_q and W_k. It is orthogonal and so lengthens neither factor, but it does not
commute with them: the product of the two norms bounds the scores of a rotary model, the norm of the product need not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.attach import attach
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, NotSupported
from foveate.core.hooks import overheard
from foveate.core.mechanism import ModelMetric
from foveate.core.params import bounded
from foveate.core.results import HEAD_COLUMNS
from foveate.core.rows import Layer
from foveate.measure._watch import Watch, seen

__all__ = ["SpectralNorm", "entropy_bound", "product_norm"]

SENTENCE = "The quick brown fox jumps over the lazy dog, 3 times."
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
SEPARATE = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"))


@dataclass(frozen=True)
class SpectralNorm(ModelMetric):
    """Spectral norm of W_q^T W_k per head, and the least entropy that it leaves possible.

    `spectral_norm` has the model's scale in it; `spectral_norm_entropy_bound` is in nats, for a row of `length` keys.

    One short sentence is passed through the model, only to see how it uses its weights: the scale, the heads, and
    the normalisation layer in front. The bound is left out for layers that read no normalisation layer's output,
    or that have an additive bias or a learned sink. Cross-attention is left out.

    Args:
        length: T, the number of keys of the row that the bound speaks of.

    Raises:
        BadInput: weights are NaN or infinite.
        NotSupported: a layer's queries and keys are not products of weights that can be found (a norm in between,
            a fused layout that is not known, quantised weights); names the module.

    Example:
        The head `average` can never be sharp: its least entropy is ln 16. `first` can, and its norm does not show
        it, because it asks by a bias.

        >>> from foveate.measure import SpectralNorm
        >>> from foveate.testing import handmade, tiny
        >>> model, tokenizer = handmade.model(), tiny.tokenizer()
        >>> table = SpectralNorm(length=16).measure(model, tokenizer)
        >>> handmade.named(table, "spectral_norm")
        {'first': 0.0, 'previous': 250.0, 'self': 250.0, 'average': 0.0}
        >>> handmade.named(table, "spectral_norm_entropy_bound")
        {'first': 0.0, 'previous': 0.0, 'self': 0.0, 'average': 2.77}
    """

    length: int = bounded(512, 2, 1 << 24)

    card: ClassVar = Card(
        title="Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        year=2023,
        family="concentration",
        needs=Needs.MODEL,
        equation="scale ||W_q^T W_k||_2; bound = ln(1 + (T-1) beta) + sigma sqrt(T (T-1)) beta / (1 + (T-1) beta), "
        "beta = exp(-sigma sqrt(T / (T-1)))",
        differs="sigma is a bound for all inputs from the gain of the norm in front, not the norm of given inputs; it "
        "uses ||W_q|| ||W_k|| instead of ||W_q^T W_k||, which rotary embeddings would make invalid; biases are added",
        use="to see from the weights alone which heads can become sharp, and to watch it through training",
        misleads="large norms permit sharp rows and do not cause them; in trained models the bound is mostly 0",
        claims=("entropy_bound",),
    )
    test_params: ClassVar = ({}, {"length": 16})

    def measure(self, model: nn.Module, tokenizer: Any) -> pd.DataFrame:
        tables = []
        for layer, heads in found_heads(model, tokenizer):
            values = {"spectral_norm": heads.scale * product_norm(heads.q, heads.k.repeat_interleave(heads.grouped, 0))}
            logit = largest_logit(heads)
            if logit is not None:
                values["spectral_norm_entropy_bound"] = entropy_bound(logit * self.length**0.5, self.length)
            for label, v in values.items():
                exact = {"value": v.tolist(), "low": v.tolist(), "high": v.tolist()}
                tables.append(pd.DataFrame({"layer": layer.index, "head": range(len(v)), "metric": label} | exact))
        return pd.concat(tables, ignore_index=True)[HEAD_COLUMNS]


def product_norm(
    q: Float[Tensor, "heads dim model_dim"], k: Float[Tensor, "heads dim model_dim"]
) -> Float[Tensor, " heads"]:
    """||q^T k||_2 per head, from a matrix of dim x dim and none of model_dim x model_dim.

    With q^T = Q_q R_q and k^T = Q_k R_k it is ||R_q R_k^T||_2.
    """
    r_q, r_k = (torch.linalg.qr(w.transpose(1, 2), mode="r").R for w in (q, k))
    return torch.linalg.matrix_norm(r_q @ r_k.transpose(1, 2), 2)


def entropy_bound(sigma: Tensor, length: int) -> Tensor:
    """Least entropy of a softmax over `length` numbers whose Euclidean norm is at most sigma."""
    gap = sigma * (length / (length - 1)) ** 0.5
    rest = (length - 1) * torch.exp(-gap)
    return torch.log1p(rest) + gap * rest / (1 + rest)


# ---------------------------------------------------------------- finding the weights, and how the model uses them


@dataclass(frozen=True, eq=False)
class Heads:
    """The query and key weights of one layer by head, and what bounds their inputs."""

    q: Float[Tensor, "heads dim model_dim"]
    k: Float[Tensor, "kv_heads dim model_dim"]
    q_bias: Float[Tensor, "heads dim"]
    k_bias: Float[Tensor, "kv_heads dim"]
    scale: float = 1.0
    softcap: float | None = None
    gain: Float[Tensor, " model_dim"] | None = None
    shift: Float[Tensor, " model_dim"] | None = None

    @property
    def grouped(self) -> int:
        return len(self.q) // len(self.k)


def largest_logit(heads: Heads) -> Float[Tensor, " heads"] | None:
    """No score of the head is larger; None where nothing bounds the layer's inputs."""
    if heads.gain is None or heads.shift is None:
        return None
    lengths = []
    for weight, bias in ((heads.q, heads.q_bias), (heads.k, heads.k_bias)):
        norm = torch.linalg.matrix_norm(weight * heads.gain, 2)
        lengths.append(norm * len(heads.gain) ** 0.5 + (bias + weight @ heads.shift).norm(dim=1))
    logit = heads.scale * lengths[0] * lengths[1].repeat_interleave(heads.grouped)
    return logit if heads.softcap is None else logit.clamp(max=heads.softcap)


@torch.no_grad()
def found_heads(model: Any, tokenizer: Any) -> list[tuple[Layer, Heads]]:
    """The heads of every self-attention, checked against the queries and keys of one sentence."""
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    decoder = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with attach(model, Watch(lambda rows: rows.view)) as attached, overheard(attached, is_norm) as heard:
        model(input_ids=ids, **decoder)
        views = seen(attached)

    found = []
    for module, layer in attached.layers.items():
        if layer.cross or layer.index not in views:
            continue
        view, (hidden, maker) = views[layer.index][0], heard[module]
        where = f"{layer.name} ({type(module).__name__})"
        q, k, q_bias, k_bias = weights_of(where, module, view.q.shape[1], view.k.shape[1], view.q.shape[3])
        x = hidden.reshape(-1, hidden.shape[-1]).double()
        scale = view.scale * (
            stretch(where, "queries", view.q, x, q, q_bias) * stretch(where, "keys", view.k, x, k, k_bias)
        )
        gain = shift = None
        if maker is not None and view.bias is None and view.sinks is None:
            gain, shift = affine_of(maker, x.shape[-1], hidden)
        found.append((layer, Heads(q, k, q_bias, k_bias, scale, view.softcap, gain, shift)))
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer by its name; what it does is tried out later."""
    return "norm" in type(module).__name__.lower()


def weights_of(where: str, module: nn.Module, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """Query and key weights [heads, dim, model_dim] and biases [heads, dim] of an attention module, in float64."""
    for names in SEPARATE:
        pair: list[Any] = [getattr(module, n, None) for n in names]
        if all(isinstance(p, nn.Module) and isinstance(getattr(p, "weight", None), Tensor) for p in pair):
            (q, q_bias), (k, k_bias) = (linear(where, n, p) for n, p in zip(names, pair, strict=True))
            break
    else:
        q, k, q_bias, k_bias = fused_weights(where, module, heads, kv_heads, dim)
    if q.shape[0] != heads * dim or k.shape[0] != kv_heads * dim or q.shape[1] != k.shape[1]:
        raise NotSupported(
            f"{where}: query and key weights are {tuple(q.shape)} and {tuple(k.shape)}, its heads are {heads} and "
            f"{kv_heads} of width {dim}; quantised or factored weights are not supported, load the model unquantised"
        )
    by_head = (heads, dim), (kv_heads, dim)
    return (
        q.reshape(*by_head[0], -1),
        k.reshape(*by_head[1], -1),
        q_bias.reshape(by_head[0]),
        k_bias.reshape(by_head[1]),
    )


def fused_weights(where: str, module: nn.Module, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """Query and key parts of a projection that makes queries, keys and values at once."""
    for name in ("c_attn", "qkv_proj", "query_key_value"):
        child = getattr(module, name, None)
        if isinstance(child, nn.Module) and isinstance(getattr(child, "weight", None), Tensor):
            weight, bias = linear(where, name, child)
            if len(weight) != (heads + 2 * kv_heads) * dim:
                break
            if name == "query_key_value":
                # GPT-NeoX puts query, key and value of one head side by side
                weight, bias = weight.reshape(heads, 3, dim, -1), bias.reshape(heads, 3, dim)
                return *(weight[:, n].flatten(0, 1) for n in (0, 1)), *(bias[:, n].flatten() for n in (0, 1))
            return *cut(weight, heads * dim, kv_heads * dim), *cut(bias, heads * dim, kv_heads * dim)
    raise NotSupported(
        f"{where}: no query and key weights found (looked for {', '.join('/'.join(n) for n in SEPARATE)}, c_attn, "
        "qkv_proj, query_key_value); its spectral norm cannot be told from the weights"
    )


def cut(x: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """The first rows, and those after them."""
    return x[:first], x[first : first + second]


def linear(where: str, name: str, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a linear map in float64; zeros for a bias that is not there."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise NotSupported(
            f"{where}: {name}.weight is {weight.dtype} {tuple(weight.shape)}; load the model unquantised"
        )
    # GPT-2's Conv1D stores its weight transposed
    weight = (weight.T if type(module).__name__ == "Conv1D" else weight).double().cpu()
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double().cpu()


def stretch(where: str, what: str, made: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """The factor between what the model attends with and W x + b; a rotation by position leaves lengths alone.

    Raises:
        BadInput: the numbers are not finite.
        NotSupported: it is not the same for all tokens and heads.
    """
    expected = (torch.einsum("hde,te->htd", weight, x.cpu()) + bias[:, None]).norm(dim=-1)
    got = made.detach().double().cpu().transpose(0, 1).flatten(1, 2).norm(dim=-1)
    if not (got.isfinite().all() and expected.isfinite().all()):
        raise BadInput(
            f"{where}: its {what} hold NaN or infinite numbers, so the model's weights are damaged; load it anew"
        )
    told = expected > 1e-6 * expected.max()
    if not told.any():
        # nothing but zeros: the factor has nothing to act on
        return 1.0
    ratio = got[told] / expected[told]
    low, high = float(ratio.min()), float(ratio.max())
    if not high - low <= TOLERANCE.get(made.dtype, 0.05) * high:
        raise NotSupported(
            f"{where}: its {what} are not its projection's outputs (a norm of queries and keys, as in Qwen 3 or "
            "OLMo 2, or a layout that is not known), so a spectral norm of the weights says nothing about its scores"
        )
    return float(ratio.mean())


def affine_of(norm: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Gain and shift of a normalisation layer, from what it does to signs: they are their own normal form.

    None where it is no normalisation: its output then grows with its input.
    """
    if width % 2:
        return None, None
    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1
    # far above the layer's epsilon
    up, down, higher = (
        norm((signs * size).to(like)[None, None]).double().cpu().flatten() for size in (64.0, -64.0, 256.0)
    )
    if up.shape != signs.shape or not torch.allclose(up, higher, rtol=TOLERANCE.get(like.dtype, 0.05), atol=1e-6):
        return None, None
    return (up - down).abs() / 2, (up + down) / 2
