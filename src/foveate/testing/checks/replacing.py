"""What stands in the place of attention: in `foveate.nn.Attention`, and in loaded models."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from foveate import nn
from foveate.core.card import Card, Needs
from foveate.core.converting import convert
from foveate.core.errors import BadInput
from foveate.core.mechanism import Mechanism
from foveate.core.mixer import Mixer
from foveate.core.recurrence import Recurrence
from foveate.core.rule import Operator, Rule
from foveate.core.standing import named
from foveate.core.states import weights
from foveate.testing import tiny
from foveate.testing.checks.measuring import moved, same
from foveate.testing.checks.running import Skip, check, expect

WIDTH, HEADS, KV_HEADS, LENGTH = 32, 4, 2, 23
OPERATORS = (Rule, Recurrence, Mixer)


def layer(m: Operator, kv_heads: int = KV_HEADS, fresh: bool = False) -> nn.Attention:
    """A module with this operator, in evaluation mode, its parameters a little away from where they begin."""
    with seeded(0):
        made = nn.Attention(WIDTH, HEADS, kv_heads, m, rope=10_000.0, causal=m.causal).eval()
        if made.rule is not None and made.rule.learned is not None and not fresh:
            moved(made.rule.learned)
    return made


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers apart from the caller's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def texts(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Float[Tensor, "batch length width"]:
    """Random inputs."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def padded(left: int = 0, right: int = 0, length: int = LENGTH) -> Bool[Tensor, "2 length"]:
    """The first text whole, the second one padded."""
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, :left] = False
    real[1, length - right :] = False
    return real


def agree(got: Tensor, want: Tensor, where: str, tolerance: float = 3e-4) -> None:
    """Fails unless two outputs agree."""
    same({"output": got}, {"output": want}, where, tolerance)


# ---------------------------------------------------------------- in a module


@check(*OPERATORS)
@torch.no_grad()
def alone(m: Operator) -> None:
    """In a batch, with padding of garbage on either side, a text gives what it gives alone."""
    module = layer(m)
    for left, right in ((6, 0), (0, 7), (3, 4)):
        x, real = texts(), padded(left, right)
        where = f"{left} tokens of padding in front, {right} behind"
        single = module(x[1:, left : LENGTH - right])
        for garbage in (0.0, float("nan")):
            x = torch.where(real[..., None], x, garbage)
            out = module(x, mask=real)
            agree(out[1:, left : LENGTH - right], single, f"{where}, filled with {garbage}")
            agree(out[:1], module(x[:1]), f"{where}, the text beside it")
        other = torch.cat([texts(seed=1)[:1], x[1:]])
        agree(module(other, mask=real)[1:, left : LENGTH - right], single, f"{where}, beside another text")


@check(*OPERATORS)
@torch.no_grad()
def remembers(m: Operator) -> None:
    """Chunk by chunk and token by token with a cache, a padded batch gives what it gives at once."""
    if not m.causal:
        raise Skip("it has no causal form, and so nothing to go on with")
    module, x, real = layer(m), texts(), padded(left=5)
    want = module(x, mask=real)
    for name, cuts in {"chunks": (9, 10, 17, LENGTH), "token by token": (8, *range(9, LENGTH + 1))}.items():
        cache, parts, before = DynamicCache(), [], 0
        for cut in cuts:
            parts.append(module(x[:, before:cut], mask=real[:, :cut], cache=cache))
            before = cut
            if cut == 10:
                # as a beam search does
                for _ in range(2):
                    cache.reorder_cache(torch.LongTensor([1, 0]))
        got = torch.cat(parts, 1)
        agree(
            torch.where(real[..., None], got, 0.0), torch.where(real[..., None], want, 0.0), f"{name} against at once"
        )
    cache = DynamicCache()
    module(x[:, :12], mask=real[:, :12], cache=cache)
    cache.batch_select_indices(torch.tensor([1]))
    agree(module(x[1:, 12:], mask=real[1:], cache=cache), want[1:, 12:], "after the other text left the batch")


