"""What can be trained by its name: the rules and mixers of the registry, and the gated convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.core import registry
from foveate.core.errors import unknown

if TYPE_CHECKING:
    from foveate.core.rule import Operator
    from foveate.training.task import TrainingTask

__all__ = ["CONVOLUTION", "mixer_names", "operator"]

CONVOLUTION = "gated_convolution"


def mixer_names() -> list[str]:
    """All names that can stand for attention in a training probe."""
    return sorted([*registry.names("replace"), CONVOLUTION])


def operator(spec: str, task: TrainingTask) -> Operator:
    """The operator of `name` or `name:param=value`; the gated convolution reaches over a training sequence.

    Raises:
        UnknownName: nothing is called so.
        BadInput: it can stand in no causal model.
    """
    if spec == CONVOLUTION:
        from foveate.training.convolution import GatedConvolution

        return GatedConvolution(task.longest)
    name = spec.partition(":")[0]
    if name not in mixer_names():
        raise unknown("rule", name, mixer_names(), "See `foveate list --verb replace`.")
    from foveate.core.standing import called, check_form

    found = called(spec)
    check_form(found, causal=True)
    return found
