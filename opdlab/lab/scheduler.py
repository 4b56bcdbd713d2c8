"""Making records: the jobs of a scale, in the order in which they need each other, and a comparison with the record.

The jobs are its models, its recorded runs and the analyses of these, in one-thread processes side by side. Each writes
the tables of its run; one process puts them into the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.budget import check_room, processes_for
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
from opdlab.processes import CONTEXT, GIVEN, find_device, processor, workers
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
    jobs, scale, index = dict[str, Job](), lab.scale, read_index(lab.records)

    def need_models(folders: tuple[str, ...]) -> list[str]:
        missing = [folder for folder in folders if not (lab.models / folder).is_dir()]
        for folder in missing:
            if folder not in scale.models.given:  # which build provides
                maker, seed = lab.maker_of(folder)
                need_run(maker.name, seed)
        return missing

    def need_run(arm: str, seed: int) -> str:
        named, name = lab.arm(arm), f"{arm}-seed{seed}"
        if name not in jobs:
            needs = need_models(lab.models_of(arm, seed))
            source = named.directions(seed, scale.later_seed(seed))
            if source:
                needs.append(need_run(*source))
            made = lab.place(named.produces, seed) if seed == 0 or named.produces in scale.models.per_seed else ""
            jobs[name] = Job(arm, seed, tuple(needs), "" if (lab.models / made).is_dir() else made)
        return name

    need_models(models)
    for arm in arms:
        if not lab.arm(arm).recorded:
            raise OpdlabError(f"no record is kept of arm {arm!r}, as it only makes a model")
    # Seed by seed, so that what is stopped halfway can be compared across arms.
    wanted = [(i, arm, seed) for arm in arms for i, seed in enumerate(seeds or lab.seeds_of(arm))]
    for _, arm, seed in sorted(wanted, key=itemgetter(0)):
        if not has_record(arm, seed, lab, index):
            need_run(arm, seed)
    for name in analyses:
        for seed in ANALYSES[name].seeds(lab):
            parts = missing_parts(ANALYSES[name], seed, lab) if not seeds or seed in seeds else []
            if parts:
                reads = dict.fromkeys(run for part in parts for run in part.runs)
                needs = [model for run in reads for model in need_models(lab.models_of(*run))]
                if ANALYSES[name].trained:
                    needs += [need_run(*run) for run in reads]
                jobs[f"{name}-seed{seed}"] = Job(name, seed, tuple(dict.fromkeys(needs)))
    return list(jobs.values())


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
    lab.models.mkdir(parents=True, exist_ok=True)
    # The one whose tokenizer the others take comes first.
    for folder in sorted(models.pretrained, key=lambda folder: folder != models.tokenizer):
        place, name = lab.models / folder, models.pretrained[folder]
        if not place.exists():
            fetch(name, default_folder(name))
            place.unlink(missing_ok=True)  # a link into a cache that has been cleared
            if models.tokenizer not in ("", folder):
                link_model(default_folder(name), lab.models / models.tokenizer, place)
            elif models.dtype == "float32":
                place.symlink_to(default_folder(name), target_is_directory=True)
            else:
                round_model(default_folder(name), models.dtype, place)
    for folder, name in models.taken.items():
        if not (lab.models / folder).exists():
            scale, _, model = name.partition("/")
            # Who repeats the training elsewhere takes it from where it was.
            here, there = (Laboratory.at(scale, root) for root in (lab.root, default_root()))
            source = (here if (here.models / model).is_dir() else there).model_folder(model)
            round_model(source, models.dtype, lab.models / folder)


def _begin_record(lab: Laboratory) -> None:
    """Refuse another processor for a scale whose passes differ between them, and note where its models are from."""
    compute, index = lab.scale.compute, read_index(lab.records)
    others = {*index.get("processor", ())} - {processor()}
    in_bfloat16 = "cpu_compute" in index and index["cpu_compute"].notna().any()
    if others and (in_bfloat16 or compute.differs_between_processors(find_device(compute.gpu))):
        raise OpdlabError(
            f"{lab.records} was made on {', '.join(sorted(others))}, and passes in bfloat16 give other numbers on "
            f"{processor()}: go on there, or move that folder away and record all of it here"
        )
    # Hub and package differ in their bits.
    files = {folder: lab.models / folder / "source.json" for folder in lab.scale.models.pretrained}
    there = {folder: file for folder, file in files.items() if file.is_file()}
    sources = {folder: read_json(file, "remove its folder and fetch it again") for folder, file in there.items()}
    if sources:
        write_json(lab.records / "pretrained.json", sources)


def _count(steps: int) -> None:
    (counter,) = GIVEN
    with counter.get_lock():
        counter.value += steps


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
        check_room(lab)
        provide_given(lab)
        if record:
            _begin_record(lab)
        _work_off(jobs, lab, record, processes or processes_for(lab))
        for job in jobs:
            if job.what in lab.arms and lab.arm(job.what).arm.projection and not lab.scale.policy.keep_snapshots:
                lab.run(lab.arm(job.what).parent, job.seed).drop_states()  # None branches off from there any more.


def _work_off(jobs: list[Job], lab: Laboratory, record: bool, processes: int) -> None:
    """Do the jobs, each when what it needs is made, under a bar of all their steps."""
    total, counter = sum(job.steps(lab) for job in jobs), CONTEXT.Value("q", 0)
    waiting, made = list(jobs), set(lab.scale.models.given)
    running: dict[Future[Path | None], Job] = {}
    with (
        tqdm(total=total, unit="step", desc=f"{len(jobs)} jobs at {lab.scale.name}") as bar,
        workers(processes, counter) as pool,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= made][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_work, job, lab, record)] = job
            if not running:
                raise OpdlabError(f"nothing makes {', '.join(waiting[0].needs)}, which {waiting[0].what!r} needs")
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    folder = future.result()
                except BrokenProcessPool as problem:
                    raise OpdlabError(
                        f"the process of {job.what} seed {job.seed} was killed, perhaps for lack of memory; the same "
                        "command goes on from its last checkpoint"
                    ) from problem
                if folder and record:
                    (add_analysis if job.what in ANALYSES else add_run)(folder, lab)
                made |= {job.produces, job.name}
                bar.set_postfix_str(", ".join(f"{job.what} {job.seed}" for job in running.values()))
            bar.n = counter.value
            bar.refresh()


# --- repeating what is recorded ---------------------------------------------------------------------------------------

# What a replication of a run is judged by: its last accuracies, and the means over its matrices.
ACCURACIES = ["sampled", "greedy"]
MEANS = ["sparsity", "angle_left_mean", "nss", "low_overlap_a30", "principal_overlap_a30", "frobenius", "stable_rank"]


def end_figures(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Return the figures of a run's end point that a replication is judged by, under the names of their columns."""
    last = tables["evaluations"][ACCURACIES].iloc[-1]
    return {**last.to_dict(), **tables["matrices"][MEANS].mean().to_dict()}


