"""Many continuations of one prompt: it is read once, and its keys and values are held once for all of them.

    with foveate.share_prefix(model, prompt_ids) as shared:
        out = shared.generate([first_ids, second_ids], max_new_tokens=32)

What comes out is what `model.generate` gives for the prompts with their continuations behind them, padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.attach import attach
from foveate.core.calls import few_logits
from foveate.core.errors import BadInput, NothingObserved, NotSupported
from foveate.core.prefix import Layout, PrefixLayer, bytes_full, prefix_cache, prefix_layers

__all__ = ["Shared", "share_prefix"]

# what `generate` says itself
OURS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")

# it takes the last token for all that is new in a cache that somebody filled before
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass(frozen=True, eq=False)
class Stretch:
    """Tokens that rows share, and what the model keeps of them.

    Args:
        ids: The tokens.
        start: How many come before them.
        kept: Keys and values, [1, kv_heads, tokens, dim] each, by cache layer; None for a layer that keeps nothing.
    """

    ids: tuple[int, ...]
    start: int
    kept: tuple[tuple[Tensor, Tensor] | None, ...]

    def bytes_held(self) -> int:
        return sum(t.untyped_storage().nbytes() for pair in self.kept if pair is not None for t in pair)


@contextmanager
def share_prefix(model: Any, prompt_ids: Any) -> Iterator[Shared]:
    """Reads a prompt once, for any number of continuations.

    Metrics and edits may be attached around this context or inside of it; rows that somebody looks at are then computed
    at full length, which is right and not fast. On leaving, the model is as it was and the prompt is freed.

    Args:
        model: A causal language model whose attention goes through `AttentionInterface`.
        prompt_ids: Token ids of the prompt: one text, as a list or a tensor.

    Yields:
        What continues the prompt: `generate`, and `extend` for a longer prompt that shares this one.

    Raises:
        BadInput: no tokens, several texts, or a token that the model does not know.
        NotOnInterface: the model's attention cannot be reached; says why and what works.
        NotSupported: it is no causal language model with a cache of keys and values, or a KV policy is attached.

    Example:
        >>> import foveate
        >>> from foveate.testing import handmade, tiny
        >>> model, tokenizer = handmade.model(), tiny.tokenizer()
        >>> with foveate.share_prefix(model, handmade.ids("a1 b2 c3 ")) as shared:
        ...     ends = [tokenizer(end).input_ids for end in ("b", "so c", "a")]
        ...     out = shared.generate(ends, max_new_tokens=1)
        >>> tokenizer.batch_decode(out[:, shared.given :])
        ['2', '3', '1']
    """
    if not getattr(model, "can_generate", lambda: False)() or model.config.is_encoder_decoder:
        raise NotSupported(
            f"{type(model).__name__} continues no prompt by itself, so there is no prefix to share; a causal language "
            "model does"
        )
    with attach(model, trial=False):
        shared = Shared(model, (), tokens_of(model, prompt_ids, "the prompt"))
        try:
            yield shared
        finally:
            shared.close()


class Shared:
    """A prompt that was read once, and its continuations.

    Args:
        model: The model.
        above: The stretches of the prompts that this one extends, from the first on.
        ids: The tokens behind them.
        parent: The prompt that this one extends, if there is one.
    """

    def __init__(
        self, model: Any, above: tuple[Stretch, ...], ids: tuple[int, ...], parent: Shared | None = None
    ) -> None:
        self.model, self.parent = model, parent
        self.alive = True
        self.used: tuple[int, int, int] | None = None
        self.stretches = (*above, self.read(above, ids))

    @property
    def open(self) -> bool:
        """Whether the context is, and those around it."""
        return self.alive and (self.parent is None or self.parent.open)

    def close(self) -> None:
        """Frees the prompt."""
        self.alive = False
        self.stretches = self.stretches[:-1]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return sum(len(one.ids) for one in self.stretches)

    @property
    def given(self) -> int:
        """How many columns of the last result were given: `out[:, shared.given:]` is new.

        Raises:
            NothingObserved: nothing has been generated.
        """
        return self.last()[0]

    def last(self) -> tuple[int, int, int]:
        """Columns given, bytes that rows held beside this prompt, and bytes of the model's own cache."""
        if self.used is None:
            raise NothingObserved("nothing has been generated from this prefix; call its .generate(suffixes) first")
        return self.used

    def bytes_held(self) -> int:
        """Bytes of the prompt's keys and values, and of what the rows of the last `generate` held beside them."""
        return sum(one.bytes_held() for one in self.stretches) + (self.used[1] if self.used else 0)

    def bytes_full(self) -> int:
        """Bytes of the model's own cache for the rows of the last `generate`, each with the prompt to itself.

        Raises:
            NothingObserved: nothing has been generated.
        """
        return self.last()[2]

    @contextmanager
    def extend(self, more_ids: Any) -> Iterator[Shared]:
        """A longer prompt that shares this one: `with shared.extend(more_ids) as child: child.generate(…)`.

        Args:
            more_ids: Token ids that follow this prompt.

        Yields:
            What continues the longer prompt.

        Raises:
            BadInput: no tokens, several texts, or a token that the model does not know.
            NotSupported: the context of this prompt has been left.
        """
        self.check_open()
        child = Shared(self.model, self.stretches, tokens_of(self.model, more_ids, "what extends the prompt"), self)
        try:
            yield child
        finally:
            child.close()

    def generate(self, suffixes: Any, **options: Any) -> Any:
        """What `model.generate` gives for this prompt with each of the suffixes behind it.

        Args:
            suffixes: Token ids of each continuation, of any lengths; an empty one continues the prompt itself. A pair
                `(ids, suffixes)` in place of one is a branch: the suffixes in it, which may be pairs again, share its
                ids, and these are read and held once, too. Branches come out in the order in which they are given.
            options: Of `model.generate`: max_new_tokens, do_sample, num_beams, num_return_sequences, eos_token_id, …

        Returns:
            What `model.generate` returns: token ids [rows, length], padded on the left to one length, or its
            dictionary.

        Raises:
            BadInput: no suffixes, or ids that the model does not know, or an option that is not the caller's to give.
            NotSupported: the context has been left, a KV policy is attached, or assisted decoding is asked for.
        """
        self.check_open()
        if wrong := [name for name in OURS if name in options]:
            raise BadInput(f"generate({wrong[0]}=…): a shared prefix says that itself; give suffixes and other options")
        if not options.get("use_cache", True):
            raise BadInput("generate(use_cache=False): without a cache there is nothing to share; use model.generate")
        config = options.get("generation_config") or self.model.generation_config
        if wrong := [name for name in ASSISTED if options.get(name, getattr(config, name, None)) is not None]:
            raise NotSupported(
                f"generate({wrong[0]}=…): assisted decoding cannot start from a cache that holds a prompt; leave it "
                "out, or use model.generate"
            )
        tree = Tree(self)
        tree.grow(suffixes, self.stretches)
        ids, mask, layout = tree.laid_out(options)
        stretches = [one for one, *_ in tree.levels()]
        cache = prefix_cache(layout, [one.kept for one in stretches], self, self.model)
        out = self.model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        branches = [one for one in stretches if one not in self.stretches]
        beside = sum(layer.bytes_own() for layer in prefix_layers(cache)) + sum(one.bytes_held() for one in branches)
        self.used = ids.shape[1], beside, bytes_full(cache)
        return out

    def check_open(self) -> None:
        """Raises `NotSupported` where the context has been left."""
        if not self.open:
            raise NotSupported(
                "the `with` block of this shared prefix has been left, and its keys and values are freed; enter "
                "`foveate.share_prefix` again"
            )

    @torch.no_grad()
    def read(self, above: tuple[Stretch, ...], ids: tuple[int, ...]) -> Stretch:
        """Reads tokens behind others that have been read."""
        start = sum(len(one.ids) for one in above)
        spans = tuple((0, 1, one.start, len(one.ids)) for one in above)
        device = self.model.device
        text = torch.tensor([[i for one in above for i in one.ids]], dtype=torch.long, device=device)
        begin = torch.zeros(1, dtype=torch.long, device=device)
        layout = Layout(spans, begin, begin + start, start, text)
        cache = prefix_cache(layout, [one.kept for one in above], self, self.model)
        # logits of a whole prompt would take more memory than the model
        few = few_logits(self.model)
        new = torch.tensor([ids], device=device)
        self.model(input_ids=new, past_key_values=cache, use_cache=True, **few)
        kept = [x.level() if isinstance(x, PrefixLayer) and x.keys is not None else None for x in cache.layers]
        return Stretch(ids, start, tuple(kept))


