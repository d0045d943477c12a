"""Replacing: other attention than a model's own, in a new module or in a loaded model."""

from foveate.core.registry import class_names, lazy

__all__ = class_names("replace")

__getattr__ = lazy("replace")
