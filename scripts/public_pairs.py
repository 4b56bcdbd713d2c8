"""Measure the sparsity of five public checkpoint pairs whose values are published: does the rule hold on real models?

For people with a network; nothing else in the repository needs one. Each pair is downloaded from the Hugging Face hub,
measured tensor by tensor, and compared with Table 1 of 2606.07082. Exits with status 1 if a pair is further than one
point from it, and with 2 if it could not be measured.

A model of 4, 8 or 14 billion parameters takes about 8, 16 or 30 GB in bfloat16, all eight together about 141 GB, and
at most 59 GB of them are on the disk at a time. A finished pair is kept in results.json in the cache folder and not
measured again; a stopped download goes on where it was. What the script downloaded is deleted when no later pair needs
it; with --keep it stays, and is the user's from then on. A model that is the user's, in the cache folder as OWNER/NAME,
is used as it is: never changed, never deleted. The hub's own cache is not touched.

    .venv/bin/python scripts/public_pairs.py --pair Polaris-4B-Preview
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import sys
from math import nan, prod
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from opdlab.errors import OpdlabError, exit_status
from opdlab.geometry import bf16_equal, describe
from opdlab.measuring.sources import in_common
from opdlab.models.checkpoints import open_checkpoint
from opdlab.models.files import cache_folder, write_json

TOLERANCE = 1.0  # points: the two papers that measured these pairs differ by up to 0.9 of one
WANTED = ("*.safetensors", "*.json")
# Weights compared at a time: an embedding of 600 million would take 15 GB in the float64 of opdlab.geometry.
CHUNK = 2**24
SPARE = 10**9  # bytes to leave free on the disk

# In GB, two bytes a parameter; a head that is stored beside its embedding adds 0.8 to the smallest.
SIZES = {"4B": 8.9, "8B": 16.4, "14B": 29.6}


class Pair(NamedTuple):
    """A base and a model tuned from it, with published shares of unchanged weights in percent."""

    base: str  # repository on the hub
    tuned: str
    size: str
    paper: float  # 2606.07082, Table 1
    earlier: float  # 2511.08567, Table 1

    @property
    def name(self) -> str:
        """The name of the tuned model, which is that of the pair."""
        return self.tuned.partition("/")[2]


# In an order in which a model that two pairs share is needed in succession. The ids were read in model cards and in the
# code of the models' authors, not on the hub itself.
PAIRS = (
    # Table 1 has GT-Qwen3-8B-Base. The authors' list of checkpoints had it under that name first, and now has it by its
    # data, MATH, beside others; that it is the same model: id not confirmed.
    Pair("Qwen/Qwen3-8B-Base", "TMLR-Group-HF/GT-Qwen3-8B-Base-MATH", "8B", 79.0, 79.9),
    Pair("Qwen/Qwen3-8B-Base", "Kwai-Klear/Klear-Reasoner-8B-SFT", "8B", 0.6, 0.6),
    Pair("Kwai-Klear/Klear-Reasoner-8B-SFT", "Kwai-Klear/Klear-Reasoner-8B", "8B", 69.9, 69.5),
    # Table 1 leaves "Qwen3-" out of its name.
    Pair("Qwen/Qwen3-14B-Base", "ReasoningTransferability/UniReason-Qwen3-14B-think-SFT", "14B", 18.8, 18.8),
    Pair("Qwen/Qwen3-4B", "POLARIS-Project/Polaris-4B-Preview", "4B", 79.9, 79.3),
)


class Cache:
    """The folder of models and results, and what in it is the script's own."""

    def __init__(self, folder: Path):
        """Read what an earlier call left in ``folder``."""
        self.folder, self.file = folder, folder / "results.json"
        self.results: dict[str, dict] = {}  # by the pair's name
        self.downloaded: list[str] = []  # the script's own models, whole or not
        self.whole: set[str] = set()  # those that this call saw to
        if self.file.is_file():
            try:
                state = json.loads(self.file.read_text())
                self.results, self.downloaded = state["results"], state["downloaded"]
            except (OSError, ValueError, KeyError, TypeError) as problem:
                raise OpdlabError(f"{self.file} cannot be read ({problem}): delete it to measure again") from problem

    def save(self) -> None:
        """Write the state down."""
        write_json(self.file, {"results": self.results, "downloaded": self.downloaded})

    def has(self, pair: Pair) -> bool:
        """Say whether a pair was measured, on the models that it has now."""
        found = self.results.get(pair.name, {})
        return (found.get("base"), found.get("tuned")) == (pair.base, pair.tuned)

    def model(self, repository: str) -> Path:
        """Return the folder of a model."""
        return self.folder / repository

    def is_here(self, repository: str) -> bool:
        """Say whether nothing of a model is missing; one that is the user's is taken as it is."""
        users = self.model(repository).exists() and repository not in self.downloaded
        return users or repository in self.whole

    def fetch(self, repository: str) -> Path:
        """Return the folder of a model, downloaded as far as it is not there."""
        folder = self.model(repository)
        if not self.is_here(repository):
            # Noted before the first byte comes, so that a stopped download is known to be the script's own.
            self.downloaded = sorted({*self.downloaded, repository})
            self.save()
            download(repository, folder)
            self.whole.add(repository)
        return folder

    def release(self, repository: str, keep: bool) -> None:
        """Delete a model that the script downloaded, or leave it to the user."""
        if repository not in self.downloaded:
            return
        if not keep:
            shutil.rmtree(self.model(repository), ignore_errors=True)
            self.whole.discard(repository)
        self.downloaded.remove(repository)
        self.save()


