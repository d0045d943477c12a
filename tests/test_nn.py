"""`foveate.nn.Attention`: against transformers' own attention, in every form, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import foveate
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, NotSupported, UnknownName
from foveate.core.mixer import Mixer
from foveate.core.recurrence import Recurrence
from foveate.core.reductions import RowEntropy
from foveate.core.rule import Rule
from foveate.nn import Attention, auxiliary_loss, rotated
from foveate.testing.checks import annotations_off

CARD = Card("a test", 2026, "test", Needs.QUERIES, "none", "nothing known", "in tests")


def x_of(length: int = 9, batch: int = 2, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def made(*args: Any, **options: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(*(args or (32, 4, 2)), **options).eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tolerance


# ---------------------------------------------------------------- plain attention


def test_it_takes_the_weights_of_a_llama_and_gives_its_outputs() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    theirs, ours = LlamaAttention(config, 0).eval(), made(rope=10_000.0)
    ours.load_state_dict(theirs.state_dict())
    x = x_of()
    where = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    later = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    close(ours(x), theirs(x, position_embeddings=where, attention_mask=later)[0])


def test_softmax_is_scaled_dot_product_attention() -> None:
    module, x = made(32, 4, 4), x_of()
    q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    for causal in (True, False):
        module.causal = causal
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        close(module(x), module.o_proj(want.transpose(1, 2).flatten(2)))


def test_a_window_is_a_mask() -> None:
    module, wide, x = made(window=3), made(), x_of()
    at = torch.arange(9)
    band = (at[:, None] - at < 3)[None, None]
    close(module(x), wide(x, mask=band))


def test_a_mask_with_holes() -> None:
    module, x = made(), x_of()
    real = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) > 0.3
    real[:, 0] = True
    # what is left of each text, without its holes, gives the same: there are no positions
    out = module(x, mask=real)
    for entry in range(2):
        close(out[entry, real[entry]], module(x[entry : entry + 1, real[entry]])[0])


def test_a_mask_per_head() -> None:
    module, x = made(), x_of()
    mask = torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(3)) > 0.3
    mask |= torch.eye(9, dtype=torch.bool)
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    seen = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    close(module(x, mask=mask), module.o_proj(want.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("rule", ["softmax", "relu"])
def test_another_sequence_is_read_and_cached(rule: str) -> None:
    module = made(rule=rule, context_dim=20)
    x, context = x_of(), x_of(5, width=20, seed=1)
    whole = module(x, context)
    cache = DynamicCache()
    close(module(x[:, :4], context, cache=cache), whole[:, :4])
    # the second time it is not read again
    close(module(x[:, 4:], context * torch.nan, cache=cache), whole[:, 4:])
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    short = module(x[1:], context[1:, :2])
    close(module(x, torch.where(real[..., None], context, torch.nan), mask=real)[1:], short)


def test_rotary_positions_turn_pairs() -> None:
    x = torch.randn(1, 1, 3, 4)
    got = rotated(x, torch.tensor([[0, 1, 5]]), 100.0)
    close(got[:, :, 0], x[:, :, 0])
    for n, place in ((1, 1.0), (2, 5.0)):
        for i, speed in ((0, 1.0), (1, 0.1)):
            pair = torch.complex(x[0, 0, n, i], x[0, 0, n, i + 2]) * torch.exp(torch.tensor(1j * place * speed))
            close(got[0, 0, n, [i, i + 2]], torch.stack([pair.real, pair.imag]))


def test_dropout_acts_in_training_only() -> None:
    module, x = made(dropout=0.5), x_of()
    plain = module(x)
    close(module(x), plain, 0.0)
    module.train()
    assert not torch.allclose(module(x), plain)


def test_a_head_may_have_its_own_width() -> None:
    assert made(32, 3, 1, head_dim=10)(x_of()).shape == (2, 9, 32)


# ---------------------------------------------------------------- looking at weights


@pytest.mark.parametrize("rule", ["softmax", "relu"])
@torch.no_grad()
def test_weights_by_hand(rule: str) -> None:
    module, x = made(rule=rule, causal=True), x_of()
    q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    s = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    hand = s.masked_fill(~seen, -torch.inf).softmax(-1)
    if rule == "relu":
        hand = s.relu() * seen / torch.arange(1, 10)[:, None]
    close(module.weights(x), hand, 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"rope": 1e4},
        {"rope": 1e4, "rule": "sigmoid"},
        {"rule": "selective"},
        {"window": 3},
        {"causal": False, "rule": "relu"},
        {"rule": "elu", "rope": 1e4},
        {"rule": "elu", "causal": False},
        {"rule": "gated_delta"},
    ],
    ids=str,
)
@torch.no_grad()
def test_weights_of_values_are_the_outputs(options: dict[str, Any]) -> None:
    module, x = made(32, 4, 2, **options), x_of()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :3] = False
    for mask in (None, real):
        given = x if mask is None else torch.where(real[..., None], x, torch.nan)
        weights = module.weights(given, mask=mask)
        assert weights.shape == (2, 4, 9, 9)
        if module.rule is not None and isinstance(module.rule.operator, Recurrence):
            heads = module.heads(given, mask)
            out = weights @ module.rule.operator.scan(heads).v.repeat_interleave(2, 1)
            out = module.rule.operator.finish(heads, out)
        else:
            view = module.view(given, mask=mask)
            out = weights @ view.rule.prepare(view).v.repeat_interleave(2, 1)
        close(module.o_proj(out.transpose(1, 2).flatten(2))[real], module(given, mask=mask)[real])
        if mask is not None:
            assert not weights[1, :, :3].any()
            assert not weights[1, :, :, :3].any()


@torch.no_grad()
def test_weights_between_two_sequences() -> None:
    module, x, context = made(context_dim=20), x_of(), x_of(5, width=20, seed=1)
    weights = module.weights(x, context)
    assert weights.shape == (2, 4, 9, 5)
    v = module.v_proj(context).unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(2, 1)
    close(module.o_proj((weights @ v).transpose(1, 2).flatten(2)), module(x, context))


def test_what_has_no_weights_or_rows() -> None:
    with pytest.raises(BadInput, match=r"Still.* forms no weights of values"):
        made(rule=Still()).weights(x_of())
    with pytest.raises(BadInput, match=r"Still.* has no attention call with rows"):
        made(rule=Still()).view(x_of())
    with pytest.raises(BadInput, match=r"Elu.* has no attention call with rows"):
        made(rule="elu").view(x_of())
    with pytest.raises(NotSupported, match=r"Scatterbrain.* are not those of one scan"):
        made(rule="scatterbrain").weights(x_of())
    with pytest.raises(BadInput, match="made without context_dim"):
        made().weights(x_of(), x_of())


# ---------------------------------------------------------------- what a rule adds to the loss


@dataclass(frozen=True)
class Watched(Rule):
    """Wants rows of low entropy."""

    card: ClassVar = CARD

    def needs(self):
        return (RowEntropy(),)

    def loss(self, rows):
        return rows[RowEntropy()].mean()


def test_losses_are_collected_in_training() -> None:
    model = torch.nn.Sequential(made(rule=Watched()), made(rule=Watched(), layer=1), made()).train()
    model(x_of())
    total = auxiliary_loss(model)
    q, k = (
        p(x_of()).unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(n, 1)
        for p, n in ((model[0].q_proj, 1), (model[0].k_proj, 2))
    )
    p = (q @ k.mT / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1).mean()
    assert float(total.detach()) > float(entropy.detach()) > 0
    model(x_of())
    close(model[0].rule.loss, entropy, 1e-4)
    total = auxiliary_loss(model)
    total.backward()
    assert model[0].q_proj.weight.grad.abs().max() > 0
    # reading it forgets it, and nobody collects outside of training
    assert not auxiliary_loss(model).any()
    model.eval()(x_of())
    assert not auxiliary_loss(model).any()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 30, "heads": 4}, "dim=30 is no multiple of heads=4"),
        ({"dim": 32, "heads": 4, "kv_heads": 3}, "heads=4 is no multiple of kv_heads=3"),
        ({"dim": 32, "heads": 0}, "all must be 1 or more"),
        ({"dim": 12, "heads": 4, "rope": 1e4}, "turn pairs"),
        ({"dim": 32, "heads": 4, "dropout": 1.0}, "below 1"),
        ({"dim": 32, "heads": 4, "window": 0}, "at least itself"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Attention(**options)


def test_a_rule_that_is_none() -> None:
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        made(rule="softmaxx")
    with annotations_off(), pytest.raises(BadInput, match=r"Entropy is no rule, recurrence or mixer"):
        made(rule=foveate.find("entropy")())


@dataclass(frozen=True)
class Encoder(Rule):
    """Has no causal form."""

    card: ClassVar = CARD
    causal: ClassVar = False

    def prepare(self, view):
        return view


@dataclass(frozen=True)
class Still(Mixer):
    """Gives back what it gets."""

    card: ClassVar = CARD
    full: ClassVar = False

    def module(self, sizes):
        return Passing()


class Passing(torch.nn.Module):
    def forward(self, tokens: Any, state: Any) -> tuple[Tensor, Any]:
        return tokens.x, state


def test_a_form_that_a_rule_has_not() -> None:
    with pytest.raises(BadInput, match="Encoder has no causal form"):
        made(rule=Encoder())
    assert made(rule=Encoder(), causal=False)(x_of()).isfinite().all()
    with pytest.raises(BadInput, match="Still is causal by its nature"):
        made(rule=Still(), causal=False)
    with pytest.raises(BadInput, match="leave window=3 out"):
        made(rule=Still(), window=3)


def test_a_mixer_refuses_masks_that_it_cannot_read() -> None:
    module, holes = made(rule=Still()), torch.ones(2, 1, 9, 9, dtype=torch.bool)
    holes[:, :, 5, 2] = False
    with pytest.raises(NotSupported, match="not windows, packed texts or masks"):
        module(x_of(), mask=holes)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m(x_of(width=16)), r"x is \(2, 9, 16\)"),
        (lambda m: m(x_of()[0]), r"must be \[batch, query, 32\]"),
        (lambda m: m(x_of(), x_of()), "made without context_dim"),
        (lambda m: m(x_of(), mask=torch.ones(2, 9)), "it must be bool"),
        (lambda m: m(x_of(), mask=torch.ones(2, 8, dtype=torch.bool)), r"of \[2, 9\]"),
        (lambda m: m(x_of(), mask=torch.ones(2, 3, 9, 9, dtype=torch.bool)), "4 or 1"),
    ],
)
def test_inputs_that_do_not_fit(call: Any, says: str) -> None:
    with annotations_off(), pytest.raises(BadInput, match=says):
        call(made())


def test_a_module_for_two_sequences_wants_both() -> None:
    with pytest.raises(BadInput, match="give it as `context`"):
        made(context_dim=20)(x_of())
