"""Training probes: small models around any operator, trained in minutes on tasks that tell them apart."""

from foveate.training.convolution import GatedConvolution
from foveate.training.experiment import Experiment, Outcome, usual
from foveate.training.loop import Trained, train
from foveate.training.model import Decoder
from foveate.training.run import Optimisation, Run, Size
from foveate.training.task import Batch, Measure, TrainingTask, find_task, task_names
from foveate.training.tasks.backcopy import Backcopy
from foveate.training.tasks.characters import Characters
from foveate.training.tasks.copying import Copying
from foveate.training.tasks.induction import Induction
from foveate.training.tasks.mqar import Mqar

__all__ = [
    "Backcopy",
    "Batch",
    "Characters",
    "Copying",
    "Decoder",
    "Experiment",
    "GatedConvolution",
    "Induction",
    "Measure",
    "Mqar",
    "Optimisation",
    "Outcome",
    "Run",
    "Size",
    "Trained",
    "TrainingTask",
    "find_task",
    "task_names",
    "train",
    "usual",
]
