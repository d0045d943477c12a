"""A transformer written by hand, whose heads do what their names say: what a mechanism finds there can be foreseen.

    layer 0     first       looks at the first token
                previous    looks at the token before, and tells its own place what stood there
                self        looks at its own token
                average     looks at all tokens so far alike
    layer 1     first       looks at the first token, whose value is nothing
                same        looks at its own token and at earlier copies of it, alike
                induction   looks at what came after earlier copies (a digit rather than anything else), and says it
                stop        looks at full stops; at the first token while there is none

It is a GPT-2 of one-hot codes. The residual stream holds the token, the token before, what is to be said, and the
position, each in columns of its own; every vector of a layer has as many ones, so that the layer norms can undo
themselves. One character is one token (`tiny.tokenizer`), and `ids` puts `<s>` in front.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from foveate.testing import tiny

__all__ = ["HEADS", "ids", "model", "named"]

HEADS = (("first", "previous", "self", "average"), ("first", "same", "induction", "stop"))
# nats between what a head looks at and all else: so many that a weight is 1 or 0 in float32
SHARP = 250.0
VOCABULARY = tiny.VOCABULARY
TOKEN, BEFORE, SAID = (slice(n * VOCABULARY, (n + 1) * VOCABULARY) for n in range(3))
PLACE = 3 * VOCABULARY


@torch.no_grad()
def model(positions: int = 64) -> PreTrainedModel:
    """The transformer, for texts of at most so many tokens.

    Args:
        positions: Most tokens of a text, `<s>` included.
    """
    width = max(positions, VOCABULARY + 1)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=positions,
        n_embd=4 * width,
        n_layer=2,
        n_head=4,
        n_inner=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in made.parameters():
        p.zero_()
    decoder = made.transformer
    one_to_one(decoder.wte.weight[:, TOKEN])
    one_to_one(decoder.wpe.weight[:, PLACE:])
    for ones, block, heads in zip((2, 3), decoder.h, HEADS, strict=True):
        undo(block.ln_1, ones)
        for n, head in enumerate(heads):
            fill(block.attn, n, width, head, positions)
    decoder.ln_f.weight.fill_(1.0)
    one_to_one(made.lm_head.weight[:, SAID])
    return made


def ids(text: str) -> Int[Tensor, "1 length"]:
    """The tokens of a text, one per character, behind `<s>`."""
    return tiny.tokenizer()(f"<s>{text}", return_tensors="pt")["input_ids"]


def named(heads: Any, metric: str, layer: int = 0) -> dict[str, float]:
    """One metric of one layer, by what its heads do, rounded to two places.

    Args:
        heads: `attached.results.heads`, or the table of a metric that runs the model itself.
        metric: The label.
        layer: 0 or 1.
    """
    part = heads[(heads.metric == metric) & (heads.layer == layer)].sort_values("head")
    # plus zero: no -0.0
    return {name: round(float(value), 2) + 0.0 for name, value in zip(HEADS[layer], part.value, strict=True)}


# ---------------------------------------------------------------- writing the weights


def undo(norm: torch.nn.Module, ones: int) -> None:
    """Makes a layer norm the identity on vectors of so many ones."""
    size = norm.weight.numel()
    mean = ones / size
    norm.weight.fill_((mean - mean**2 + norm.eps) ** 0.5)
    norm.bias.fill_(mean)


def fill(attention: torch.nn.Module, n: int, width: int, head: str, positions: int) -> None:
    """Writes one head: what it asks for, what its keys answer, what its values carry, and where they go."""
    size, places, vocabulary = 4 * width, slice(PLACE, PLACE + positions), tiny.tokenizer().get_vocab()
    ask, answer, carried = (torch.zeros(size, width) for _ in range(3))
    bias, to = torch.zeros(width), torch.zeros(width, size)
    match head:
        case "first":
            bias[0] = answer[PLACE, 0] = 1
        case "previous":
            one_to_one(ask[PLACE + 1 : places.stop])
            one_to_one(answer[places])
        case "self":
            one_to_one(ask[places])
            one_to_one(answer[places])
        case "same":
            one_to_one(ask[TOKEN])
            one_to_one(answer[TOKEN])
        case "induction":
            one_to_one(ask[TOKEN])
            one_to_one(answer[BEFORE])
            # a digit is half an answer to every question, in one more column
            bias[VOCABULARY] = 1
            answer[[vocabulary[digit] for digit in "0123456789"], VOCABULARY] = 0.5
        case "stop":
            bias[0] = answer[vocabulary["."], 0] = 1
            answer[PLACE, 0] = 0.5
    one_to_one(carried[TOKEN])
    if head == "first":
        carried[vocabulary["<s>"]] = 0
    if head in ("previous", "induction"):
        one_to_one(to[:VOCABULARY, BEFORE if head == "previous" else SAID])

    queries, keys, values = (slice(part * size + n * width, part * size + (n + 1) * width) for part in range(3))
    # the model divides scores by the root of the head's width
    sharp = SHARP * width**0.5
    attention.c_attn.weight[:, queries], attention.c_attn.bias[queries] = sharp * ask, sharp * bias
    attention.c_attn.weight[:, keys], attention.c_attn.weight[:, values] = answer, carried
    attention.c_proj.weight[n * width : (n + 1) * width] = to


def one_to_one(weight: Float[Tensor, "rows columns"]) -> None:
    """Gives row n a one in column n."""
    weight.fill_diagonal_(1.0)
