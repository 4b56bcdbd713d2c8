"""Making records: the jobs of a scale, in the order in which they need each other, and a comparison with the record.

The jobs are its models, its recorded runs and the analyses of these. They run as one-thread processes side by side:
base -> SFT -> anchor, teacher, then what starts from the anchor, the projected runs that take their directions from
another run, and last the analyses. Each writes the tables of its run; one process puts them into the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.budget import check_device, check_room, processes_for
from opdlab.lab.laboratory import Laboratory, default_root
from opdlab.lab.records import (
    add_analysis,
    add_run,
    analyse,
    find_tables,
    has_record,
    missing_parts,
    read_index,
    read_table,
    read_tables,
)
from opdlab.models.files import only_process, read_json, write_json
from opdlab.models.folders import link_model, round_model
from opdlab.processes import CONTEXT, find_device, processor, workers
from opdlab.stats import prediction_interval
from opdlab.training.loop import install_model

# What of a record says where it was made: the entries of :func:`opdlab.processes.provenance`.
MACHINE = ("python", "torch", "transformers", "numpy", "device", "processor", "machine", "cuda")


@dataclass(frozen=True)
class Job:
    """One run or analysis."""

    what: str  #: an arm or an analysis
    seed: int
    needs: tuple[str, ...]  #: the model folders and the names of the jobs that it waits for
    produces: str = ""  #: the model folder that it makes

    @property
    def name(self) -> str:
        """The name by which other jobs wait for this one."""
        return f"{self.what}-seed{self.seed}"

    def steps(self, lab: Laboratory) -> int:
        """Return how many steps it counts for in a bar; an analysis takes about as long as a run."""
        return lab.recipe("opd" if self.what in ANALYSES else self.what).steps


class _Plan:
    """The jobs found so far, each with what it needs before it."""

    def __init__(self, lab: Laboratory):
        self.lab, self.jobs = lab, dict[str, Job]()

    def need_model(self, folder: str) -> list[str]:
        if (self.lab.models / folder).is_dir():
            return []
        if folder not in self.lab.scale.models.given:  # which build provides
            maker, seed = self.lab.maker_of(folder)
            self.need_run(maker.name, seed)
        return [folder]

    def need_models(self, arm: str, seed: int) -> list[str]:
        return [model for folder in self.lab.models_of(arm, seed) for model in self.need_model(folder)]

    def need_run(self, arm: str, seed: int) -> str:
        name, named = f"{arm}-seed{seed}", self.lab.arm(arm)
        if name not in self.jobs:
            needs = self.need_models(arm, seed)
            source = named.directions(seed, self.lab.scale.later_seed(seed))
            if source:
                needs.append(self.need_run(*source))
            made = named.produces if seed == 0 or named.produces in self.lab.scale.models.per_seed else ""
            made = self.lab.place(made, seed)
            self.jobs[name] = Job(arm, seed, tuple(needs), "" if (self.lab.models / made).is_dir() else made)
        return name

    def need_analysis(self, name: str, seed: int) -> None:
        parts = missing_parts(ANALYSES[name], seed, self.lab)
        reads = dict.fromkeys(run for part in parts for run in part.runs)
        needs = [model for run in reads for model in self.need_models(*run)]
        if ANALYSES[name].trained:
            needs += [self.need_run(*run) for run in reads]
        if parts:
            self.jobs[f"{name}-seed{seed}"] = Job(name, seed, tuple(dict.fromkeys(needs)))


def plan(
    lab: Laboratory,
    arms: tuple[str, ...],
    seeds: tuple[int, ...] = (),
    models: tuple[str, ...] = (),
    analyses: tuple[str, ...] = (),
) -> list[Job]:
    """List the jobs that give the records of ``arms`` and ``analyses``, and ``models``, those they need first.

    Args:
        lab: what is already among its models is not made again, nor what is recorded, unless another run needs it.
        arms: of which a record is kept.
        seeds: of these seeds; by default, of all seeds that the scale has for an arm.
        models: names of model folders.
        analyses: names in :data:`opdlab.lab.analyses.ANALYSES`.

    Raises:
        OpdlabError: if an arm is unknown, or one that no record is kept of; or if no arm makes a model.
    """
    found, index = _Plan(lab), read_index(lab.records)
    for folder in models:
        found.need_model(folder)
    for arm in arms:
        if not lab.arm(arm).recorded:
            raise OpdlabError(f"no record is kept of arm {arm!r}, as it only makes a model")
    # Seed by seed, so that what is stopped halfway can be compared across arms.
    wanted = [(i, arm, seed) for arm in arms for i, seed in enumerate(seeds or lab.seeds_of(arm))]
    for _, arm, seed in sorted(wanted, key=itemgetter(0)):
        if not has_record(arm, seed, lab, index):
            found.need_run(arm, seed)
    for name in analyses:
        for seed in ANALYSES[name].seeds(lab):
            if not seeds or seed in seeds:
                found.need_analysis(name, seed)
    return list(found.jobs.values())


def all_models(lab: Laboratory) -> tuple[str, ...]:
    """Return the names of all model folders that a scale makes, and of those that its records need for their seeds."""
    made = [lab.arm(name).produces for name in lab.scale.models.makers]
    needed = (
        folder for arm in lab.scale.policy.arms for seed in lab.seeds_of(arm) for folder in lab.models_of(arm, seed)
    )
    return tuple(dict.fromkeys([*made, *needed]))


def provide_given(lab: Laboratory) -> None:
    """Fetch the pretrained models of a scale, and put links to them, or rounded copies, among its models.

    Those that are taken from another scale are rounded copies, too; raises an OpdlabError if one is not there.
    """
    from opdlab.models.fetch import default_folder, fetch  # Only who lacks them needs it.

    models = lab.scale.models
    # The one whose tokenizer the others take comes first.
    for folder in sorted(models.pretrained, key=lambda folder: folder != models.tokenizer):
        place, name = lab.models / folder, models.pretrained[folder]
        if not place.exists():
            fetch(name, default_folder(name), progress=True)
            place.unlink(missing_ok=True)  # a link into a cache that has been cleared
            place.parent.mkdir(parents=True, exist_ok=True)
            if models.tokenizer not in ("", folder):
                link_model(default_folder(name), lab.models / models.tokenizer, place)
            elif models.dtype == "float32":
                place.symlink_to(default_folder(name), target_is_directory=True)
            else:
                round_model(default_folder(name), models.dtype, place)
    for folder, name in models.taken.items():
        if not (lab.models / folder).exists():
            # Who repeats the training elsewhere takes it from where it was.
            sources = [root / "data" / "models" / name for root in (lab.root, default_root())]
            source = next((folder for folder in sources if folder.is_dir()), None)
            if source is None:
                scale = name.partition("/")[0]
                raise OpdlabError(f"there is no model in {sources[0]}: run 'opdlab models --scale {scale}' first")
            lab.models.mkdir(parents=True, exist_ok=True)
            round_model(source, models.dtype, lab.models / folder)


def _note_pretrained(lab: Laboratory) -> None:
    """Write beside the records where a scale's pretrained models are from: hub and package differ in their bits."""
    sources = {folder: lab.models / folder / "source.json" for folder in lab.scale.models.pretrained}
    remedy = "remove its folder and fetch it again"
    found = {folder: read_json(path, remedy) for folder, path in sources.items() if path.is_file()}
    if found:
        write_json(lab.records / "pretrained.json", found)