def _recorded(what: str, seeds: Sequence[int], lab: Laboratory) -> dict[int, tuple[dict, dict, dict]]:
    """Return by seed the figures of an arm or an analysis, what tells it apart bit for bit, and the machine."""
    kind, column = ("analyses", "analysis") if what in ANALYSES else ("runs", "arm")
    index, found = read_index(lab.records, kind).set_index([column, "seed"]), {}
    if what in ANALYSES:
        tables = {what: read_table(lab.records / "analyses" / f"{what}.csv")}
    else:
        tables = read_tables(lab.records / what)
    for seed in seeds:
        row, own = index.loc[(what, seed)], {name: table[table["seed"] == seed] for name, table in tables.items()}
        if what in ANALYSES:
            columns = own[what].reset_index(drop=True).drop(columns=["seed", "key", "claims"], errors="ignore")
            figures = columns.select_dtypes("number").mean().to_dict()
            identity = {name: entries.to_csv() for name, entries in columns.items()}
        else:
            figures, identity = end_figures(own), {"weights": row["weights"]}
        found[seed] = figures, identity, {name: row[name] for name in MACHINE if name in row}
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
    columns do not count. Elsewhere (another processor or version) training amplifies the first rounding difference, so
    a figure agrees if it lies ``within the spread``: the 99 % prediction interval of the recorded seeds. Anything else
    is ``outside``, or with a single recorded seed, which has no spread, ``one seed``.
    """
    rows = []
    for what in names:
        of_all = ANALYSES[what].seeds(recorded) if what in ANALYSES else recorded.seeds_of(what)
        records = _recorded(what, of_all, recorded)
        again = _recorded(what, [seed for seed in seeds if seed in of_all], repeated)
        for seed, (figures, identity, machine) in again.items():
            recorded_figures, recorded_identity, recorded_machine = records[seed]
            for figure in (name for name in figures if name in recorded_figures):
                spread = prediction_interval([others[figure] for others, *_ in records.values()])
                verdict = "one seed" if len(records) == 1 else "outside"
                if recorded_identity.items() <= identity.items():
                    verdict = "bit for bit"
                elif spread.low <= figures[figure] <= spread.high:
                    verdict = "within the spread"
                found = (recorded_figures[figure], figures[figure], spread.low, spread.high, verdict)
                rows.append((f"{what} seed {seed}", figure, *found, machine == recorded_machine))
    columns = ["run", "figure", "recorded", "repeated", "low", "high", "verdict", "same machine"]
    return pd.DataFrame(rows, columns=columns)
