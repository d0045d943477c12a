r"""Attention experts: the attention of several dense models in one layer, every token going to all of them.

Models that grew from one seed and were trained on text of their own each know something else. Their attention, whole,
becomes the experts of a mixture, and a router says how much a token takes of each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.attach import attention_layers
from foveate.core.card import Card, Needs
from foveate.core.converting import convert
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mask import Mask
from foveate.core.mixer import Mixer, State, Tokens
from foveate.core.params import bounded, choice
from foveate.core.rows import View, attend
from foveate.core.rule import Sizes
from foveate.nn import Attention, rotated

__all__ = ["AttentionExperts", "upcycled"]

KEYS_AND_VALUES = ("k_proj", "v_proj")
QUERIES_AND_OUTPUT = ("q_proj", "o_proj")


def projections(sizes: Sizes, names: Sequence[str], bias: str) -> nn.ModuleDict:
    """The named projections of an attention layer."""
    heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads, "v_proj": sizes.kv_heads}
    made: dict[str, nn.Module] = {
        n: nn.Linear(sizes.width, heads[n] * sizes.head_dim, bias=bias != "none") for n in names if n in heads
    }
    if "o_proj" in names:
        made["o_proj"] = nn.Linear(sizes.heads * sizes.head_dim, sizes.width, bias=bias == "all")
    return nn.ModuleDict(made)


class Experts(nn.Module):
    """Attention modules with a router over them; called as every mixer is.

    Args:
        operator: How many, and what they share.
        sizes: Sizes of each of them.

    Raises:
        BadInput: heads that rotary positions cannot turn.
    """

    def __init__(self, operator: AttentionExperts, sizes: Sizes) -> None:
        super().__init__()
        if operator.rope and sizes.head_dim % 2:
            raise BadInput(
                f"rotary positions turn pairs of numbers: head_dim {sizes.head_dim}; make it even, or rope=0"
            )
        self.sizes, self.rope = sizes, operator.rope
        shares = operator.kv == "shared"
        own = QUERIES_AND_OUTPUT if shares else (*QUERIES_AND_OUTPUT, *KEYS_AND_VALUES)
        self.router = nn.Linear(sizes.width, operator.experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = nn.ModuleList(projections(sizes, own, operator.bias) for _ in range(operator.experts))
        self.shared = projections(sizes, KEYS_AND_VALUES, operator.bias) if shares else None

    def forward(self, tokens: Tokens, state: State | None) -> tuple[Float[Tensor, "batch query width"], State]:
        """The output, and the keys and values of all tokens up to here."""
        x, s, turned = tokens.x, self.sizes, tokens.place.clamp_min(0)
        experts = cast("list[nn.ModuleDict]", list(self.experts))
        holders = experts if self.shared is None else [self.shared]
        k = torch.cat([self.placed(h["k_proj"](x), turned) for h in holders], 1)
        v = torch.cat([self.heads(h["v_proj"](x)) for h in holders], 1)
        real = tokens.real
        if state:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            real = torch.cat([state["real"], real], 1)
        mask = Mask.of_padding(real, x.shape[1], real.shape[1], causal=tokens.causal, device=x.device)
        logits = self.router(x)
        # half precision would round what the experts' weights sum to
        g = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(x.dtype)
        out = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            at = slice(None) if self.shared is not None else slice(e * s.kv_heads, (e + 1) * s.kv_heads)
            mixed = attend(View(self.placed(expert["q_proj"](x), turned), k[:, at], v[:, at], mask)).out
            out = out + g[..., e, None] * expert["o_proj"](mixed.transpose(1, 2).flatten(2))
        return out, {"k": k, "v": v, "real": real}

    def heads(self, x: Float[Tensor, "batch query inner"]) -> Float[Tensor, "batch heads query head_dim"]:
        """A projection, head by head."""
        return x.unflatten(-1, (-1, self.sizes.head_dim)).transpose(1, 2)

    def placed(
        self, x: Float[Tensor, "batch query inner"], place: Tensor
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """Queries or keys, turned to their place."""
        return rotated(self.heads(x), place, self.rope) if self.rope else self.heads(x)


@dataclass(frozen=True)
class AttentionExperts(Mixer):
    r"""A soft mixture of whole attention modules.

        g(x) = softmax(W_r x),    out_t = \sum_e g_e(x_t) MHA_e(x)_t

    Each expert has queries and an output projection of its own, and keys and values, too, or all share them.
    `upcycled` makes such a mixture from dense attention modules or models; by itself its weights are fresh.

    Args:
        experts: How many.
        kv: Whose keys and values an expert reads: its own ("expert"), or those that all share ("shared").
        rope: Base of the rotary positions; 0: no positions.
        bias: Which projections have one: "none", those of queries, keys and values ("qkv"), or "all".

    Example:
        Two modules become one. A module mixed with itself is itself, whatever the router says.

        >>> import torch, foveate
        >>> from foveate.replace import AttentionExperts
        >>> from foveate.replace.heads.attention_experts import upcycled
        >>> dense = foveate.nn.Attention(32, heads=4, kv_heads=2, rope=1e4)
        >>> mixture = upcycled([dense, dense])
        >>> mixture.rule.operator == AttentionExperts(experts=2, rope=1e4)
        True
        >>> x = torch.randn(1, 6, 32)
        >>> bool(torch.allclose(mixture(x), dense(x), atol=1e-5))
        True
    """

    experts: int = bounded(4, 1, 64, grid=(2, 4, 8))
    kv: str = choice("expert", "expert", "shared")
    rope: float = bounded(10_000.0, 0.0, 1e12)
    bias: str = choice("none", "none", "qkv", "all")

    card: ClassVar[Card] = Card(
        title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
        year=2024,
        family="heads",
        needs=Needs.QUERIES | Needs.KEYS | Needs.VALUES,
        equation="out = sum_e softmax(W_r x)_e MHA_e(x)",
        differs="attention alone: the paper makes experts of the feed-forward layers, too, and computes both beside "
        "each other; here feed-forward layers become the mean of the models', as all that is no attention does. "
        "Shared keys and values begin as the mean of the experts'. The paper gives no start of the router; here it "
        "is normal with deviation 0.02",
        use="Put models that were branched off one seed, and trained on domains of their own, back into one "
        "(upcycled).",
        misleads="put into a loaded model by `convert` it begins untrained: the model's own attention is not in it. "
        "It costs as much time as all its experts, and a cache of all their keys and values unless these are shared",
    )
    test_params: ClassVar[tuple[dict[str, Any], ...]] = (
        {"experts": 2},
        {"experts": 3, "kv": "shared", "bias": "all"},
        {"experts": 1, "rope": 0.0, "bias": "qkv"},
    )

    def module(self, sizes: Sizes) -> nn.Module:
        return Experts(self, sizes)


def upcycled(dense: Sequence[nn.Module], kv: str = "expert") -> nn.Module:
    """A mixture whose experts are the attention of these modules, or of these models layer by layer.

    Args:
        dense: Modules of `foveate.nn.Attention`, or transformers models; of one architecture, all of them.
        kv: "expert": each keeps its keys and values; "shared": all read keys and values made by the mean of theirs.

    Returns:
        A new module or model. Of a model, what is no attention is the mean of the models'.

    Raises:
        BadInput: modules that are not alike, or none.
        NotSupported: attention that is more than four projections, rotary positions and softmax.
    """
    if not dense:
        raise BadInput("a mixture is made of one dense module or more; none was given")
    first = dense[0]
    if any(type(d) is not type(first) or shapes(d) != shapes(first) for d in dense):
        raise BadInput(
            "the dense modules are not of one architecture: classes and the shapes of weights must be the same"
        )
    if isinstance(first, Attention):
        return mixed_module([d for d in dense if isinstance(d, Attention)], kv)
    if isinstance(first, PreTrainedModel):
        return mixed_model([d for d in dense if isinstance(d, PreTrainedModel)], kv)
    raise BadInput(f"{type(first).__name__} is no foveate.nn.Attention and no transformers model; give those")


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of each weight, by name."""
    return {name: p.shape for name, p in module.named_parameters()}


