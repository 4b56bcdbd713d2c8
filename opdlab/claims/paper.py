"""The claims that the laboratory in the regime tests: those of the paper (2606.07082), then those of newer papers.

They are committed before the runs that they judge, or before the analyses of these, and each record names the claims
that it was made under by their digests. Margins are the same for all claims of a kind: a factor of 1.2 for sizes and
ranks, a twentieth of what is possible for sparsity, masks and similarities, and 0.02 nats of KL to the teacher, about a
tenth of what OPD gains.

A source without the number of a paper is a place in the third version of 2606.07082, or in the draft of its first.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

from opdlab.claims.literature import ELSEWHERE
from opdlab.claims.rules import Claim, Contrast, Metric

#: The margins of ratios, of shares, and of the KL to the teacher in nats per token.
RATIO, SHARE, NATS = log(1.2), 0.05, 0.02
_RECIPE, _SIZE, _LOCKED = "SFT's own recipe", "the size of the update", "rounding, on an update that is locked"

_SPARSITY = Metric("sparsity")
_BEYOND_SIZE = Metric("sparsity", minus="sparsity_ruler")
_KL = Metric("kl_teacher")
# The paper follows attention between checkpoints in bfloat16; its first one is at a fifth of the training.
_FOLLOWED: dict[str, Any] = {"block": "attention", "log": True}
_CURVE = Metric("stable_rank_bf16", curve=True, **_FOLLOWED)
_NORM = Metric("frobenius", progress=1.0, **_FOLLOWED)
_END, _EARLY = (Metric("stable_rank_bf16", progress=progress, **_FOLLOWED) for progress in (1.0, 0.2))
_RISE, _FALL = replace(_END, since=0.2), replace(_EARLY, since=1.0)
_SIM = Metric("sim_right_K16_bf16", progress=0.2, block="attention")


def _told(*claims: Claim) -> tuple[Claim, ...]:
    """Return claims with what other papers found about them."""
    return tuple(replace(claim, elsewhere=ELSEWHERE.get(claim.name, "")) for claim in claims)


def _but_locked(metric: Metric) -> Metric:
    """Return what a metric between bfloat16 checkpoints has beyond that of the locked null."""
    return replace(metric, minus=metric.column.replace("_bf16", "_locked"))


def _order(name: str, statement: str, source: str, metric: Metric, at_equal_size: Metric, high: str, low: str,
           margin: float) -> Claim:  # fmt: skip
    controls = {_SIZE: Contrast(at_equal_size, high, low)}
    if "sft" in (high, low):
        arms = ("sft_matched" if arm == "sft" else arm for arm in (high, low))
        controls[_RECIPE] = Contrast(metric, *arms)
    return Claim(name, "regime", statement, source, Contrast(metric, high, low), margin, controls=controls,
                 known="printed")  # fmt: skip


def _sizes(name: str, statement: str, source: str, column: str, high: str, low: str) -> Claim:
    metric = Metric(column, log=True)
    return _order(name, statement, source, metric, replace(metric, column=f"{column}_matched"), high, low, RATIO)


def _masked(arm: str, label: str, star: str, does: str, known: str) -> Claim:
    """Return the claim that an arm avoids the principal weights, or prefers the small ones."""
    column = f"{star}_position_a30"

    def beyond(null: str) -> Contrast:
        low, high = column, f"{column}_{null}"
        return Contrast(Metric(high, minus=low) if star == "principal" else Metric(low, minus=high), arm)

    printed = {"principal": "below the 30 % random baseline",
               "low": "53.59 % of OPD's updates and 73.48 % of RLVR's, at random 30"}  # fmt: skip
    controls = {_SIZE: beyond("ruler"), "noise of the same density": beyond("noise")}
    return Claim(f"{star}-{arm}", "regime", f"{label} {does}", f"Section 3.2: {printed[star]}",
                 beyond("share"), SHARE, controls=controls, known=known)  # fmt: skip


_SPARSER: dict[str, Any] = {
    "source": "Table 1: 8.1, 51.6 and 77.2 %",
    "metric": _SPARSITY,
    "at_equal_size": _BEYOND_SIZE,
}

_REGIME = _told(
    _order("sparsity-opd-sft", "OPD leaves more weights unchanged than SFT", high="opd", low="sft", margin=SHARE,
           **_SPARSER),
    _order("sparsity-rlvr-opd", "RLVR leaves more weights unchanged than OPD", high="rlvr", low="opd", margin=SHARE,
           **_SPARSER),
    _sizes("rotation-sft-opd", "SFT turns subspaces further than OPD",
           "Section 3.2: above 10 and around 1 degree in one layer", "angle_left_mean", "sft", "opd"),
    _sizes("rotation-opd-rlvr", "OPD turns subspaces further than RLVR",
           "Section 3.2: around 1 and below 0.5 degrees in one layer", "angle_left_mean", "opd", "rlvr"),
    _sizes("drift-sft-opd", "SFT moves the spectrum further than OPD", "Section 3.2: at the 1e-3 and the 1e-4 level",
           "nss", "sft", "opd"),
    _sizes("drift-opd-rlvr", "OPD moves the spectrum further than RLVR", "Section 3.2: at the 1e-4 and the 1e-5 level",
           "nss", "opd", "rlvr"),
    _masked("opd", "OPD", "principal", "avoids the principal weights", "words"),
    _masked("opd", "OPD", "low", "prefers the small weights", "printed"),
    _masked("rlvr", "RLVR", "principal", "avoids the principal weights", "words"),
    _masked("rlvr", "RLVR", "low", "prefers the small weights", "printed"),
    Claim("sparsity-same-teacher", "regime", "OPD from a teacher of its own size leaves as many weights unchanged",
          "Table 1: 48.6 to 57.1 % for all variants, of which none has such a teacher",
          Contrast(_SPARSITY, "opd_same_teacher", "opd"), SHARE, "near",
          rivals={"matched SFT": Contrast(_SPARSITY, "sft_matched", "opd")}, known="printed"),
    Claim("density-rlvr-long", "regime", "Ten times as long as OPD, RLVR changes more weights than OPD",
          "2609.39405, Appendix C.1: 1.27 % changed by OPD, 21.04 % by RL, from one anchor at one rate",
          Contrast(_SPARSITY, "opd", "rlvr_10"), SHARE,
          controls={_SIZE: Contrast(_BEYOND_SIZE, "opd", "rlvr_10")}, known="printed"),
    Claim("sparsity-rlvr-teacher", "regime", "Taught by what RLVR made of its anchor, OPD changes fewer weights",
          "2609.39405, Appendix C.1: with such a teacher OPD changes 1.27 %",
          Contrast(_SPARSITY, "opd_rlvr_teacher", "opd"), SHARE, known="printed"),
)  # fmt: skip

_RANK = _told(
    Claim("rank-rlvr-falls", "rank", "The stable rank of RLVR falls",
          "Section 4.1: contracts toward a low-dimensional endpoint", Contrast(_FALL, "rlvr"), RATIO,
          controls={_LOCKED: Contrast(_but_locked(_FALL), "rlvr")}),
    Claim("rank-sft-rises", "rank", "The stable rank of SFT rises",
          "Section 4.1: progressively expands; from 20 to 75, as a reader took it from Figure 4",
          Contrast(_RISE, "sft"), RATIO, controls={_RECIPE: Contrast(_RISE, "sft", "sft_matched")}, known="secondary"),
    Claim("rank-opd-flat", "rank", "The stable rank of OPD rises less than that of SFT",
          "Section 4.1: a narrow low-rank band; 20 to 30, as a reader took it from Figure 4",
          Contrast(_RISE, "sft", "opd"), RATIO, controls={
              _RECIPE: Contrast(_RISE, "sft_matched", "opd"),
              _LOCKED: Contrast(_but_locked(_RISE), "sft", "opd")}, known="secondary"),
    Claim("rank-opd-low", "rank", "At a fifth of the training OPD's stable rank is below RLVR's",
          "Section 4.1: OPD enters the low-dimensional regime early, RLVR contracts toward it",
          Contrast(_EARLY, "rlvr", "opd"), RATIO, controls={_LOCKED: Contrast(_but_locked(_EARLY), "rlvr", "opd")}),
    Claim("rank-opd-rlvr-end", "rank", "In the end RLVR's stable rank is about OPD's",
          "Section 4.1: ending with comparable stable rank",
          Contrast(_END, "rlvr", "opd"), RATIO, "near",
          rivals={"matched SFT": Contrast(_END, "sft_matched", "opd"),
                  "random signs": Contrast(_END, "random_signs", "opd")}),
    Claim("norm-opd-rlvr", "rank", "OPD moves further than RLVR",
          "Section 4.1: a substantially larger update; norms of 0.452 and 0.168 in the draft",
          Contrast(_NORM, "opd", "rlvr"), RATIO, known="draft"),
    Claim("norm-signs", "rank", "OPD moves further than credits without meaning would take it",
          "2606.07082 has no such control", Contrast(_NORM, "opd", "random_signs"), RATIO,
          controls={"matched SFT, which moves as far": Contrast(_NORM, "opd", "sft_matched")}),
)  # fmt: skip

_WALK = Metric("sim_right_K16", minus="sim_right_K16_null", progress=0.2, block="attention")


_LOCKING = _told(
    Claim("locking-opd", "locking", "OPD's final subspace is there at a fifth of the training",
          "Section 4.2: aligns with its final V16 from the first measured checkpoint",
          Contrast(_WALK, "opd"), SHARE, rivals={"matched SFT": Contrast(_WALK, "sft_matched"),
                                                 "random signs": Contrast(_WALK, "random_signs")}),
    Claim("locking-opd-rlvr", "locking", "OPD's final subspace is there earlier than RLVR's",
          "Section 4.2: SFT and RLVR converge more gradually",
          Contrast(_SIM, "opd", "rlvr"), SHARE, controls={_LOCKED: Contrast(_but_locked(_SIM), "opd", "rlvr")}),
    Claim("locking-opd-sft", "locking", "OPD's final subspace is there earlier than SFT's",
          "Section 4.2: SFT and RLVR converge more gradually",
          Contrast(_SIM, "opd", "sft"), SHARE, controls={
              _RECIPE: Contrast(_SIM, "opd", "sft_matched"),
              _LOCKED: Contrast(_but_locked(_SIM), "opd", "sft")}),
    Claim("locking-rlvr", "locking", "RLVR's final subspace is there at a fifth of the training, too",
          "2605.21468: one direction, estimated from the first 15 % of the steps, does as well as all of RLVR",
          Contrast(_WALK, "rlvr"), SHARE, rivals={"random signs": Contrast(_WALK, "random_signs")}),
)  # fmt: skip

# --- is the early subspace enough? Positive is a lower KL to the teacher ---


def _closer(arm: str, than: str) -> Contrast:
    return Contrast(_KL, than, arm)


_SUFFICIENCY = _told(
    Claim("sufficiency-opd", "sufficiency", "OPD with gradients in its early 16 directions loses nothing",
          "Section 4.2: essentially unchanged; 64.2 against 63.3 % in the draft",
          _closer("opd_gradient16", "opd"), -NATS, known="draft"),
    Claim("sufficiency-strict", "sufficiency", "OPD with updates in its early 4 directions loses nothing",
          "Section 4.2: sufficient for OPD training; made strict here", _closer("opd_update4", "opd"), -NATS,
          rivals={"4 random directions": _closer("opd_random_rescaled4", "opd"),
                  "4 principal directions of W0": _closer("opd_weights4", "opd"),
                  "4 directions of RLVR": _closer("opd_of_rlvr4", "opd")}),
    Claim("sufficiency-own", "sufficiency", "OPD's early directions serve it better than random ones of full size",
          "Section 4.2: not a generic property of the projection dimension",
          _closer("opd_update4", "opd_random_rescaled4"), NATS,
          controls={"the principal directions of W0": _closer("opd_update4", "opd_weights4"),
                    "RLVR's directions": _closer("opd_update4", "opd_of_rlvr4"),
                    "another seed's directions": _closer("opd_update4", "opd_of_seed4")}),
    Claim("sufficiency-sft", "sufficiency", "SFT with gradients in its early 16 directions loses",
          "Section 4.2: degrades SFT; 45.6 against 55.5 % in the draft",
          _closer("sft", "sft_gradient16"), NATS,
          controls={_RECIPE: _closer("sft_matched", "sft_matched_update4")}, known="draft"),
)  # fmt: skip

# --- one part of OPD changed at a time ---

_RIVALS = {"RLVR": Contrast(_CURVE, "rlvr", "opd"), "random signs": Contrast(_CURVE, "random_signs", "opd")}


def _same_rank(arm: str, finding: str, what: str, source: str, to: str = "opd", **entries: Any) -> Claim:
    rivals = {name: replace(rival, minus_arm=to) for name, rival in _RIVALS.items()}
    return Claim(f"rank-{arm}", finding, f"{what} keeps OPD's stable rank", source, Contrast(_CURVE, arm, to), RATIO,
                 "near", rivals=rivals, **entries)  # fmt: skip


_PARTS = _told(
    _same_rank("opd_top25", "tokens", "The quarter of the tokens with the largest log-ratio",
               "Section 5.1: all sparsified variants closely track the trajectory"),
    _same_rank("opd_random25", "tokens", "A random quarter of the tokens",
               "Section 5.1: changes update scale more than spectral shape"),
    Claim("tokens-first", "tokens", "The first 30 % of the tokens do as well as all",
          "2606.22600, abstract: perform comparably to using all tokens",
          _closer("opd_first30", "opd"), -NATS, rivals={"the last 30 %": _closer("opd_last30", "opd")}),
    Claim("tokens-last", "tokens", "The last 30 % of the tokens do worse than the first",
          "2606.22600, abstract: barely learns anything",
          _closer("opd_first30", "opd_last30"), NATS),
    Claim("tokens-random", "tokens", "A random quarter of the tokens does as well as all",
          "2604.14084, Table 3, where half of them, drawn by entropy, match all",
          _closer("opd_random25", "opd"), -NATS),
    _same_rank("opd_teacher100", "rollouts", "Learning from the teacher's rollouts",
               "Section 5.1: leaves the trajectory nearly unchanged"),
    Claim("norm-opd_teacher100", "rollouts", "The teacher's rollouts move OPD further",
          "Section 5.1: a modestly larger update norm",
          Contrast(_NORM, "opd_teacher100", "opd"), log(1.05)),
    Claim("rollouts-stale", "rollouts", "With stale rollouts, reverse KL does worse",
          "2606.24143, abstract: student-weighted reverse KL is vulnerable",
          _closer("opd", "opd_stale"), NATS),
    Claim("rollouts-stale-forward", "rollouts", "With stale rollouts, forward KL does not",
          "2606.24143, abstract: teacher-weighted forward KL is more robust",
          _closer("opd_stale_forward", "opd_forward"), -NATS,
          rivals={"reverse KL": _closer("opd_stale", "opd")}),
    _same_rank("opd_mix50", "objectives", "Half of RLVR's objective",
               "Section 5.2: OPD-dominant mixtures retain the trajectory; no threshold is given"),
    _same_rank("opd_mix5", "objectives", "With one part in twenty of OPD, the mixture",
               "Section 5.2: departs when the OPD component becomes weak; no threshold is given"),
    Claim("rank-opd_mix1", "objectives", "With one part in a hundred of OPD, the stable rank is another",
          "Section 5.2: enters a distinct spectral regime", Contrast(_CURVE, "opd_mix1", "opd"), RATIO, "apart"),
    _same_rank("opd_same_teacher", "mechanism", "A teacher of the student's size",
               "2606.07082 varies the teacher in Table 1, for sparsity alone"),
    _same_rank("opd_rlvr_teacher", "mechanism", "A teacher that RLVR made of the anchor",
               "2609.39405 has such a teacher, and measures no stable rank"),
    _same_rank("opd_forward", "mechanism", "Forward KL",
               "Appendix D: with forward KL the argument is unchanged", "opd_full"),
    Claim("rank-credit", "mechanism", "One credit per completion changes the stable rank",
          "Section 3.3, Gate II: heterogeneous token coefficients broaden the directional support",
          Contrast(_CURVE, "opd_sequence_mean", "opd"), RATIO, "apart"),
    Claim("rank-bf16", "mechanism", "Weights stored in bf16 change the stable rank",
          "2606.07082, Table 2: bf16 training", Contrast(_CURVE, "opd_bf16", "opd"), RATIO, "apart"),
    Claim("rank-rate", "mechanism", "Four times the learning rate changes the stable rank",
          "2606.07082, Tables 4 and 5: one rate",
          Contrast(_CURVE, "opd_quadruple_rate", "opd"), RATIO, "apart"),
)  # fmt: skip
# --- learning against eliciting: the same arms from an anchor that has half learned the skill ---

_FLOAT_END, _FLOAT_RISE = (Metric("stable_rank", progress=1.0, since=since, **_FOLLOWED) for since in (None, 0.2))
_FLOAT_SIM = Metric("sim_right_K16", progress=0.2, block="attention")


def _elicited(name: str, statement: str, metric: Metric, high: str, low: str, margin: float) -> Claim:
    arms = ("sft_matched" if "young" not in arm else "young_sft_matched" for arm in (high, low))
    return Claim(name, "mechanism", statement, "A question of this book; 2606.07082 has one anchor",
                 Contrast(metric, high, low), margin, rivals={"matched SFT": Contrast(metric, *arms)})  # fmt: skip


_ELICITING = (
    _elicited("elicit-coherent", "Where the skill is elicited, OPD moves further than where it is learned",
              _NORM, "opd", "young_opd", RATIO),
    _elicited("elicit-low", "Where the skill is elicited, OPD's stable rank is lower in the end",
              _FLOAT_END, "young_opd", "opd", RATIO),
    _elicited("elicit-flat", "Where the skill is elicited, OPD's stable rank rises less",
              _FLOAT_RISE, "young_opd", "opd", RATIO),
    _elicited("elicit-early", "Where the skill is elicited, OPD's final subspace is there earlier",
              _FLOAT_SIM, "opd", "young_opd", SHARE),
)  # fmt: skip

# --- analyses of finished runs ---

_ALL: dict[str, Any] = {"block": "all"}


def _path(name: str, column: str, statement: str, words: str) -> Claim:
    """Return a claim about the path of RLVR's update, beyond a random walk whose intervals have the same norms."""
    metric = Metric(column, f"{column}_null", "linearity", **_ALL)
    rivals = {"OPD": Contrast(metric, "opd"), "random signs": Contrast(metric, "random_signs")}
    source = f"2605.21468, abstract: {words}"
    return Claim(name, "locking", statement, source, Contrast(metric, "rlvr"), SHARE, rivals=rivals)


