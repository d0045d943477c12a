"""Times x-transformers' attention modules; part of bench/rules.py, in another environment.

    PYTHON bench/peers/x_transformers_worker.py THREADS

The first line that goes out has the versions and the mechanisms, with whether they form whole rows of weights. What
comes in is lines of JSON with `mechanism`, `tokens` and `backward`, and for each the seconds of one pass go out.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from functools import cache

import torch
from x_transformers.x_transformers import Attention

HEADS, DIM = 4, 64
# sigmoid has no bias here, relu is not divided, and the extra key has a value of its own: none of it costs much
MECHANISMS = {
    "softmax": {"flash": True},
    "sigmoid": {"sigmoid": True},
    "relu": {"custom_attn_fn": torch.relu},
    "key_bias": {"num_mem_kv": 1},
}


@cache
def made(mechanism: str, tokens: int, backward: bool) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    """The module, its input, and the derivative of its output."""
    torch.manual_seed(0)
    module = Attention(HEADS * DIM, dim_head=DIM, heads=HEADS, causal=True, **MECHANISMS[mechanism]).train(backward)
    x, weigh = torch.randn(2, 1, tokens, HEADS * DIM)
    return module, x.requires_grad_(backward), weigh


def seconds(mechanism: str, tokens: int, backward: bool) -> float:
    """One pass."""
    module, x, weigh = made(mechanism, tokens, backward)
    begun = time.perf_counter()
    if backward:
        torch.autograd.grad(module(x), [x, *module.parameters()], weigh)
    else:
        with torch.no_grad():
            module(x)
    return time.perf_counter() - begun


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    versions = {"x-transformers": importlib.metadata.version("x-transformers"), "torch": torch.__version__}
    whole = {name: "flash" not in options for name, options in MECHANISMS.items()}
    print(json.dumps({"versions": versions, "whole": whole}), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