def biased(attention: nn.Module) -> str:
    """Which projections of an attention module have a bias.

    Raises:
        NotSupported: it has other parameters than these projections, or not all of them.
    """
    names = {name for name, _ in attention.named_parameters()}
    for bias, ends in (("none", ()), ("qkv", "qkv"), ("all", "qkvo")):
        wanted = {f"{p}_proj.weight" for p in "qkvo"} | {f"{p}_proj.bias" for p in ends}
        if names == wanted:
            return bias
    raise NotSupported(
        f"{type(attention).__name__} is no expert: it must have q_proj, k_proj, v_proj and o_proj and no other "
        f"parameters, and has {', '.join(sorted(names))}"
    )


def mixed_module(dense: Sequence[Attention], kv: str) -> Attention:
    """One module of several."""
    first = dense[0]
    if any((d.sizes, d.rope, d.causal) != (first.sizes, first.rope, first.causal) for d in dense):
        raise BadInput("the dense modules differ in sizes, positions or causal order; an expert must fit the others")
    if first.crosses or any(d.rule is not None or d.window is not None or d.dropout for d in dense):
        raise NotSupported("experts are softmax attention of one sequence, without window and dropout; these are more")
    s = first.sizes
    operator = AttentionExperts(len(dense), kv, first.rope or 0.0, biased(first))
    made = Attention(s.width, s.heads, s.kv_heads, operator, head_dim=s.head_dim, causal=first.causal, layer=s.layer)
    made.to(first.q_proj.weight.device, first.q_proj.weight.dtype).train(first.training)
    fill(experts_in(made), dense)
    return made


