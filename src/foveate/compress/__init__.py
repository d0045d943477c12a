"""Mechanisms that make a model remember or compute less."""

from foveate.core import registry

__all__ = registry.class_names("compress")
__getattr__ = registry.lazy("compress")
