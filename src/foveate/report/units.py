"""What the numbers of a metric are called and counted in."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["describe", "unit"]

# Most metrics are shares of a row's mass; these are not.
UNITS = (
    (r"entropy|head_similarity_divergence|.*entropy_bound", "nats"),
    (r"local_mass_distance", "tokens"),
    (r"coverage_[\d.]+|sink_rate_keys", "keys"),
    (r"output_norm.*|spectral_norm.*|value_drain.*|head_similarity.*|retrieval_score(_control)?", ""),
)


def unit(name: str, values: Float[np.ndarray, "*shape"]) -> str:
    """Its unit; "%" for shares, which are what lies between 0 and 1 when nothing else is known."""
    for pattern, name_of_unit in UNITS:
        if re.fullmatch(pattern, name):
            return name_of_unit
    known = values[np.isfinite(values)]
    return "%" if known.size and known.min() >= 0 and known.max() <= 1 else ""


def describe(name: str, catalogue: list[dict[str, Any]]) -> dict[str, str]:
    """Title, meaning and warning of a metric's label, from the card of the metric that it belongs to."""
    owners = [e for e in catalogue if name == e["name"] or re.match(rf"{re.escape(e['name'])}[_:]", name)]
    owner = max(owners, key=lambda e: len(e["name"]), default={})
    return {
        "title": name.replace("_", " "),
        "metric": owner.get("name", ""),
        "family": owner.get("family", "other"),
        "summary": owner.get("summary", "").replace("`", ""),
        "misleads": owner.get("misleads", ""),
    }