def mixed_model(dense: Sequence[PreTrainedModel], kv: str) -> PreTrainedModel:
    """One model of several, layer by layer."""
    found = [list(attention_layers(d)) for d in dense]
    operator = AttentionExperts(len(dense), kv, base_of(dense[0]), biased(found[0][0]))
    proved(dense[0], operator)
    made = convert(copy.deepcopy(dense[0]), operator)
    others = [dict(d.named_parameters()) for d in dense]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in others[0]:
                parameter.copy_(mean([o[name] for o in others]))
    for mixture, sources in zip(attention_layers(made), zip(*found, strict=True), strict=True):
        fill(experts_in(mixture), sources)
    return made


@torch.no_grad()
def proved(model: PreTrainedModel, operator: AttentionExperts) -> None:
    """Raises `NotSupported` unless a model whose attention is one expert is still that model."""
    alone = convert(copy.deepcopy(model).eval(), AttentionExperts(1, "expert", operator.rope, operator.bias))
    for mixture, source in zip(attention_layers(alone), attention_layers(model), strict=True):
        fill(experts_in(mixture), [source])
    before = copy.deepcopy(model).eval()
    ids = (torch.arange(12, device=model.device) * 7 % model.config.get_text_config().vocab_size)[None]
    a, b = (m(input_ids=ids)[0].float() for m in (before, alone))
    allowed = (1e-3 if model.dtype == torch.float32 else 0.1) * float(a.abs().max().clamp_min(1))
    if not float((a - b).abs().max()) <= allowed:
        raise NotSupported(
            f"the attention of {type(model).__name__} is more than projections, rotary positions and softmax (a "
            "window, another scale, positions of another kind), so it cannot be an expert; llama, mistral without a "
            "window, qwen2 and smollm2 can"
        )


def base_of(model: PreTrainedModel) -> float:
    """Base of a model's rotary positions; 0 where it has none.

    Raises:
        NotSupported: they are stretched or differ from layer to layer.
    """
    said = getattr(model.config.get_text_config(), "rope_parameters", None)
    if not said:
        return 0.0
    if said.get("rope_type") != "default" or "rope_theta" not in said:
        raise NotSupported(f"rotary positions {said} are not plain ones; models with rope_type 'default' work")
    return float(said["rope_theta"])


def experts_in(attention: nn.Module) -> Experts:
    """What stands in an attention module as its mixture."""
    found = attention.get_submodule("rule.learned")
    assert isinstance(found, Experts)
    return found


@torch.no_grad()
def fill(mixture: Experts, sources: Sequence[nn.Module]) -> None:
    """Gives each expert the weights of its source."""
    for expert, source in zip(mixture.experts, sources, strict=True):
        given = dict(source.named_parameters())
        for name, parameter in expert.named_parameters():
            parameter.copy_(given[name])
    if mixture.shared is not None:
        for name, parameter in mixture.shared.named_parameters():
            parameter.copy_(mean([dict(s.named_parameters())[name] for s in sources]))


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean, taken in float64."""
    return torch.stack([t.double() for t in tensors]).mean(0)
