"""Steering: mechanisms that change where a running model looks, or what its heads and layers give."""

from foveate.core.registry import class_names, lazy

__all__ = class_names("steer")

__getattr__ = lazy("steer")
