"""What the tests share: a lab of its own at the smoke scale, built from nothing in seconds."""

import ast
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

# One thread, as in the recorded runs: the tests compare bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import nbformat
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from opdlab.geometry import measure_matrix, measure_matrix_trajectory, weight_matrices
from opdlab.geometry.matrices import identity
from opdlab.lab.grid import ARMS, PAPER, vary
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import add_run, find_tables, load
from opdlab.lab.scales import SMOKE
from opdlab.models.folders import new_model
from opdlab.training.arms import Projection, Tokens
from opdlab.training.loop import install_model

# Of models that are only stored and measured.
SMALL_SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_hidden_layers": 2,
}


ROOT = Path(__file__).resolve().parent.parent

#: For tests that read the records of tiny.
needs_tiny = pytest.mark.skipif(
    not (ROOT / "data/records/tiny/runs.csv").is_file(), reason="the records of tiny are not there"
)


def code_of(notebook):
    """Return the code of each cell of a notebook, or "" where there is none to run."""
    cells = nbformat.read(notebook, as_version=4).cells
    runs = [cell.cell_type == "code" and "remove-cell" not in cell.metadata.get("tags", ()) for cell in cells]
    return [cell.source if run else "" for cell, run in zip(cells, runs, strict=True)]


def needed(sources, ends):
    """Return which of some cells must run for those of the numbers ``ends`` to run: a cell that only draws need not."""
    wanted, found = set(), set()
    for number in reversed(range(len(sources))):
        lines = [_names(statement) for statement in ast.parse(sources[number]).body]
        if number in ends or any((written | changed) & wanted for _, written, changed in lines):
            found.add(number)
            for read, written, _ in reversed(lines):
                wanted = wanted - written | read
    return found


def _names(statement):
    """Return the names that a statement reads, those it gives a new value, and those whose value it may change."""
    own = [node.target for node in ast.walk(statement) if isinstance(node, ast.comprehension)]
    own = {name for target in own for name in _inside(target)}
    read, written, changed = set(), set(), set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else written).add(node.id)
        elif isinstance(node, ast.alias):
            written.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            changed |= _inside(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            changed |= _inside(node.value.func)
        elif isinstance(node, ast.AugAssign):
            read |= _inside(node.target)
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        written = {statement.name}
    # A branch may not be taken, nor a loop entered.
    sure = isinstance(statement, (ast.Assign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
    return (read, written - own, changed) if sure else (read, set(), changed | written - own)


def _inside(node):
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def pair_table(w0s, w1s, *how, **options):
    """The rows that the matrices of an update have by measure_matrix."""
    matrices = weight_matrices(w0s).items()
    rows = [identity(name, w0.shape) | measure_matrix(name, w0, w1s[name], *how, **options) for name, w0 in matrices]
    return pd.DataFrame(rows)


def path_table(w0s, path, *how, **options):
    """The rows that they have by measure_matrix_trajectory, given steps and weights: step by step, like the model."""
    steps, parts = [step for step, _ in path], []
    for name, w0 in weight_matrices(w0s).items():
        columns = measure_matrix_trajectory(name, w0, [weights[name] for _, weights in path], *how, **options)
        parts.append(pd.DataFrame({"step": steps} | identity(name, w0.shape) | columns))
    return pd.concat(parts).sort_values("step", kind="stable", ignore_index=True)


def more_arms():
    """The arms of the book, and those that have what an arm can have and none of the book's does."""
    arms = dict(ARMS)
    vary(arms, "opd", "opd_muon", "Muon", optimizer="muon")
    vary(arms, "opd", "opd_top1", "top 1 %", tokens=Tokens("log-ratio", 0.01, per_completion=False))
    vary(arms, "opd", "opd_mix25", "α = 0.25", alpha=0.25)
    for name, label, projection in (
        ("opd_update2", "updates in 2", Projection(k=2)),
        ("opd_rescaled4", "updates in 4, full size", Projection(k=4, rescale=True)),
    ):
        vary(arms, "opd", name, label, projection=projection)
    return arms


def shallow(scale):
    """A scale whose own models have one layer, and the larger teacher two: a third of the matrices to measure."""
    layers = {name: 2 if name == "teacher" else 1 for name in scale.models.shapes}
    shapes = {name: shape | {"num_hidden_layers": layers[name]} for name, shape in scale.models.shapes.items()}
    return replace(scale, models=replace(scale.models, shapes=shapes))


@pytest.fixture(scope="module")
def script(request):
    """The program that a file of tests names in SCRIPT by its path from the root, loaded as a module."""
    spec = importlib.util.spec_from_file_location(Path(request.module.SCRIPT).stem, ROOT / request.module.SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Classes look up their own module here while it is run.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="session")
def scale():
    """The smoke scale with fewer layers and evaluation prompts: untrained models never stop early."""
    return shallow(replace(SMOKE, budget=replace(SMOKE.budget, evaluation_prompts=8)))


@pytest.fixture(scope="session")
def lab(tmp_path_factory, scale):
    """A laboratory with more arms than the book, whose base, teacher and anchor were trained for six steps."""
    lab = Laboratory(scale, tmp_path_factory.mktemp("lab"), more_arms())
    for arm, name in (("base", "base"), ("teacher", "teacher"), ("sft", "anchor")):
        install_model(lab.train(arm), lab.models / name)
    return lab


@pytest.fixture(scope="session")
def copy_of():
    """Makes a laboratory with the same models and no runs in another folder."""

    def copy(lab, folder):
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "models").symlink_to(lab.root / "data" / "models")
        return replace(lab, root=folder)

    return copy


@pytest.fixture(scope="session")
def paper(lab, copy_of, tmp_path_factory):
    """A laboratory with the same models and runs, and records of the paper's arms with two seeds."""
    policy = replace(lab.scale.policy, arms=PAPER, analyses=(), seeds=(0, 1))
    root = tmp_path_factory.mktemp("paper") / "root"
    paper = copy_of(replace(lab, scale=replace(lab.scale, policy=policy)), root)
    (paper.root / "runs").symlink_to(lab.root / "runs")
    for arm in PAPER:
        for seed in policy.seeds:
            add_run(find_tables(arm, seed, paper), paper)
    return paper


@pytest.fixture(scope="session")
def of_paper(paper):
    """The records of the paper's arms."""
    return load(paper)


@pytest.fixture(scope="session")
def pretrained():
    """Writes a Llama model whose tokenizer, like SmolLM2's, has bytes and single digits, and two special tokens."""

    def write(folder, context=128):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet])}
        tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
        ).save_pretrained(folder)
        config = transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True,
            eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.LlamaForCausalLM(config).save_pretrained(folder)

    return write


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A base folder and a tuned one, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("pair")
    model = new_model(SMALL_SHAPE, 0)
    model.bfloat16().save_pretrained(folder / "base")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.002 * torch.randn_like(weight))
    model.save_pretrained(folder / "tuned", max_shard_size="8KB")
    return folder / "base", folder / "tuned"
