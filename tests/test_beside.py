import pandas as pd
import pytest

from opdlab import plots
from opdlab.beside import at_scales, records_at
from opdlab.claims import CLAIMS, Value, effects
from opdlab.runs import Home, default_home
from opdlab.scales import SMALL, TINY

VALUES = {"accuracy": Value("sampled", progress=1.0), "stable rank": Value("stable_rank", progress=1.0)}


def test_values_at_scales_are_those_of_the_records():
    table = at_scales(VALUES, ("opd", "opd_random16"), ("tiny", "small"))
    of_tiny = table[table["scale"] == "tiny"]
    assert set(of_tiny["arm"]) == {"opd", "opd_random16"} and list(dict.fromkeys(of_tiny["title"])) == list(VALUES)
    evaluations = pd.read_csv(default_home().records(TINY) / "opd-seed3" / "evaluations.csv")
    row = of_tiny[(of_tiny["title"] == "accuracy") & (of_tiny["arm"] == "opd") & (of_tiny["seed"] == 3)]
    assert row["value"].item() == pytest.approx(evaluations["sampled"].iloc[-1])
    # At small no such run is recorded, and none is trained for it.
    assert (
        "opd_random16" not in set(table.loc[table["scale"] == "small", "arm"]) and "opd_random16" not in SMALL.recorded
    )


def test_what_is_not_recorded_is_left_out(tmp_path):
    home = Home(tmp_path)
    assert records_at("small", ("opd",), home) is None
    assert at_scales(VALUES, ("opd",), ("small",), home).empty


def test_panels_by_scale():
    table = at_scales(VALUES, ("opd", "rlvr"), ("tiny",))
    figure = plots.draw_scales(table)
    assert [axis.get_title() for axis in figure.axes] == ["accuracy, tiny", "stable rank, tiny"]


def test_effects_of_the_claims_that_the_records_can_tell():
    records = records_at("tiny", ("sft", "opd", "rlvr", "sft_matched"))
    found = effects(CLAIMS, records)
    assert "norm-opd-rlvr" in found and "rank-opd_mix1" not in found and "span" not in found
    claim = next(claim for claim in CLAIMS if claim.name == "norm-opd-rlvr")
    assert found["norm-opd-rlvr"].mean == pytest.approx(claim.effect.of(records).mean())
