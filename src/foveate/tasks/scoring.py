"""How right a model is on examples, and how sure: from the log-likelihood of every answer, nothing is sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import softmax
from torch import Tensor

from foveate.core.errors import BadInput, NotSupported
from foveate.probe.perplexity import head
from foveate.probe.run import wilson
from foveate.tasks.examples import Example
from foveate.tasks.preparing import Layout, Prepared, prepare

__all__ = ["Scores", "log_likelihoods", "loss", "score"]

CHUNK = 128
"""Positions whose logits are held at once."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model made of each example.

    Args:
        examples: The examples.
        predicted: Index of the likeliest choice. For a free answer: 0 if right, else -1.
        right: Whether the right choice is likelier than each other one; a tie is not right. For a free answer: whether
            greedy decoding gives just its tokens.
        margin: Log-likelihood of the right choice less that of the best wrong one. For a free answer: the least lead of
            one of its tokens over the best other token at its place.
        log_likelihood: Log-likelihood of the right answer, in nats.
        probability: Softmax over the log-likelihoods of the choices, at the right one. For a free answer: the
            exponential of its log-likelihood.
        entropy: Entropy of the next token behind the prompt, in nats. It needs no labels.
        by_choice: For each example, the log-likelihood of each of its choices, or of the free answer alone.
        normalised: Whether log-likelihoods are means per token; else they are sums.
    """

    examples: tuple[Example, ...]
    predicted: Int[np.ndarray, " example"]
    right: Bool[np.ndarray, " example"]
    margin: Float[np.ndarray, " example"]
    log_likelihood: Float[np.ndarray, " example"]
    probability: Float[np.ndarray, " example"]
    entropy: Float[np.ndarray, " example"]
    by_choice: tuple[Float[np.ndarray, " _"], ...]
    normalised: bool

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(int(self.right.sum()), len(self))


@torch.no_grad()
def score(
    model: Any,
    tokenizer: Any,
    examples: Prepared | Sequence[Example],
    *,
    normalise: bool = False,
    batch: int = 16,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Asks a model for the log-likelihood of every answer behind its prompt, all tokens of it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; not needed for prepared examples.
        examples: The examples; what is scored many times is tokenised once by `prepare`.
        normalise: Compare the means per token, instead of the sums, in which long answers have a hard time.
        batch: Sequences that the model reads at once.
        chat: Whether prompts go through the chat template; prepared examples have been through it, or not.
        progress: Called after each batch with how many sequences are done and how many there are.

    Raises:
        BadInput: the examples cannot be prepared or are too long for the model, or its logits are not finite.
    """
    prepared = examples if isinstance(examples, Prepared) else prepare(tokenizer, examples, chat=chat)
    told = ask(model, prepared, batch, progress)
    by_choice = [part.numpy() for part in per_option(told.log_prob.double().cpu(), prepared, normalise)]
    bad = [number for number, by in enumerate(by_choice) if not np.isfinite(by).all()]
    if bad:
        raise BadInput(
            f"the model's logits are not finite on {len(bad)} of {len(prepared)} examples, first on number {bad[0]}; "
            "take off the edit that does it, or load the model in float32."
        )
    measured = map(judged, prepared.examples, by_choice, least_leads(told, prepared))
    predicted, margin, likelihood, probability = (np.array(column) for column in zip(*measured, strict=True))
    return Scores(
        prepared.examples,
        predicted,
        margin > 0,
        margin,
        likelihood,
        probability,
        told.entropy[list(prepared.layout.ends)].double().cpu().numpy(),
        tuple(by_choice),
        normalise,
    )


def judged(example: Example, by_choice: Float[np.ndarray, " choice"], lead: float) -> tuple[int, float, float, float]:
    """The predicted option of an example, its margin, its log-likelihood and its probability."""
    right = by_choice[example.right]
    if not example.choices:
        return 0 if lead > 0 else -1, lead, float(right), float(np.exp(right))
    margin = right - np.delete(by_choice, example.right).max()
    return int(by_choice.argmax()), float(margin), float(right), float(softmax(by_choice)[example.right])


def log_likelihoods(
    model: Any, prepared: Prepared, *, normalise: bool = False, batch: int = 16
) -> tuple[Float[Tensor, " _"], ...]:
    """The log-likelihood of each option of each example, as tensors through which gradients flow.

    The graph of all examples is held at once: give a slice of many, `prepared[:16]`.
    """
    return per_option(ask(model, prepared, batch).log_prob, prepared, normalise)


def loss(model: Any, prepared: Prepared, *, normalise: bool = False, batch: int = 16) -> Float[Tensor, ""]:
    """The mean negative log-likelihood of the right answers, by softmax over the choices; gradients flow.

    The log-likelihood of a free answer, which has nothing to be compared with, is taken as it is.
    """
    found = []
    for example, by in zip(
        prepared.examples, log_likelihoods(model, prepared, normalise=normalise, batch=batch), strict=True
    ):
        found.append((by.log_softmax(0) if example.choices else by)[example.right])
    return -torch.stack(found).mean()


