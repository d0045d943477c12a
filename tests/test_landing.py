"""An edit lands or raises: on entering, on leaving, and nothing is left behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core import landing
from foveate.core.attach import ACTIVE, attach
from foveate.core.errors import BadInput, NothingObserved, NotLanded, NotSupported
from foveate.core.mechanism import Edit, ExpertEdit, HeadEdit, ResidualEdit, Stream, Tilt
from foveate.core.places import Span, Value, some_heads, some_indices, some_spans, values_of
from foveate.measure import Entropy
from foveate.steer import InitialTokenScale
from foveate.testing import tiny


@dataclass(frozen=True)
class Doubled(HeadEdit):
    """Doubles every other head of some layers."""

    layers: tuple[int, ...] = some_indices()
    heads: tuple[tuple[int, int], ...] = some_heads()

    def edit(self, rows: Any, out: Tensor) -> Tensor:
        if self.layers and rows.layer.index not in self.layers:
            return out
        out = out.clone()
        out[:, ::2] *= 2
        return out


@dataclass(frozen=True)
class Forgotten(HeadEdit):
    """Computes and throws away."""

    def edit(self, rows: Any, out: Tensor) -> Tensor:
        _ = 2 * out
        return out


@dataclass(frozen=True)
class OnSpan(Edit):
    """A bias on a span."""

    span: tuple[Span, ...] = some_spans()

    def miniature(self) -> OnSpan:
        return replace(self, span=((1, 3),))

    def tilt(self, view: Any) -> Tilt:
        return Tilt(bias=view.inside(self.span, view.mask.key_place)[:, None].float())


@dataclass(frozen=True)
class Shifted(ResidualEdit):
    """Adds to every other number of the stream behind some layers; a norm would take a constant back."""

    layers: tuple[int, ...] = some_indices()
    by: float = 1.0

    def edit(self, stream: Stream) -> Tensor:
        odd = torch.arange(stream.hidden.shape[-1]) % 2
        return stream.hidden + self.by * odd if stream.layer in self.layers else stream.hidden


@dataclass(frozen=True)
class NoExpert(ExpertEdit):
    """Switches expert 0 off."""

    def edit(self, layer: int, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([0]), -torch.inf)


def run(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return landing.first(model(**given))


@pytest.mark.parametrize("family", tiny.models())
def test_edits_land_on_every_family(family: str) -> None:
    model = tiny.model(family)
    batch = tiny.inputs(family)
    before = run(model, **batch)
    for edit in (Doubled(), InitialTokenScale(3.0)):
        with attach(model, edit):
            assert not torch.equal(run(model, **batch), before)
    assert torch.equal(run(model, **batch), before)


def test_an_edit_that_changes_nothing_raises_before_the_block_runs() -> None:
    model = tiny.model("llama")
    words = "Forgotten changes nothing in any layer of LlamaForCausalLM"
    with pytest.raises(NotLanded, match=words), attach(model, Doubled(), Forgotten()):
        pytest.fail("the block ran")
    assert model not in ACTIVE


def test_the_layer_that_stays_still_is_named() -> None:
    @dataclass(frozen=True)
    class Half(HeadEdit):
        """Says layers 0 and 1, does layer 0."""

        layers: tuple[int, ...] = some_indices()

        def edit(self, rows: Any, out: Tensor) -> Tensor:
            return 2 * out if rows.layer.index == 0 else out

    with pytest.raises(NotLanded, match="changes nothing in layer 1 of"), attach(tiny.model("llama"), Half((0, 1))):
        pass


def test_a_layer_named_by_a_number_for_one_of_its_heads_must_move() -> None:
    @dataclass(frozen=True)
    class Numbered(HeadEdit):
        """Takes numbers for heads, and uses those of layer 0."""

        by: float = 1.0
        heads: tuple[Value, ...] = values_of(0.0, 9.0)
        identity: ClassVar = {"by": 1.0, "heads": ()}

        def edit(self, rows: Any, out: Tensor) -> Tensor:
            return 2 * out if rows.layer.index == 0 else out

    both = Numbered(heads=((0, 0, 2.0), (1, 0, 2.0)))
    with pytest.raises(NotLanded, match="changes nothing in layer 1 of"), attach(tiny.model("llama"), both):
        pass
    # the number that changes nothing asks for nothing
    model = tiny.model("llama")
    with attach(model, Numbered(heads=((0, 0, 2.0), (1, 0, 1.0)))):
        run(model, **tiny.inputs("llama"))


def test_what_is_not_what_the_reference_says_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = landing.Trial.reference
    monkeypatch.setattr(landing.Trial, "reference", lambda self, view, ms: plain(self, view, ms) * (1.2 if ms else 1))
    words = r"head outputs of layer 0 are not what the dense reference says .*engine='blocks'"
    with pytest.raises(NotLanded, match=words), attach(tiny.model("llama"), Doubled()):
        pass


def test_what_is_not_used_by_the_model_raises() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with (
        pytest.raises(NotLanded, match=r"changes layers 0, 1 of .* but not the model's output"),
        attach(model, Doubled()),
    ):
        pass


def test_what_a_norm_takes_back_raises() -> None:
    # Gemma 2 normalises what its attention gives: twice as much of all heads is as much
    model = tiny.model("gemma2")
    heads = foveate.find("head_scale")
    with pytest.raises(NotLanded, match="but not the model's output"), attach(model, heads(2.0)):
        pass
    with attach(model, heads(1.0, heads=((0, 1, 2.0),))):
        run(model, **tiny.inputs("gemma2"))


def test_the_identity_needs_no_proof() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama")
    before = run(model, **batch)
    with attach(model, InitialTokenScale(1.0)):
        torch.testing.assert_close(run(model, **batch), before, atol=1e-5, rtol=0)


def test_a_trial_of_ones_own_or_none() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama")
    with pytest.raises(NotLanded, match="OnSpan changes nothing"), attach(model, OnSpan(((50, 60),)), trial=batch):
        pass
    with attach(model, Forgotten(), trial=False):
        run(model, **batch)


def test_a_model_whose_input_is_unknown_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama")
    forward = type(model).forward

    def other(self: Any, tokens: Tensor, **more: Any) -> Any:
        return forward(self, input_ids=tokens, **more)

    monkeypatch.setattr(type(model), "forward", other)
    with pytest.raises(NotSupported, match=r"no small input for LlamaForCausalLM"), attach(model, Doubled()):
        pass
    with attach(model, Doubled(), trial={"tokens": batch["input_ids"]}):
        run(model, tokens=batch["input_ids"])


def test_the_trial_leaves_modes_and_random_numbers_alone() -> None:
    model = tiny.model("llama").train()
    model.model.layers[0].eval()
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    with attach(model, Doubled()):
        assert torch.equal(torch.rand(3), want)
        run(model, **tiny.inputs("llama"))
    assert model.training
    assert not model.model.layers[0].training


def test_metrics_around_a_trial_do_not_see_it() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama")
    with attach(model, Entropy()) as outer:
        run(model, **batch)
        calls, want = outer.calls, outer.results.heads
        with attach(model, Doubled()) as inner:
            assert outer.calls == calls
            assert inner.calls == 0
            run(model, **batch)
        assert len(outer.results.heads) == len(want)
        assert outer.calls == calls + 2
    assert model not in ACTIVE


def test_a_decode_can_be_steered_half_way() -> None:
    model, ids = tiny.model("llama"), tiny.inputs("llama", batch=1)["input_ids"]
    with attach(model, Doubled()):
        whole = run(model, input_ids=ids)
    with torch.no_grad(), attach(model, Doubled()):
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        with attach(model, Entropy()):
            rest = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-4, rtol=0)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Doubled(heads=((2, 0),)), "has no layer 2; its 2 layers are 0 to 1"),
        (Doubled(heads=((1, 4),)), "layer 1 of LlamaForCausalLM has no head 4; its 4 heads are 0 to 3"),
        (Doubled(layers=(7,)), "has no layer 7"),
        (InitialTokenScale(1.0, heads=((0, 9, 2.0),)), "has no head 9"),
    ],
)
def test_a_place_that_the_model_has_not_is_told(edit: Any, words: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(BadInput, match=words), attach(model, edit):
        pass
    assert model not in ACTIVE


def test_a_span_that_never_came_by_raises_on_leaving() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama", length=11)
    words = r"OnSpan\(span=…\): token 20 was never seen; .* has 11 tokens"
    with pytest.raises(NothingObserved, match=words), attach(model, OnSpan(((20, 22),))):
        run(model, **batch)
    with attach(model, OnSpan(((9, 22),))):
        run(model, **batch)


def test_as_many_spans_as_rows() -> None:
    model, batch = tiny.model("llama"), tiny.inputs("llama", batch=2)
    with pytest.raises(BadInput, match="3 spans on a batch of 2 rows"), attach(model, OnSpan(((0, 1), (1, 2), (2, 3)))):
        run(model, **batch)
    with attach(model, OnSpan(((0, 2), (4, 7)))):
        both = run(model, **batch)
    for n, span in enumerate(((0, 2), (4, 7))):
        with attach(model, OnSpan((span,))):
            one = run(model, **{k: v[n : n + 1] for k, v in batch.items()})
        torch.testing.assert_close(both[n : n + 1], one, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Sets(HeadEdit):
    """Puts a constant in place of head 0 of layer 0."""

    to: float = 1.0
    identity: ClassVar = None

    def sets(self) -> frozenset[tuple]:
        return frozenset({("layer", 0, "head", 0)})

    def edit(self, rows: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0] = self.to
        return out


def test_edits_that_contradict_each_other() -> None:
    model = tiny.model("llama")
    words = "Sets and Sets both set layer 0 head 0, and contradict each other"
    with pytest.raises(BadInput, match=words), attach(model, Sets(1.0), Sets(2.0)):
        pass
    with attach(model, Sets(1.0)):
        with pytest.raises(BadInput, match="contradict"), attach(model, Sets(2.0)):
            pass
        run(model, **tiny.inputs("llama"))


def test_prompt_edits_are_told_what_they_are_for() -> None:
    words = "changes a text, before there are tokens"
    with pytest.raises(BadInput, match=words), attach(tiny.model("llama"), foveate.find("reread")()):
        pass


# ---------------------------------------------------------------- residual stream and experts


@pytest.mark.parametrize("family", tiny.models("decoder", "encoder"))
def test_the_stream_behind_a_layer_is_what_the_next_one_reads(family: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    plain = model(**batch, output_hidden_states=True).hidden_states
    seen = {}

    @dataclass(frozen=True)
    class Look(ResidualEdit):
        """Keeps the stream."""

        def edit(self, stream: Stream) -> Tensor:
            seen[stream.layer] = stream.hidden
            return stream.hidden

    with attach(model, Look(), trial=False):
        run(model, **batch)
    torch.testing.assert_close(seen[0], plain[1])
    read: list[Tensor] = []
    with attach(model, Shifted(layers=(0,))) as attached:
        second = next(block for block, layer in attached.blocks.items() if layer == 1)
        second.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        run(model, **batch)
    torch.testing.assert_close(read[0], plain[1] + torch.arange(plain[1].shape[-1]) % 2)


def test_places_of_a_stream_are_those_of_each_text() -> None:
    model = tiny.model("llama")
    batch = tiny.inputs("llama", padding="left", length=9)
    places = []

    @dataclass(frozen=True)
    class Look(ResidualEdit):
        """Keeps places."""

        def edit(self, stream: Stream) -> Tensor:
            if stream.layer == 1:
                places.append((stream.place.clone(), stream.real.clone()))
            return stream.hidden

    with attach(model, Look(), trial=False), torch.no_grad():
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    place, real = places[0]
    cut = 3
    assert torch.equal(real, batch["attention_mask"].bool())
    assert torch.equal(place[0], torch.arange(9, dtype=torch.int32))
    assert torch.equal(place[1, cut:], torch.arange(9 - cut, dtype=torch.int32))
    assert [p[0].tolist() for p in places[1:]] == [[[9], [9 - cut]], [[10], [10 - cut]]]


def test_a_model_without_a_stream_says_so() -> None:
    model = tiny.model("llama")
    block = model.model.layers[0]
    plain = type(block).forward

    class Odd(type(block)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {"hidden": plain(self, *args, **kwargs)}

    block.__class__ = Odd
    model.model.layers[1].forward = lambda hidden, *a, **k: hidden["hidden"]
    with pytest.raises(NotSupported, match="gives no residual stream behind layer 0"), attach(model, Shifted((0,))):
        pass
    assert model not in ACTIVE


def test_experts_are_reached_and_let_go() -> None:
    model, batch = tiny.model("gpt_oss"), tiny.inputs("gpt_oss")
    before = run(model, **batch)
    with attach(model, NoExpert()):
        inside = run(model, **batch)
    assert not torch.equal(inside, before)
    assert torch.equal(run(model, **batch), before)
    assert "forward" not in model.model.layers[0].mlp.router.__dict__


def test_a_model_without_experts_says_so() -> None:
    with (
        pytest.raises(NotSupported, match="has no experts to choose from"),
        attach(tiny.model("llama"), NoExpert()),
    ):
        pass


def test_after_an_exception_the_model_is_as_before() -> None:
    model, batch = tiny.model("gpt_oss"), tiny.inputs("gpt_oss")
    before, names = run(model, **batch), [set(m.__dict__) for m in model.modules()]

    def broken() -> None:
        with attach(model, NoExpert(), Shifted((0,)), Doubled()):
            run(model, **batch)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        broken()
    assert torch.equal(run(model, **batch), before)
    assert [set(m.__dict__) for m in model.modules()] == names
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