class Tree:
    """The rows of a batch and what they share.

    Args:
        shared: The prompt.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        # the stretches in front of each row, and its own tokens
        self.rows: list[tuple[tuple[Stretch, ...], tuple[int, ...]]] = []

    def grow(self, entries: Any, above: tuple[Stretch, ...], what: str = "suffixes") -> None:
        """Takes up suffixes and branches behind some stretches."""
        if isinstance(entries, str) or not isinstance(entries, Sequence | Tensor):
            raise BadInput(f"{what} must be a list of token ids for each continuation, not {type(entries).__name__}")
        if isinstance(entries, Tensor) and entries.ndim != 2:
            raise BadInput(f"{what} as a tensor must be [rows, tokens], not {list(entries.shape)}; or give a list")
        if not len(entries):
            raise BadInput(f"no {what}; give token ids for each continuation, [[]] to continue without more of them")
        for n, entry in enumerate(entries):
            if is_branch(entry):
                ids = tokens_of(self.shared.model, entry[0], f"branch {n}")
                self.grow(entry[1], (*above, self.shared.read(above, ids)), f"suffixes of branch {n}")
            else:
                self.rows.append((above, tokens_of(self.shared.model, entry, f"suffix {n}", empty=True)))

    def levels(self) -> list[tuple[Stretch, int, int]]:
        """What rows share, with the first of these rows and one past the last; they lie side by side."""
        found: dict[Stretch, list[int]] = {}
        for n, (above, _) in enumerate(self.rows):
            for one in above:
                found.setdefault(one, []).append(n)
        return [(one, at[0], at[-1] + 1) for one, at in found.items()]

    def laid_out(self, options: dict[str, Any]) -> tuple[Tensor, Tensor, Layout]:
        """Token ids and mask as `generate` takes them, padded on the left, and where the rows have what they share."""
        device = self.shared.model.device
        shared = [sum(len(one.ids) for one in above) for above, _ in self.rows]
        own = [len(suffix) for _, suffix in self.rows]
        width = max(a + b for a, b in zip(shared, own, strict=True))
        ids = torch.full((len(self.rows), width), padding(self.shared.model, options), device=device)
        mask = torch.zeros_like(ids)
        for n, (above, suffix) in enumerate(self.rows):
            text = [*(i for one in above for i in one.ids), *suffix]
            ids[n, width - len(text) :] = torch.tensor(text, device=device)
            mask[n, width - len(text) :] = 1
        # the model is always given one token at least
        cells = width - max(1, *own)
        begin = [width - a - b for a, b in zip(shared, own, strict=True)]
        layout = Layout(
            tuple((first, last, one.start, len(one.ids)) for one, first, last in self.levels()),
            torch.tensor(begin, device=device),
            torch.tensor(shared, device=device),
            cells,
            ids[:, :cells],
        )
        return ids, mask, layout


def is_branch(entry: Any) -> bool:
    """Whether an entry is a pair of ids and suffixes, and not two token ids."""
    return isinstance(entry, tuple) and len(entry) == 2 and not isinstance(entry[1], int)


def padding(model: Any, options: dict[str, Any]) -> int:
    """The token that stands where a row has none."""
    config = options.get("generation_config") or model.generation_config
    for name in ("pad_token_id", "eos_token_id"):
        given = options.get(name, getattr(config, name, None))
        given = given[0] if isinstance(given, Sequence) and given else given
        if isinstance(given, int):
            return given
    return 0


def tokens_of(model: Any, ids: Any, what: str, empty: bool = False) -> tuple[int, ...]:
    """Token ids of one text.

    Raises:
        BadInput: several texts, no tokens, or what is no token of the model.
    """
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(found, Sequence) and len(found) == 1 and isinstance(found[0], Sequence):
        found = found[0]
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(type(i) is int for i in found):
        raise BadInput(
            f"{what} must be the token ids of one text, as a list or a tensor; got {type(ids).__name__}. A tokenizer "
            "makes them: tokenizer(text).input_ids"
        )
    known = model.get_input_embeddings().num_embeddings
    if wrong := [i for i in found if not 0 <= i < known]:
        raise BadInput(f"{what}: {type(model).__name__} knows no token {wrong[0]}; its tokens are 0 to {known - 1}")
    if not found and not empty:
        raise BadInput(f"{what} has no tokens; give at least one")
    return tuple(found)
