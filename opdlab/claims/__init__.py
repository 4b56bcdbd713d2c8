"""The paper's claims as data, and the verdict on each of them, computed from records.

:mod:`~opdlab.claims.judging` says what a verdict is, :mod:`~opdlab.claims.paper` holds the claims.
"""

from opdlab.claims.judging import (
    VERDICTS,
    Claim,
    Difference,
    Value,
    Verdict,
    count_verdicts,
    differences,
    holm,
    judge,
    judgeable,
    scorecard,
)
from opdlab.claims.paper import CLAIMS, FINDINGS

__all__ = [
    "CLAIMS",
    "FINDINGS",
    "VERDICTS",
    "Claim",
    "Difference",
    "Value",
    "Verdict",
    "count_verdicts",
    "differences",
    "holm",
    "judge",
    "judgeable",
    "scorecard",
]