_AHEAD = Metric("cosine_rank1", analysis="linearity", **_ALL)
_FIRST = Metric("first", analysis="linearity", log=True, **_ALL)
_STRETCHED = Metric("recovered_kl", analysis="extrapolation",
                    where=(("kind", "stretched"), ("progress", 0.1), ("factor", 1.0)))  # fmt: skip
_TO_NEXT, _TO_SAME = (
    Metric("sim_right_K16", analysis="similarity", where=(("other", "opd"), ("next_seed", later)), block="attention")
    for later in (True, False)
)

_PATHS = _told(
    _path("linear-rlvr", "r2", "RLVR's update grows along a straight line in steps",
          "the magnitude of this projection evolves near-linearly with training steps"),
    _path("linear-rank", "along", "RLVR's updates at all times are nearly multiples of one",
          "the majority of gains are captured by a rank-1 approximation of the parameter deltas"),
    _path("linear-early", "cosine", "15 % of RLVR's training point to its end",
          "requiring as few as 15 % steps of full RLVR training"),
    Claim("ahead-opd", "locking", "OPD's leading directions point to their end earlier than RLVR's",
          "2605.11739: nearer to the final directions, most of all in the first 30 %",
          Contrast(_AHEAD, "opd", "rlvr"), SHARE,
          controls={"matched SFT, whose own do so, too": Contrast(_AHEAD, "opd", "sft_matched")}),
    Claim("concentrated-opd", "locking", "OPD's update has more of its energy in its first directions than RLVR's",
          "2605.11739: largest value over norm 39.6 and 33.2 % (1.5B) to 28.1 and 24.4 % (14B)",
          Contrast(_FIRST, "opd", "rlvr"), RATIO,
          controls={"matched SFT, which has as much there": Contrast(_FIRST, "opd", "sft_matched")}, known="printed"),
    Claim("stretched", "locking", "A tenth of OPD's training, stretched to the final size, has most of its gain",
          "2605.11739: about 80 % of the score", Contrast(_STRETCHED, "opd"), 0.5,
          rivals={"matched SFT": Contrast(_STRETCHED, "sft_matched"), "RLVR": Contrast(_STRETCHED, "rlvr")},
          known="printed"),
    Claim("channel-own", "locking", "OPD's runs from two anchors share more of their final subspaces than OPD and RLVR",
          "2606.07082: a persistent channel of OPD's; no two runs are compared",
          Contrast(_TO_NEXT, "opd", "rlvr"), SHARE,
          controls={"matched SFT, which shares as much": Contrast(_TO_NEXT, "opd", "sft_matched")}),
    Claim("channel-objective", "locking", "Two estimators of OPD end nearer to one another than RLVR to OPD",
          "2606.07082: a persistent channel of OPD's; here from one anchor",
          Contrast(_TO_SAME, "opd_full", "rlvr"), SHARE,
          controls={"matched SFT, which ends as near": Contrast(_TO_SAME, "opd_full", "sft_matched")}),
)  # fmt: skip


