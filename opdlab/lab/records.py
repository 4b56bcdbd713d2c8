"""Records: the small tables of finished runs that chapters read instead of training again.

A record is a folder of CSV files with its configuration and provenance (``record.json``), of a run or of an analysis of
runs. It counts only if its configuration is exactly the one asked for; otherwise the run is trained, or the analysis
made, on the spot, and its tables are kept beside its weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.geometry import measure_pair, measure_trajectory, weight_matrices
from opdlab.geometry.matrices import describe
from opdlab.geometry.summary import means
from opdlab.lab.analyses import ANALYSES, Study
from opdlab.lab.grid import ARMS, PAPER
from opdlab.lab.scales import Scale, get_scale
from opdlab.models.files import load_tensors, write_json, write_whole
from opdlab.processes import cpu_threads, find_device, provenance
from opdlab.training.loop import train
from opdlab.training.store import Home, Run, config_key, default_home, resolve

TABLES = ("history", "evaluations", "matrices", "trajectory")


@dataclass(frozen=True)
class Records:
    """The tables of several runs, one below the other, each with the columns ``arm``, ``label`` and ``seed``.

    Attributes:
        history: one row per training step (loss, accuracy of the rollouts, entropy, norms, tokens, seconds: of the
            processor, or on a GPU of the clock).
        evaluations: one row per evaluation (greedy and sampled accuracy, entropy, KL to the teacher).
        matrices: one row per weight matrix, origin against end point (:func:`opdlab.geometry.measure_pair`).
        trajectory: one row per snapshot and block, attention or MLP, the mean over its matrices
            (:func:`opdlab.geometry.measure_trajectory`).
        sources: one row per run: where its tables come from, key, versions, seconds.
        analyses: the tables of analyses (:data:`opdlab.lab.analyses.ANALYSES`), by name, each with a column ``seed``.
    """

    history: pd.DataFrame
    evaluations: pd.DataFrame
    matrices: pd.DataFrame
    trajectory: pd.DataFrame
    sources: pd.DataFrame
    analyses: dict[str, pd.DataFrame] = field(default_factory=dict)

    def of_seeds(self, seeds: Sequence[int]) -> Records:
        """Return only what is of these seeds."""
        tables = {name: getattr(self, name) for name in (*TABLES, "sources")}
        kept = {name: table[table["seed"].isin(seeds)] for name, table in tables.items()}
        analyses = {name: table[table["seed"].isin(seeds)] for name, table in self.analyses.items()}
        return Records(**kept, analyses=analyses)

    def colophon(self) -> str:
        """Return one line on how many runs these are, how long they trained, and on what."""
        minutes = self.sources["seconds"].sum() / 60
        on_cpu = self.sources["device"] == "cpu"
        made = self.sources.assign(on=self.sources["processor"].where(on_cpu, self.sources["device"]))
        machines = made[["torch", "transformers", "on"]].drop_duplicates().itertuples()
        where = "; ".join(f"torch {row.torch}, transformers {row.transformers}, {row.on}" for row in machines)
        threads = " in one thread each" if on_cpu.all() else ""
        return f"*Runs of this page: {len(self.sources)}, {minutes:.0f} minutes of training{threads}, {where}.*"


def record_key(config: dict, scale: Scale) -> str:
    """Return the hash of what decides a record: the run's configuration and the resolution of the measurements."""
    measured = {"run": config, "geometry": json.loads(json.dumps(asdict(scale.geometry)))}
    if scale.trajectory_block:
        measured["trajectory_block"] = scale.trajectory_block
    return config_key(measured)


def measure_run(run: Run, scale: Scale) -> Path:
    """Measure a finished run, write its tables into its folder, and return their folder."""
    folder = run.folder / "tables"
    device = find_device(scale.gpu)
    origin = _on(device, run.snapshot(0))
    seed, last = run.config["seed"], run.snapshot_path(run.config["recipe"]["steps"])
    snapshots = [(step, _follow(_on(device, run.snapshot(step)), scale)) for step in run.config["snapshots"][1:]]
    followed = _follow(origin, scale), snapshots
    with cpu_threads(scale.threads):
        tables = {
            "history": pd.DataFrame(run.lines("history")),
            "evaluations": pd.DataFrame(run.lines("evaluations")),
            "matrices": measure_pair(origin, _on(device, load_tensors(last)[0]), scale.geometry, seed=seed),
            "trajectory": by_block(measure_trajectory(*followed, scale.geometry, seed=seed)),
        }
    for name, table in tables.items():
        _write_table(folder / f"{name}.csv", table)
    # Written last: a folder without it is not a record.
    write_json(
        folder / "record.json",
        {
            "key": record_key(run.config, scale),
            "weights": tensors_digest(last),
            "seconds": round(float(tables["history"]["seconds"].sum()), 1),
            "provenance": json.loads((run.folder / "provenance.json").read_text()),
            "config": run.config,
            "geometry": asdict(scale.geometry),
        },
    )
    return folder


