"""TRL as an engine: its configuration against the paper's tables, and its updates against those of opdlab's own loop.

Each trainer runs alone in this process, and in two processes (gloo) under FSDP2. On CPUs accelerate 1.15 by itself
offers DDP only: ``tests/training/engine_worker.py`` adds them to the devices that it shards on,
which is all that is missing.
``pytest -rP`` shows the differences.
"""

import importlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
pytest.importorskip("trl")

import engine_worker
import transformers
from engine_worker import ANY_END, shortened, snapshots_of, stopping_once, valued, written
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.tasks import CARELESS_SUM
from opdlab.measuring.callback import callback_for
from opdlab.measuring.sources import find_trajectory
from opdlab.measuring.update import measure
from opdlab.models.folders import load_model, load_tokenizer, save_model
from opdlab.training import trl as engine
from opdlab.training.arms import Model
from opdlab.training.config import Experiment
from opdlab.training.opening import link_for_vllm
from opdlab.training.trainer import Trainer, random_numbers
from opdlab.training.trl import accelerate_arguments, configure

TRAINERS = {"sft": "SFT", "opd_full": "Distillation", "opd": "IWOPD", "rlvr": "GRPO"}
# After each of two AdamW steps in float32: the norm of the difference of the two updates, as a share of the norm of
# one. Adam divides a gradient by its own size, so where that is near 0 rounding becomes a part of a step.
UPDATE = 2e-4
# Adam's step is blind to the size of the gradient, so that is compared too: its norm before clipping, relative.
GRADIENT = 2e-6


# --- the configuration ------------------------------------------------------------------------------------------------


def paper(arm: str) -> Experiment:
    return Laboratory.at("paper", Path("/nowhere")).experiment(arm)


def of_paper(arm: str) -> dict:
    return configure(paper(arm), processes=8, gpu=True, vllm=True)


def test_the_configurations_are_those_of_the_papers_tables():
    everywhere = {"weight_decay": 0.1, "adam_beta1": 0.9, "bf16": True, "use_cpu": False}
    rollouts = {"temperature": 1.0, "top_p": 1.0, "use_vllm": True, "adam_beta2": 0.98, "lr_scheduler_type": "constant"}
    tables = {
        "sft": {"max_steps": 5375, "learning_rate": 1e-5, "adam_beta2": 0.95, "warmup_steps": 537}
        | {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        "opd_full": {"max_steps": 300, "learning_rate": 1e-6, "beta": 1.0} | rollouts,
        "opd": {"max_steps": 300, "learning_rate": 1e-6, "iw_opd_gamma": 0.0} | rollouts,
        "rlvr": {"max_steps": 1024, "learning_rate": 1e-6, "num_generations": 8, "beta": 0.0, "loss_type": "dapo"}
        | {"epsilon": 0.2, "epsilon_high": 0.28, "adam_epsilon": 1e-15}
        | rollouts,
    }
    for (arm, table), batch in zip(tables.items(), (256, 64, 64, 512), strict=True):
        config = of_paper(arm)
        arguments = config["arguments"]
        assert config["trainer"] == TRAINERS[arm]
        assert arguments == arguments | everywhere | table
        assert 8 * arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == batch
    models = [(config["start"].rsplit("/", 2)[-2:], config["teacher"]) for config in map(of_paper, tables)]
    anchor, teacher = ["paper", "anchor"], "Qwen/Qwen3-32B"
    assert models == [(["paper", "base"], None), (anchor, teacher), (anchor, teacher), (anchor, None)]


@pytest.mark.parametrize("arm", TRAINERS)
def test_trl_knows_all_arguments(arm, tmp_path):
    config = of_paper(arm)
    library = importlib.import_module("trl.experimental.iw_opd" if arm == "opd" else "trl")
    settings = getattr(library, f"{config['trainer']}Config")
    # A machine without a GPU refuses the two.
    read = settings(output_dir=str(tmp_path), **config["arguments"] | {"use_cpu": True, "bf16": False})
    assert read.learning_rate == config["recipe"]["learning_rate"]


def test_accelerate_shards_the_paper_and_uses_cpus_without_gpus(lab):
    arguments = accelerate_arguments(of_paper("opd_full"))
    assert (arguments["distributed_type"], arguments["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    assert (arguments["num_processes"], arguments["mixed_precision"], arguments["use_cpu"]) == (8, "bf16", False)
    arguments = accelerate_arguments(configure(lab.experiment("opd_full"), 2, gpu=False, vllm=False))
    assert (arguments["num_processes"], arguments["mixed_precision"], arguments["use_cpu"]) == (2, "no", True)


def test_what_it_refuses(lab):
    for arm, message in (
        ("sft_matched", "rollouts by the teacher and the loss cross_entropy"),
        ("opd_sign", "rollouts by the student and the loss opd_sign"),
        ("opd_top25", "tokens"),
        ("opd_update4", "projection"),
        ("opd_mix50", "alpha"),
        ("opd_sgd", "optimizer"),
        ("opd_bf16", "weight_dtype"),
        ("base", "it starts from random weights"),
    ):
        with pytest.raises(OpdlabError, match=rf"TRL has no trainer for '{arm}' \({message}\): choose sft, opd"):
            configure(lab.experiment(arm), 1, gpu=False, vllm=False)
    opd = lab.experiment("opd")
    with pytest.raises(OpdlabError, match="paper has no recipe for arm 'rlvr_10'"):
        paper("rlvr_10")
    for processes in (3, 32, 0, -2):
        with pytest.raises(OpdlabError, match=f"^{processes} processes cannot share a batch of 16 completions"):
            configure(opd, processes, gpu=False, vllm=False)
    empty = replace(lab, root=lab.root / "empty").experiment("opd")
    with pytest.raises(OpdlabError, match=r"there is no model folder .*empty/data/models/smoke/anchor; run 'opdlab"):
        config = configure(empty, 1, gpu=False, vllm=False)
        engine.launch(empty, config, lab.root / "empty", callback_for, produces=None, dry_run=False)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_paper_needs_the_engine_and_gpus(tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main([*arguments, "--scale", "paper", "--home", str(tmp_path)]) == 2
        return capsys.readouterr().err

    for command in (["models"], ["record"], ["train", "--arm", "opd"]):
        assert "is too large for opdlab's own loop: run 'opdlab train --engine trl --scale paper" in said(*command)
    opd = ("train", "--arm", "opd", "--engine", "trl")
    assert "needs 64 CUDA GPUs, and this machine has" in said(*opd, "--processes", "64")
    assert "TRL has no trainer for 'sft_matched'" in said("train", "--arm", "sft_matched", "--engine", "trl")
    assert main([*opd, "--scale", "paper", "--home", str(tmp_path), "--processes", "4", "--dry-run"]) == 0
    folder = tmp_path / "runs" / "paper" / "opd-seed0-trl4"  # without the key that its models would give it
    command = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"accelerate launch --config_file {folder}/accelerate.json -m opdlab.training.trl {folder}/run.pickle"
        in command
    )
    assert json.loads((folder / "trl.json").read_text())["processes"] == 4


# --- the updates ------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Steps of opdlab's own loop: the weights before and after each, gradient norms, and what was written."""

    weights: list[dict[str, Tensor]]
    norms: list[float]
    completions: list[list]

    def moved(self, step: int) -> float:
        """The size of the update of a step, counted from 1."""
        return distance(self.weights[step], self.weights[step - 1])


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[name] - weight).double().square().sum() for name, weight in other.items())) ** 0.5