def _outside(name: str, basis: str, what: str, source: str) -> Claim:
    """Return the claim that some of OPD's update is no combination of two others."""
    metric = Metric("outside", analysis="span", where=(("basis", basis),))
    controls = {"the noise of OPD's estimator": Contrast(replace(metric, minus="outside_own"), "opd")}
    return Claim(name, "interpolation", f"Some of OPD's update lies outside the span of {what}", source,
                 Contrast(metric, "opd"), SHARE, controls=controls)  # fmt: skip


_TAUGHT_NORM = Metric("norm", analysis="taught", log=True, **_ALL)
_OFF, _ENERGY = (Metric(column, analysis="taught", **_ALL) for column in ("outside", "energy_4"))

_SPANS = _told(
    _outside("span", "SFT and RLVR", "SFT's and RLVR's",
             "2606.07082, abstract: not merely an intermediate point between SFT and RLVR"),
    _outside("span-matched", "matched SFT and RLVR", "matched SFT's and RLVR's",
             "2606.07082, abstract: the same; here from OPD's anchor, by OPD's recipe"),
    Claim("taught-norm", "interpolation", "Taught by what RLVR made of its anchor, OPD moves less far than RLVR",
          "2609.39405: 60 to 69 % of RL's norm", Contrast(_TAUGHT_NORM, "rlvr", "opd_rlvr_teacher"), RATIO,
          rivals={"OPD from a larger teacher": Contrast(_TAUGHT_NORM, "rlvr", "opd")}, known="printed"),
    Claim("taught-own", "interpolation", "Most of OPD's update is orthogonal to that of its RL teacher",
          "2609.39405: 93 to 95 %", Contrast(replace(_OFF, minus="inside"), "opd_rlvr_teacher"), SHARE,
          controls={"another run of RLVR, which is as orthogonal": Contrast(_OFF, "opd_rlvr_teacher", "rlvr")},
          known="printed"),
    Claim("taught-energy", "interpolation", "Taught by what RLVR made of its anchor, OPD spreads its energy more",
          "2609.39405: less concentrated than RL's at all ranks", Contrast(_ENERGY, "rlvr", "opd_rlvr_teacher"), SHARE,
          rivals={"OPD from a larger teacher": Contrast(_ENERGY, "rlvr", "opd")}),
)  # fmt: skip

