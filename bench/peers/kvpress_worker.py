"""Runs kvpress's presses on prompts that come in as lines of JSON; part of bench/frontier.py, in another environment.

Each line has `ids` (the text that is compressed), `rest` (what comes behind it), `press`, `keep`, and for an answer
`limit` and `stop`. What is said, or the mean loss of `rest`, goes out as a line of JSON with the share of bytes held.
The press `QuantizedCache` is transformers' own cache of 4 bits (optimum-quanto), which keeps every entry.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import nullcontext

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache
from transformers.utils import logging

PIECE = 32


def stored(tensor) -> int:
    """Bytes of a tensor, or of those that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()


@torch.no_grad()
def answer(model, job: dict) -> dict:
    """One prompt under one press."""
    ids = torch.tensor([job["ids"]])
    config = model.config
    if job["press"] == "QuantizedCache":
        press, cache = nullcontext(), QuantizedCache("quanto", config, nbits=4)
    else:
        press = getattr(kvpress, job["press"])(compression_ratio=1 - job["keep"])(model)
        cache = DynamicCache(config=config)
    with press:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    held = sum(
        stored(t) for layer in cache.layers for name, t in vars(layer).items() if name.endswith(("keys", "values"))
    )
    full = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * ids.shape[1] * 4
    place = ids.shape[1]

    def step(tokens: list[int]) -> torch.Tensor:
        nonlocal place
        # places go on behind the whole text, whatever a press has dropped of it
        at = torch.arange(place, place + len(tokens))[None]
        place += len(tokens)
        return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, position_ids=at).logits

    if "limit" not in job:
        rest = job["rest"]
        total = torch.nn.functional.cross_entropy(logits, torch.tensor(rest[:1])).item()
        for start in range(0, len(rest) - 1, PIECE):
            piece = rest[start : min(start + PIECE, len(rest) - 1)]
            wanted = torch.tensor(rest[start + 1 : start + 1 + len(piece)])
            total += torch.nn.functional.cross_entropy(step(piece)[0], wanted, reduction="sum").item()
        return {"loss": total / len(rest), "share": held / full}
    said: list[int] = []
    logits = step(job["rest"])[:, -1]
    for _ in range(job["limit"]):
        token = int(logits.argmax())
        if token in job["stop"]:
            break
        said.append(token)
        logits = step([token])[:, -1]
    return {"said": said, "share": held / full}


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2_FOLDER"], dtype=torch.float32).eval()
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