@pytest.fixture(scope="module")
def short(lab) -> dict[str, Experiment]:
    """Two steps of each arm."""
    return {arm: shortened(lab.experiment(arm)) for arm in TRAINERS}


@pytest.fixture(scope="module")
def ours(short) -> dict[str, Steps]:
    """What opdlab's own loop does, by arm."""
    return {arm: own_steps(Trainer(experiment)) for arm, experiment in short.items()}


def own_steps(trainer: Trainer) -> Steps:
    drawn, draw = [], trainer.batch
    trainer.batch = lambda step: drawn.append(draw(step)) or drawn[-1]
    done = Steps([trainer.origin], [], [])
    for step in range(trainer.recipe.steps):
        done.norms.append(trainer.step(step)["grad_norm"])
        done.weights.append({name: weight.detach().clone() for name, weight in trainer.student.named_parameters()})
        rollouts, _ = drawn[-1]
        prompts = [prompt for prompt in rollouts.prompts for _ in range(rollouts.samples)]
        done.completions.append(list(zip(prompts, rollouts.completions, strict=True)))
    return done


def assert_same_updates(arm: str, ours: Steps, folder: Path) -> None:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    for step, (theirs, norm) in enumerate(zip(snapshots_of(folder), norms, strict=True), 1):
        assert theirs.keys() == ours.weights[0].keys()
        moved = distance(ours.weights[step], ours.weights[0])
        update, gradient = distance(theirs, ours.weights[step]) / moved, abs(norm - ours.norms[step - 1])
        print(f"{arm}, step {step}: update +- {update:.1e}, gradient norm {norm:.3g} +- {gradient:.1e}")
        assert update <= UPDATE and gradient <= GRADIENT * ours.norms[step - 1]
    assert step == len(ours.norms)


