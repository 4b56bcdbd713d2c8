"""Sentences that are computed from the records, so that a chapter never says more than they show."""

from __future__ import annotations

import re
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.lab.scales import get_scale


def states(*said: Any, at: str = "tiny") -> Any:
    """Return a paragraph of sentences that state results, for a notebook to show; each has to be true of the records.

    >>> states("Two is more than one.", 2 > 1, "Three is more.", 3 > 2, at="").data
    'Two is more than one. Three is more.'

    The sentences are in Markdown, each followed by the condition under which it is true. They are about the records of
    the scale ``at``: at another one they are shown as what they say of that, and nothing is checked; "" stands for
    sentences that are true at all scales. A percentage has a blank before its sign, at which no line ends.

    Raises:
        OpdlabError: if a condition does not hold, with its sentence.
    """
    from IPython.display import Markdown  # imported late: only notebooks have it

    pairs = list(zip(said[::2], said[1::2], strict=True))
    paragraph = re.sub(r"(\d) ?%", "\\1\u00a0%", " ".join(sentence for sentence, _ in pairs))
    if at and get_scale().name != at:
        return Markdown(f"*Not at this scale. At {at}:* {paragraph}")
    for sentence, holds in pairs:
        if not bool(holds):
            raise OpdlabError(f"the records do not say that {sentence!r}: rewrite the sentence, or find out why")
    return Markdown(paragraph)


def check(answer: Any, right: Any, near: float = 0.02, hint: str = "Not yet.") -> str:
    """Return what there is to say of a reader's answer to an exercise: ``hint``, if it is not right.

    Numbers may differ from the right one by the share ``near`` of it.

    >>> check(None, 1.5)
    'Not answered yet: put your answer in the place of None, and run both cells.'
    >>> check(1.51, 1.5), check(1.2, 1.5, hint="Not yet: is the update rounded?")
    ('Right.', 'Not yet: is the update rounded?')
    """
    if answer is None:
        return "Not answered yet: put your answer in the place of None, and run both cells."
    if isinstance(right, (bool, str)):
        return "Right." if answer == right else hint
    return "Right." if abs(float(answer) - float(right)) <= near * abs(float(right)) else hint
