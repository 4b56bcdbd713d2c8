"""Claims of the paper and of newer ones as data, and the verdict on each of them, computed from the records.

:mod:`~opdlab.claims.rules` says how a claim is judged, :mod:`~opdlab.claims.paper` holds the claims, and
:mod:`~opdlab.claims.scorecard` shows the verdicts to a reader.
"""

from opdlab.claims.paper import CLAIMS, FINDINGS
from opdlab.claims.rules import Claim, Contrast, Metric, Runs, Verdict, digests, judge, written_after
from opdlab.claims.scorecard import badge, claims_table, fold, judgeable, scorecard, verdict_table
