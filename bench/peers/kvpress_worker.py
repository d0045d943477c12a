"""Runs kvpress's presses on prompts that come in as lines of JSON; part of bench/frontier.py, in another environment.

Each line has `ids` (the text that is compressed), `rest` (what comes behind it), `caches` (press and share, each), and
for an answer `limit` and `stop`. For each cache what is said, or the mean loss of `rest`, goes out with the share of
bytes held; all of them as one line of JSON. The text is read once: a press acts behind a layer's attention, which is
that of the whole text, so that every press's own hook can have the layer in a cache of its own.
The press `QuantizedCache` is transformers' own cache of 4 bits (optimum-quanto), which keeps every entry.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import contextmanager, nullcontext

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache
from transformers.utils import logging

PIECE = 32
QUANTISED = "QuantizedCache"


class Branch:
    """A press, and the cache that it makes of a text."""

    def __init__(self, config, press: str, keep: float) -> None:
        if press == QUANTISED:
            self.press, self.cache = None, QuantizedCache("quanto", config, nbits=4)
        else:
            self.press = getattr(kvpress, press)(compression_ratio=1 - keep)
            self.cache = DynamicCache(config=config)

    def hook(self, module, inputs, kwargs, output) -> None:
        """Takes a layer of the cache that the text was read into, and compresses it."""
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        self.cache.update(layer.keys, layer.values, module.layer_idx)
        if self.press:
            self.press.forward_hook(module, inputs, kwargs | {"past_key_values": self.cache}, output)


@contextmanager
def hooked(model, branches: list[Branch]):
    """Every branch's hook on every layer's attention, as kvpress itself places them."""
    # a press that does nothing sets up what the hooks of the others need of the model
    with kvpress.KnormPress(compression_ratio=0)(model) if any(b.press for b in branches) else nullcontext():
        for branch in branches:
            if branch.press:
                branch.press.post_init_from_model(model)
        hooks = [
            layer.self_attn.register_forward_hook(branch.hook, with_kwargs=True)
            for layer in model.model.layers
            for branch in branches
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stored(tensor) -> int:
    """Bytes of a tensor, or of those that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()


@torch.no_grad()
def answers(model, job: dict) -> list[dict]:
    """One prompt with every cache."""
    ids = torch.tensor([job["ids"]])
    config = model.config
    branches = [Branch(config, press, keep) for press, keep in job["caches"]]
    with hooked(model, branches):
        read = DynamicCache(config=config)
        logits = model(ids, past_key_values=read, use_cache=True, logits_to_keep=1).logits[:, -1]
    full = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * ids.shape[1] * 4
    del read
    found = []
    while branches:
        cache = branches.pop(0).cache
        held = sum(
            stored(t) for layer in cache.layers for name, t in vars(layer).items() if name.endswith(("keys", "values"))
        )
        said = answer(model, cache, job) if "limit" in job else loss(model, cache, logits, job)
        found.append(said | {"share": held / full})
    return found


def step(model, cache, place: int, tokens: list[int]) -> torch.Tensor:
    """The logits of tokens from a place on, which is behind the whole text, whatever a press has dropped of it."""
    at = torch.arange(place, place + len(tokens))[None]
    return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, position_ids=at).logits


def loss(model, cache, logits: torch.Tensor, job: dict) -> dict:
    """The mean loss of what comes behind the text."""
    rest, place = job["rest"], len(job["ids"])
    total = torch.nn.functional.cross_entropy(logits, torch.tensor(rest[:1])).item()
    for start in range(0, len(rest) - 1, PIECE):
        piece = rest[start : min(start + PIECE, len(rest) - 1)]
        wanted = torch.tensor(rest[start + 1 : start + 1 + len(piece)])
        got = step(model, cache, place + start, piece)[0]
        total += torch.nn.functional.cross_entropy(got, wanted, reduction="sum").item()
    return {"loss": total / len(rest)}


def answer(model, cache, job: dict) -> dict:
    """What is said behind the question."""
    said: list[int] = []
    place = len(job["ids"])
    logits = step(model, cache, place, job["rest"])[:, -1]
    place += len(job["rest"])
    while len(said) < job["limit"]:
        token = int(logits.argmax())
        if token in job["stop"]:
            break
        logits = step(model, cache, place + len(said), [token])[:, -1]
        said.append(token)
    return {"said": said}


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2_FOLDER"], dtype=torch.float32).eval()
    for line in sys.stdin:
        print(json.dumps(answers(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
