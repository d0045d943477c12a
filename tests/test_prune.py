"""Parts taken out of models: that every check of pruners can fail, and what no check of a single one sees."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers.cache_utils import DummyLayer, DynamicCache

import foveate
from foveate.compress import MixedBits, PartRemoval, RetrievalHeads, Streaming
from foveate.compress.prune import _greedy
from foveate.core import removing
from foveate.core.attach import attach, attention_layers
from foveate.core.budget import Budget
from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput, NotSupported
from foveate.core.mechanism import Parts, Pruner
from foveate.core.places import some_indices
from foveate.measure import Entropy
from foveate.steer import HeadScale, ShiftVectors
from foveate.testing import CheckFailed, check_mechanism, checks_for, tiny
from foveate.testing.checks.steering import logits

SMALL = {"input_ids": torch.arange(4, 16)[None]}


# ---------------------------------------------------------------- every check can fail


@dataclass(frozen=True)
class Sound(Pruner):
    """Takes feed-forward parts out."""

    layers: tuple[int, ...] = some_indices()
    card: ClassVar = Card("a test", 2026, "prune", Needs.MODEL, "none", "nothing known", "in tests")
    identity: ClassVar = {"layers": ()}

    def parts(self) -> Parts:
        return Parts(feed_forward=self.layers)


@dataclass(frozen=True)
class Always(Sound):
    """Takes one out whatever it is told."""

    identity: ClassVar = {"layers": (0,)}


class Loud(removing.Gone):
    """Says what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *[None] * (self.outputs - 1)) if self.outputs else given


