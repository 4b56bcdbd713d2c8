"""The claims of the paper (2606.07082), as data.

The criteria were committed before the runs that they judge, as the history of this file shows, with two exceptions.
Seeds 0 to 2 of the paper's arms and of matched SFT were known when their criteria were written: they are a pilot, and
the later seeds are the test. And a batch of 16 completions had been seen when the criteria for gradients were
committed, which are judged on 128.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

from opdlab.claims.judging import Claim, Contrast, Metric

#: The findings that claims belong to, with title and page of the chapter on each, in the order of the book.
FINDINGS = {
    "regime": ("Where the updates land", "04_where_updates_land"),
    "rank": ("Rank over time", "05_rank_over_time"),
    "locking": ("Subspace locking", "06_subspace_locking"),
    "sufficiency": ("Is the early subspace enough?", "07_sufficiency"),
    "tokens": ("Which tokens count?", "08_tokens"),
    "rollouts": ("Who writes the rollouts?", "09_rollouts"),
    "objectives": ("Mixing OPD with RLVR", "10_objectives"),
    "mechanism": ("What makes the geometry?", "11_mechanism"),
    "interpolation": ("Is OPD between SFT and RLVR?", "12_interpolation"),
}

_SPARSITY = Metric("sparsity")
_ANGLE, _DRIFT = Metric("angle_left_mean", log=True), Metric("nss", log=True)
_END: dict[str, Any] = {"progress": 1.0, "block": "attention"}
_RISE = Metric("stable_rank", since=0.1, **_END)
# At 20 % of the training, about the paper's first checkpoint.
_EARLY = Metric("sim_right_K16", progress=0.2, block="attention")


def _matched(metric: Metric) -> Metric:
    return replace(metric, column=f"{metric.column}_matched")


def _order(name: str, what: str, metric: Metric, high: str, low: str, smallest: float, source: str) -> Claim:
    """Return the claim that one arm lies above another, with the controls for size and, for SFT, for its recipe."""
    controls = {"the size of the update": Contrast(_matched(metric), high, low)}
    if high == "sft":
        controls["SFT's own recipe"] = Contrast(metric, "sft_matched", low)
    if low == "sft":
        controls["SFT's own recipe"] = Contrast(metric, high, "sft_matched")
    return Claim(name, "regime", what, source, Contrast(metric, high, low), smallest, controls, known="printed")


def _masked(arm: str, label: str, star: str, does: str, known: str = "words") -> Claim:
    """Return the claim that an arm avoids the principal weights, or prefers the small ones, more than chance would."""

    def beyond(chance: str) -> Contrast:
        low, high = Metric(f"{star}_overlap_a30"), Metric(f"{star}_{chance}")
        if star == "low":
            low, high = high, low
        return Contrast(high, arm, minus=low)

    controls = {
        "noise of the same density": beyond("overlap_a30_noise"),
        "the permuted update": beyond("overlap_a30_null"),
    }
    return Claim(f"{star}-{arm}", "regime", f"{label} {does}", "Figure 3: below and above the random 0.3",
                 beyond("share_a30"), 0.005, controls, known=known)  # fmt: skip


# --- the variants: a fifth of the steps, against the same arms with as many ---

_SHORT_RANK = Metric("stable_rank", **_END)
_ACCURACY = Metric("sampled", progress=1.0)
#: Two points of accuracy, the smallest loss or gain that counts.
POINTS = 0.02


def _near(metric: Metric, arm: str, to: str) -> Contrast:
    return Contrast(metric, arm, to, size=-1)


def _same_sparsity(arm: str, what: str) -> Claim:
    return Claim(f"sparsity-{arm}", "regime", f"OPD with {what} leaves as many weights unchanged",
                 "Table 1: 48.6 to 57.1 %", _near(_SPARSITY, arm, "opd_short"), -0.01,
                 known="printed", negative_controls={
                     "matched SFT, which is as near": _near(_SPARSITY, "sft_matched_short", "opd_short")})  # fmt: skip


def _same_rank(arm: str, finding: str, what: str, source: str) -> Claim:
    others = {"RLVR, whose stable rank is as near": _near(_SHORT_RANK, "rlvr_short", "opd_short")}
    return Claim(f"rank-{arm}", finding, f"{what} keeps OPD's stable rank", source,
                 _near(_SHORT_RANK, arm, "opd_short"), -0.25, negative_controls=others)  # fmt: skip


def _unharmed(name: str, what: str, arm: str, source: str, others: dict[str, str], known: str = "words") -> Claim:
    """Return the claim that a variant loses no accuracy; ``others`` names the negative controls, by the reason."""
    negative = {label: Contrast(_ACCURACY, other, "opd_short") for label, other in others.items()}
    effect = Contrast(_ACCURACY, arm, "opd_short")
    return Claim(name, "sufficiency", what, source, effect, -POINTS, negative_controls=negative, known=known)


_VARIANTS = (
    _same_sparsity("opd_weak_teacher", "a weaker teacher"),
    _same_sparsity("opd_same_teacher", "a teacher of its own size"),
    _same_sparsity("opd_small", "a smaller student"),
    _same_sparsity("opd_difference", "a second task"),
    _unharmed("sufficiency-opd", "OPD with gradients in its early 16 directions loses nothing", "opd_gradient16",
              "Figure 6: 64.2 against 63.3 %", {"16 random directions, which lose nothing either": "opd_random16"},
              known="draft"),
    _unharmed("sufficiency-strict", "OPD with updates in its early 4 directions loses nothing", "opd_update4",
              "Section 4, made strict", {"4 random directions, which lose nothing either": "opd_random4",
                                         "4 principal directions of W0": "opd_weights4"}),
    Claim("sufficiency-own", "sufficiency", "OPD's early directions serve it better than random ones",
          "Section 4: functionally sufficient", Contrast(_ACCURACY, "opd_update4", "opd_random4"), POINTS,
          {"the principal directions of W0": Contrast(_ACCURACY, "opd_update4", "opd_weights4"),
           "RLVR's directions": Contrast(_ACCURACY, "opd_update4", "opd_of_rlvr4"),
           "the size of the confined updates": Contrast(_ACCURACY, "opd_rescaled4", "opd_random_rescaled4")}),
    Claim("sufficiency-sft", "sufficiency", "SFT with gradients in its early 16 directions loses",
          "Figure 6: 45.6 against 55.5 %", Contrast(_ACCURACY, "sft", "sft_gradient16"), POINTS,
          {"SFT's own recipe": Contrast(_ACCURACY, "sft_matched_short", "sft_matched_gradient16")}, known="draft"),
    _same_rank("opd_top50", "tokens", "The half of the tokens with the largest log-ratio", "Figure 7"),
    _same_rank("opd_top25", "tokens", "The quarter of the tokens with the largest log-ratio", "Figure 7"),
    _same_rank("opd_random50", "tokens", "A random half of the tokens", "Figure 7"),
    _same_rank("opd_random25", "tokens", "A random quarter of the tokens", "Figure 7"),
    _same_rank("opd_teacher100", "rollouts", "Learning from the teacher's rollouts", "Section 5.2"),
    Claim("norm-opd_teacher100", "rollouts", "The teacher's rollouts move OPD further", "Section 5.2: modestly",
          Contrast(Metric("frobenius", log=True, **_END), "opd_teacher100", "opd_short"), log(1.05)),
    _same_rank("opd_mix75", "objectives", "A quarter of RLVR's objective", "Section 5.3"),
    _same_rank("opd_mix50", "objectives", "Half of RLVR's objective", "Section 5.3"),
    Claim("rank-opd_mix1", "objectives", "With one part in a hundred of OPD, the stable rank is another",
          "Section 5.3: a distinct spectral regime", Contrast(_SHORT_RANK, "opd_mix1", "opd_short", size=1), 0.25),
    Claim("rank-credit", "mechanism", "One credit per completion lowers the stable rank", "Section 6, Gate II",
          Contrast(_SHORT_RANK, "opd_short", "opd_sequence_mean"), 0.25),
    Claim("rank-forward", "mechanism", "Forward KL has the stable rank of reverse KL", "Appendix D",
          _near(_SHORT_RANK, "opd_forward", "opd_full_short"), -0.25,
          negative_controls={"RLVR, whose stable rank is as near": _near(_SHORT_RANK, "rlvr_short", "opd_full_short")}),
)  # fmt: skip

# --- analyses of finished runs ---


def _end_similarity(other: str, minus: str) -> Contrast:
    """Return how much more of OPD's final subspace one run has than another, both with the next seed."""
    first, second = (
        Metric("sim_right_K16", "similarity", {"other": name, "next_seed": True, "block": "attention"})
        for name in (other, minus)
    )
    return Contrast(first, "opd", minus=second)


