"""The path of pretrained models, on one of their kind that is as small as it can be."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.lab.budget import DEVICES, plan_run, shape_of
from opdlab.lab.grid import ARMS
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import add_run, find_tables, load, read_index
from opdlab.lab.scales import SMALL, TINY
from opdlab.lab.scheduler import all_models, build, plan, provide_given
from opdlab.models import fetch as fetching
from opdlab.models.fetch import fetch
from opdlab.models.folders import check_same_vocabulary, load_model, load_tokenizer
from opdlab.processes import find_device
from opdlab.training.config import Recipe
from opdlab.training.loop import install_model
from opdlab.training.trainer import Trainer

SCALE = replace(
    SMALL,
    budget=replace(
        SMALL.budget,
        recipes={
            name: Recipe(6 if name == "expert" else 4, prompts=4, samples=2, learning_rate=1e-3, warmup=1)
            for name in SMALL.budget.recipes
        },
        evaluation_prompts=8,
        confined_from=0.2,
    ),
    tasks={},  # The mixture's questions are too long for the stand-in.
    # In float32, which all CPUs compute in, and which all is held against.
    models=replace(SMALL.models, dtype="float32"),
    compute=replace(SMALL.compute, cpu_dtype="float32"),
)


@pytest.fixture(scope="module")
def real(tmp_path_factory, pretrained):
    """A laboratory whose anchor and teacher were made from a pretrained model."""
    real = Laboratory(SCALE, tmp_path_factory.mktemp("real"))
    pretrained(real.models / "base")
    for arm in ("sft", "expert"):
        install_model(real.train(arm), real.models / ARMS[arm].produces)
    return real


def trainer(lab, arm, clip=1.0, **compute):
    """The trainer of an arm, computed otherwise than the scale says."""
    of = lab.experiment(arm)
    return Trainer(replace(of, recipe=replace(of.recipe, clip=clip), compute=replace(of.compute, **compute)))


@pytest.mark.parametrize("arm", ["opd", "opd_full", "rlvr", "sft_matched", "opd_update4", "opd_mix50"])
def test_every_arm_trains_from_a_pretrained_model(arm, real):
    run = real.train(arm)
    assert [line["step"] for line in run.lines("history")] == [1, 2, 3, 4]
    assert run.lines("evaluations")[-1]["kl_teacher"] > 0


def test_demonstrations_end_with_the_tokenizers_own_token(real):
    subject = trainer(real, "sft")
    rollouts, rewards = subject.batch(0)
    texts = subject.tokenizer.batch_decode(rollouts.completions)
    assert rewards is None and all(text.endswith("<|im_end|>") and text.count("<|im_end|>") == 1 for text in texts)
    assert max(map(len, rollouts.completions)) <= SCALE.budget.max_new_tokens


ARMS_READ = ("opd", "opd_full", "rlvr", "sft_matched", "opd_random25", "opd_top25", "opd_sequence_mean", "opd_mix50")


@pytest.mark.parametrize("arm", ARMS_READ)
def test_pieces_and_recomputing_change_nothing(arm, real):
    """The gradient of a step, whatever of the logits is held at once, and whatever is computed twice."""
    found = []
    for tokens, recompute in ((0, False), (10_000, False), (40, False), (1, True)):
        subject = trainer(real, arm, clip=1e9, tokens_at_once=tokens, recompute=recompute)
        rollouts, rewards = subject.batch(0)
        if rewards is not None:
            rewards = torch.arange(float(len(rewards))) % 3
        subject.batch = lambda step, given=(rollouts, rewards): given
        line = subject.step(0)
        gradient = torch.cat([weight.grad.flatten() for weight in subject.student.parameters()])
        found.append((gradient, line["loss"], line["entropy"], line["kl_teacher"] or 0.0))
    for gradient, *numbers in found[1:]:
        torch.testing.assert_close(gradient, found[0][0], rtol=1e-4, atol=1e-6)
        assert numbers == pytest.approx(found[0][1:], rel=1e-5, abs=1e-7)


def test_no_two_pieces_have_their_logits_at_once(real):
    """What autograd keeps of a step read in pieces is less than the logits of all of its tokens."""
    sizes = {}
    for tokens in (0, 16):
        subject = trainer(real, "opd_full", tokens_at_once=tokens)
        rollouts, _ = subject.batch(0)
        subject.batch = lambda step, rollouts=rollouts: (rollouts, None)
        kept = {}

        def keep(tensor, kept=kept, width=subject.student.config.vocab_size):
            if tensor.dim() and tensor.shape[-1] == width and tensor.dtype == torch.float32:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            subject.step(0)
        sizes[tokens] = sum(kept.values())
        largest = 4 * rollouts.tokens * subject.student.config.vocab_size
    assert sizes[0] > largest and sizes[16] < largest


def test_records_can_be_read_without_the_models(real, tmp_path):
    add_run(find_tables("opd", 0, real), real)
    bare = replace(real, root=tmp_path)
    bare.records.parent.mkdir(parents=True)
    bare.records.symlink_to(real.records)
    for name in ("anchor", "teacher"):
        assert bare.model(name).identity == real.model(name).identity
    assert bare.experiment("opd").config == real.experiment("opd").config
    read = load(bare, ("opd",), seeds=(0,))
    assert read.runs["device"].item() == "cpu" and read_index(bare.records)["compute"].item() == "bfloat16"
    assert set(read.trajectory["block"]) == {"attention"} and set(read.matrices["block"]) > {"attention"}
    with pytest.raises(OpdlabError, match=r"no model in .*base: run 'opdlab models --scale small' first"):
        bare.train("sft")
    # What is not recorded cannot be trained without the models, and says so.
    with pytest.raises(OpdlabError, match="opdlab models --scale small"):
        bare.train("rlvr")


def test_the_disk_holds_what_is_planned_and_then_what_others_need(real, copy_of, tmp_path):
    own = copy_of(real, tmp_path / "own")
    plans = {arm: plan_run(own, arm, DEVICES["cpu"]) for arm in ("opd", "rlvr", "opd_of_rlvr4")}
    runs = {arm: own.run(arm) for arm in plans}

    def size(arm):
        return sum(path.stat().st_size for path in runs[arm].folder.glob("*/*.safetensors"))

    own.train("opd")
    weights = 4 * shape_of("anchor", own).parameters
    assert size("opd") == pytest.approx(plans["opd"].disk - 3 * weights, rel=0.2)  # files name their parts
    build(plan(own, tuple(plans), (0,)), own, processes=1)
    assert all(run.finished for run in runs.values())
    for arm, planned in plans.items():
        assert size(arm) == pytest.approx(planned.stays + weights, rel=0.2)
        # One file with a name in each run.
        assert runs[arm].snapshot_path(0).samefile(runs["opd"].snapshot_path(0))
    # Only where other runs begin, or find their directions, is more left than the start and the end.
    left = {arm: [step for step in range(5) if run.snapshot_path(step).exists()] for arm, run in runs.items()}
    assert left == {"opd": [0, 1, 4], "rlvr": [0, 1, 4], "opd_of_rlvr4": [0, 4]}


def test_a_base_takes_the_tokenizer_and_the_ends_of_its_teacher(pretrained, tmp_path, monkeypatch):
    """A base model ends a sequence with another token than one that was trained for chats, and knows no template."""
    monkeypatch.setenv("OPDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "HfApi", lambda: type("Api", (), {"model_info": lambda *a, **k: Revision})())

    def download(repository, revision, local_dir, allow_patterns):
        pretrained(local_dir)
        tokenizer = load_tokenizer(local_dir)
        if repository == "someone/chats":
            tokenizer.eos_token, tokenizer.chat_template = "#", "<{{ messages[0]['content'] }}>"
        tokenizer.save_pretrained(local_dir)
        ends = {"eos_token_id": [tokenizer.eos_token_id]}
        (local_dir / "generation_config.json").write_text(json.dumps(ends))

    monkeypatch.setattr(fetching, "snapshot_download", download)
    models = replace(SCALE.models, pretrained={"base": "someone/base", "teacher": "someone/chats"}, tokenizer="teacher")
    own = Laboratory(replace(SCALE, models=models), tmp_path / "own")
    assert own.model("base").folder == str(own.models / "base"), "the hub's own would end with another token"
    assert own.model("teacher").folder == "someone/chats"
    provide_given(own)
    base, teacher = own.models / "base", own.models / "teacher"
    check_same_vocabulary(base, teacher)
    assert (
        load_tokenizer(base).eos_token == "#"
        and load_tokenizer(base).chat_template == load_tokenizer(teacher).chat_template
    )
    assert (base / "model.safetensors").samefile(
        tmp_path / "cache" / "models" / "someone" / "base" / "model.safetensors"
    )
    # What SFT makes of it ends so too.
    install_model(own.train("sft"), own.models / "anchor")
    check_same_vocabulary(own.models / "anchor", teacher)


def test_a_model_of_another_scale_is_taken_as_a_rounded_copy(lab, tmp_path, monkeypatch):
    own = Laboratory(TINY, tmp_path / "own")
    monkeypatch.setenv("OPDLAB_HOME", str(tmp_path / "home"))
    with pytest.raises(OpdlabError, match=r"tiny-learning/anchor: run 'opdlab models --scale tiny-learning' first"):
        provide_given(own)
    shutil.copytree(lab.models / "anchor", tmp_path / "home/data/models/tiny-learning/anchor")
    assert "young" in all_models(own)
    assert all(job.what != "young" for job in plan(own, (), models=all_models(own))), "no arm makes it"
    for _ in range(2):
        provide_given(own)
    source, copy = (load_model(path).state_dict() for path in (lab.models / "anchor", own.models / "young"))
    assert all(torch.equal(copy[name], weight.bfloat16().float()) for name, weight in source.items())


def test_all_models_of_all_seeds_are_made():
    lab = Laboratory.at("tiny")
    made, last = all_models(lab), max(lab.seeds_of("sft"))
    assert {"base", "teacher", "teacher_same", "young", "anchor", f"anchor-{last}", "teacher_rlvr-2"} <= set(made)
    assert f"anchor-{last + 1}" not in made and len(set(made)) == len(made)


def test_a_pretrained_model_is_fetched_once_and_linked(pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("OPDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "HfApi", lambda: type("Api", (), {"model_info": lambda *a, **k: Revision})())
    calls = []

    def download(repository, revision, local_dir, allow_patterns):
        calls.append((repository, revision))
        pretrained(local_dir)
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr(fetching, "snapshot_download", download)
    scale = replace(SCALE, models=replace(SCALE.models, pretrained={"base": "someone/model"}))
    own = Laboratory(scale, tmp_path / "own")
    for _ in range(2):
        provide_given(own)
    assert calls == [("someone/model", "abc")]
    # A cache may be cleared, and the link then leads nowhere.
    shutil.rmtree(tmp_path / "cache")
    provide_given(own)
    assert len(calls) == 2
    assert load_model(own.models / "base").config.hidden_size == 32
    assert not (own.models / "base" / ".cache").exists()
    assert [job.what for job in plan(own, (), models=("anchor", "teacher"))] == ["sft", "expert"]
    build([], own)
    noted = json.loads((own.records / "pretrained.json").read_text())["base"]
    assert noted["from"] and noted["weights"] == own.model("base").identity
    monkeypatch.setattr(fetching, "HfApi", lambda: None)
    with pytest.raises(OpdlabError, match=r"cannot be taken from the hub .*put its folder there yourself"):
        fetch("someone/other", tmp_path / "other")


class Revision:
    sha = "abc"


def test_which_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(SCALE.compute.gpu) == torch.device("cpu")
    monkeypatch.setenv("OPDLAB_DEVICE", "cuda")
    if not torch.backends.cuda.is_built():
        with pytest.raises(OpdlabError, match=r"device 'cuda' cannot be used .*OPDLAB_DEVICE=cpu"):
            find_device(SCALE.compute.gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arm", ["opd", "opd_full", "rlvr", "sft"])
def test_a_gpu_gives_the_same_loss_and_gradient(arm, real, monkeypatch):
    """In float32, on the same batch: loss within 1e-5, gradient within 1e-4 of its norm."""
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("OPDLAB_DEVICE", device)
        subject = trainer(real, arm, clip=1e9, dtype="float32")
        if device == "cpu":
            rollouts, rewards = subject.batch(0)
            rewards = None if rewards is None else torch.arange(float(len(rewards))) % 3
        subject.batch = lambda step, given=(rollouts, rewards): given
        loss = subject.step(0)["loss"]
        found[device] = loss, torch.cat([weight.grad.flatten().cpu() for weight in subject.student.parameters()])
    (loss, gradient), (other_loss, other) = found.values()
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert (other - gradient).norm() < 1e-4 * gradient.norm()
