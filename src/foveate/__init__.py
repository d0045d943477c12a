"""foveate: see, steer, compress and replace the attention of a transformer.

model, tokenizer = foveate.load("smollm2")
profile = foveate.profile(model, tokenizer, text, tokens=4096)

with foveate.attach(model, Entropy(), FirstTokenMass()) as attached:
    model(ids)
attached.results.heads
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate import nn
    from foveate.core.attach import attach
    from foveate.core.budget import Budget
    from foveate.core.converting import convert
    from foveate.core.errors import FoveateError
    from foveate.core.plan import Plan, apply
    from foveate.core.registry import find, make, names
    from foveate.locating import locate
    from foveate.models import load
    from foveate.profiling import Profile, profile
    from foveate.sharing import share_prefix
    from foveate.testing import check_mechanism
    from foveate.zooming import zoom

__version__ = "0.1.0"

# Looked up on first use: `import foveate` and `foveate list` must not wait for torch.
HOMES = {
    "Budget": "foveate.core.budget",
    "FoveateError": "foveate.core.errors",
    "Plan": "foveate.core.plan",
    "Profile": "foveate.profiling",
    "apply": "foveate.core.plan",
    "attach": "foveate.core.attach",
    "check_mechanism": "foveate.testing",
    "convert": "foveate.core.converting",
    "find": "foveate.core.registry",
    "load": "foveate.models",
    "locate": "foveate.locating",
    "make": "foveate.core.registry",
    "names": "foveate.core.registry",
    "profile": "foveate.profiling",
    "share_prefix": "foveate.sharing",
    "zoom": "foveate.zooming",
}

__all__ = [
    "Budget",
    "FoveateError",
    "Plan",
    "Profile",
    "__version__",
    "apply",
    "attach",
    "check_mechanism",
    "convert",
    "find",
    "load",
    "locate",
    "make",
    "names",
    "nn",
    "profile",
    "share_prefix",
    "zoom",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("foveate.nn")
    if name not in HOMES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
