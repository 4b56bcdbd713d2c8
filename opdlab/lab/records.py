"""Records: the tables of finished runs and of analyses of them, which chapters read. Reading never trains.

The records of a scale are one folder::

    data/records/tiny/
        runs.csv                one row per run: arm, seed, key, what decides it, where and how long it was made
        opd/history.csv         the tables of an arm, with the columns arm and seed (:class:`Records`)
        opd/...
        analyses.csv            one row per analysis and seed: where and how long it was made
        analyses/span.csv       the table of an analysis, with the columns seed and key
        claims.json             the claims that runs and analyses were made under, by the digest in their column claims

A row counts only if its key is that of the experiment asked for, or of all the experiments that an analysis read.
Columns that follow from others are not stored: :func:`read_tables` adds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.geometry import gaussian_stable_rank
from opdlab.geometry.matrices import LAYERS, describe
from opdlab.geometry.summary import means
from opdlab.lab.analyses import ANALYSES, Analysis, Part, RunSet
from opdlab.lab.laboratory import Laboratory
from opdlab.measuring import shown
from opdlab.measuring.sources import open_all
from opdlab.measuring.tensors import Job, measured
from opdlab.measuring.where import Where, beside_published, of_seeds
from opdlab.models.files import read_json, tensors_digest, write_json
from opdlab.processes import cpu_threads, find_device, provenance
from opdlab.training.config import Experiment, config_key
from opdlab.training.store import REMEDY

# Records have seven digits.
write_table = partial(shown.write_table, digits="%.7g")

TABLES = ("history", "evaluations", "matrices", "trajectory")
#: Columns of ``evaluations``.
EVALUATED = ("sampled", "greedy", "entropy", "kl_teacher")
# Columns of hexadecimal digits, which may look like numbers.
DIGESTS = ("key", "claims", "weights", "student", "teacher", "data", "template", "projection.run")


@dataclass(frozen=True)
class Records:
    """The tables of several runs, one below the other, each with the columns ``arm``, ``label`` and ``seed``."""

    #: One row per training step, with loss, accuracy of the rollouts, entropy, norms, tokens and seconds (of the
    #: processor, or on a GPU of the clock).
    history: pd.DataFrame
    evaluations: pd.DataFrame  #: one row per evaluation, with greedy and sampled accuracy, entropy, KL to the teacher
    matrices: pd.DataFrame  #: one row per weight matrix, origin against end point (opdlab.geometry.measure_matrix)
    trajectory: pd.DataFrame  #: one row per snapshot and block, attention or MLP, the mean over its matrices
    runs: pd.DataFrame  #: one row per run, with key, what decides it, versions, seconds
    analyses: dict[str, pd.DataFrame] = field(default_factory=dict)  #: tables of analyses by name, with a column seed

    def table_of(self, column: str, analysis: str = "", over_steps: bool = False) -> pd.DataFrame:
        """Return the table that a column is read from.

        Raises:
            OpdlabError: if it is that of an analysis, and the records were loaded without this.
        """
        if analysis:
            if analysis not in self.analyses:
                raise OpdlabError(f"the records were loaded without the analysis {analysis!r}")
            return self.analyses[analysis]
        if column in EVALUATED:
            return self.evaluations
        return self.trajectory if over_steps else self.matrices

    def where(self) -> Where:
        """Return where the runs of each arm are, in the mean over seeds, beside updates that were published."""
        tables = {name: getattr(self, name) for name in ("matrices", "trajectory", "history")}
        return beside_published(of_seeds(self.runs, tables))

    def colophon(self) -> str:
        """Return one line on how many runs these are, how long they trained, and on what."""
        minutes = self.runs["seconds"].sum() / 60
        on_cpu = self.runs["device"] == "cpu"
        made = self.runs.assign(on=self.runs["processor"].where(on_cpu, self.runs["device"]))
        machines = made[["torch", "transformers", "on"]].drop_duplicates().itertuples()
        where = "; ".join(f"torch {row.torch}, transformers {row.transformers}, {row.on}" for row in machines)
        threads = " in one thread each" if on_cpu.all() else ""
        return f"*Runs of this page: {len(self.runs)}, {minutes:.0f} minutes of training{threads}, {where}.*"


# --- reading ----------------------------------------------------------------------------------------------------------


class _Reading(Laboratory):
    """A laboratory whose models stay as they are: each experiment, and so its key, is found out once."""

    @cached_property
    def _found(self) -> Callable[[str, int], Experiment]:
        return cache(super().experiment)

    def experiment(self, name: str, seed: int = 0) -> Experiment:
        """Return the experiment of an arm and a seed, as it was at first."""
        return self._found(name, seed)


def load(
    scale: str | Laboratory | None = None,
    arms: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    analyses: Sequence[str] | None = None,
    root: Path | None = None,
) -> Records:
    """Return the records of a scale. Nothing is trained.

    Args:
        scale: its name, or its laboratory; by default that of ``OPDLAB_SCALE``.
        arms: names in :data:`opdlab.lab.grid.ARMS`; by default all that are recorded.
        seeds: by default those that the scale has for each arm.
        analyses: names in :data:`opdlab.lab.analyses.ANALYSES`; by default none if ``arms`` is given, or else all that
            are recorded.
        root: the folder that holds data/records; by default the repository.

    Raises:
        OpdlabError: if a record is missing, with the command that makes it, or a file is damaged.
    """
    lab = _Reading(**vars(scale if isinstance(scale, Laboratory) else Laboratory.at(scale, root)))
    asked = analyses is not None
    if analyses is None:
        analyses = recorded_analyses(lab) if arms is None else ()
    arms = recorded_arms(lab) if arms is None else tuple(arms)
    index = read_index(lab.records)
    wanted = [(arm, seed) for arm in arms for seed in (lab.seeds_of(arm) if seeds is None else seeds)]
    missing = dict.fromkeys(arm for arm, seed in wanted if not has_record(arm, seed, lab, index))
    if missing or not wanted:
        named = "".join(f" --arm {arm}" for arm in missing)
        raise OpdlabError(
            f"{lab.records} has no record of {', '.join(missing) or 'any arm'} as it would be made now: run "
            f"'opdlab record --scale {lab.scale.name}{named}'{lab.elsewhere}"
        )
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for arm in arms:
        kept = [seed for name, seed in wanted if name == arm]
        for name, table in read_tables(lab.records / arm).items():
            # A copy is in one piece, or pandas warns where columns are added later.
            rows = table[table["seed"].isin(kept)].copy().assign(label=lab.arm(arm).label)
            parts[name].append(rows.assign(progress=rows["step"] / lab.recipe(arm).steps) if "step" in rows else rows)
    tables = {name: pd.concat(of_arms, ignore_index=True) for name, of_arms in parts.items()}
    runs = pd.DataFrame(wanted, columns=["arm", "seed"]).merge(index, on=["arm", "seed"], how="left")
    runs.insert(1, "label", [lab.arm(arm).label for arm in runs["arm"]])
    # What was found to be recorded is not asked again.
    found = {name: _analysis(name, lab, seeds, index if asked else None) for name in analyses}
    return Records(**tables, runs=runs, analyses=found)


def _analysis(name: str, lab: Laboratory, seeds: Sequence[int] | None, index: pd.DataFrame | None) -> pd.DataFrame:
    """Return the rows of an analysis that count, after a look whether it is due if an index of the runs is given."""
    analysis = ANALYSES[name]
    wanted = [seed for seed in analysis.seeds(lab) if seeds is None or seed in seeds]
    if index is not None and any(_is_due(analysis, seed, lab, index) for seed in wanted):
        raise OpdlabError(
            f"{lab.records} has no record of the analysis {name!r} as it would be made now: run "
            f"'opdlab record --scale {lab.scale.name} --analysis {name}'{lab.elsewhere}"
        )
    table = read_table(lab.records / "analyses" / f"{name}.csv")
    valid = {part.key(lab) for seed in wanted for part in analysis.parts(lab, seed)}
    return table[table["key"].isin(valid) & table["seed"].isin(wanted)].reset_index(drop=True)


def read_index(folder: Path, of: str = "runs") -> pd.DataFrame:
    """Return the table of all runs in a folder of records, or ``of`` all "analyses"; empty if there is none."""
    path, what = folder / f"{of}.csv", {"runs": "arm", "analyses": "analysis"}[of]
    return read_table(path) if path.exists() else pd.DataFrame(columns=[what, "seed", "key"])


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Read the tables of an arm, or of a run, with the columns that are not stored; raises as :func:`read_table`."""
    tables = {name: read_table(folder / f"{name}.csv") for name in TABLES}
    matrices = tables["matrices"]
    return tables | {"matrices": pd.concat([matrices, derived(matrices)], axis=1)}