def _check_processor(lab: Laboratory) -> None:
    """Raise an OpdlabError if a scale whose passes differ between processors is recorded on another one."""
    compute, index = lab.scale.compute, read_index(lab.records)
    others = {*index.get("processor", ())} - {processor()}
    if others and compute.differs_between_processors(find_device(compute.gpu)):
        raise OpdlabError(
            f"{lab.records} was made on {', '.join(sorted(others))}, and passes in bfloat16 give other numbers on "
            f"{processor()}: go on there, or move that folder away and record all of it here"
        )


_counter: Any = None


def _take(counter: Any) -> None:
    global _counter
    _counter = counter


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def _work(job: Job, lab: Laboratory, record: bool) -> Path | None:
    """Do a job in a process of its own, and return the folder of its tables, if a record is kept of them."""
    if job.what in ANALYSES:
        folder = analyse(job.what, job.seed, lab)
        _count(job.steps(lab))
        return folder
    check_room(lab, job.what)
    run = lab.train(job.what, job.seed, on_steps=_count)
    if job.produces:
        install_model(run, lab.models / job.produces, lab.scale.models.dtype)
    if not record or not lab.arm(job.what).recorded:
        return None
    folder = find_tables(job.what, job.seed, lab)
    run.drop_snapshots(lab.kept_steps(job.what))
    return folder


