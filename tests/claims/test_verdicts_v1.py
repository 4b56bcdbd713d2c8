"""The verdicts of the first laboratory stay what they were while its code is moved."""

from pathlib import Path

import pandas as pd
import pytest

from opdlab.claims.across_scales import judge_at

KEPT = Path(__file__).resolve().parents[2] / "data" / "verdicts-v1.csv"


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_the_moved_code_gives_the_verdicts_and_effects_of_before(scale):
    before = pd.read_csv(KEPT, keep_default_na=False).query("scale == @scale").set_index("claim")
    verdicts = {found.claim.name: found for found in judge_at(scale)}
    assert list(verdicts) == list(before.index)
    for name, old in before.iterrows():
        now = verdicts[name]
        assert (now.verdict, now.by, "; ".join(now.perhaps)) == (old["verdict"], old["by"], old["perhaps"]), name
        numbers = (*now.effect, now.p)
        assert numbers == pytest.approx((old["effect"], old["low"], old["high"], old["p"]), rel=1e-6, nan_ok=True), name
        left = "; ".join(f"{what}: {of.mean:.7g} [{of.low:.7g}, {of.high:.7g}]" for what, of in now.left.items())
        assert left == old["left"], name
        assert (now.seeds, now.claim.smallest) == (old["seeds"], pytest.approx(old["counts_from"])), name