def compare(experiment: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Train in both ways, from the same completions; the prompts' tokens are compared too."""
    ours = own_steps(Trainer(experiment))
    if experiment.title != "sft":
        monkeypatch.setattr(transformers.Qwen3ForCausalLM, "generate", engine_worker.feed(ours.completions))
    written(experiment, folder, processes=1)
    engine.run(folder / "run.pickle")
    assert_same_updates(experiment.title, ours, folder)
    return ours


@pytest.mark.parametrize("arm", TRAINERS)
def test_alone(arm, ours, short, tmp_path, monkeypatch):
    if arm != "sft":
        monkeypatch.setattr(transformers.Qwen3ForCausalLM, "generate", engine_worker.feed(ours[arm].completions))
    written(short[arm], tmp_path, processes=1)
    engine.run(tmp_path / "run.pickle")
    assert_same_updates(arm, ours[arm], tmp_path)


@pytest.mark.parametrize("arm", TRAINERS)
def test_temperature_and_weight_decay(arm, short, tmp_path, monkeypatch):
    """One meaning of temperature, and one rule of what decays: neither norms nor biases."""
    compare(replace(shortened(short[arm], weight_decay=0.1), temperature=0.7), tmp_path, monkeypatch)


def test_sft_reads_what_the_authors_of_a_task_wrote(short, tmp_path, monkeypatch):
    compare(shortened(short["sft"], CARELESS_SUM), tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def awkward(lab, tmp_path_factory) -> Path:
    """Models whose tokenizer has a chat template and no padding token, and which would rather sample otherwise."""
    root = tmp_path_factory.mktemp("awkward")
    for name in ("anchor", "teacher"):
        shutil.copytree(lab.models / name, root / name)
        path = root / name / "tokenizer_config.json"
        template = "{% for m in messages %}S{{ m['content'] }}T{% endfor %}{% if add_generation_prompt %}O{% endif %}"
        said = json.loads(path.read_text()) | {"chat_template": template}
        del said["pad_token"]
        path.write_text(json.dumps(said))
        sampling = {"do_sample": True, "repetition_penalty": 1.7, "min_p": 0.2, "top_k": 3, "top_p": 0.5}
        ends = {"eos_token_id": [lab_end(lab), 15], "temperature": 0.3, "suppress_tokens": [1]}
        (root / name / "generation_config.json").write_text(json.dumps(sampling | ends))
    return root


def lab_end(lab) -> int:
    return load_tokenizer(lab.models / "anchor").eos_token_id


def of_folder(experiment: Experiment, root: Path) -> Experiment:
    """The experiment with models from another folder; for SFT too, the student is the anchor."""
    teacher = experiment.arm.teacher and Model(str(root / "teacher"))
    return replace(experiment, arm=replace(experiment.arm, student=Model(str(root / "anchor")), teacher=teacher))


@pytest.mark.parametrize("arm", TRAINERS)
def test_a_chat_template_and_no_padding_token(arm, lab, awkward, tmp_path, monkeypatch):
    chat = replace(ANY_END, chat=True)
    ours = compare(shortened(of_folder(lab.experiment(arm), awkward), chat), tmp_path, monkeypatch)
    tokenizer = load_tokenizer(awkward / "anchor")
    prompts = [tokenizer.decode(prompt) for prompt, _ in ours.completions[0]]
    assert all(prompt.startswith("SQ") and prompt.endswith(":TO") for prompt in prompts)


@pytest.fixture(scope="module")
def padded(lab, tmp_path_factory) -> Path:
    """Models with logits that are no token, the teacher with more; their tokenizer writes a beginning by itself."""
    root = tmp_path_factory.mktemp("padded")
    for name, rows in (("anchor", 32), ("teacher", 40)):
        model, tokenizer = load_model(lab.models / name), load_tokenizer(lab.models / name)
        model.resize_token_embeddings(rows)  # as likely as the mean of the tokens
        begin = ("S", tokenizer.convert_tokens_to_ids("S"))
        tokenizer.bos_token = "S"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="S $A", special_tokens=[begin])
        save_model(model, tokenizer, root / name)
    return root


@pytest.mark.parametrize("arm", TRAINERS)
def test_padded_vocabularies_and_a_beginning(arm, lab, padded, tmp_path, monkeypatch):
    ours = compare(shortened(of_folder(lab.experiment(arm), padded), valued()), tmp_path, monkeypatch)
    tokenizer = load_tokenizer(padded / "anchor")
    assert all(tokenizer.decode(prompt).startswith("SQ") for prompt, _ in ours.completions[0])
    snapshot = snapshots_of(tmp_path)[-1]
    assert snapshot.keys() == dict(load_model(padded / "anchor").named_parameters()).keys()
    assert len(snapshot["model.embed_tokens.weight"]) == 32


def test_what_is_no_token_is_never_sampled(lab, padded, tmp_path, monkeypatch):
    written_ids, generate = [], transformers.Qwen3ForCausalLM.generate

    def spy(self, *arguments, **options):
        found = generate(self, *arguments, **options)
        written_ids.append(getattr(found, "sequences", found))
        return found

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "generate", spy)
    written(replace(shortened(of_folder(lab.experiment("opd"), padded), steps=1), temperature=9.0), tmp_path, 1)
    engine.run(tmp_path / "run.pickle")
    tokens = len(load_tokenizer(padded / "anchor"))
    assert written_ids and max(int(ids.max()) for ids in written_ids) == tokens - 1