def build(jobs: list[Job], lab: Laboratory, *, record: bool = True, processes: int | None = None) -> None:
    """Run the jobs that :func:`plan` lists, and ``record`` what was trained; ``processes`` at once, or as many as fit.

    Raises:
        OpdlabError: if a job fails, where the others' results stay and the same call goes on from there; or if another
            process makes records or models of the same scale.
    """
    with only_process(lab.runs, "makes records or models"):
        _build(jobs, lab, record, processes or processes_for(lab))


def _build(jobs: list[Job], lab: Laboratory, record: bool, processes: int) -> None:
    check_device(lab)
    provide_given(lab)
    if record:
        _check_processor(lab)
        _note_pretrained(lab)
    total, counter = sum(job.steps(lab) for job in jobs), CONTEXT.Value("q", 0)
    waiting, made = list(jobs), set(lab.scale.models.given)
    running: dict[Future[Path | None], Job] = {}
    with (
        tqdm(total=total, unit="step", desc=f"{len(jobs)} jobs at {lab.scale.name}") as bar,
        workers(processes, _take, counter) as pool,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= made][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_work, job, lab, record)] = job
            if not running:
                raise OpdlabError(f"nothing makes {', '.join(waiting[0].needs)}, which {waiting[0].what!r} needs")
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                folder = _result(future, job)
                if folder and record:
                    (add_analysis if job.what in ANALYSES else add_run)(folder, lab)
                made |= {job.produces, job.name}
                bar.set_postfix_str(", ".join(f"{job.what} {job.seed}" for job in running.values()))
            bar.n = counter.value
            bar.refresh()
    for job in jobs:
        if job.what in lab.arms and lab.arm(job.what).arm.projection and not lab.scale.policy.keep_snapshots:
            lab.run(lab.arm(job.what).parent, job.seed).drop_states()  # None branches off from there any more.


def _result(future: Future[Path | None], job: Job) -> Path | None:
    try:
        return future.result()
    except BrokenProcessPool as problem:
        raise OpdlabError(
            f"the process of {job.what} seed {job.seed} was killed, perhaps for lack of memory; the same command goes "
            "on from its last checkpoint"
        ) from problem


# --- repeating what is recorded ---------------------------------------------------------------------------------------

FIGURES = {
    "sampled accuracy": ("evaluations", "sampled"),
    "greedy accuracy": ("evaluations", "greedy"),
    "bf16 sparsity": ("matrices", "sparsity"),
    "left angle": ("matrices", "angle_left_mean"),
    "NSS": ("matrices", "nss"),
    "low-magnitude overlap": ("matrices", "low_overlap_a30"),
    "principal overlap": ("matrices", "principal_overlap_a30"),
    "Frobenius norm": ("matrices", "frobenius"),
    "stable rank": ("matrices", "stable_rank"),
}