@check(*OPERATORS)
@torch.no_grad()
def order(m: Operator) -> None:
    """No token of a causal text sees a later one."""
    if not m.causal:
        raise Skip("it has no causal form")
    module, x = layer(m), texts()
    changed = torch.cat([x[:, :14], texts(seed=1)[:, 14:]], 1)
    agree(module(changed)[:, :14], module(x)[:, :14], "tokens 0 to 13 with other ones after them", 1e-5)


@check(*OPERATORS)
@torch.no_grad()
def short(m: Operator) -> None:
    """Texts of any length, and a text that is all padding, give finite numbers."""
    module = layer(m)
    for length in (1, 2, 3, 7, 64, 67):
        out = module(texts(length=length))
        expect(out.shape == (2, length, WIDTH), f"length {length}: the output is {tuple(out.shape)}")
        expect(bool(out.isfinite().all()), f"length {length}: the output is not finite")
    real = padded(right=LENGTH)
    out = module(torch.where(real[..., None], texts(), float("nan")), mask=real)
    expect(bool(out.isfinite().all()), "a text that is all padding: the output is not finite")
    agree(out[:1], module(texts()[:1]), "beside a text that is all padding")


@check(*OPERATORS)
def trains(m: Operator) -> None:
    """The derivative along every parameter and the input is the one that finite differences give."""
    module, x = layer(m).double(), texts(length=11).double()
    weigh = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    real = padded(left=3, length=11)

    def loss() -> Tensor:
        return (module(x, mask=real) * weigh)[real].sum()

    leaves = {"x": x.requires_grad_()} | {n: p for n, p in module.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(loss(), list(leaves.values()), allow_unused=True)
    rng, step = torch.Generator().manual_seed(6), 1e-6
    for (name, leaf), g in zip(leaves.items(), got, strict=True):
        expect(g is not None, f"{name} has no influence on the output: it gets no gradient")
        expect(bool(g.isfinite().all()), f"the gradient of {name} is not finite")
        along = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * along
                ends.append(float(loss()))
                leaf -= sign * step * along
        want, found = (ends[0] - ends[1]) / (2 * step), float((g * along).sum())
        close = abs(found - want) <= 1e-3 * max(1.0, abs(want))
        expect(close, f"the derivative along {name} is {found:.6g}, finite differences say {want:.6g}")


@check(*OPERATORS)
@torch.no_grad()
def narrow(m: Operator) -> None:
    """In bfloat16 it gives nearly what it gives in float32, and the dtype of its input."""
    module, x = layer(m).to(torch.bfloat16), texts().to(torch.bfloat16)
    out = module(x)
    expect(out.dtype == torch.bfloat16, f"bfloat16 in, {out.dtype} out")
    agree(out.float(), copy.deepcopy(module).float()(x.float()), "bfloat16 against float32", 0.06)


@check(*OPERATORS)
@torch.no_grad()
def steady(m: Operator) -> None:
    """The same input gives the same output, whatever the global random state."""
    module, x = layer(m), texts()
    found = []
    for seed in (0, 1):
        with seeded(seed):
            found.append(module(x))
    agree(found[1], found[0], "the second time", 0.0)


@check(*OPERATORS)
@torch.no_grad()
def says_what_it_is(m: Operator) -> None:
    """Its state dict fits a module with the same operator and is refused by one with another."""
    module, x = layer(m), texts()
    twin = nn.Attention(WIDTH, HEADS, KV_HEADS, m, rope=10_000.0, causal=m.causal).eval()
    twin.load_state_dict(module.state_dict())
    agree(twin(x), module(x), "a module with its state dict", 0.0)
    if module.rule is None:
        return
    other = nn.Attention(WIDTH, HEADS, KV_HEADS, Another(), causal=True)
    expect(refuses(other.load_state_dict, module.state_dict(), strict=False), "another operator takes its state dict")


@dataclass(frozen=True)
class Another(Rule):
    """Half of the scores: another operator."""

    card: ClassVar = Card("a test", 2026, "test", Needs.QUERIES, "s / 2", "nothing known", "in checks")

    def score(self, block: Any) -> Tensor:
        return super().score(block) / 2


def refuses(call: Any, *args: Any, **options: Any) -> bool:
    """Whether a call ends in `BadInput`."""
    try:
        call(*args, **options)
    except BadInput:
        return True
    return False


@check(Recurrence)
@torch.no_grad()
def forms(m: Recurrence) -> None:
    """Quadratic, chunked and recurrent form agree with the weights, and a text leaves a state of one size."""
    module, real = layer(m).double(), padded(left=4)
    heads = module.heads(texts().double(), real)
    scan = m.scan(heads)
    if m.one_scan:
        want = m.finish(heads, weights(scan) @ heads.every_head(scan.v))
    else:
        want, _ = m.flow(heads, None, "quadratic")
    for form in ("quadratic", "chunked", "recurrent") if m.causal else ("auto",):
        out, _ = m.flow(heads, None, form)
        agree(out.transpose(1, 2)[real], want.transpose(1, 2)[real], f"the {form} form against the weights", 1e-6)
    if m.causal:
        left = []
        for x in (texts().double(), texts(2, 40).double()):
            _, state = m.flow(module.heads(x), {})
            left.append({name: t.untyped_storage().nbytes() for name, t in state.items()})
        expect(left[0] == left[1], f"its state grows with the text, in bytes: {left[0]}, then {left[1]}")


# ---------------------------------------------------------------- in a loaded model


@check(*OPERATORS)
@torch.no_grad()
def converts(m: Operator) -> None:
    """In a converted model: padded as alone, cached as at once, saved and loaded as it was, and copied."""
    from foveate.models import load
    from foveate.models.sources import quiet

    family = "llama" if m.causal else "bert"
    model, inputs = tiny.model(family), tiny.inputs(family, padding="left" if m.causal else "right", length=14)
    if m.causal:
        # as `generate` gives them: what a key without a place stands for would be turned by the padding, too
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with seeded(1):
        convert(model, m)
    for module in model.modules():
        learned = getattr(getattr(module, "rule", None), "learned", None)
        if isinstance(learned, torch.nn.Module):
            with seeded(2):
                moved(learned)
    real = inputs["attention_mask"].bool()
    want = first(model(**inputs))
    single = first(model(**{n: t[1:][:, real[1]] for n, t in inputs.items()}))
    agree(want[1:][:, real[1]], single, f"in {family}, a padded text against itself alone", 2e-3)
    if m.causal:
        cache = DynamicCache(config=model.config)
        parts = [
            first(
                model(
                    input_ids=inputs["input_ids"][:, a:b],
                    position_ids=inputs["position_ids"][:, a:b],
                    attention_mask=inputs["attention_mask"][:, :b],
                    past_key_values=cache,
                )
            )
            for a, b in ((0, 8), (8, 9), (9, 14))
        ]
        agree(torch.cat(parts, 1)[real], want[real], f"in {family}, cached against at once", 2e-3)
    agree(first(copy.deepcopy(model)(**inputs)), want, "a copy of the model", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model.save_pretrained(folder)
        if "name" not in named(m):
            expect(refuses(load, folder, tokenizer=False), "a model with an operator that no registry knows is opened")
            return
        again, _ = load(folder, tokenizer=False)
        agree(first(again(**inputs)), want, "saved and loaded", 1e-5)


def first(output: Any) -> Tensor:
    """Logits, or hidden states."""
    return output[0]


@check(*OPERATORS)
@torch.no_grad()
def whose_cache(m: Operator) -> None:
    """A cache that it filled is refused by another operator, and by plain attention."""
    module = layer(m)
    if not m.causal or module.rule is None:
        raise Skip("it fills no cache, or one of plain attention")
    for other in ("softmax", Another()):
        cache = DynamicCache()
        module(texts()[:, :4], cache=cache)
        reader = nn.Attention(WIDTH, HEADS, KV_HEADS, other, rope=10_000.0).eval()
        expect(refuses(reader, texts()[:, 4:], cache=cache), f"{other} reads its cache")


@check(Mixer)
def identity(m: Mechanism) -> None:
    """It declares no setting at which it is attention, for it is none."""
    expect(m.identity is None, "a mixer is no attention, so no setting of it equals plain attention")