class Averaging(removing.Gone):
    """Says the mean over all tokens that came with the call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        said = given.mean(1, keepdim=True).expand_as(given)
        return (said, *[None] * (self.outputs - 1)) if self.outputs else said


def keeps_norms_out(back: ExitStack, parent: torch.nn.Module, name: str, new: torch.nn.Module) -> None:
    """Puts nothing back."""
    setattr(parent, name, new.train(parent.training))


def lets_nothing_go(self: removing.Removal) -> None:
    self.lasting = True


ATTENTION = PartRemoval(attention=(0,))
BREAKS = {
    "identity": (Always(), None),
    "silent": (ATTENTION, (removing, "Gone", Loud)),
    "restores": (ATTENTION, (removing, "swap", keeps_norms_out)),
    # a cache whose first layer stays empty says that there is no text yet
    "decode": (ATTENTION, (removing, "without_slots", lambda *_: None)),
    "padding": (ATTENTION, (removing, "Gone", Averaging)),
    "frees": (ATTENTION, (removing.Removal, "release", lets_nothing_go)),
}


@pytest.mark.parametrize("check", BREAKS)
def test_checks_can_fail(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner, broken = BREAKS[check]
    if broken:
        if check == "decode":
            monkeypatch.setattr(removing, "make_room", lambda *_: None)
            monkeypatch.setattr("foveate.core.attach.make_room", lambda *_: None)
        monkeypatch.setattr(*broken)
    with pytest.raises(CheckFailed, match=f"check '{check}'"):
        check_mechanism(pruner, only=[check])


def test_every_check_has_its_breaker() -> None:
    assert set(checks_for(Pruner)) - {"form", "bounds"} == set(BREAKS)
    assert check_mechanism(Sound((1,)), only=["identity", "silent", "restores"])


# ---------------------------------------------------------------- families


@contextmanager
def mute(model: Any, *names: str):
    """The model with zeros for what these modules say."""
    with ExitStack() as stack:
        for name in names:

            def silence(module: Any, args: Any, made: Any) -> Any:
                return (torch.zeros_like(made[0]), *made[1:]) if isinstance(made, tuple) else torch.zeros_like(made)

            stack.callback(model.get_submodule(name).register_forward_hook(silence).remove)
        yield


PLACES = {
    "gemma2": ("model.layers", "self_attn", "mlp"),
    "gemma3": ("model.layers", "self_attn", "mlp"),
    "olmo2": ("model.layers", "self_attn", "mlp"),
    "cohere": ("model.layers", "self_attn", "mlp"),
    "phi3": ("model.layers", "self_attn", "mlp"),
    "mixtral": ("model.layers", "self_attn", "mlp"),
    "gpt_oss": ("model.layers", "self_attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
}


@pytest.mark.parametrize("name", PLACES)
def test_families(name: str) -> None:
    model, (layers, attention, feed_forward) = tiny.model(name), PLACES[name]
    with mute(model, f"{layers}.0.{attention}", f"{layers}.1.{feed_forward}"), torch.no_grad():
        want = model(**SMALL).logits
    pruner = PartRemoval(attention=(0,), feed_forward=(1,))
    torch.testing.assert_close(logits(model, pruner, [SMALL])["logits"], want, atol=2e-5, rtol=1e-4)
    ids = SMALL["input_ids"]
    steps = [{"input_ids": ids[:, a : a + 4]} for a in range(0, 12, 4)]
    torch.testing.assert_close(logits(model, pruner, steps)["logits"], want, atol=1e-4, rtol=1e-3)


def test_a_norm_goes_with_the_last_of_its_parts() -> None:
    model = tiny.model("cohere")
    block = model.model.layers[0]
    with attach(model, PartRemoval(attention=(0,)), trial=False):
        assert block.input_layernorm.weight is not None
        model(**SMALL)
    with attach(model, PartRemoval(attention=(0,), feed_forward=(0,)), trial=False):
        assert not list(block.parameters())
        model(**SMALL)


def test_a_norm_that_the_stream_passes_through_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    forward = type(model.model.layers[0]).forward

    def normed_residual(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return forward(self, self.input_layernorm(hidden_states), **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", normed_residual)
    with mute(model, "model.layers.0.self_attn"), torch.no_grad():
        want = model(**SMALL).logits
    torch.testing.assert_close(logits(model, ATTENTION, [SMALL])["logits"], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "says"), [("bert", r"\(bert\): its attention is no branch"), ("bart", "a decoder")])
def test_other_families_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(NotSupported, match=says), attach(tiny.model(name), ATTENTION):
        pass


# ---------------------------------------------------------------- heads


def test_heads_that_share_a_key_go_together() -> None:
    model = tiny.model("llama")
    for heads, says in (
        (((0, 1),), r"heads \[0, 1\] share one key"),
        (tuple((0, h) for h in range(4)), "take its attention out"),
        (((5, 0),), "has no layer 5"),
        (((0, 4),), "has no head 4"),
    ):
        with pytest.raises(BadInput, match=says), attach(model, PartRemoval(heads=heads)):
            pass
    with pytest.raises(BadInput, match="go with its attention"), attach(model, PartRemoval((0,), heads=((0, 0),))):
        pass
    before = model.model.layers[0].self_attn.k_proj.weight.shape
    with attach(model, PartRemoval(heads=((0, 0), (0, 1))), trial=False):
        attention = model.model.layers[0].self_attn
        shapes = [getattr(attention, f"{n}_proj").weight.shape for n in "qkvo"]
        assert [tuple(s) for s in shapes] == [(16, 32), (8, 32), (8, 32), (32, 16)]
        model(**SMALL)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == before


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "gpt_oss"])
def test_heads_that_cannot_be_cut_out_are_refused(name: str) -> None:
    model = tiny.model(name)
    before = copy.deepcopy(model.state_dict())
    pruner = PartRemoval(feed_forward=(0,), heads=((1, 0), (1, 1)))
    with pytest.raises(NotSupported, match="HeadScale"), attach(model, pruner):
        pass
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_heads_that_are_left_are_counted_anew() -> None:
    model, pruner = tiny.model("llama"), PartRemoval(heads=((0, 0), (0, 1)))
    says, gone = r"layer 0 of .* has no head 2; its 2 heads", HeadScale(heads=((0, 2, 0.5),))
    with pytest.raises(BadInput, match=says), attach(model, pruner, gone):
        pass
    with attach(model, pruner, HeadScale(heads=((1, 2, 0.5),))):
        model(**SMALL)


# ---------------------------------------------------------------- beside other mechanisms


def test_layers_keep_their_numbers() -> None:
    model = tiny.model("gemma3", num_hidden_layers=7, layer_types=None)
    plain = [layer.index for layer in attention_layers(model).values()]
    with attach(model, PartRemoval(attention=(0, 3)), Entropy()) as attached:
        assert [layer.index for layer in attention_layers(model).values()] == plain
        model(**SMALL)
    found = attached.results.heads
    assert sorted(set(found.layer)) == [1, 2, 4, 5, 6]
    pruner, edit = PartRemoval(attention=(0, 3)), HeadScale(heads=((3, 0, 0.0), (4, 0, 0.0)))
    with pytest.raises(BadInput, match="names layers 3 of Gemma3"), attach(model, pruner, edit):
        pass


def test_policies_name_layers_as_the_whole_model_counts_them() -> None:
    model = tiny.model("gemma3", sliding_window=64, num_hidden_layers=7, layer_types=None)
    small = Budget(4, sinks=1, recent=1, every=0)
    policy = RetrievalHeads(small, heads=((0, 0), (4, 1)))
    with attach(model, PartRemoval(attention=(0, 3)), policy), torch.no_grad():
        cache = model(**SMALL).past_key_values
        lengths = {n: c.store.length[0].tolist() for n, c in enumerate(cache.layers) if not isinstance(c, DummyLayer)}
    assert lengths == {1: [4, 4], 2: [4, 4], 4: [4, 12], 5: [4, 4], 6: [4, 4]}
    pruner, policy = PartRemoval(attention=(0, 3)), RetrievalHeads(small, heads=((0, 0), (3, 1)))
    with pytest.raises(BadInput, match="only heads of layers whose attention is gone"), attach(model, pruner, policy):
        pass


def test_bits_of_layers_are_those_of_the_whole_model() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    policy = MixedBits(keys=(3,), values=(3,))
    with attach(model, PartRemoval(attention=(0,)), policy), torch.no_grad():
        cache = model(**SMALL).past_key_values
        held = {n: c.bytes_held() for n, c in enumerate(cache.layers) if not isinstance(c, DummyLayer)}
    assert held[1] == held[2] < held[3] and set(held) == {1, 2, 3}
    # of layers that are gone nothing need be said
    with attach(model, PartRemoval(attention=(0,)), MixedBits(keys=(0,))) as attached, torch.no_grad():
        model(**SMALL)
        assert attached.bytes_held() == 3 * held[1]


def test_a_policy_that_keeps_everything_changes_nothing() -> None:
    model, ids = tiny.model("llama"), SMALL["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    with attach(model, ATTENTION):
        want = model.generate(ids, **options)
    with attach(model, ATTENTION, Streaming(1.0)) as attached:
        got = model.generate(ids, **options)
        assert torch.equal(got, want)
        whole = attached.bytes_held()
    with attach(model, Streaming(1.0)) as attached:
        model.generate(ids, **options)
        assert attached.bytes_held() == 2 * whole


def test_the_residual_stream_is_edited_where_attention_is_left() -> None:
    model = tiny.model("llama")
    vector = (1.0,) * 32
    with attach(model, PartRemoval(feed_forward=(0,)), ShiftVectors(vectors=((0, vector),))):
        model(**SMALL)
    with attach(model, ATTENTION, ShiftVectors(vectors=((1, vector),))):
        model(**SMALL)
    edit = ShiftVectors(vectors=((0, vector),))
    with pytest.raises(BadInput, match="names layers 0 of Llama"), attach(model, ATTENTION, edit):
        pass


def test_an_old_cache_is_made_room_in_or_refused() -> None:
    model, ids = tiny.model("llama"), SMALL["input_ids"]
    with torch.no_grad():
        want = logits(model, ATTENTION, [SMALL])["logits"]
        old = model(ids[:, :6], use_cache=True).past_key_values
        with attach(model, ATTENTION):
            with pytest.raises(BadInput, match="filled before the attention of layer 0 was taken out"):
                model(ids[:, 6:], past_key_values=old)
            for cache in (DynamicCache(), DynamicCache(config=tiny.model("llama").config)):
                parts = [model(ids[:, a : a + 6], past_key_values=cache).logits for a in (0, 6)]
                torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-3)


def test_what_contradicts_is_refused() -> None:
    model = tiny.model("llama")
    for given, says in (
        ((ATTENTION, PartRemoval(feed_forward=(1,))), "one pruner at a time"),
        ((PartRemoval(attention=(0, 1)),), "leave at least one"),
        ((PartRemoval(attention=(2,)),), "has no layer 2"),
    ):
        with pytest.raises(BadInput, match=says), attach(model, *given):
            pass
    with attach(model), pytest.raises(BadInput, match="to the outermost one"), attach(model, ATTENTION):
        pass


# ---------------------------------------------------------------- plans


def test_a_plan_takes_parts_out_for_good(tmp_path: Any) -> None:
    model, ids = tiny.model("llama"), SMALL["input_ids"]
    pruner, small = PartRemoval((0,), (1,), ((1, 2), (1, 3))), Budget(6, sinks=1, recent=2, every=1)
    mechanisms = (pruner, Streaming(small), HeadScale(heads=((1, 0, 0.5),)))
    with attach(model, *mechanisms):
        want = model.generate(ids, max_new_tokens=4, do_sample=False)
    plan = foveate.Plan.of(model, *mechanisms, evidence=PartRemoval.fit(model, ids, count=1).evidence())
    loaded = foveate.Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.mechanisms == mechanisms
    assert loaded.evidence["steps"][0]["distance"] > 0
    count = sum(p.numel() for p in model.parameters())
    gone = 4 * 32 * 32 - 2 * 16 * 32 + 32 + 3 * 32 * 48 + 32 + 2 * 16 * 32 + 2 * 8 * 32
    applied = foveate.apply(model, loaded)
    assert sum(p.numel() for p in model.parameters()) == count - gone
    for _ in range(2):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
        with pytest.raises(BadInput, match=r"PartRemoval took out of LlamaForCausalLM are gone.* load the model again"):
            applied.remove()
    with attach(model, Entropy()) as attached:
        model(**SMALL)
    assert set(attached.results.heads.layer) == {1}


def test_a_plan_that_fails_leaves_the_model_whole() -> None:
    model = tiny.model("llama")
    before, plan = logits(model, None, [SMALL]), foveate.Plan.of(model, ATTENTION, HeadScale(heads=((0, 0, 0.0),)))
    with pytest.raises(BadInput, match="taken out; leave them out"):
        foveate.apply(model, plan)
    assert torch.equal(logits(model, None, [SMALL])["logits"], before["logits"])
    assert [layer.index for layer in attention_layers(model).values() if layer] == [0, 1]
    foveate.apply(model, foveate.Plan.of(model, HeadScale(0.5))).remove()


# ---------------------------------------------------------------- the search


def brute(model: Any, ids: torch.Tensor, parts: list[PartRemoval]) -> list[float]:
    """How far the output is without these parts, in float64 and by whole runs."""
    plain = logits(model, None, [{"input_ids": ids}])["logits"].double().log_softmax(-1)
    found = []
    for m in parts:
        q = logits(model, m, [{"input_ids": ids}])["logits"].double().log_softmax(-1)
        middle = ((plain.exp() + q.exp()) / 2).log()
        each = [(p.exp() * (p - middle)).sum(-1).mean() for p in (plain, q)]
        found.append(float(sum(each)) / 2)
    return found


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_search_is_greedy_and_scores_anew(name: str) -> None:
    model = tiny.model(name, num_hidden_layers=3)
    ids = torch.randint(4, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    before, ticks = copy.deepcopy(model.state_dict()), []
    # in two calls of unequal size, which must weigh as their texts do
    found = PartRemoval.fit(model, [ids[:2], ids[2]], count=4, progress=lambda n, of: ticks.append((n, of)))
    assert ticks[-1][0] <= ticks[-1][1] == 2 * (6 + 5 + 4 + 3)
    assert [n for n, _ in ticks] == list(range(1, len(ticks) + 1))
    gone: dict[str, tuple[int, ...]] = {"attention": (), "feed_forward": ()}
    for step in found.steps:
        tries = [gone | {kind: (*gone[kind], layer)} for kind, layer, _ in step.tried]
        want = brute(model, ids, [PartRemoval(**t) for t in tries])
        torch.testing.assert_close([d for *_, d in step.tried], want, atol=1e-5, rtol=1e-3)
        best = min(step.tried, key=lambda t: t[2])
        assert (step.kind, step.layer, step.distance) == best
        gone[step.kind] = (*gone[step.kind], step.layer)
    assert found.mechanism == PartRemoval(*(tuple(sorted(gone[k])) for k in gone))
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
    assert not [m for m in model.modules() if "forward" in vars(m) or isinstance(m, removing.Gone)]
    assert json.loads(json.dumps(found.evidence()))["steps"][0]["layer"] == found.steps[0].layer


def test_the_last_attention_is_never_taken_out() -> None:
    model, ids = tiny.model("llama"), SMALL["input_ids"]
    found = PartRemoval.fit(model, ids, count=3)
    assert len(found.mechanism.attention) == 1
    assert found.mechanism.feed_forward == (0, 1)
    late = PartRemoval.fit(model, ids, count=2, first=1)
    assert late.mechanism == PartRemoval((1,), (1,))
    for more, says in (
        ({"count": 4}, "from 1 to 3"),
        ({"count": 2, "among": ("attention",)}, "from 1 to 1"),
        ({"count": 1, "measure": "angel"}, "one of divergence, norm, angle"),
        ({"count": 1, "among": ("heads",)}, "attention, feed_forward"),
    ):
        with pytest.raises(BadInput, match=says):
            PartRemoval.fit(model, ids, **more)
    with pytest.raises(BadInput, match=r"attention in one layer only.*let feed_forward parts go"):
        PartRemoval.fit(tiny.model("llama", num_hidden_layers=1), ids, count=1, among=("attention",))
    with pytest.raises(BadInput, match="token ids"):
        PartRemoval.fit(model, [ids.float()], count=1)
    with pytest.raises(NotSupported, match="BertModel has no attention"):
        PartRemoval.fit(tiny.model("bert"), ids, count=1)


def test_distances() -> None:
    p, q = (torch.randn(2, 200, 7, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    a, b = (x.double().softmax(-1) for x in (p, q))
    m = (a + b) / 2
    want = float((a * (a / m).log() + b * (b / m).log()).sum(-1).mean() / 2)
    assert _greedy.divergence(p, q) == pytest.approx(want, rel=1e-5)
    assert _greedy.divergence(100 * torch.eye(7)[None], 100 * torch.eye(7).flip(0)[None]) == pytest.approx(
        6 / 7 * torch.tensor(2.0).log().item(), rel=1e-5
    )
    assert _greedy.norm(p, q) == pytest.approx(float((p - q).pow(2).sum((1, 2)).sqrt().mean()), rel=1e-5)
    right = torch.eye(2)[None]
    assert _greedy.angle(right, right.flip(1)) == pytest.approx(torch.pi / 2, rel=1e-5)
    assert _greedy.angle(right, 3 * right) == pytest.approx(0.0, abs=1e-3)
