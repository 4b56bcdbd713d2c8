import pandas as pd
import pytest

from opdlab import plots
from opdlab.beside import at_scales, compare_order, records_at
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


def test_the_order_of_arms_at_two_scales():
    values = {("tiny", "opd"): (3.0, 3.1, 2.9), ("tiny", "rlvr"): (1.0, 1.1, 0.9), ("tiny", "sft"): (0.5, 2.5, 1.4)}
    values |= {("small", "opd"): (1.0,), ("small", "rlvr"): (2.0,), ("small", "sft"): (0.5,)}
    table = pd.DataFrame(
        [
            {"scale": scale, "title": "a value", "arm": arm, "label": arm, "seed": seed, "value": value}
            for (scale, arm), row in values.items()
            for seed, value in enumerate(row)
        ]
    )
    # OPD is clearly above RLVR, and the noisy arm clearly neither above nor below any; at small RLVR is above OPD.
    assert compare_order(table, "a value") == (
        "at tiny OPD 3, SFT 1.47, RLVR 1; at small RLVR 2, OPD 1, SFT 0.5; "
        "pairs that the seeds at tiny tell apart: 1 of 3; of these in the same order at small: 0"
    )
    figure = plots.draw_scales(table, near={"a value": 0.25})
    assert [axis.patches[0].get_y() for axis in figure.axes] == [pytest.approx(2.75), pytest.approx(0.75)]


def test_effects_of_the_claims_that_the_records_can_tell():
    records = records_at("tiny", ("sft", "opd", "rlvr", "sft_matched"))
    found = effects(CLAIMS, records)
    assert "norm-opd-rlvr" in found and "rank-opd_mix1" not in found and "span" not in found
    claim = next(claim for claim in CLAIMS if claim.name == "norm-opd-rlvr")
    assert found["norm-opd-rlvr"].mean == pytest.approx(claim.effect.of(records).mean())
