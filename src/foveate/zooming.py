"""A window of one head at full resolution, on demand: from stored queries and keys, or by running the model again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate import opened, stored
from foveate.closeup import window_of
from foveate.core.errors import BadInput, FoveateError, LoadError, TooBig
from foveate.highlights import named
from foveate.opened import Window
from foveate.passes import visit

if TYPE_CHECKING:
    from foveate.core.rows import View
    from foveate.profiling import Profile

__all__ = ["LARGEST", "zoom"]

# weights of one window: as many as 512 x 512, so that a report with a few of them stays small
LARGEST = 1 << 18


def zoom(
    folder: str | os.PathLike[str],
    layer: int,
    head: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    *,
    text: str = "profile",
    model: Any = None,
) -> Window:
    """The exact weights of some rows and keys of one head, added to the windows of a saved profile.

    Queries and keys come from the profile's folder if they were kept there. If not, the model runs the profile's text
    again as far as this layer, and they are kept for the next time.

    Args:
        folder: Of the saved profile.
        layer: Number of the layer.
        head: Number of the head.
        rows: First row, and one past the last.
        keys: First key, and one past the last.
        text: "profile", or "needle" for the prompt of the retrieval probe.
        model: The model, or its name as `foveate.load` takes it; default: the one that was profiled.

    Returns:
        The window.

    Raises:
        BadInput: no such layer, head, rows, keys or text; or states that do not belong to this profile.
        TooBig: more than 512 x 512 weights.
        LoadError: the model is needed and cannot be opened any more.
    """
    from foveate.profiling import Profile

    folder = Path(folder)
    profile = Profile.load(folder)
    ids, pieces = text_of(profile, text)
    check(profile, layer, head, {"rows": rows, "keys": keys}, len(ids))
    states = folder / "states"
    mark = stored.mark_of(profile.info, ids)
    view = stored.read(states, text, layer, mark)
    windows: list[Window] = []

    def read(view: View) -> None:
        windows.append(window_of(view, head, rows, keys, pieces, text, "zoom"))

    if view is not None:
        read(view)
    else:

        def read_and_keep(view: View) -> None:
            read(view)
            stored.write(view, states, text, mark)

        network = open_model(profile, model)
        visit(network, torch.tensor([ids], device=network.device), [layer], read_and_keep)
    opened.add_window(folder, windows[0])
    return windows[0]


def text_of(profile: Profile, text: str) -> tuple[list[int], list[str]]:
    """Token ids of a text of the profile, and their pieces."""
    if text == "profile":
        ids = profile.info["ids"]
        return ids, named(profile.pieces, ids)
    needle = profile.info.get("needle")
    if text == "needle" and needle:
        return needle["ids"], needle["pieces"]
    known = "profile or needle" if needle else "profile (no retrieval head was found, so there is no needle)"
    raise BadInput(f"this profile has no text {text!r}; it may be {known}")


def check(profile: Profile, layer: int, head: int, spans: dict[str, tuple[int, int]], tokens: int) -> None:
    """Raises unless the profile has such a head and the text such rows and keys."""
    layers = len(profile.info["layers"])
    if not 0 <= layer < layers:
        raise BadInput(f"there is no layer {layer}; {profile.info['model']} has layers 0 to {layers - 1}")
    table = profile.heads[profile.heads.layer == layer]
    heads = int(table["head"].max()) + 1 if len(table) else profile.info["query_heads"]
    if not 0 <= head < heads:
        raise BadInput(f"there is no head {head} in layer {layer}; it has heads 0 to {heads - 1}")
    for name, (start, stop) in spans.items():
        if not 0 <= start < stop <= tokens:
            raise BadInput(f"{name} {start}:{stop} are not in the text; give START:STOP between 0 and {tokens}")
    (a, b), (c, d) = spans.values()
    if (b - a) * (d - c) > LARGEST:
        raise TooBig(
            f"a window of {b - a:,} rows x {d - c:,} keys has more than {LARGEST:,} weights (512 x 512); "
            "narrow --rows or --keys"
        )


def open_model(profile: Profile, model: Any) -> Any:
    """The profiled model, opened again where it is not at hand.

    Raises:
        LoadError: it cannot be opened; says what to do.
        BadInput: the given model is another one.
    """
    info = profile.info
    if model is None or isinstance(model, str | os.PathLike):
        from foveate.models import load

        source = model or info.get("source")
        if not source:
            raise LoadError(
                f"this layer was not kept, so {info['model']} is needed, and nothing says where it is; use --model"
            )
        try:
            model, _ = load(source, dtype=info.get("dtype"), tokenizer=False)
        except FoveateError as e:
            raise LoadError(f"this layer was not kept, so the model is needed: {e} Or use --model") from e
    config = model.config.get_text_config()
    if (type(model).__name__, config.num_attention_heads) != (info["architecture"], info["query_heads"]):
        raise BadInput(
            f"{type(model).__name__} with {config.num_attention_heads} heads is not the profiled model, "
            f"{info['model']} ({info['architecture']}, {info['query_heads']} heads)"
        )
    return model
