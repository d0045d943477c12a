r"""Repeating the context: the passage is read once knowing the question, and then again.

    text = context + question        text' = (question context "\n") * (times - 1) + text

In the second reading the model has seen everything already, so the order of facts and question matters less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core.card import Card, Needs
from foveate.core.errors import BadInput
from foveate.core.mechanism import PromptEdit
from foveate.core.params import bounded, choice

__all__ = ["RepeatContext"]


@dataclass(frozen=True)
class RepeatContext(PromptEdit):
    r"""Puts the question and the context before the prompt, once more or several times.

    Args:
        times: How often the context stands in the prompt; 1 changes nothing.
        mark: Where the question begins: at the last place in the text that says this. In a text without it all is
            context.
        lead: What a repetition begins with; "question" as in the paper, "nothing" is the control for it.

    Raises:
        BadInput: when it acts, for an empty text.

    Example:
        The question goes in front, so that the passage is read with it in mind.

        >>> from foveate.steer import RepeatContext
        >>> text = "Ann has the key. Bob has the box.\nQuestion: Who has the key?"
        >>> print(RepeatContext().edit(text))
        Question: Who has the key? Ann has the key. Bob has the box.
        Ann has the key. Bob has the box.
        Question: Who has the key?
    """

    times: int = bounded(2, 1, 8, grid=(1, 2, 3))
    mark: str = "\nQuestion:"
    lead: str = choice("question", "question", "nothing")

    card: ClassVar = Card(
        title="Just read twice: closing the recall gap for recurrent language models",
        year=2024,
        family="prompt",
        needs=Needs.TOKENS,
        equation=r"""text = context + question; text' = (question context "\n") * (times - 1) + text""",
        differs="made for recurrent models in the paper, of which only the prompt (JRT-Prompt) is here. The form is "
        "the paper's for reading comprehension; for its other tasks the leading question and the last one are worded "
        "apart, and a full stop is put behind the context",
        use="for questions about a long passage, where the model reads the passage before it knows what is asked",
        misleads="the question in front helps by itself: compare with lead='nothing'. The prompt is twice as long, in "
        "time and in memory",
    )
    identity: ClassVar = {"times": 1}
    test_params: ClassVar = ({}, {"times": 1}, {"times": 3, "lead": "nothing"}, {"mark": "\n\n"})

    def edit(self, text: str) -> str:
        if not text.strip():
            raise BadInput("RepeatContext: the text is empty, there is no context to repeat")
        at = text.rfind(self.mark) if self.mark else -1
        context, question = (text, "") if at < 0 else (text[:at].strip(), text[at:].strip())
        begins = f"{question} " if question and self.lead == "question" else ""
        return f"{begins}{context}\n" * (self.times - 1) + text