def read_table(path: Path) -> pd.DataFrame:
    """Read one file as it is stored, or raise an OpdlabError if it is missing or damaged."""
    try:
        return pd.read_csv(path, dtype=dict.fromkeys(DIGESTS, str))
    except (OSError, ValueError) as problem:
        raise OpdlabError(
            f"the record file {path} is missing or damaged ({problem}): restore it, or delete it and record again"
        ) from problem


#: Shares of the entries in the masks, in percent.
MASK_PERCENTS = (30, 50)


def derived(matrices: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that follow from name, shape and resolution of a matrix, with as many digits as are stored."""
    m, n, k = matrices["rows"], matrices["cols"], matrices["k"]
    gaussian = {shape: gaussian_stable_rank(*shape) for shape in set(zip(m, n, strict=True))}
    columns = {
        "energy_left_random": k / m,
        "energy_right_random": k / n,
        "energy_both_random": k / m * (k / n),
        "stable_rank_gaussian": [gaussian[shape] for shape in zip(m, n, strict=True)],
    }
    for percent in MASK_PERCENTS:
        share = (percent / 100 * (m * n)).round() / (m * n)
        columns |= {f"principal_share_a{percent}": share, f"low_share_a{percent}": share}
    rounded = pd.DataFrame(columns, index=matrices.index).map(lambda value: float(f"{value:.7g}"))
    described = pd.DataFrame([describe(name)._asdict() for name in matrices["matrix"]], index=matrices.index)
    return pd.concat([described.assign(parameters=m * n), rounded], axis=1)


def has_record(arm: str, seed: int, lab: Laboratory, index: pd.DataFrame | None = None) -> bool:
    """Tell whether a run is recorded as it would be made now."""
    index = read_index(lab.records) if index is None else index
    keys = index.loc[(index["arm"] == arm) & (index["seed"] == seed), "key"]
    return bool(len(keys)) and keys.iloc[0] == lab.experiment(arm, seed).key


def recorded_arms(lab: Laboratory) -> tuple[str, ...]:
    """Return the arms recorded for every seed of the scale."""
    index, arms = read_index(lab.records), lab.scale.policy.arms
    return tuple(arm for arm in arms if all(has_record(arm, seed, lab, index) for seed in lab.seeds_of(arm)))


def recorded_analyses(lab: Laboratory) -> tuple[str, ...]:
    """Return the analyses recorded for every seed that they have at the scale."""
    index, analyses = read_index(lab.records), (ANALYSES[name] for name in lab.scale.policy.analyses)
    return tuple(of.name for of in analyses if not any(_is_due(of, seed, lab, index) for seed in of.seeds(lab)))


def _is_due(analysis: Analysis, seed: int, lab: Laboratory, index: pd.DataFrame) -> bool:
    """Tell whether an analysis lacks a part. Pairs with a run that is not recorded itself are not asked for yet."""
    missing = missing_parts(analysis, seed, lab)
    if not analysis.pairs or len(missing) == len(analysis.parts(lab, seed)):
        return bool(missing)
    return any(all(has_record(*run, lab, index) for run in part.runs) for part in missing)


def missing_parts(analysis: Analysis, seed: int, lab: Laboratory) -> list[Part]:
    """Return the parts of an analysis that are not recorded as they would be made now."""
    path = lab.records / "analyses" / f"{analysis.name}.csv"
    known = set(read_table(path).query("seed == @seed")["key"]) if path.exists() else set()
    return [part for part in analysis.parts(lab, seed) if not _is_in(known, part, lab)]


def _is_in(known: set[str], part: Part, lab: Laboratory) -> bool:
    try:
        return part.key(lab) in known
    except OpdlabError:  # A run of it starts from a model that is yet to be made.
        return False


# --- making -----------------------------------------------------------------------------------------------------------


def find_tables(arm: str, seed: int, lab: Laboratory) -> Path:
    """Return the folder with the tables of a run, which is trained and measured first if it has none yet.

    Raises:
        OpdlabError: if a file of the run is damaged, and whatever training raises.
    """
    folder = lab.run(arm, seed).folder / "tables"
    if (folder / "record.json").exists():
        return folder
    run, block = lab.train(arm, seed), lab.scale.policy.trajectory_block
    experiment = run.experiment
    tables = {name: pd.DataFrame(run.lines(name)) for name in ("history", "evaluations")}
    machine = read_json(run.folder / "provenance.json", REMEDY)
    for step in experiment.kept:
        run.snapshot(step)  # Its digest is looked at.
    base, *path = map(run.snapshot_path, experiment.kept)
    job = Job(
        *open_all(base, path), steps=experiment.kept[1:], seed=experiment.seed, blocks=LAYERS,
        trajectory_blocks=(block,) if block else None, device=str(find_device(experiment.compute.gpu)),
    )  # fmt: skip
    with cpu_threads(experiment.compute.threads), measured(job, processes=1) as (matrices, trajectory):
        tables["matrices"] = matrices.drop(columns=list(derived(matrices)))
        tables["trajectory"] = means(trajectory, ["step", "block"])
    who = {"arm": experiment.name, "seed": experiment.seed}
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", pd.concat([pd.DataFrame(who, index=table.index), table], axis=1))
    # A column for each entry of each part, such as recipe.steps, with lists as text.
    decides = pd.json_normalize(run.config).to_dict("records")[0]
    decides |= {name: " ".join(map(str, value)) for name, value in decides.items() if isinstance(value, list)}
    description = {
        **who,
        "key": experiment.key,
        "weights": tensors_digest(run.snapshot(run.steps)),
        "seconds": round(float(tables["history"]["seconds"].sum()), 1),
        **decides,
        **machine,
        **({"claims": config_key(dict(lab.claims))} if lab.claims else {}),
    }
    # Written last: a folder without it is not a record.
    write_json(folder / "record.json", description)
    return folder


def add_run(folder: Path, lab: Laboratory) -> None:
    """Put the tables of a run into the records, in the place of older ones of the same arm and seed.

    One process at a time may do so: the others only write the tables of their runs.
    """
    description = read_json(folder / "record.json", f"delete {folder} and run it again")
    arm, seed = description["arm"], description["seed"]
    for name in TABLES:
        _replace_rows(lab.records / arm / f"{name}.csv", read_table(folder / f"{name}.csv"), seed=seed)
    _replace_rows(lab.records / "runs.csv", pd.DataFrame([description]), arm=arm, seed=seed)
    _keep_claims([description.get("claims")], lab)


def _keep_claims(named: Sequence[str | None], lab: Laboratory) -> None:
    """Write down what is in the laboratory's set of claims, if new records name it."""
    if (own := config_key(dict(lab.claims))) in named:
        path = lab.records / "claims.json"
        known = read_json(path) if path.is_file() else {}
        write_json(path, known | {own: dict(lab.claims)})


def analyse(name: str, seed: int, lab: Laboratory) -> Path:
    """Compute the parts of an analysis that are not recorded, and return the folder with their table."""
    analysis, folder = ANALYSES[name], lab.runs / f"{name}-seed{seed}"
    parts = missing_parts(analysis, seed, lab)
    with cpu_threads(lab.scale.compute.threads):
        began = time.process_time()  # whatever else runs here
        table = analysis.measure(RunSet(lab, seed), parts)
        seconds = round(time.process_time() - began, 1)
    if analysis.keys:
        table = means(table, [*analysis.keys, "block"])
    keys = {tuple(part.entries.values()): part.key(lab) for part in parts}
    of_rows = [keys[tuple(row[name] for name in parts[0].entries)] for row in table.to_dict("records")]
    table.insert(0, "seed", seed)
    table.insert(1, "key", of_rows)
    if lab.claims:  # row by row, for a part may come later than another
        table.insert(2, "claims", config_key(dict(lab.claims)))
    write_table(folder / f"{name}.csv", table)
    write_json(folder / "record.json", {"analysis": name, "seed": seed, "seconds": seconds, **provenance()})
    return folder


def add_analysis(folder: Path, lab: Laboratory) -> None:
    """Put the table of an analysis into the records, in the place of older rows of the same parts."""
    description = read_json(folder / "record.json", f"delete {folder} and run it again")
    name, seed = description["analysis"], description["seed"]
    path = lab.records / "analyses" / f"{name}.csv"
    valid = {part.key(lab) for part in ANALYSES[name].parts(lab, seed)}
    added = read_table(folder / f"{name}.csv")
    before = read_table(path) if path.exists() else added.head(0)
    stale = (before["seed"] == seed) & (~before["key"].isin(valid) | before["key"].isin(added["key"]))
    write_table(path, pd.concat([before[~stale], added], ignore_index=True).sort_values("seed", kind="stable"))
    _replace_rows(lab.records / "analyses.csv", pd.DataFrame([description]), analysis=name, seed=seed)
    _keep_claims(list(added.get("claims", ())), lab)


def _replace_rows(path: Path, rows: pd.DataFrame, **which: Any) -> None:
    """Add rows to a table on disk, in the place of those with the same entries in the columns of ``which``."""
    if path.exists():
        before = read_table(path)
        same = (before[list(which)] == pd.Series(which)).all(axis=1)
        rows = pd.concat([before[~same], rows], ignore_index=True)
    write_table(path, rows.sort_values(list(which), kind="stable"))


# --- means ------------------------------------------------------------------------------------------------------------


def nearest(table: pd.DataFrame, progress: float) -> pd.DataFrame:
    """Return, of a table with the columns ``arm`` and ``progress``, each arm's rows nearest to a share of training."""
    gap = (table["progress"] - progress).abs()
    return table[gap == gap.groupby(table["arm"]).transform("min")]


def per_run(table: pd.DataFrame, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Average over matrices, leaving one row per run of ``matrices``, or per run and snapshot of ``trajectory``.

    All diagnostics are averaged, or only those in ``columns``, which is faster. The mean is unweighted, the paper's
    rule for all diagnostics but one: sparsity weighs a matrix by its parameters (2606.07082, Appendix C.3).
    ``matrices`` counts what was averaged.
    """
    return means(table, [key for key in ("arm", "label", "seed", "step", "progress") if key in table], columns)
