"""Tasks with known answers, made on the spot from a seed."""

from foveate.probe.arithmetic import Arithmetic
from foveate.probe.coloured_objects import ColouredObjects
from foveate.probe.common_words import CommonWords
from foveate.probe.factual_recall import FactualRecall
from foveate.probe.indirect_object import IndirectObject
from foveate.probe.instruction import Emphasised, Instruction
from foveate.probe.key_value import KeyValue
from foveate.probe.needles import Needles
from foveate.probe.passkey import Passkey
from foveate.probe.perplexity import perplexity
from foveate.probe.planted_facts import PlantedFacts
from foveate.probe.run import ProbeResult, Record, greedy, run, wilson
from foveate.probe.sample import Sample, Task
from foveate.probe.text import default_text
from foveate.probe.variable_tracking import VariableTracking

__all__ = [
    "Arithmetic",
    "ColouredObjects",
    "CommonWords",
    "Emphasised",
    "FactualRecall",
    "IndirectObject",
    "Instruction",
    "KeyValue",
    "Needles",
    "Passkey",
    "PlantedFacts",
    "ProbeResult",
    "Record",
    "Sample",
    "Task",
    "VariableTracking",
    "default_text",
    "greedy",
    "perplexity",
    "run",
    "wilson",
]
