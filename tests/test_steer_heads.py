"""What the edits of sinks and of head outputs do, against dense computations and on models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import BadInput, BadParameter, NothingObserved, NotLanded
from foveate.core.recording import head_outputs
from foveate.core.rows import View, attend
from foveate.steer import (
    AttentionCalibration,
    HeadOffsets,
    HeadReinforcement,
    HeadScale,
    MeanAblation,
    ResampleAblation,
    SinkRedistribution,
)
from foveate.steer.head_reinforcement import divergence, sensitive
from foveate.steer.resample_ablation import Donor
from foveate.tasks import Example, loss, prepare
from foveate.testing import handmade, tiny, views

SITUATIONS = ("left_padded", "window", "packed", "sinks", "scattered", "empty_rows")


# ---------------------------------------------------------------- against dense rows


def rows_of(view: View) -> Iterator[tuple[int, int, int, Tensor, list[int]]]:
    """Each row of plain attention in float64: batch entry, head, row, weights, the keys that it sees."""
    for b in range(view.batch):
        for h in range(view.heads):
            for i in range(view.queries):
                k = view.k[b, h // view.grouped].double()
                s = (k @ view.q[b, h, i].double()) * view.scale
                blocked = view.mask.additive(torch.tensor([i]), 0, view.keys)
                s = s + blocked.expand(view.batch, -1, -1, -1)[b, 0, 0]
                extra = [] if view.sinks is None else [view.sinks[h].double()]
                visible = (s > -torch.inf).nonzero()[:, 0].tolist()
                if visible:
                    p = torch.stack([*s[visible], *extra]).softmax(0)[: len(visible)]
                    yield b, h, i, p, visible


def dense(view: View, change: Any) -> Tensor:
    """Head outputs with each row changed by itself."""
    out = torch.zeros(view.batch, view.heads, view.queries, view.v.shape[3], dtype=torch.float64)
    for b, h, i, p, keys in rows_of(view):
        out[b, h, i] = change(b, h, i, p, keys) @ view.v[b, h // view.grouped, keys].double()
    return out


def first_token(view: View, b: int, i: int) -> int:
    return int(view.mask.starts.expand(view.batch, -1)[b, i])


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("spared", [0, 2])
def test_calibration_is_what_the_paper_says(name: str, spared: int) -> None:
    view = views.view(name)

    def change(b: int, h: int, i: int, p: Tensor, keys: list[int]) -> Tensor:
        begin = first_token(view, b, i)
        sinks = [n for n, k in enumerate(keys) if p[n] > 0.2 and not begin <= k < begin + spared]
        others = [n for n in range(len(keys)) if n not in sinks]
        new, freed = p.clone(), 0.7 * p[sinks].sum()
        if sinks and others:
            new[sinks] = 0.3 * p[sinks]
            new[others] = p[others] + freed * p[others] / p[others].sum()
        assert torch.isclose(new.sum(), p.sum())
        return new

    out = attend(view, edits=[AttentionCalibration(factor=0.3, threshold=0.2, spared=spared)]).out.double()
    assert (out - dense(view, change)).abs().max() < 1e-4


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("span", [((0, 6),), ((1, 6), (4, 12))])
def test_redistribution_is_what_the_paper_says(name: str, span: tuple[tuple[int, int], ...]) -> None:
    view = views.view(name)
    edit = SinkRedistribution(span, portion=0.6, centric=0.3, least=0.1, threshold=2.0)
    acted = []

    def change(b: int, h: int, i: int, p: Tensor, keys: list[int]) -> Tensor:
        first, last = span[b % len(span)]
        begin = int(view.mask.text_begin.expand(view.batch)[b])
        sinks = [n for n, k in enumerate(keys) if p[n] > 2.0 / len(keys) or k == first_token(view, b, i)]
        region = [n for n, k in enumerate(keys) if first <= k - begin < last]
        clear = [n for n in region if n not in sinks]
        behind = int(view.mask.position[i]) - begin >= last
        if not behind or not clear or p[region].sum() < 0.1 or p[clear].sum() < 0.3 * p[region].sum():
            return p
        new = p.clone()
        new[sinks] = 0.4 * p[sinks]
        new[clear] = p[clear] + 0.6 * p[sinks].sum() * p[clear] / p[clear].sum()
        assert torch.isclose(new.sum(), p.sum())
        acted.append(bool(sinks))
        return new

    want = dense(view, change)
    assert any(acted)
    assert (attend(view, edits=[edit]).out.double() - want).abs().max() < 1e-4


def test_only_the_named_heads_and_layers_are_calibrated() -> None:
    view = views.view("causal")
    plain = attend(view).out
    moved = attend(view, edits=[AttentionCalibration(0.2, heads=((1, 2), (0, 1)))]).out - plain
    assert moved[:, 2].abs().max() > 1e-3
    assert moved[:, [0, 1, 3]].abs().max() < 1e-5
    assert torch.equal(attend(view, edits=[AttentionCalibration(0.2, layers=(0,))], engine="blocks").out, blocks(view))
    elsewhere = SinkRedistribution(((2, 9),), centric=0.0, least=0.0, heads=((0, 1),))
    assert torch.equal(attend(view, edits=[elsewhere], engine="blocks").out, blocks(view))


def blocks(view: View) -> Tensor:
    return attend(view, engine="blocks").out


def test_what_looks_at_another_text_has_no_sinks() -> None:
    view = views.view("cross")
    for edit in (AttentionCalibration(0.0), SinkRedistribution(((0, 5),), centric=0.0, least=0.0)):
        assert torch.equal(attend(view, edits=[edit], engine="blocks").out, blocks(view))


# ---------------------------------------------------------------- scaling and ablating heads


def test_a_head_at_zero_is_a_head_without_its_columns_in_the_projection() -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", padding="left")
    with torch.no_grad():
        with foveate.attach(model, HeadScale(heads=((1, 2, 0.0),))):
            got = model(**given).logits
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        want = model(**given).logits
    real = given["attention_mask"].bool()
    assert (got - want)[real].abs().max() < 1e-4


def test_zero_takes_out_what_is_infinite() -> None:
    rows = attend(views.view("causal"))
    out = HeadScale(heads=((1, 0, 0.0),)).edit(rows, torch.full_like(rows.out, torch.inf))
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    assert out[:, 1].isinf().all()


def test_means_are_those_of_the_texts_without_padding() -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", padding="left")
    made = MeanAblation.fit(model, given, heads=((0, 3), (1, 1)))
    assert [at[:2] for at in made.means] == [(0, 3), (1, 1)]
    texts = [ids[mask.bool()][None] for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    apart = [head_outputs(model, input_ids=ids) for ids in texts]
    for layer, head, mean in made.means:
        want = torch.cat([found[layer][0, head] for found in apart]).mean(0)
        assert torch.allclose(torch.tensor(mean), want, atol=1e-5)
    # the same texts one by one, and all heads
    every = MeanAblation.fit(model, [{"input_ids": ids} for ids in texts])
    assert len(every.means) == 8
    assert torch.allclose(torch.tensor(every.means[3][2]), torch.tensor(made.means[0][2]), atol=1e-5)


def test_an_ablated_head_says_its_mean_in_every_row() -> None:
    model, given = tiny.model("qwen2"), tiny.inputs("qwen2", padding="left")
    made = MeanAblation.fit(model, given, heads=((1, 1),))
    with foveate.attach(model, made):
        after = head_outputs(model, **given)
    before, real = head_outputs(model, **given), given["attention_mask"].bool()
    mean = torch.tensor(made.means[0][2])
    assert torch.allclose(after[1][:, 1][real], mean.expand(int(real.sum()), -1))
    assert torch.allclose(after[1][:, [0, 2, 3]], before[1][:, [0, 2, 3]], atol=1e-5)


def test_errors_of_means_name_what_is_wrong(unchecked: None) -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama")
    five = MeanAblation(((1, 0, (0.0,) * 5),))
    with pytest.raises(BadInput, match=r"layer 1, head 0 has 5.*have 8; give 8, or one"), foveate.attach(model, five):
        pass
    with pytest.raises(BadInput, match="no layer 7"):
        MeanAblation.fit(model, given, heads=((7, 0),))
    with pytest.raises(BadInput, match="no inputs"):
        MeanAblation.fit(model, [])
    with pytest.raises(BadInput, match=r"arguments by name.*got str"):
        MeanAblation.fit(model, ["a text"])  # type: ignore[list-item]
    with pytest.raises(NothingObserved, match="gave nothing"):
        MeanAblation.fit(model, given | {"attention_mask": torch.zeros_like(given["attention_mask"])}, ((0, 1),))
    with pytest.raises(BadParameter, match="means"):
        MeanAblation(((0, 0, (float("nan"),)),))


def test_two_that_set_one_head_contradict_each_other() -> None:
    model = tiny.model("llama")
    mean, patch = MeanAblation(((1, 0, (0.1,)),)), ResampleAblation(Donor.constant((1, 0)))
    zero = HeadScale(heads=((1, 0, 0.0),))
    for one, other in ((mean, patch), (patch, zero), (zero, mean)):
        with pytest.raises(BadInput, match="both set layer 1 head 0"), foveate.attach(model, one, other):
            pass
    half = HeadScale(heads=((1, 0, 0.5),))
    with foveate.attach(model, mean, half):
        model(**tiny.inputs("llama"))
    # what comes first is overwritten
    with pytest.raises(NotLanded, match="HeadScale changes nothing"), foveate.attach(model, half, mean):
        pass


# ---------------------------------------------------------------- from another run


def ids(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    return tiny.inputs("llama", batch=batch, length=length, seed=seed)["input_ids"]


def test_patching_every_head_of_the_last_layer_gives_its_outputs_in_the_donor() -> None:
    model, clean, other = tiny.model("llama"), ids(11), ids(11, seed=1)
    patch = ResampleAblation.fit(model, {"input_ids": other})
    with foveate.attach(model, patch):
        got = head_outputs(model, input_ids=clean)
    want = head_outputs(model, input_ids=other)
    assert all(torch.allclose(got[layer], want[layer], atol=1e-5) for layer in want)


def test_patching_a_text_from_itself_changes_nothing() -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", padding="left")
    patch = ResampleAblation.fit(model, given, heads=((0, 1), (1, 2)))
    with torch.no_grad():
        before = model(**given).logits
        with foveate.attach(model, patch):
            after = model(**given).logits
    assert (before - after)[given["attention_mask"].bool()].abs().max() < 1e-5


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_rows_are_aligned_from_the_start_or_the_end(align: str, padding: tiny.Padding | None) -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", padding=padding, length=12)
    texts = (ids(9, seed=2)[0], ids(14, seed=3)[0])
    patch = ResampleAblation.fit(model, [{"input_ids": t[None]} for t in texts], ((1, 2),), align)
    with foveate.attach(model, patch, trial=False):
        got = head_outputs(model, **given)[1][:, 2]
    for b, mask in enumerate(given["attention_mask"].bool()):
        donor = head_outputs(model, input_ids=texts[b][None])[1][0, 2]
        length, shift = int(mask.sum()), 0 if align == "start" else len(donor) - int(mask.sum())
        nearest = [min(max(i + shift, 0), len(donor) - 1) for i in range(length)]
        assert torch.allclose(got[b, mask], donor[nearest], atol=1e-5)


def test_decoding_goes_on_with_the_last_row_of_the_donor() -> None:
    model, prompt = tiny.model("llama"), ids(6)
    for align in ("start", "end"):
        patch = ResampleAblation.fit(model, {"input_ids": ids(6, seed=1)}, ((0, 0),), align)
        with torch.no_grad(), foveate.attach(model, patch):
            cache = model(input_ids=prompt, use_cache=True).past_key_values
            got = head_outputs(model, input_ids=torch.tensor([[7]]), past_key_values=cache)[0][0, 0]
        assert torch.equal(got, patch.donor.outputs[0, 0][0, -1:])


def test_a_batch_with_its_donors_in_generate_equals_each_row_alone() -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", padding="left", length=12)
    donors = [ids(8, seed=4), ids(5, seed=5)]
    heads = ((0, 0), (0, 3), (1, 1))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 4}
    beamed = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with foveate.attach(model, ResampleAblation.fit(model, [{"input_ids": t} for t in donors], heads)):
        both = torch.stack(model.generate(**given, **options).logits, 1)
        beams = model.generate(**given, **beamed)
    for b, donor in enumerate(donors):
        one = {"input_ids": given["input_ids"][b : b + 1, given["attention_mask"][b].bool()]}
        with foveate.attach(model, ResampleAblation.fit(model, {"input_ids": donor}, heads)):
            alone = torch.stack(model.generate(**one, **options).logits, 1)
            alone_beams = model.generate(**one, **beamed)
        assert torch.allclose(both[b], alone[0], atol=1e-3)
        assert torch.equal(beams[b, -4:], alone_beams[0, -4:])


def test_errors_of_donors_name_what_is_wrong() -> None:
    model = tiny.model("llama")
    patch = ResampleAblation.fit(model, {"input_ids": ids(5, batch=2)}, heads=((1, 0),))
    with foveate.attach(model, patch), pytest.raises(BadInput, match="2 texts of the donor for a batch of 3 rows"):
        model(input_ids=ids(5, batch=3))
    with pytest.raises(BadInput, match=r"heads=\[\(0, 3\)\].*Donor\(1 heads, texts of 5, 5 tokens\)"):
        ResampleAblation(patch.donor, heads=((0, 3),))
    wide = ResampleAblation(Donor({(1, 0): torch.zeros(1, 4, 6)}, (4,)))
    with pytest.raises(BadInput, match="has 6 numbers"), foveate.attach(model, wide):
        pass
    with pytest.raises(BadInput, match="no head 4"):
        ResampleAblation.fit(model, {"input_ids": ids(5)}, heads=((1, 4),))
    mask = torch.tensor([[1] * 5, [0] * 5])
    with pytest.raises(NothingObserved, match="text 1 of the donor's inputs is all padding"):
        Donor.of(model, {"input_ids": ids(5, batch=2), "attention_mask": mask})


def test_looking_at_heads_leaves_the_model_in_training() -> None:
    model = tiny.model("llama").train()
    ResampleAblation.fit(model, {"input_ids": ids(5)})
    assert all(m.training for m in model.modules())


# ---------------------------------------------------------------- heads that a span matters to


def test_divergence_is_that_of_the_outputs_at_the_last_token() -> None:
    model, text = tiny.model("llama"), ids(10)
    cut = torch.cat([text[:, :3], text[:, 6:]], 1)
    there, gone = head_outputs(model, input_ids=text), head_outputs(model, input_ids=cut)
    found = divergence(model, {"input_ids": text}, (3, 6))
    for layer in (0, 1):
        first, second = there[layer][0, :, -1], gone[layer][0, :, -1]
        by, alone = (first - second).norm(dim=-1), second.square().sum(-1)
        for head in range(4):
            high = all(float(x[head]) > float(x.mean() + x.std(correction=0)) for x in (by, alone))
            assert float(found[layer][head]) == pytest.approx(0.0 if high else float(by[head]), abs=1e-5)


def test_a_head_that_surges_without_the_span_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.steer import head_reinforcement

    there, gone = [[0.0, 1.0, 0.5, 0.2], [9.0, 1.0, 0.5, 0.2]], [[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    runs = iter([{n: torch.tensor(o)[None, :, None, None] for n, o in enumerate(run)} for run in (there, gone)])
    monkeypatch.setattr(head_reinforcement, "head_outputs", lambda *_, **__: next(runs))
    found = divergence(None, {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, (0, 2))
    assert found[0].tolist() == pytest.approx([0.0, 1.0, 0.5, 0.2])
    assert found[1].tolist() == pytest.approx([9.0, 1.0, 0.5, 0.2])
    assert sensitive(found[0]).tolist() == [False, True, True, False]
    assert sensitive(found[1]).tolist() == [True, True, False, False]


def test_heads_found_on_a_padded_batch_are_those_of_its_texts() -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", padding="left", length=14)
    both = HeadReinforcement.fit(model, given, span=((1, 4), (2, 6)), factor=3.0)
    texts = [x[m.bool()][None] for x, m in zip(given["input_ids"], given["attention_mask"], strict=True)]
    apart = [divergence(model, {"input_ids": t}, s) for t, s in zip(texts, ((1, 4), (2, 6)), strict=True)]
    want = [(layer, h) for layer in (0, 1) for h in (apart[0][layer] + apart[1][layer]).topk(2).indices.tolist()]
    assert both == HeadReinforcement(3.0, tuple(sorted(want)))
    assert all(layer == 1 for layer, _ in HeadReinforcement.fit(model, given, ((1, 4),), layers=(1,)).heads)
    assert len(HeadReinforcement.fit(model, given, ((1, 4),), share=0.25).heads) == 2


def test_what_is_no_token_is_left_out_with_the_span() -> None:
    calls = []

    class Watched(torch.nn.Module):
        def forward(self, **given: Any) -> None:
            calls.append({name: tuple(x.shape) for name, x in given.items()})

    from foveate.steer.head_reinforcement import single, without

    call = {"input_ids": ids(9), "pixel_values": torch.zeros(1, 3, 4, 4), "token_type_ids": torch.zeros(1, 9)}
    (text,) = single(call | {"attention_mask": torch.tensor([[0] + [1] * 8])})
    Watched()(**text)
    Watched()(**without(text, (2, 5)))
    assert calls[0] == {"input_ids": (1, 8), "pixel_values": (1, 3, 4, 4), "token_type_ids": (1, 8)}
    assert calls[1] == {"input_ids": (1, 5), "token_type_ids": (1, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span": ((0, 11),)}, "must leave the last token"),
        ({"span": ((20, 22),)}, "of a text of 11 tokens"),
        ({"span": ((1, 3),) * 3}, "3 spans for 2 texts"),
        ({"layers": (5,)}, r"layers=\[5\].*the layers 0 to 1"),
        ({"share": 1.0}, "share=1.0"),
        ({"inputs": {"pixel_values": torch.zeros(1, 3, 4, 4)}}, "no `input_ids`"),
        ({"inputs": {"input_ids": torch.ones(2, 5).long(), "pixel_values": torch.zeros(2, 3)}}, "pixel_values cannot"),
    ],
)
def test_errors_of_spans_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    given = {"inputs": tiny.inputs("llama"), "span": ((1, 3),)} | change
    with pytest.raises(BadInput, match=message):
        HeadReinforcement.fit(tiny.model("llama"), **given)


# ---------------------------------------------------------------- learned offsets

PAIRS = [("ab", "?"), ("cde", "!"), ("fg hi", "?"), ("jklm", "!"), ("n", "?")]


def learned(model: Any, **options: Any) -> HeadOffsets:
    return HeadOffsets.fit(model, tiny.tokenizer(), PAIRS, **{"heads": 2, "epochs": 2, "batch": 3} | options)


def test_offsets_make_the_right_answers_likelier() -> None:
    model = tiny.model("llama")
    prepared = prepare(tiny.tokenizer(), [Example(prompt, answer=answer) for prompt, answer in PAIRS])
    made = learned(model, epochs=6, batch=5, rates=(0.2, 0.2))
    assert len(made.offsets) == 2
    assert all(len(vector) == 8 for *_, vector in made.offsets)
    with torch.no_grad():
        before = float(loss(model, prepared))
        with foveate.attach(model, made):
            after = float(loss(model, prepared))
    assert after < before - 1


def test_heads_that_the_task_wants_scaled_are_chosen() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        # only these two can say anything
        model.model.layers[0].self_attn.o_proj.weight[:, :24] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, [*range(8), *range(16, 32)]] = 0
    assert [at[:2] for at in learned(model).offsets] == [(0, 3), (1, 1)]


def test_the_loss_is_that_of_the_answer_alone() -> None:
    model = handmade.model()
    made = HeadOffsets.fit(model, tiny.tokenizer(), [("<s>abxyz", "?")], heads=((1, 2),), epochs=20, rates=(0.1, 0.1))
    (vector,) = [torch.tensor(v) for *_, v in made.offsets]
    wanted = tiny.tokenizer().get_vocab()["?"]
    assert int(vector.argmax()) == wanted
    rest = torch.cat([vector[:wanted], vector[wanted + 1 : tiny.VOCABULARY]])
    assert float(rest.max()) < 0.1


def test_the_same_seed_gives_the_same_offsets_whatever_the_global_state() -> None:
    model = tiny.model("llama")
    first = learned(model)
    torch.manual_seed(5)
    with torch.no_grad():
        assert learned(model) == first
    assert learned(model, seed=1) != first


def test_heads_that_are_named_are_not_chosen_again() -> None:
    steps: list[tuple[int, int]] = []
    made = learned(tiny.model("llama"), heads=((1, 3), (0, 1)), progress=lambda *n: steps.append(n))
    assert [at[:2] for at in made.offsets] == [(0, 1), (1, 3)]
    assert steps == [(n, 4) for n in range(1, 5)]
    steps.clear()
    learned(tiny.model("llama"), progress=lambda *n: steps.append(n))
    assert steps == [(n, 8) for n in range(1, 9)]


def test_examples_of_tasks_are_read_by_their_right_answer() -> None:
    model = tiny.model("llama")
    examples = [Example(p, ("?", "!"), "?!".index(a)) for p, a in PAIRS]
    assert HeadOffsets.fit(model, tiny.tokenizer(), examples, 2, epochs=2, batch=3) == learned(model)


def state(model: Any) -> list[tuple[bool, bool, Tensor]]:
    return [(p.requires_grad, p.grad is None, p.detach().clone()) for p in model.parameters()]


def unchanged(model: Any, before: list[tuple[bool, bool, Tensor]]) -> bool:
    after = state(model)
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def test_the_model_comes_out_as_it_went_in() -> None:
    model = tiny.model("llama").train()
    next(model.parameters()).requires_grad_(False)
    model.model.layers[0].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    learned(model, epochs=1)
    assert unchanged(model, before)
    assert [m.training for m in model.modules()] == modes

    def stop(done: int, total: int) -> None:
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(model, progress=stop)
    assert unchanged(model, before)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 9}, "has 1 to 8 heads"),
        ({"heads": 0}, "has 1 to 8 heads"),
        ({"heads": ((0, 4),)}, r"heads=\[\(0, 4\)\]"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch": 0}, "batch=0"),
        ({"l1": -1.0}, "must not be negative"),
    ],
)
def test_errors_of_learning_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        learned(tiny.model("llama"), **change)


def test_a_loss_that_is_no_number_ends_the_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.steer import _learning

    model = tiny.model("llama")
    found = iter((0.0, torch.nan))
    monkeypatch.setattr(_learning, "loss", lambda *_, **__: torch.tensor(next(found)))
    with pytest.raises(BadInput, match="the loss is nan after 1 steps; take a smaller rate than"):
        learned(model)
    found = iter((torch.nan,))
    with pytest.raises(BadInput, match="nan after 0 steps; the model gives it"):
        learned(model)


def test_there_must_be_something_to_learn_from() -> None:
    with pytest.raises(BadInput, match="no examples"):
        HeadOffsets.fit(tiny.model("llama"), tiny.tokenizer(), [])
    with pytest.raises(BadInput, match="answer"):
        HeadOffsets.fit(tiny.model("llama"), tiny.tokenizer(), [("ab", "")])