@pytest.mark.parametrize("arm", [arm for arm in TRAINERS if arm != "sft"])
def test_no_model_folder_has_a_say_in_sampling(arm, lab, awkward, tmp_path, monkeypatch):
    """transformers says what it sampled with in the end, for both folders the same."""
    asked, prepare = [], transformers.GenerationMixin._prepare_generation_config

    def spy(self, *arguments, **options):
        found = prepare(self, *arguments, **options)
        asked.append({k: v for k, v in found[0].to_dict().items() if k != "transformers_version"})
        return found

    monkeypatch.setattr(transformers.GenerationMixin, "_prepare_generation_config", spy)
    for folder in (awkward, lab.models):
        written(shortened(of_folder(lab.experiment(arm), folder), steps=1), tmp_path / folder.name, processes=1)
        engine.run(tmp_path / folder.name / "run.pickle")
    half = len(asked) // 2
    assert half and asked[:half] == asked[half:]
    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None}
    assert asked[0] == asked[0] | neutral and asked[0]["repetition_penalty"] in (None, 1.0)
    ends = asked[0]["eos_token_id"]
    assert ends in (lab_end(lab), [lab_end(lab)])


def test_vllm_is_given_a_folder_that_says_nothing_of_sampling(lab, awkward, tmp_path):
    tokenizer, student = load_tokenizer(awkward / "anchor"), load_model(awkward / "anchor")
    student.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    for _ in range(2):
        folder = link_for_vllm(student, tmp_path / "start")
    assert all(weight.equal(student.state_dict()[name]) for name, weight in load_model(folder).state_dict().items())
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    read = transformers.GenerationConfig.from_pretrained(folder)
    assert (read.eos_token_id, read.repetition_penalty, read.top_k) == (tokenizer.eos_token_id, None, None)


@pytest.fixture(scope="module")
def silent(lab) -> Experiment:
    """RLVR with values as rewards and weight decay; no sample of the second step's prompts earns more than another."""
    rlvr = shortened(lab.experiment("rlvr"), valued(), steps=3, warmup=0, weight_decay=0.1)
    prompts = rlvr.task.prompts(rlvr.recipe.prompts, random_numbers(rlvr.seed, "prompts", 1))
    return replace(rlvr, task=valued(prompts))


def test_a_batch_without_signal_moves_nothing(silent, tmp_path, monkeypatch):
    ours = compare(silent, tmp_path, monkeypatch)
    first, second, third = snapshots_of(tmp_path)
    print(f"own loop: {ours.moved(1):.3g}, {ours.moved(2)}, {ours.moved(3):.3g}; TRL: {distance(second, first)}")
    assert ours.moved(1) > 0 and ours.moved(2) == 0 and ours.moved(3) > 0
    assert distance(second, first) == 0 and distance(third, second) > 0


def test_in_two_processes_under_fsdp2(ours, short, silent, lab, tmp_path):
    """All arms, a batch without signal, and a run that is stopped in the middle and goes on, bit for bit."""
    ours = ours | {"silent": own_steps(Trainer(silent))}
    folders = {arm: tmp_path / arm for arm in ours}
    for arm, folder in folders.items():
        command = written(short.get(arm, silent), folder, processes=2)
        if arm != "sft":
            (folder / "completions.json").write_text(json.dumps(ours[arm].completions))
    longer = shortened(short["opd"], steps=3)
    written(longer, tmp_path / "through", processes=2)
    written(longer, tmp_path / "stopped", processes=2, callback=stopping_once)
    begun = command[: command.index("-m")]
    files = [str(tmp_path / name / "run.pickle") for name in (*folders, "through", "stopped", "stopped")]
    done = subprocess.run([*begun, engine_worker.__file__, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for arm, folder in folders.items():
        assert_same_updates(arm, ours[arm], folder)
    one, two, _ = snapshots_of(folders["silent"])
    assert distance(one, two) == 0
    assert sorted(path.name for path in (tmp_path / "stopped").glob("stopped-*")) == ["stopped-0", "stopped-1"]
    for through, stopped in zip(snapshots_of(tmp_path / "through"), snapshots_of(tmp_path / "stopped"), strict=True):
        assert all(weight.equal(stopped[name]) for name, weight in through.items())
    path = find_trajectory(folders["opd"] / "snapshots")
    update = measure(lab.models / "anchor", path, nulls=False)
    assert (update.table["frobenius"] > 0).any() and len(update.trajectory)