def _outside(basis: str, minus: str = "") -> Contrast:
    """Return the share of OPD's update outside the span of two others, minus the share outside a second such span."""
    metric = Metric("residual", "span", {"basis": basis})
    return Contrast(metric, "opd", minus=replace(metric, where={"basis": minus}) if minus else 0.0)


def _gradients(arm: str, minus_arm: str = "") -> Contrast:
    """Return how much of OPD's gradient subspace a loss shares, beyond chance or beyond what another loss shares."""
    metric = Metric("sim_right_K16", "gradients", {"block": "attention"})
    if minus_arm:
        return Contrast(metric, arm, minus_arm)
    return Contrast(metric, arm, minus=replace(metric, column="sim_right_random_K16"))


def _stretched(arm: str) -> Contrast:
    where = {"kind": "stretched", "progress": 0.1, "factor": 1.0}
    return Contrast(Metric("recovered", "extrapolation", where), arm, minus=0.0)


_OF_RUNS = (
    Claim("channel-own", "locking", "Two seeds of OPD share more of their final subspaces than OPD and RLVR do",
          "Section 4: a channel of OPD's; no two runs are compared", _end_similarity("opd", "rlvr"), 0.05,
          {"matched SFT, which shares it as well": _end_similarity("opd", "sft_matched")}),
    Claim("span", "interpolation", "OPD's update lies outside the span of SFT's and RLVR's",
          "Section 7: more than an interpolation", _outside("SFT and RLVR"), 0.5,
          {"the chance of a seed": _outside("SFT and RLVR", "two other seeds")}),
    Claim("span-matched", "interpolation", "OPD's update lies outside the span of matched SFT's and RLVR's",
          "The same, with OPD's origin and recipe", _outside("matched SFT and RLVR"), 0.5,
          {"the chance of a seed": _outside("matched SFT and RLVR of another seed", "two other seeds")}),
    Claim("between", "interpolation", "OPD solves more than the point halfway between matched SFT and RLVR",
          "Section 7: more than an interpolation",
          Contrast(Metric("sampled", "landscape", {"path": "opd", "opd": 1.0}), "",
                   minus=Metric("sampled", "landscape", {"path": "sft_matched to rlvr", "rlvr": 0.5})), POINTS),
    Claim("gradients-top", "mechanism", "The top quarter of the tokens has gradients in OPD's subspace",
          "Section 6: a shared dominant subspace", _gradients("opd_top25"), 0.5,
          negative_controls={"RLVR's gradients, which lie there as well": _gradients("rlvr"),
                             "random credits, whose gradients lie there as well": _gradients("random signs")}),
    Claim("gradients-rlvr", "mechanism", "RLVR's gradients lie in another subspace than OPD's",
          "Section 6: a different source", _gradients("opd, another batch", "rlvr"), 0.1),
    Claim("entries", "mechanism", "OPD confined to an eighth of the entries, those it moved first, loses nothing",
          "2505.11711: a small subnetwork", Contrast(_ACCURACY, "opd_entries", "opd_short"), -POINTS,
          negative_controls={"a random eighth, which loses nothing either":
                             Contrast(_ACCURACY, "opd_random_entries", "opd_short")}, known="printed"),
    Claim("stretched", "mechanism", "A tenth of OPD's training, stretched to the final size, has most of its gain",
          "2605.11739: about 80 % of the score", _stretched("opd"), 0.5,
          negative_controls={"matched SFT, which has it as well": _stretched("sft_matched"),
                             "RLVR, which has it as well": _stretched("rlvr")}, known="printed"),
)  # fmt: skip