_SHARED = Metric("sim_right_K16", analysis="gradients", block="attention")
_FORGOTTEN = Metric("kl", analysis="retention", log=True)


def _gradients(arm: str) -> Contrast:
    """Return how much more of OPD's gradient subspace a loss shares than another batch of OPD does."""
    return Contrast(_SHARED, arm, "opd, another batch")


def _forgotten(name: str, statement: str, high: str, low: str, **controls: Contrast) -> Claim:
    beyond = Contrast(replace(_FORGOTTEN, minus="kl_noise"), high, low)
    return Claim(name, "mechanism", statement, "2509.04259: who learns from their own samples forgets less",
                 Contrast(_FORGOTTEN, high, low), RATIO, controls={_SIZE: beyond} | controls)  # fmt: skip


_BY_ANALYSES = (
    Claim("gradients-top", "mechanism", "The top quarter of the tokens has gradients in OPD's subspace",
          "2606.07082: where the gradients of tokens share a dominant subspace", _gradients("opd_top25"), -SHARE,
          rivals={"RLVR": _gradients("rlvr"), "random signs": _gradients("random signs")}),
    Claim("gradients-rlvr", "mechanism", "RLVR's gradients lie in another subspace than OPD's",
          "2606.07082: another source of covariance", Contrast(_SHARED, "opd, another batch", "rlvr"), SHARE, controls={
              "credits without meaning, whose gradients do so, too": Contrast(_SHARED, "random signs", "rlvr")}),
    _forgotten("forget-sft", "OPD forgets less than SFT", "sft", "opd",
               **{_RECIPE: Contrast(_FORGOTTEN, "sft_matched", "opd")}),
    _forgotten("forget-rlvr", "RLVR forgets less than matched SFT", "sft_matched", "rlvr"),
)  # fmt: skip

#: The findings that claims belong to, with title and page of the chapter on each, in the order of the book.
#:
#: :meta hide-value:
FINDINGS = {
    "regime": ("How far each update goes", "04_size"),
    "rank": ("Rank, and its shadow in bfloat16", "06_rank"),
    "locking": ("Locking", "07_locking"),
    "sufficiency": ("Is the early subspace enough?", "08_sufficiency"),
    "tokens": ("Change one part", "09_parts"),
    "rollouts": ("Change one part", "09_parts"),
    "objectives": ("Change one part", "09_parts"),
    "mechanism": ("What makes the geometry?", "10_mechanism"),
    "interpolation": ("Is OPD between SFT and RLVR?", "11_between"),
}
#: All claims.
#:
#: :meta hide-value:
CLAIMS = (
    *(*_REGIME, *_RANK, *_LOCKING, *_SUFFICIENCY, *_PARTS, *_ELICITING),
    *(*_PATHS, *_SPANS, *_BY_ANALYSES),
)