def download(repository: str, folder: Path) -> None:
    """Download the weights and settings of a model.

    Raises:
        OpdlabError: if the hub cannot be reached, does not give the model, or the disk is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        snapshot_download(repository, local_dir=folder, allow_patterns=list(WANTED))
    except GatedRepoError as problem:
        raise OpdlabError(
            f"{repository} asks for an account: log in with 'hf auth login' and run it again"
        ) from problem
    except RepositoryNotFoundError as problem:
        raise OpdlabError(f"the hub has no public model {repository}: it was moved, renamed or removed") from problem
    except Exception as problem:  # the hub's client lets through whatever its own client raises
        if getattr(problem, "errno", None) == errno.ENOSPC:
            raise OpdlabError(f"the disk is full: {repository} is incomplete in {folder}; make room") from problem
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0].split(". ")[0].rstrip(".:")
        raise OpdlabError(
            f"{repository} cannot be downloaded ({reason}): check the network and HF_HUB_OFFLINE, and run it again"
        ) from problem


def check_space(pair: Pair, cache: Cache) -> None:
    """Say how much of a pair is missing, and raise OpdlabError if the disk has no room for it."""
    missing = 0
    for repository in (pair.base, pair.tuned):
        folder = cache.model(repository)
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        missing += 0 if cache.is_here(repository) else max(0, int(SIZES[pair.size] * 1e9) - there)
    cache.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.folder).free
    if missing and free < missing + SPARE:
        raise OpdlabError(
            f"{pair.name} needs {(missing + SPARE) / 1e9:.0f} GB more in {cache.folder}, where {free / 1e9:.0f} GB are "
            "free: make room, or choose another folder with --cache"
        )
    if missing:
        print(f"{pair.name}: downloading about {missing / 1e9:.0f} GB into {cache.folder}", flush=True)


def measure(base: Path, tuned: Path, name: str) -> dict:
    """Count the weights of two models that are equal in bfloat16.

    Args:
        base: folder of the model before.
        tuned: folder of the model after.
        name: what to call the pair on the bar.

    Returns:
        Percent of equal weights: ``all`` of them, and of the ``matrices`` of attention and MLP; how many ``parameters``
        both have, and how many of them are ``matrices_parameters``; the ``dtypes`` and ``revisions`` of both models.

    Raises:
        OpdlabError: if they are not two states of one model, or a file is damaged.
    """
    (before, after), _ = in_common(open_checkpoint(base), [open_checkpoint(tuned)])
    names = sorted(before.pieces, key=lambda tensor: -prod(before.pieces[tensor].shape))
    equal, counted = {"all": 0, "matrices": 0}, {"all": 0, "matrices": 0}
    total = sum(prod(before.pieces[tensor].shape) for tensor in names)
    with tqdm(total=total, desc=name, unit=" weights", unit_scale=True) as bar:
        for tensor in names:
            w0, w1 = before.read(tensor), after.read(tensor)
            parts = zip(w0.flatten().split(CHUNK), w1.flatten().split(CHUNK), strict=True)
            same = sum(int(bf16_equal(a, b).count_nonzero()) for a, b in parts)
            inside = w0.ndim == 2 and describe(tensor).block in ("attention", "mlp")
            for group in ("all", "matrices") if inside else ("all",):
                equal[group] += same
                counted[group] += w0.numel()
            bar.update(w0.numel())
    return {
        **{group: 100 * equal[group] / counted[group] if counted[group] else nan for group in equal},
        "parameters": counted["all"],
        "matrices_parameters": counted["matrices"],
        "dtypes": [before.dtypes, after.dtypes],
        "revisions": [revision(base), revision(tuned)],
    }


def revision(folder: Path) -> str | None:
    """Return the commit of a model on the hub, which its client notes beside what it downloads; None if unknown."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return note.read_text().split("\n")[0] if note.is_file() else None