def end_figures(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Return the figures of a run's end point that a replication is judged by: means over matrices, last accuracies."""
    return {
        name: float(tables[table][column].iloc[-1] if table == "evaluations" else tables[table][column].mean())
        for name, (table, column) in FIGURES.items()
    }


class _Recorded(NamedTuple):
    """What is recorded of a run or an analysis: its figures, what tells it apart bit for bit, and the machine."""

    figures: dict[str, float]
    identity: dict[str, str]
    machine: dict[str, Any]


def _recorded(what: str, seeds: Sequence[int], lab: Laboratory) -> dict[int, _Recorded]:
    """Return what is recorded of an arm or an analysis, by seed."""
    if what in ANALYSES:
        index = read_index(lab.records, "analyses").query("analysis == @what").set_index("seed")
        tables = {what: read_table(lab.records / "analyses" / f"{what}.csv")}
    else:
        index = read_index(lab.records).query("arm == @what").set_index("seed")
        tables = read_tables(lab.records / what)
    found = {}
    for seed in seeds:
        row, own = index.loc[seed], {name: table[table["seed"] == seed] for name, table in tables.items()}
        if what in ANALYSES:
            figures = own[what].drop(columns="seed").select_dtypes("number").mean().to_dict()
            identity = {name: column.to_csv() for name, column in own[what].reset_index(drop=True).items()}
            identity = {name: text for name, text in identity.items() if name not in ("key", "claims")}
        else:
            figures, identity = end_figures(own), {"weights": row["weights"]}
        found[seed] = _Recorded(figures, identity, {name: row[name] for name in MACHINE if name in row})
    return found


def missing_records(names: tuple[str, ...], seeds: tuple[int, ...], lab: Laboratory) -> list[str]:
    """Return which arms and analyses have no record with all of these seeds; an unknown arm raises an OpdlabError."""
    runs, analyses = read_index(lab.records), read_index(lab.records, "analyses")
    kept = {*zip(runs["arm"], runs["seed"], strict=True), *zip(analyses["analysis"], analyses["seed"], strict=True)}
    known = [name if name in ANALYSES else lab.arm(name).name for name in names]
    return [name for name in known if not all((name, seed) in kept for seed in seeds)]


def compare(recorded: Laboratory, repeated: Laboratory, names: tuple[str, ...], seeds: tuple[int, ...]) -> pd.DataFrame:
    """Compare repeated arms and analyses with the record, one row for each figure of each that has one of the seeds.

    A run agrees ``bit for bit`` if its last weights are the recorded ones, an analysis if its table is, where new
    columns do not count. Elsewhere
    (another processor or version) training amplifies the first rounding difference, so a figure agrees if it lies
    ``within the spread``: the 99 % prediction interval of the recorded seeds. Anything else is ``outside``, or with a
    single recorded seed, which has no spread, ``one seed``.
    """
    rows = []
    for what in names:
        of_all = ANALYSES[what].seeds(recorded) if what in ANALYSES else recorded.seeds_of(what)
        records = _recorded(what, of_all, recorded)
        again = _recorded(what, [seed for seed in seeds if seed in of_all], repeated)
        for seed, here in again.items():
            there = records[seed]
            for figure, value in here.figures.items():
                if figure not in there.figures:
                    continue
                spread = prediction_interval([other.figures[figure] for other in records.values()])
                verdict = "one seed" if len(records) == 1 else "outside"
                if there.identity.items() <= here.identity.items():
                    verdict = "bit for bit"
                elif spread.low <= value <= spread.high:
                    verdict = "within the spread"
                rows.append(
                    {
                        "run": f"{what} seed {seed}",
                        "figure": figure,
                        "recorded": there.figures[figure],
                        "repeated": value,
                        "low": spread.low,
                        "high": spread.high,
                        "verdict": verdict,
                        "same machine": here.machine == there.machine,
                    }
                )
    return pd.DataFrame(rows)
