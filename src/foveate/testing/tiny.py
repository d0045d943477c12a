"""Tiny random models, one per family, that build in milliseconds: 2 layers, 4 heads, 99 tokens.

`models()` names the families that work with `foveate.attach`, `mixtures()` those among them that have experts, and
`refused()` those off transformers' attention interface.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from foveate.core.errors import BadInput, unknown

__all__ = ["VOCABULARY", "Family", "family", "inputs", "mixtures", "model", "models", "refused", "tokenizer"]

VOCABULARY = 99
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
IMAGE = 24
PATCH = 8
FRAMES = 40

Kind = Literal["decoder", "encoder", "image", "text-image", "encoder-decoder", "speech"]
Padding = Literal["left", "right"]


def common() -> dict[str, Any]:
    """What the configurations of most decoders understand."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def grouped(**more: Any) -> dict[str, Any]:
    """A decoder with two query heads per key-value head."""
    return common() | {"num_key_value_heads": 2, "head_dim": 8} | more


def experts(**more: Any) -> dict[str, Any]:
    """A mixture of experts, two of which each token goes to."""
    return grouped(num_experts_per_tok=2) | more


def coders(**more: Any) -> dict[str, Any]:
    """The names that encoder-decoders of the BART line use."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return {"vocab_size": VOCABULARY, "decoder_start_token_id": 1} | sizes | more


@dataclass(frozen=True)
class Family:
    """How to build one model of a family.

    Args:
        config: Arguments of its configuration.
        kind: What goes in.
        head: Class of transformers that is built.
        config_name: `model_type` of the configuration, where it is not the family's own name.
        absolute: Whether positions are absolute, so that a padded row needs `position_ids` to equal itself alone.
        on_interface: Whether its attention goes through transformers' interface.
    """

    config: Callable[[], dict[str, Any]]
    kind: Kind = "decoder"
    head: str = "AutoModelForCausalLM"
    config_name: str = ""
    absolute: bool = False
    on_interface: bool = True


def clip() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "text_config": text,
        "vision_config": sizes | {"image_size": IMAGE, "patch_size": PATCH},
        "projection_dim": 16,
    }


def whisper() -> dict[str, Any]:
    lengths = {"max_source_positions": FRAMES // 2, "max_target_positions": 64, "num_mel_bins": 8}
    return coders(**lengths, pad_token_id=0, bos_token_id=1, eos_token_id=2, begin_suppress_tokens=None)


def gemma3() -> dict[str, Any]:
    # left alone, the sixth layer is the first with full attention
    return grouped(sliding_window=5, layer_types=["sliding_attention", "full_attention"])


FAMILIES: dict[str, Family] = {
    "llama": Family(grouped),
    "mistral": Family(lambda: grouped(sliding_window=5)),
    "qwen2": Family(grouped),
    "qwen3": Family(grouped),
    "gemma2": Family(lambda: grouped(sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=4)),
    "gemma3": Family(gemma3, config_name="gemma3_text"),
    "phi3": Family(grouped),
    "granite": Family(lambda: grouped(attention_multiplier=0.3)),
    "olmo2": Family(grouped),
    "cohere": Family(grouped),
    "smollm3": Family(grouped),
    "gpt_oss": Family(
        lambda: experts(
            num_local_experts=4, sliding_window=5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
        )
    ),
    "mixtral": Family(lambda: experts(num_local_experts=4)),
    "qwen3_moe": Family(lambda: experts(num_experts=6, moe_intermediate_size=24, norm_topk_prob=True)),
    "gpt2": Family(
        lambda: common() | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        absolute=True,
    ),
    "gpt_neox": Family(common),
    "opt": Family(lambda: common() | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": Family(common, kind="encoder", head="BertModel"),
    "vit": Family(
        lambda: common() | {"image_size": IMAGE, "patch_size": PATCH},
        kind="image",
        head="ViTModel",
    ),
    "clip": Family(clip, kind="text-image", head="CLIPModel"),
    "whisper": Family(whisper, kind="speech", head="WhisperForConditionalGeneration"),
    "t5": Family(
        lambda: {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        kind="encoder-decoder",
        head="T5ForConditionalGeneration",
    ),
    "bart": Family(
        lambda: coders(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        kind="encoder-decoder",
        head="BartForConditionalGeneration",
    ),
    "bloom": Family(lambda: common() | {"n_layer": 2, "n_head": 4}, on_interface=False),
    "falcon": Family(lambda: common() | {"num_attention_heads": 4, "alibi": False}, on_interface=False),
    "gptj": Family(
        lambda: common() | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
        on_interface=False,
    ),
    "mpt": Family(
        lambda: common() | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
        on_interface=False,
    ),
}


def models(*kinds: Kind) -> list[str]:
    """Families on the attention interface, of all kinds or of the given ones."""
    return [n for n, f in FAMILIES.items() if f.on_interface and (not kinds or f.kind in kinds)]


def mixtures() -> list[str]:
    """Families that are mixtures of experts."""
    return [n for n, f in FAMILIES.items() if "num_experts_per_tok" in f.config()]


def refused() -> list[str]:
    """Families whose attention cannot be reached."""
    return [n for n, f in FAMILIES.items() if not f.on_interface]


def family(name: str) -> Family:
    """The table's entry for a family.

    Raises:
        UnknownName: no such family.
    """
    if name not in FAMILIES:
        raise unknown("tiny model", name, FAMILIES)
    return FAMILIES[name]


def model(name: str, seed: int = 0, attention: str = "eager", **changed: Any) -> PreTrainedModel:
    """A random model of a family, in evaluation mode.

    Args:
        name: One of `models()` or `refused()`.
        seed: Of the weights.
        attention: Implementation that transformers is asked for.
        changed: Configuration arguments that differ from the table.

    Raises:
        UnknownName: no such family.
    """
    f = family(name)
    config = AutoConfig.for_model(f.config_name or name, **(f.config() | changed))
    # drawn apart from the caller's own random numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = getattr(transformers, f.head)
        build = head.from_config if f.head.startswith("Auto") else head._from_config
        made = build(config, attn_implementation=attention).eval()
        sharpen(made)
    return made


@torch.no_grad()
def sharpen(made: torch.nn.Module) -> None:
    """Draws all parameters anew, wide enough that heads differ and biases and sinks are no zeros."""
    for name, p in made.named_parameters():
        if "norm" in name.lower() and p.ndim == 1:
            p.copy_(1 + 0.1 * torch.randn_like(p) if name.endswith("weight") else 0.1 * torch.randn_like(p))
        else:
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1))


def inputs(
    name: str, batch: int = 2, length: int = 11, seed: int = 0, padding: Padding | None = None
) -> dict[str, Tensor]:
    """What a family's forward wants.

    Args:
        name: One of the families.
        batch: Texts, images or sounds.
        length: Tokens of each text, padding included.
        seed: Of the contents.
        padding: Side on which all texts but the first are padded, by about a third of their length.

    Raises:
        BadInput: padding asked of a family without texts of its own.
    """
    f = family(name)
    rng = torch.Generator().manual_seed(seed)
    # token 1 to 3 are special and never drawn
    ids = torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=rng)
    image = torch.randn(batch, 3, IMAGE, IMAGE, generator=rng)
    if f.kind == "image":
        if padding:
            raise BadInput(f"{name} reads images, which have no padding")
        return {"pixel_values": image}
    mask = torch.ones_like(ids)
    if padding:
        cut = max(1, length // 3)
        mask[1:, slice(0, cut) if padding == "left" else slice(length - cut, None)] = 0
        ids = ids * mask
    if f.kind == "speech":
        return {"input_features": torch.randn(batch, 8, FRAMES, generator=rng), "decoder_input_ids": ids}
    made = {"input_ids": ids, "attention_mask": mask}
    if f.kind == "text-image":
        made["pixel_values"] = image
    if f.kind == "encoder-decoder":
        made["decoder_input_ids"] = torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=rng)
    if padding == "left" and f.absolute:
        made["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character: the 99 tokens of the tiny models."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    characters = [c for c in string.printable if c.isprintable()]
    words = {w: n for n, w in enumerate([*SPECIAL, *characters])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
