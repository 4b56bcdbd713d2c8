"""The paper's claims as data, and the verdict on each of them, computed from the records.

:mod:`~opdlab.claims.judging` defines the verdicts, and :mod:`~opdlab.claims.paper` holds the claims.
"""

from opdlab.claims.judging import (
    VERDICTS,
    Claim,
    Contrast,
    Metric,
    Verdict,
    contrasts,
    count_verdicts,
    holm,
    judge,
    judgeable,
    scorecard,
)
from opdlab.claims.paper import CLAIMS, FINDINGS