def table(pairs: list[Pair], results: dict[str, dict]) -> str:
    """Return the table of the measured pairs: shares in percent, the difference in points."""
    width = max(len(pair.name) for pair in pairs)
    lines = [f"{'pair':{width}}  paper  2511.08567  all weights  matrices  difference  within {TOLERANCE:g} point"]
    for pair in pairs:
        found = results[pair.name]
        lines.append(
            f"{pair.name:{width}}  {pair.paper:5.1f}  {pair.earlier:10.1f}  {found['all']:11.2f}  "
            f"{found['matrices']:8.2f}  {difference(pair, found):+10.2f}  {'yes' if is_within(pair, found) else 'NO'}"
        )
    return "\n".join(lines)


def difference(pair: Pair, found: dict) -> float:
    """Return by how many points all weights of a pair differ from the paper's value."""
    return found["all"] - pair.paper


def is_within(pair: Pair, found: dict) -> bool:
    """Say whether a pair is within the tolerance."""
    return abs(difference(pair, found)) <= TOLERANCE


def run(pairs: list[Pair], cache: Cache, keep: bool) -> None:
    """Measure the pairs that are not measured yet, and note each in the cache."""
    for i, pair in enumerate(pairs):
        if not cache.has(pair):
            check_space(pair, cache)
            base, tuned = cache.fetch(pair.base), cache.fetch(pair.tuned)
            cache.results[pair.name] = {"base": pair.base, "tuned": pair.tuned} | measure(base, tuned, pair.name)
            cache.save()
        later = {model for other in pairs[i + 1 :] if not cache.has(other) for model in (other.base, other.tuned)}
        for repository in sorted({pair.base, pair.tuned} - later):
            cache.release(repository, keep)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and return the exit status: 1 if a pair is outside, 2 if one cannot be measured."""
    what, _, sizes = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=what, epilog=sizes, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [pair.name for pair in PAIRS]
    parser.add_argument("--pair", action="append", choices=names, metavar="NAME", help=f"only {' or '.join(names)}")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "public_pairs", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the models that it downloads")
    options = parser.parse_args(arguments)
    chosen = [pair for pair in PAIRS if not options.pair or pair.name in options.pair]

    def work() -> int:
        cache = Cache(options.cache.expanduser())
        run(chosen, cache, options.keep)
        print(table(chosen, cache.results))
        return 0 if all(is_within(pair, cache.results[pair.name]) for pair in chosen) else 1

    return exit_status("public_pairs", work)


if __name__ == "__main__":
    sys.exit(main())