#: All claims.
#:
#: :meta hide-value:
CLAIMS = (
    _order("sparsity-opd-sft", "OPD leaves more weights unchanged than SFT", _SPARSITY, "opd", "sft", 0.01,
           "Table 1: 51.6 and 8.1 %"),
    _order("sparsity-rlvr-opd", "RLVR leaves more weights unchanged than OPD", _SPARSITY, "rlvr", "opd", 0.01,
           "Table 1: 77.2 and 51.6 %"),
    _order("rotation-sft-opd", "SFT turns subspaces further than OPD", _ANGLE, "sft", "opd", log(1.5),
           "Figure 2: above 10 and about 1 degree, the largest angles"),
    _order("rotation-opd-rlvr", "OPD turns subspaces further than RLVR", _ANGLE, "opd", "rlvr", log(1.2),
           "Figure 2: about 1 and below 0.5 degrees, the largest angles"),
    _order("drift-sft-opd", "SFT moves the spectrum further than OPD", _DRIFT, "sft", "opd", log(1.5),
           "Section 4: about 1e-3 and 1e-4"),
    _order("drift-opd-rlvr", "OPD moves the spectrum further than RLVR", _DRIFT, "opd", "rlvr", log(1.2),
           "Section 4: about 1e-4 and 1e-5"),
    _masked("opd", "OPD", "principal", "avoids the principal weights"),
    _masked("opd", "OPD", "low", "prefers the small weights", known="printed"),
    _masked("rlvr", "RLVR", "principal", "avoids the principal weights"),
    _masked("rlvr", "RLVR", "low", "prefers the small weights", known="printed"),
    Claim("rank-sft-rises", "rank", "The stable rank of SFT rises", "Figure 4: from 20 to 75",
          Contrast(_RISE, "sft", minus=0.0), 0.25, known="secondary"),
    Claim("rank-rlvr-falls", "rank", "The stable rank of RLVR falls", "Figure 4",
          Contrast(Metric("stable_rank", progress=0.1, block="attention"), "rlvr", minus=Metric("stable_rank", **_END)),
          0.25),
    Claim("rank-opd-flat", "rank", "The stable rank of OPD rises less than that of SFT", "Figure 4: 20 to 30",
          Contrast(_RISE, "sft", "opd"), 0.25,
          {"SFT's own recipe": Contrast(_RISE, "sft_matched", "opd")}, known="secondary"),
    Claim("norm-opd-rlvr", "rank", "OPD moves further than RLVR", "Figure 4: norms of 0.45 and 0.17",
          Contrast(Metric("frobenius", log=True, **_END), "opd", "rlvr"), log(1.2), known="draft"),
    Claim("locking-opd", "locking", "OPD's final subspace is there at 20 % of the training", "Figure 5",
          Contrast(_EARLY, "opd", minus=replace(_EARLY, column="sim_right_K16_null")), 0.1,
          {"matched SFT, which has it as well": Contrast(_EARLY, "opd", "sft_matched")}),
    Claim("locking-opd-sft", "locking", "OPD's final subspace is there earlier than SFT's", "Figure 5",
          Contrast(_EARLY, "opd", "sft"), 0.05,
          {"SFT's own recipe": Contrast(_EARLY, "opd", "sft_matched")}),
    *_VARIANTS,
    *_OF_RUNS,
)  # fmt: skip
