"""Shift vectors, switched experts and edited prompts: what the common checks cannot know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveate.core import attach as door
from foveate.core.attach import attach
from foveate.core.errors import BadInput, BadParameter, NotLanded, NotSupported
from foveate.core.recording import residual_streams
from foveate.steer import ExpertSwitch, RepeatContext, Reread, ShiftVectors, expert_switch
from foveate.steer.expert_switch import choice_rates
from foveate.steer.shift_vectors import collect
from foveate.testing import tiny

WITH, WITHOUT = ["please do help me", "oh please, a cup", "so please go"], ["now do help me", "oh no, a cup", "so go"]
TOKENIZER = tiny.tokenizer()


# ---------------------------------------------------------------- shift vectors


def dense_states(model: Any, text: str, layer: int) -> torch.Tensor:
    """The hidden states behind a layer but the last one, as transformers gives them."""
    with torch.no_grad():
        out = model(**TOKENIZER(text, return_tensors="pt"), output_hidden_states=True)
    return out.hidden_states[layer + 1][0]


@pytest.mark.parametrize("at", ["all", "last"])
def test_shift_vectors_are_differences_of_means(at: Any) -> None:
    model = tiny.model("llama")

    def mean(texts: list[str]) -> torch.Tensor:
        states = [dense_states(model, text, 0) for text in texts]
        return torch.stack([s[1:].mean(0) if at == "all" else s[-1] for s in states]).mean(0)

    fitted = ShiftVectors.fit(model, TOKENIZER, WITH, WITHOUT, layers=(0,), at=at)
    ((layer, vector),) = fitted.vectors
    assert layer == 0
    torch.testing.assert_close(torch.tensor(vector), mean(WITH) - mean(WITHOUT))


def test_shifting_takes_one_mean_to_the_other() -> None:
    model = tiny.model("gpt2")
    fitted = ShiftVectors.fit(model, TOKENIZER, WITH, WITHOUT)
    ((layer, _),) = fitted.vectors
    wanted = collect(model, TOKENIZER, WITH)[layer].mean(0)
    with attach(model, fitted):
        shifted = collect(model, TOKENIZER, WITHOUT)[layer].mean(0)
    torch.testing.assert_close(shifted, wanted)


def test_a_shift_is_what_a_hook_of_ones_own_does() -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama", length=12)
    vector = torch.linspace(-1, 1, 32)
    edit = ShiftVectors(((0, tuple(vector.tolist())),), strength=3.0, span=((2, 5), (4, 12)))

    def by_hand(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(output.shape[:2])
        rows[0, 2:5] = rows[1, 4:] = 1
        return output + 3.0 * rows[..., None] * vector

    with torch.no_grad():
        with attach(model, edit):
            got = model(**given).logits
        hook = model.model.layers[0].register_forward_hook(by_hand)
        want = model(**given).logits
        hook.remove()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_fitted_shift_changes_what_is_generated_and_pads_well(family: str) -> None:
    model = tiny.model(family)
    edit = ShiftVectors(ShiftVectors.fit(model, TOKENIZER, WITH, WITHOUT).vectors, strength=20.0)
    prompts = ["a longer prompt, which is not padded", "a short one"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    both = TOKENIZER(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    one = TOKENIZER(prompts[1], return_tensors="pt", return_token_type_ids=False)
    plain = model.generate(**one, **options)
    with attach(model, edit):
        together, alone = model.generate(**both, **options), model.generate(**one, **options)
    new = alone[0, one["input_ids"].shape[1] :]
    assert together[1, both["input_ids"].shape[1] :].tolist()[: len(new)] == new.tolist()
    assert plain.tolist() != alone.tolist()


def vectors(width: int, layer: int = 0) -> tuple:
    return ((layer, (1.0,) * width),)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (ShiftVectors(vectors(7)), "the vector of layer 0 has 7 numbers, the residual stream of this model 32"),
        (ShiftVectors(vectors(32, layer=5)), "has no layer 5; its 2 layers are 0 to 1"),
    ],
)
def test_vectors_of_another_model_are_refused(edit: ShiftVectors, words: str) -> None:
    model, given = tiny.model("llama"), tiny.inputs("llama")
    with torch.no_grad():
        before = model(**given).logits
        with pytest.raises(BadInput, match=words), attach(model, edit):
            pass
        assert torch.equal(model(**given).logits, before)


def test_spans_that_fit_no_batch_are_refused() -> None:
    model, edit = tiny.model("llama"), ShiftVectors(vectors(32), span=((0, 2), (1, 3), (2, 4)))
    with pytest.raises(BadInput, match="3 spans on a batch of 2 rows"), attach(model, edit):
        model(**tiny.inputs("llama"))


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda model: ShiftVectors.fit(model, TOKENIZER, [], WITHOUT), "texts_with is empty"),
        (lambda model: ShiftVectors.fit(model, TOKENIZER, WITH, "now"), "texts_without is one text, 'now'"),
        (lambda model: ShiftVectors.fit(model, TOKENIZER, WITH, ["a", ""]), r"texts_without\[1\] is '', which has no"),
        (lambda model: ShiftVectors.fit(model, TOKENIZER, WITH, WITHOUT, layers=(0, 9)), "behind a layer 9; .* 0, 1"),
    ],
)
def test_fitting_on_nothing_is_refused(unchecked: None, fit: Callable, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        fit(tiny.model("llama"))


def test_a_model_without_a_residual_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(door, "blocks", lambda *_: {})
    with pytest.raises(NotSupported, match="no residual stream that can be reached"):
        ShiftVectors.fit(model, TOKENIZER, WITH, WITHOUT)
    with (
        pytest.raises((NotLanded, NotSupported, BadInput), match="LlamaForCausalLM"),
        attach(model, ShiftVectors(vectors(32))),
    ):
        pass


def test_layers_that_are_not_named_are_left_alone() -> None:
    model, given = tiny.model("gemma3", num_hidden_layers=7, layer_types=None), tiny.inputs("gemma3")
    before, _ = residual_streams(model, **given)
    with attach(model, ShiftVectors(vectors(32, layer=3))):
        after, _ = residual_streams(model, **given)
    assert [layer for layer in before if not torch.equal(before[layer], after[layer])] == [3, 4, 5, 6]


# ---------------------------------------------------------------- experts


def test_an_expert_that_is_off_is_one_with_no_chance() -> None:
    # in float32 the order in which products are summed shows; the grouped product knows no float64
    model, other = tiny.model("gpt_oss").double(), tiny.model("gpt_oss").double()
    given = tiny.inputs("gpt_oss")
    for one in (model, other):
        one.set_experts_implementation("eager")
    with torch.no_grad():
        other.model.layers[1].mlp.router.bias[2] = -1e30
        with attach(model, ExpertSwitch(off=((1, 2),))):
            got = model(**given).logits
        torch.testing.assert_close(got, other(**given).logits)
        assert not torch.allclose(got, model(**given).logits)


def test_the_logits_of_switched_experts() -> None:
    z = torch.tensor([[1.0, 4.0, 2.0, 0.5], [6.0, 1.0, 0.0, 9.0]])
    inf = torch.inf
    off = ExpertSwitch(off=((1, 1),))
    assert off.edit(1, z).tolist() == [[1, -inf, 2, 0.5], [6, -inf, 0, 9]]
    assert off.edit(0, z).tolist() == z.tolist()
    assert ExpertSwitch(on=((1, 3),), strength=2.0).edit(1, z).tolist() == [[1, 4, 2, 6], [6, 1, 0, 9]]
    both = ExpertSwitch(off=((1, 1),), on=((1, 0), (1, 3)), strength=0.5)
    assert both.edit(1, z).tolist() == [[2.5, -inf, 2, 2.5], [6, -inf, 0, 9]]


@pytest.mark.parametrize("family", tiny.mixtures())
def test_experts_found_by_contrast_are_those_most_chosen(family: str) -> None:
    model, (a, b) = tiny.model(family), (["aaa bb", "ab"], ["zz?", "y!y! z"])

    def rates(prompts: list[str]) -> torch.Tensor:
        found = []
        for prompt in prompts:
            with torch.no_grad():
                out = model(**TOKENIZER(prompt, return_tensors="pt"), output_router_logits=True)
            logits = torch.stack([layer.reshape(-1, layer.shape[-1]) for layer in out.router_logits])
            # the second largest and what is above it
            found.append((logits >= logits.sort(-1).values[..., -2:-1]).float().mean(1))
        return torch.stack(found).mean(0)

    contrast = rates(a) - rates(b)
    torch.testing.assert_close(torch.stack(list(choice_rates(model, TOKENIZER, a).values())), rates(a))
    best = [(int(n) // contrast.shape[1], int(n) % contrast.shape[1]) for n in contrast.flatten().argsort()[-2:]]
    found = ExpertSwitch.fit(model, TOKENIZER, a, b, 2)
    assert found == ExpertSwitch(off=tuple(sorted(best)))
    assert ExpertSwitch.fit(model, TOKENIZER, a, b, 2, switch="on").on == found.off
    with attach(model, found):
        after = choice_rates(model, TOKENIZER, a)
    assert [float(after[layer][e]) for layer, e in found.off] == [0.0, 0.0]


def test_fitting_leaves_enough_experts_in_each_layer() -> None:
    model = tiny.model("mixtral")
    with pytest.raises(BadInput, match=r"fit\(count=8\): \d experts of MixtralForCausalLM are chosen more often"):
        ExpertSwitch.fit(model, TOKENIZER, ["aaa"], ["zzz"], 8)
    for count in (1, 2, 3):
        found = ExpertSwitch.fit(model, TOKENIZER, ["abab"], ["zyx!"], count)
        assert len(found.off) == count
        assert all(sum(at == layer for at, _ in found.off) <= 2 for layer in (0, 1))


def test_random_experts_are_others_of_the_same_layers() -> None:
    model = tiny.model("qwen3_moe")
    switch = ExpertSwitch(off=((0, 2), (0, 5)), on=((1, 0),), strength=2.0)
    drawn = [switch.random(model, seed) for seed in range(8)]
    assert drawn[0] == switch.random(model, 0)
    assert len({d.off for d in drawn}) > 2
    for d in drawn:
        assert [layer for layer, _ in d.off] == [0, 0]
        assert [layer for layer, _ in d.on] == [1]
        assert not {*d.off, *d.on} & {*switch.off, *switch.on}
        assert d.strength == 2.0
    with pytest.raises(BadInput, match="has 2 other experts to draw 4 from"):
        ExpertSwitch(off=tuple((0, e) for e in range(4))).random(model, 0)


@pytest.mark.parametrize(
    ("family", "edit", "error", "words"),
    [
        ("mixtral", ExpertSwitch(off=((1, 4),)), BadInput, "layer 1 has no expert 4; its 4 experts are 0 to 3"),
        ("mixtral", ExpertSwitch(on=((0, 1), (2, 0))), BadInput, "has no layer 2; its 2 layers are 0 to 1"),
        (
            "mixtral",
            ExpertSwitch(off=tuple((1, e) for e in range(4))),
            BadInput,
            "all 4 experts of layer 1 are switched; leave at least one",
        ),
        ("llama", ExpertSwitch(off=((0, 0),)), (NotLanded, NotSupported, BadInput), "LlamaForCausalLM"),
    ],
)
def test_experts_that_are_not_there_are_refused(family: str, edit: ExpertSwitch, error: Any, words: str) -> None:
    model, given = tiny.model(family), tiny.inputs(family)
    with torch.no_grad():
        before = model(**given).logits
        with pytest.raises(error, match=words), attach(model, edit):
            pass
        assert torch.equal(model(**given).logits, before)


def test_an_expert_is_off_or_on() -> None:
    with pytest.raises(BadParameter, match="expert 3 of layer 1 is to be off and on"):
        ExpertSwitch(off=((1, 3),), on=((0, 0), (1, 3)))
    model = tiny.model("mixtral")
    with (
        pytest.raises(BadInput, match="both set layer 1 expert 3"),
        attach(model, ExpertSwitch(off=((1, 3),)), ExpertSwitch(on=((1, 3),))),
    ):
        pass


def test_models_without_experts_have_none_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    with pytest.raises(NotSupported, match="LlamaForCausalLM has no experts"):
        ExpertSwitch.fit(model, TOKENIZER, WITH, WITHOUT)
    with pytest.raises(NotSupported, match="LlamaForCausalLM has no experts"):
        ExpertSwitch(off=((0, 0),)).random(model, 0)
    monkeypatch.setattr(expert_switch, "PER_TOKEN", ("experts_of_each",))
    with pytest.raises(NotSupported, match=r"does not say how many .* \(none of experts_of_each\)"):
        ExpertSwitch.fit(tiny.model("mixtral"), TOKENIZER, WITH, WITHOUT)


# ---------------------------------------------------------------- prompts

QUESTION = "Roger has 5 balls and buys 2 more. How many are there?"
FACTS, ASKED = "Ann has the key. Bob has the box.", "Who has the key?"


def test_reading_again_takes_the_form_of_the_paper() -> None:
    assert Reread().edit(QUESTION) == f"{QUESTION} \n\nRead the question again: {QUESTION}"
    thrice = Reread(3, "# Read the question again:").edit(QUESTION)
    assert thrice == " \n\n# Read the question again: ".join([QUESTION] * 3)
    once = Reread(ending="\nA:")
    assert once.edit(f"{QUESTION}\nA:") == f"{QUESTION} \n\nRead the question again: {QUESTION}\nA:"
    assert once.edit(QUESTION) == Reread().edit(QUESTION)


def test_repeating_the_context_takes_the_form_of_the_paper() -> None:
    text = f"{FACTS}\nQuestion: {ASKED}"
    assert RepeatContext().edit(text) == f"Question: {ASKED} {FACTS}\n{text}"
    assert RepeatContext(lead="nothing").edit(text) == f"{FACTS}\n{text}"
    assert RepeatContext(3).edit(text) == f"Question: {ASKED} {FACTS}\n" * 2 + text
    # the last mark is the one of this question, those before it are examples
    shots = f"Two questions.\nQuestion: Who am I?\nAnswer: You.\n{FACTS}\nQuestion: {ASKED}\nAnswer:"
    examples = f"Two questions.\nQuestion: Who am I?\nAnswer: You.\n{FACTS}"
    assert RepeatContext().edit(shots) == f"Question: {ASKED}\nAnswer: {examples}\n{shots}"
    assert RepeatContext(mark="\n\n").edit(f"{FACTS}\n\n{ASKED}") == f"{ASKED} {FACTS}\n{FACTS}\n\n{ASKED}"
    assert RepeatContext().edit(FACTS) == f"{FACTS}\n{FACTS}"
    assert RepeatContext(mark="").edit(text) == f"{text}\n{text}"


@pytest.mark.parametrize("edit", [Reread(), RepeatContext()])
def test_prompt_edits_are_no_attachments(edit: Any) -> None:
    with pytest.raises(BadInput, match=r"call its \.edit\(text\)"), attach(tiny.model("llama"), edit):
        pass
    with pytest.raises(BadInput, match="the text is empty"):
        edit.edit(" \n")
