"""`foveate.convert`: other attention inside loaded models, trained, saved, copied, taken off again, and refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import foveate
from foveate.compress import Streaming
from foveate.core.converting import converted_layers
from foveate.core.errors import BadInput, NotOnInterface, NotSupported, UnknownName
from foveate.measure import Entropy
from foveate.models.sources import quiet
from foveate.replace import Relu, Softmax
from foveate.testing import tiny
from test_replacing_checks_can_fail import Mean, Temperature

DECODERS = ["llama", "qwen3", "gemma2", "gpt2", "gpt_oss"]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [*DECODERS, "bert", "vit", "t5", "bart"])
def test_softmax_leaves_a_model_as_it_was(family: str) -> None:
    inputs = tiny.inputs(family)
    plain, model = tiny.model(family), foveate.convert(tiny.model(family), Softmax())
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), atol=2e-4, rtol=1e-4)
    assert not converted_layers(model)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "t5", "bart"])
def test_a_rule_that_changes_nothing_yet_changes_nothing(family: str) -> None:
    """Fresh temperatures are 1: whatever the family, the call that the rule sees is the model's own."""

    class Fresh(Temperature):
        write = Temperature.__mro__[2].write

    inputs = tiny.inputs(family, padding="right")
    real = inputs["attention_mask"].bool()
    plain, model = tiny.model(family), foveate.convert(tiny.model(family), Fresh())
    got, want = logits(model, inputs), logits(plain, inputs)
    if want.shape[:2] == real.shape:
        got, want = got[real], want[real]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_layers_are_chosen() -> None:
    model = foveate.convert(tiny.model("llama"), "relu", layers=[1])
    assert converted_layers(model) == {1: Relu()}
    foveate.convert(model, "softmax", layers=1)
    assert not converted_layers(model)
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


@pytest.mark.parametrize("rule", ["relu", Mean()], ids=str)
def test_generation_with_a_cache_is_generation_without(rule: Any) -> None:
    model, ids = foveate.convert(tiny.model("llama"), rule), tiny.inputs("llama")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": 98}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_it_learns_with_plain_pytorch() -> None:
    torch.manual_seed(0)
    model, inputs = foveate.convert(tiny.model("llama"), Temperature()).train(), tiny.inputs("llama", length=16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "rule" in n)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    inputs, found = tiny.inputs("llama", length=16), []
    for checkpointing in (False, True):
        model = foveate.convert(tiny.model("llama"), Temperature()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_it_learns_with_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model, inputs = foveate.convert(tiny.model("llama"), Temperature()), tiny.inputs("llama", length=16)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["rule"], r=2))
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert any("rule" in n and "log" in n for n in trainable)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    want = logits(adapted.eval(), inputs)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(foveate.convert(tiny.model("llama"), Temperature()), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again, inputs), want)


def test_metrics_read_the_rows_of_the_rule() -> None:
    model, inputs = foveate.convert(tiny.model("llama"), Relu()), tiny.inputs("llama")
    want = logits(model, inputs)
    with foveate.attach(model, Entropy()) as attached:
        torch.testing.assert_close(logits(model, inputs), want)
    with foveate.attach(foveate.convert(model, "softmax"), Entropy()) as plain:
        logits(model, inputs)
    ours, theirs = (a.results.heads.value for a in (attached, plain))
    assert not ours.round(3).equals(theirs.round(3))