@dataclass(frozen=True)
class Told:
    """What a model says to the questions and contexts of a layout.

    Args:
        log_prob: Log-probability of each question's token.
        lead: Logit of that token less the best other one's.
        entropy: Entropy of the next token behind each context.
    """

    log_prob: Float[Tensor, " question"]
    lead: Float[Tensor, " question"]
    entropy: Float[Tensor, " context"]


def ask(model: Any, prepared: Prepared, batch: int, progress: Callable[[int, int], None] | None = None) -> Told:
    """Has the model read all sequences of the layout, and its head answer where something is asked.

    Raises:
        BadInput: `batch` is no number of sequences, or a sequence is too long for the model.
        NotSupported: the model does not go on with a text.
    """
    layout = prepared.layout
    if batch < 1:
        raise BadInput(f"batch={batch}: the model must read at least one sequence at once.")
    refuse_encoders(model)
    refuse_long(model, layout)
    context_of_sequence = [sequence for sequence, _ in layout.contexts]
    context_of_question = [context for context, _, _ in layout.questions]
    told = []
    for start in range(0, len(layout.sequences), batch):
        stop = min(start + batch, len(layout.sequences))
        hidden = read(model, layout.sequences[start:stop])
        low, high = (bisect_left(context_of_sequence, at) for at in (start, stop))
        where = torch.tensor(layout.contexts[low:high], device=model.device)
        # the needed positions of all sequences, as one short sequence
        short = hidden.last_hidden_state[where[:, 0] - start, where[:, 1]][None]
        hidden = type(hidden)(**{**hidden, "last_hidden_state": short})
        for first in range(low, high, CHUNK):
            last = min(first + CHUNK, high)
            asked = layout.questions[slice(*(bisect_left(context_of_question, at) for at in (first, last)))]
            told.append(answered(model, hidden, first - low, last - low, [(c - first, t) for c, t, _ in asked]))
        if progress is not None:
            progress(stop, len(layout.sequences))
    return Told(*(torch.cat(column) for column in zip(*told, strict=True)))


def refuse_encoders(model: Any) -> None:
    """Raises if the model does not go on with a text."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotSupported(f"{type(model).__name__} does not go on with its prompt; load a causal language model")


def refuse_long(model: Any, layout: Layout) -> None:
    """Raises if the longest sequence is longer than the model's positions."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = len(layout.sequences[0])
    if limit is not None and longest > limit:
        raise BadInput(
            f"the longest prompt has {longest} tokens with its answer, {type(model).__name__} reads {limit}; "
            "leave out what is longer."
        )


def read(model: Any, sequences: Sequence[tuple[int, ...]]) -> Any:
    """The hidden states of sequences, padded on the right: what is behind a token changes nothing in it."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return model.base_model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, return_dict=True
    )


def answered(
    model: Any, hidden: Any, start: int, stop: int, asked: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and lead of each asked (position, token), and the entropy at each position."""
    blank = torch.zeros(1, stop - start, dtype=torch.long, device=model.device)
    logits = head(model, hidden, start, stop)(input_ids=blank, use_cache=False).logits[0].float()
    rows, ids = torch.tensor(asked, device=logits.device).unbind(1)
    normaliser = logits.logsumexp(-1)
    best = logits.topk(2)
    own = logits[rows, ids]
    other = torch.where(best.indices[rows, 0] == ids, best.values[rows, 1], best.values[rows, 0])
    return own - normaliser[rows], own - other, torch.special.entr(logits.softmax(-1)).sum(-1)


def rows_of(layout: Layout) -> Int[Tensor, " question"]:
    """The option that each question is part of."""
    return torch.tensor([row for _, _, row in layout.questions])


def least_leads(told: Told, prepared: Prepared) -> list[float]:
    """The least lead among the tokens of each example's first option, which is the whole of a free answer."""
    sizes = [len(options) for options in prepared.options]
    none = torch.full((sum(sizes),), torch.inf)
    leads = none.scatter_reduce(0, rows_of(prepared.layout), told.lead.float().cpu(), "amin")
    return [part[0].item() for part in leads.split(sizes)]


def per_option(
    log_prob: Float[Tensor, " question"], prepared: Prepared, normalise: bool
) -> tuple[Float[Tensor, " _"], ...]:
    """Sums of the questions' log-probabilities over each option, or means, by example."""
    sizes = [len(options) for options in prepared.options]
    total = log_prob.new_zeros(sum(sizes)).index_add(0, rows_of(prepared.layout).to(log_prob.device), log_prob)
    if normalise:
        lengths = [len(option) for options in prepared.options for option in options]
        total = total / total.new_tensor(lengths)
    return total.split(sizes)