def _on(device: torch.device, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.to(device) for name, weight in weights.items()}


def _follow(weights: dict[str, Tensor], scale: Scale) -> dict[str, Tensor]:
    """Choose the matrices that a scale follows over training."""
    matrices = weight_matrices(weights)
    return {name: matrix for name, matrix in matrices.items() if scale.trajectory_block in ("", describe(name).block)}


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda file: table.to_csv(file, index=False, float_format="%.7g", lineterminator="\n"))


def tensors_digest(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of the tensors in a snapshot: equal if they agree bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(path)[0].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_record(folder: Path, names: tuple[str, ...] = TABLES) -> tuple[dict, dict[str, pd.DataFrame]]:
    """Read ``record.json`` and the tables called ``names`` of one record.

    Raises:
        OpdlabError: if a file is missing or damaged, naming it.
    """
    path = folder / "record.json"
    try:
        description = json.loads(path.read_text())
        tables = {}
        for name in names:
            path = folder / f"{name}.csv"
            tables[name] = pd.read_csv(path)
        return description, tables
    except (OSError, ValueError) as problem:
        raise OpdlabError(
            f"the record file {path} is missing or damaged ({problem}): restore it, or delete its folder"
        ) from problem


def is_recorded(folder: Path, key: str) -> bool:
    """Tell whether ``folder`` holds the record with this key.

    Raises:
        OpdlabError: if its record.json is damaged.
    """
    path = folder / "record.json"
    if not path.exists():
        return False
    try:
        return json.loads(path.read_text())["key"] == key
    except (ValueError, KeyError) as problem:
        raise OpdlabError(f"the record file {path} is damaged: restore it, or delete its folder") from problem


def has_record(name: str, seed: int, scale: Scale, home: Home) -> bool:
    """Tell whether the repository has the record of a run, or of an analysis, as it would be made now."""
    folder = home.records(scale) / f"{name}-seed{seed}"
    if not folder.is_dir():
        return False
    if name in ANALYSES:
        return is_recorded(folder, record_key(_config_of_analysis(name, seed, scale, home), scale))
    return is_recorded(folder, record_key(resolve(scale, name, seed, home), scale))


def recorded_arms(scale: Scale, home: Home | None = None) -> tuple[str, ...]:
    """Return the arms of which the repository has the records of all seeds that a scale has: no training is needed."""
    home = home or default_home()
    return tuple(
        arm for arm in scale.recorded if all(has_record(arm, seed, scale, home) for seed in scale.seeds_of(arm))
    )


def recorded_analyses(scale: Scale, home: Home | None = None) -> tuple[str, ...]:
    """Return the analyses of which the repository has the records of all their seeds."""
    home = home or default_home()
    return tuple(
        name
        for name in scale.analyses
        if all(has_record(name, seed, scale, home) for seed in ANALYSES[name].seeds(scale))
    )


def find_tables(arm: str, seed: int, scale: Scale, home: Home, progress: bool = False) -> Path:
    """Return the folder with the tables of a run: its record, else its own folder, else train and measure it now.

    Args:
        arm: of which arm.
        seed: with which seed.
        scale: at which scale.
        home: where records, models and runs lie.
        progress: show bars for what has to be trained.
    """
    config = resolve(scale, arm, seed, home)
    key = record_key(config, scale)
    recorded = home.records(scale) / f"{arm}-seed{seed}"
    run = Run.of(scale, arm, seed, home)
    for folder in (recorded, run.folder / "tables"):
        if is_recorded(folder, key):
            return folder
    if progress and recorded.exists():
        print(f"{arm} seed {seed}: the record was made with another configuration; training it now")
    return measure_run(train(arm, seed, scale, home=home, progress=progress), scale)


def write_record(name: str, seed: int, scale: Scale, home: Home) -> Path:
    """Copy the tables of a finished run, or of an analysis, to the records, and return their folder there.

    Args:
        name: of an arm or an analysis.
        seed: with which seed.
        scale: at which scale.
        home: where records, models and runs lie.
    """
    find, tables = (find_analysis, (name,)) if name in ANALYSES else (find_tables, TABLES)
    source, target = find(name, seed, scale, home), home.records(scale) / f"{name}-seed{seed}"
    if source != target:
        for file in (*(f"{table}.csv" for table in tables), "record.json"):
            write_whole(target / file, partial(shutil.copyfile, source / file))
    return target


def _config_of_analysis(name: str, seed: int, scale: Scale, home: Home) -> dict:
    runs = {f"{arm}-seed{s}": config_key(resolve(scale, arm, s, home)) for arm, s in ANALYSES[name].runs(scale, seed)}
    return {"scale": scale.name, "analysis": name, "seed": seed, "runs": runs}


def find_analysis(name: str, seed: int, scale: Scale, home: Home, progress: bool = False) -> Path:
    """Return the folder with the table of an analysis: its record, else an earlier one, else make it now.

    Args:
        name: in :data:`opdlab.lab.analyses.ANALYSES`.
        seed: with which seed.
        scale: at which scale.
        home: where records, models and runs lie.
        progress: show bars.
    """
    analysis, config = ANALYSES[name], _config_of_analysis(name, seed, scale, home)
    key = record_key(config, scale)
    here = home.runs(scale) / f"{name}-seed{seed}-{key}"
    for folder in (home.records(scale) / f"{name}-seed{seed}", here):
        if is_recorded(folder, key):
            return folder
    began = time.process_time()
    with cpu_threads(scale.threads):
        table = analysis.measure(Study(scale, home, seed, progress=progress))
    if analysis.keys:
        table = by_block(table, analysis.keys)
    _write_table(here / f"{name}.csv", table)
    digest = hashlib.sha256((here / f"{name}.csv").read_bytes()).hexdigest()[:16]
    seconds = round(time.process_time() - began, 1)
    geometry = asdict(scale.geometry)
    description = {"key": key, "table": digest, "seconds": seconds, "provenance": provenance(), "config": config}
    write_json(here / "record.json", description | {"geometry": geometry})
    return here


def load_records(
    arms: tuple[str, ...] = PAPER,
    scale: Scale | None = None,
    *,
    seeds: tuple[int, ...] | None = None,
    home: Home | None = None,
    progress: bool = True,
    analyses: tuple[str, ...] = (),
) -> Records:
    """Return the tables of ``arms`` at a scale, over its seeds, training whatever is not recorded.

    Args:
        arms: names in :data:`opdlab.lab.grid.ARMS`; by default the paper's and matched SFT.
        scale: by default that of ``OPDLAB_SCALE``.
        seeds: by default those that the scale has for each arm.
        home: by default the repository.
        progress: show bars for what has to be trained.
        analyses: names in :data:`opdlab.lab.analyses.ANALYSES`; by default none.
    """
    scale, home = scale or get_scale(), home or default_home()
    parts: dict[str, dict[tuple, pd.DataFrame]] = {name: {} for name in TABLES}
    sources = []
    wanted = [(arm, seed) for arm in arms for seed in (scale.seeds_of(arm) if seeds is None else seeds)]
    for arm, seed in wanted:
        folder = find_tables(arm, seed, scale, home, progress)
        description, tables = read_record(folder)
        recorded = folder.is_relative_to(home.records(scale))
        source = {"arm": arm, "label": ARMS[arm].label, "seed": seed, "recorded": recorded}
        source |= {name: description[name] for name in ("key", "seconds", "weights")}
        sources.append(source | description["provenance"])
        for name, table in tables.items():
            parts[name][arm, ARMS[arm].label, seed] = table
    who = ["arm", "label", "seed"]
    joined = {
        name: pd.concat(tables, names=who).reset_index(who).reset_index(drop=True) for name, tables in parts.items()
    }
    steps = {arm: scale.recipe(arm).steps for arm in arms}
    for name in TABLES:
        if "step" in joined[name]:
            joined[name]["progress"] = joined[name]["step"] / joined[name]["arm"].map(steps)
    found = {}
    for name in analyses:
        of_seeds = []
        for seed in ANALYSES[name].seeds(scale):
            if seeds is None or seed in seeds:
                folder = find_analysis(name, seed, scale, home, progress)
                of_seeds.append(read_record(folder, (name,))[1][name].assign(seed=seed))
        found[name] = pd.concat(of_seeds, ignore_index=True)
    return Records(**joined, sources=pd.DataFrame(sources), analyses=found)


def nearest(table: pd.DataFrame, progress: float) -> pd.DataFrame:
    """Return, of a table with the columns ``arm`` and ``progress``, each arm's rows nearest to a share of training."""
    gap = (table["progress"] - progress).abs()
    return table[gap == gap.groupby(table["arm"]).transform("min")]


def by_block(table: pd.DataFrame, keys: tuple[str, ...] = ("step",)) -> pd.DataFrame:
    """Average over the matrices of each block, as :func:`per_run` does, keeping apart what differs in ``keys``."""
    return means(table, [*keys, "block"])


def per_run(table: pd.DataFrame, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Average over matrices, leaving one row per run of ``matrices``, or per run and snapshot of ``trajectory``.

    All diagnostics are averaged, or only those in ``columns``, which is faster.

    The mean is unweighted, the paper's rule for all diagnostics but one: sparsity weighs a matrix by its parameters
    (2606.07082, Appendix C.3). ``matrices`` counts what was averaged.
    """
    return means(table, [key for key in ("arm", "label", "seed", "step", "progress") if key in table], columns)