def test_a_kv_policy_acts_on_the_keys_of_a_rule() -> None:
    model, inputs = foveate.convert(tiny.model("llama"), Temperature()), tiny.inputs("llama", batch=1, length=20)
    whole = model(**inputs).logits[:, -1]
    with foveate.attach(model, Streaming(foveate.Budget(1.0))):
        cache = DynamicCache(config=model.config)
        model(input_ids=inputs["input_ids"][:, :19], past_key_values=cache)
        last = model(input_ids=inputs["input_ids"][:, 19:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, whole, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- saved and loaded


def test_transformers_alone_refuses_what_it_would_read_wrong(tmp_path: Path) -> None:
    saved(foveate.convert(tiny.model("llama"), "relu"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    relu = {"name": "relu", "parameters": {"alpha": 1.0}}
    assert config["foveate_attention"] == [{"operator": relu, "layers": [0, 1]}]
    code = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode
    assert 'attn_implementation="foveate"' in run.stderr


def test_a_model_taken_back_is_a_plain_one_again(tmp_path: Path) -> None:
    plain = tiny.model("llama")
    model = foveate.convert(foveate.convert(tiny.model("llama"), "relu"), "softmax")
    saved(model, tmp_path)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = tiny.inputs("llama")
    torch.testing.assert_close(logits(again, inputs), logits(plain, inputs), atol=1e-4, rtol=1e-4)


def test_weights_of_another_rule_are_refused(tmp_path: Path) -> None:
    folder = saved(foveate.convert(tiny.model("llama"), "relu"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["foveate_attention"][0]["operator"] = {"name": "softplus", "parameters": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"weights are of relu\(alpha=1\.0\), and the layer has softplus"):
        foveate.load(folder, tokenizer=False)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = saved(foveate.convert(tiny.model("llama"), "relu"), tmp_path)
    file = folder / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.endswith("1.self_attn.rule._extra_state")}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"lack 1 weights of the model's rules, the first model\.layers\.1"):
        foveate.load(folder, tokenizer=False)


def test_a_rule_that_this_version_has_not(tmp_path: Path) -> None:
    folder = saved(foveate.convert(tiny.model("llama"), "relu"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["foveate_attention"][0]["operator"]["name"] = "reluu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownName, match="reluu"):
        foveate.load(folder, tokenizer=False)


def test_a_copy_while_gradients_are_held() -> None:
    model, inputs = foveate.convert(tiny.model("llama"), Temperature()).train(), tiny.inputs("llama")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(**inputs, labels=inputs["input_ids"]).loss, loss)


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_converted_is_said_and_nothing_is_changed() -> None:
    model = tiny.model("llama")
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(BadInput, match=r"no attention layer 2; it has 2, from 0 to 1"):
        foveate.convert(model, "relu", layers=[0, 2])
    with foveate.attach(model, Entropy()) as attached:
        with pytest.raises(BadInput, match="leave the `with` block"):
            foveate.convert(model, "relu")
        logits(model, tiny.inputs("llama"))
        assert attached.calls
    with pytest.raises(NotSupported, match="in one with its queries and keys"):
        foveate.convert(tiny.model("gpt2"), Temperature())
    assert [n for n, _ in model.named_modules()] == before
    with pytest.raises(NotOnInterface):
        foveate.convert(tiny.model(tiny.refused()[0]), "relu")


def test_a_mixer_takes_the_weights_away() -> None:
    model = foveate.convert(tiny.model("llama"), Mean(), layers=0)
    with pytest.raises(BadInput, match="whose weights are gone"):
        foveate.convert(model, "relu", layers=0)
    foveate.convert(model, Mean(), layers=0)
    with pytest.raises(NotSupported, match="makes the positions of all layers"):
        foveate.convert(tiny.model("t5"), Mean())
    words = r"acts on rows of attention, which layers 0 of LlamaForCausalLM have not"
    with pytest.raises(BadInput, match=words), foveate.attach(model, Streaming(0.5)):
        pass


def test_a_cache_of_another_rule() -> None:
    model, ids = foveate.convert(tiny.model("llama"), "relu"), tiny.inputs("llama")["input_ids"]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :5], past_key_values=cache)
    foveate.convert(model, Temperature())
    with pytest.raises(BadInput, match=r"was made by Relu\(alpha=1\.0\) and cannot be read by Temperature"):
        model(input_ids=ids[:, 5:], past_key_values=cache)
