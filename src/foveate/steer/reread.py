r"""Re-reading: the question twice, so that its second reading can look at all of it.

    text' = text + (" \n\n" + wording + " " + text) * (times - 1)

A causal model reads each word knowing only those before it. In the second reading every word can attend to the whole
of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import PromptEdit
from foveate.core.params import bounded

__all__ = ["Reread"]


@dataclass(frozen=True)
class Reread(PromptEdit):
    r"""Says a question again.

    Args:
        times: How often the question stands in the prompt; 1 changes nothing.
        wording: What stands before each repetition.
        ending: What a text may end with that is no part of its question, for instance a line "Answer:" with the line
            break before it; it stays at the end, once.

    Raises:
        BadInput: when it acts, for an empty text.

    Example:
        The second reading follows the first; what is no part of the question stays at the end.

        >>> from foveate.steer import Reread
        >>> Reread().edit("What is 2 + 2?")
        'What is 2 + 2? \n\nRead the question again: What is 2 + 2?'
        >>> Reread(ending="\nA:").edit("What is 2 + 2?\nA:")
        'What is 2 + 2? \n\nRead the question again: What is 2 + 2?\nA:'
    """

    times: int = bounded(2, 1, 8, grid=(1, 2, 3))
    wording: str = "Read the question again:"
    ending: str = ""

    card: ClassVar = Card(
        title="Re-Reading Improves Reasoning in Language Models",
        year=2023,
        family="prompt",
        needs=Needs.TOKENS,
        equation=r"""text' = text + (" \n\n" + wording + " " + text) * (times - 1)""",
        differs="nothing in the repetition itself. The text is taken as it is: the paper's frame around it (Q: and A:, "
        "the form of the answer, a request to think step by step) belongs to the task",
        use="for questions of several conditions, before anything that costs more",
        misleads="a prompt that is longer, and says the question twice, is itself a change: compare with times=3, and "
        "with other text of the same length",
        claims=("re_reading",),
    )
    identity: ClassVar = {"times": 1}
    test_params: ClassVar = ({}, {"times": 1}, {"times": 3, "wording": "Again:"}, {"ending": "\nAnswer:"})

    def edit(self, text: str) -> str:
        if not text.strip():
            raise BadInput("Reread: the text is empty, there is nothing to read again")
        question = text.removesuffix(self.ending)
        return f" \n\n{self.wording} ".join([question] * self.times) + text[len(question) :]
