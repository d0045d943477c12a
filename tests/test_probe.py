"""Probes: prompts of the right length with a needle that is where they say, and honest numbers."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.core.errors import BadInput, BadParameter, NotSupported
from foveate.probe import KeyValue, Passkey, default_text, greedy, perplexity, run, wilson

TASKS = [Passkey(length=600), KeyValue(length=600, pairs=3), KeyValue(length=700, pairs=5, digits=7, depth=1.0)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte: no merge hides a mistake by one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


class Knows:
    """Says whatever stands between the needle's borders, or always the same wrong thing."""

    device = torch.device("cpu")
    generation_config = None
    config = LlamaConfig(max_position_embeddings=4096)

    def __init__(self, samples, right, vocabulary):
        self.answers = {s.ids: s.ids[slice(*s.needle)] if right else (7, 7, 7) for s in samples}
        self.vocabulary = vocabulary

    def forward(self, input_ids, past_key_values, use_cache):
        rest = list(self.answers[tuple(input_ids[0].tolist())]) if past_key_values is None else past_key_values
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[0, 0, rest[0] if rest else 1] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=rest[1:])

    __call__ = forward


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_prompts_are_what_they_say(task, template, tokenizer):
    tokenizer.chat_template = template
    samples = task.samples(tokenizer, 6, seed=3)
    for sample in samples:
        text = tokenizer.decode(sample.ids)
        assert task.length - 16 <= len(sample.ids) <= task.length
        assert tokenizer.decode(sample.ids[slice(*sample.needle)]) == sample.answer
        assert tokenizer.decode(sample.answer_ids) == sample.answer
        assert text.count(sample.answer) == 2
        assert text.index(sample.answer) == len(tokenizer.decode(sample.ids[: sample.needle[0]]))
        assert tokenizer.decode(sample.ids[sample.question_start :]).startswith("What is the ")
        assert sample.needle[1] < sample.question_start
    assert len({sample.answer for sample in samples}) == 6
    assert [sample.depth for sample in samples] == sorted(sample.depth for sample in samples)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_seed_decides(task, tokenizer):
    first, again, other = (task.samples(tokenizer, 3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))


def test_the_needle_is_at_its_depth(tokenizer):
    places = [Passkey(6000, depth=d).samples(tokenizer, 1)[0].needle[0] / 6000 for d in (0, 0.25, 0.5, 0.75, 1.0)]
    assert places == pytest.approx([0.02, 0.25, 0.5, 0.75, 0.98], abs=0.08)


def test_filler_text_of_the_user(tokenizer):
    text = "Sheep graze on the quiet meadows of Wales. "
    sample = Passkey(length=900, text=text).samples(tokenizer, 1)[0]
    assert tokenizer.decode(sample.ids).count("meadows") > 10


@pytest.mark.parametrize(("right", "recall"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_recall_of_a_model_that_is_always_right_or_wrong(task, right, recall, tokenizer):
    knows = Knows(task.samples(tokenizer, 5, seed=4), right, len(tokenizer))
    seen = []
    result = run(knows, tokenizer, task, count=5, seed=4, progress=lambda *done: seen.append(done))
    assert result.recall == recall
    assert result.low <= recall <= result.high
    assert [record.right for record in result.records] == [right] * 5
    assert seen == [(i, 5) for i in range(1, 6)]


def test_greedy_is_what_generate_says(model):
    ids = random.Random(0).choices(range(2, 258), k=30)
    said = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=1)
    assert greedy(model, ids, 12, stop={1}) == [token for token in said[0, 30:].tolist() if token != 1]
    assert greedy(model, ids, 12, stop=set(said[0, 30:].tolist())) == []


def test_wilson():
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 20) == pytest.approx((0.2188, 0.6134), abs=1e-4)


def test_what_cannot_be_asked(tokenizer):
    with pytest.raises(BadInput, match="too short"):
        Passkey(length=40).samples(tokenizer, 1)
    with pytest.raises(BadInput, match="filler text is empty"):
        Passkey(text=" \n").samples(tokenizer, 1)
    with pytest.raises(BadInput, match="at least one sample"):
        Passkey().samples(tokenizer, 0)
    with pytest.raises(BadInput, match="words that can be keys"):
        KeyValue(text="no words").samples(tokenizer, 1)
    with pytest.raises(BadInput, match="more digits"):
        Passkey(digits=1, text="0123456789").samples(tokenizer, 1)
    with pytest.raises(BadParameter, match="depth must be from 0"):
        Passkey(depth=1.5)
    with pytest.raises(BadParameter, match="length must be from"):
        KeyValue(length=0)
    with pytest.raises(BadInput, match="prompt is empty"):
        greedy(None, [], 3)


def test_a_needle_that_the_tokenizer_loses():
    vocabulary = {"<unk>": 0, **{letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .", start=1)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    digitless = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    with pytest.raises(BadInput, match=r"needle '\d+' cannot be found again"):
        Passkey(length=600).samples(digitless, 1)


def test_a_template_that_changes_the_text(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(BadInput, match="chat template"):
        Passkey(length=600).samples(tokenizer, 1)
    tokenizer.chat_template = None


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "gpt_neox"])
def test_perplexity_is_the_plain_loss(family, chunk):
    from transformers import AutoConfig

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
    odd = {
        "gemma2": {"final_logit_softcapping": 0.2},
        "granite": {"logits_scaling": 0.1},
        "cohere": {"logit_scale": 9.0},
    }
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 16}
    config = AutoConfig.for_model(family, **sizes, **odd.get(family, {}), **(opt if family == "opt" else {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = list(model.named_modules())
    ids = torch.randint(1, 99, (100,))
    ppl, low, high = perplexity(model, ids, chunk=chunk, context=40)
    with torch.no_grad():
        logits = [(model(ids[None, a : a + 40]).logits[0, :-1], ids[a + 1 : a + 40]) for a in (0, 40, 80)]
    plain = torch.cat([torch.nn.functional.cross_entropy(x, y, reduction="none") for x, y in logits]).mean()
    assert math.log(ppl) == pytest.approx(plain.item(), rel=1e-5)
    assert low < ppl < high
    assert list(model.named_modules()) == before


def test_perplexity_never_holds_all_logits(model, monkeypatch):
    widest = []
    plain = torch.nn.Linear.forward

    def watched(self, x):
        if self.out_features == 258:
            widest.append(x.shape[-2])
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    perplexity(model, torch.randint(2, 258, (250,)), chunk=16)
    assert max(widest) == 16


def test_perplexity_of_text_and_what_it_refuses(model, tokenizer):
    text = default_text()[:120]
    assert perplexity(model, text, tokenizer) == perplexity(model, tokenizer(text).input_ids)
    assert perplexity(model, [3, 4])[1:] == (1.0, math.inf)
    with pytest.raises(BadInput, match="needs its tokenizer"):
        perplexity(model, text)
    with pytest.raises(BadInput, match="at least 2 token ids"):
        perplexity(model, [3])
    with pytest.raises(BadInput, match="context from 2 to 256"):
        perplexity(model, [3, 4, 5], context=1000)
    with pytest.raises(NotSupported, match="no language-model head"):
        perplexity(model.model, [3, 4, 5])


def test_the_default_text_is_long_and_the_same_each_time():
    assert len(default_text()) > 200_000
    assert default_text() is default_text()
