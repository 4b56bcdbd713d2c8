"""Training on data, rewards and models of one's own: what comes of it, and each way of holding it wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

import opdlab as ol
from opdlab.cli import main
from opdlab.errors import OpdlabError
from opdlab.models.folders import check_same_vocabulary, load_tokenizer
from opdlab.training import loop
from opdlab.training.arms import Model
from opdlab.training.config import with_fields
from opdlab.training.rollouts import encode_completions, encode_prompts
from opdlab.training.trained import make_experiment
from opdlab.training.trainer import Trainer

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|model|>"]
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)
# Few steps of few completions, and no bar.
QUICK = {"steps": 4, "learning_rate": 1e-3, "progress": False, "prompts": 4, "samples": 2, "evaluation_prompts": 4}


def own_model(
    folder, *, width=16, seed=0, letters="abcdef", template=TEMPLATE, pad="<|pad|>", eos="<|end|>", bos=None, **config
):
    """Write a Qwen3 model with random weights, and a tokenizer with a chat template, which may begin by itself."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        begin = [(bos, vocabulary[bos])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=SPECIAL[1:],
        chat_template=template,
    ).save_pretrained(folder)
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    shape |= {"vocab_size": len(vocabulary), "tie_word_embeddings": True} | config
    config = transformers.Qwen3Config(**shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a student and a larger teacher."""
    folder = tmp_path_factory.mktemp("models")
    own_model(folder / "student")
    own_model(folder / "teacher", width=24, seed=1)
    return folder


def words():
    return [a + b + c for a in "abcdef" for b in "abcdef" for c in "abcdef"][::3]


def rows():
    return [{"word": word, "sorted": "".join(sorted(word))} for word in words()]


def share(prompt, completion, answer):
    """Reward each letter that is in its place, and longer texts a bit, so that no two texts are alike."""
    return sum(a == b for a, b in zip(completion, answer, strict=False)) / 3 + len(completion) / 100


def task_of(reward=share, **options):
    return ol.Task.from_dataset(rows(), prompt="word", answer="sorted", reward=reward, **options)


def histories(run):
    """What a run wrote, without what time it took."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run.run.lines("history")]
    return lines, run.run.lines("evaluations")


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "snapshots").iterdir())}


# --- what a person does -----------------------------------------------------------------------------------------------


def test_ten_lines(models, tmp_path):
    task = task_of()
    run = ol.train(ol.opd(student=models / "student", teacher=models / "teacher"), task, out=tmp_path / "mine", **QUICK)
    assert list(run.history["step"]) == [1, 2, 3, 4]
    assert {"loss", "reward", "entropy", "kl_teacher", "tokens", "seconds"} <= set(run.history)
    assert run.history[["loss", "reward", "entropy", "kl_teacher"]].notna().all(axis=None)
    assert run.history["cut"].between(0, 1).all() and run.evaluations["cut"].between(0, 1).all()
    assert run.accuracy == run.evaluations["sampled"].iloc[-1]
    assert run.trajectory.plot("stable_rank").axes
    assert {"coherence", "growth", "clipped"} <= set(run.where().wide) and run.where().wide["steps"].iloc[-1] == "4"
    assert repr(run).startswith("mine, 4 steps: mean reward ")

    said = run.transcripts(2)
    assert list(said) == ["prompt", "demonstration", "before", "reward before", "after", "reward after"]
    assert (said["demonstration"] == said["prompt"].map(lambda word: "".join(sorted(word)))).all()
    # Random models write special tokens and seldom end: what is shown is what was graded.
    shown = run.transcripts(8)
    cut = 0
    for when in ("before", "after"):
        for prompt, demonstration, text, reward in shown[
            ["prompt", "demonstration", when, f"reward {when}"]
        ].to_numpy():
            cut += text.endswith("…")
            earned = 0.0 if text.endswith("…") else share(prompt, text, demonstration)
            assert reward == pytest.approx(earned)
    assert 0 < cut < 16 and shown["before"].str.contains("<|", regex=False).any()

    half = ol.opd(
        student=run.model,
        teacher=models / "teacher",
        tokens=ol.top("log-ratio", 0.25),
        projection=ol.project(k=4, start=0.5),
    )
    other = ol.train(half, task, out=tmp_path / "half", **QUICK)
    pairs = ol.compare([run, other]).pairs
    assert set(pairs["a"]) == {"mine"} and set(pairs["b"]) == {"half"}


def test_the_first_example_of_the_readme(models, tmp_path, monkeypatch, capsys):
    example = (Path(__file__).parents[2] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in example.splitlines() if line]) <= 10 and example.count("steps=200") == 2
    monkeypatch.chdir(tmp_path)
    for name, made in {"base-model": "student", "better-model": "teacher"}.items():
        shutil.copytree(models / made, name)
    own_model("tuned-model", seed=2)
    lines = [json.dumps({"question": word, "answer": "a"}) for word in words()]  # now and then by chance
    Path("prompts.jsonl").write_text("\n".join(lines))
    exec(example.replace("steps=200", "steps=6"), {})
    assert "stable_rank" in capsys.readouterr().out


def test_sft_opd_and_rlvr_follow_each_other(models, tmp_path):
    task = task_of()
    sft = ol.train(ol.sft(models / "student"), task, out=tmp_path / "sft", **QUICK | {"samples": 1})
    assert sft.history["reward"].dtype == float and sft.history["reward"].isna().all()
    assert sft.history["loss"].notna().all()
    for name, arm in {
        "opd": ol.opd(sft.model, models / "teacher", estimator="full"),
        "rlvr": ol.rlvr(sft.model),
        "matched": ol.sft(sft.model, teacher=models / "teacher"),
    }.items():
        run = ol.train(arm, task, out=tmp_path / name, **QUICK)
        start, end = (sft.run.snapshot(4), run.run.snapshot(0))
        assert all(torch.equal(start[key], end[key]) for key in start), "it starts where SFT ended"
        assert run.run.finished


def test_the_models_read_prompts_through_the_chat_template(models, tmp_path):
    trainer = Trainer(make_experiment(ol.rlvr(models / "student"), task_of(), steps=1, learning_rate=1e-3))
    assert trainer.task.texts(trainer.tokenizer, ["cab"]) == ["<|user|>cab<|model|>"]
    rollouts, _ = trainer.batch(0)
    assert all(
        ids[0] == SPECIAL.index("<|user|>") and ids[-1] == SPECIAL.index("<|model|>") for ids in rollouts.prompts
    )
    plain = Trainer(make_experiment(ol.rlvr(models / "student"), task_of(chat=False), steps=1, learning_rate=1e-3))
    assert plain.task.texts(plain.tokenizer, ["cab"]) == ["cab"]
    own_model(tmp_path / "no-template", template=None)
    without = make_experiment(ol.rlvr(tmp_path / "no-template"), task_of(), steps=1, learning_rate=1e-3)
    assert without.task.texts(Trainer(without).tokenizer, ["cab"]) == ["cab"]


def test_rows_come_from_where_they_are(tmp_path):
    file = tmp_path / "words.jsonl"
    # A line separator inside a string is no end of a row.
    lines = [*rows(), {"word": "a\u2028b", "sorted": "ab"}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    from_file = ol.Task.from_dataset(file, prompt="word", answer="sorted")
    assert from_file.name == "words" and from_file.data == (*words(), "a\u2028b")
    frame = pd.DataFrame(rows())
    frame.to_csv(tmp_path / "words.csv", index=False)
    columns = {"prompt": "word", "answer": "sorted"}
    of_all = [ol.Task.from_dataset(place, **columns) for place in (frame, tmp_path / "words.csv", rows(), rows() * 2)]
    assert len({task.digest for task in of_all}) == 1 and of_all[1].name == "words"
    file.write_text('{"word": "a", "sorted": "a"}\n{"word": \n')
    with pytest.raises(OpdlabError, match=r"words.jsonl cannot be read \(line 2: Expecting value: column 10"):
        ol.Task.from_dataset(file, **columns)
    datasets = pytest.importorskip("datasets")
    from_datasets = ol.Task.from_dataset(datasets.Dataset.from_list(rows()), prompt="word", answer="sorted")
    assert from_datasets.data == tuple(words())
    assert from_datasets.digest == ol.Task.from_dataset(rows(), prompt="word", answer="sorted").digest


def test_a_reward_that_finds_no_answer_right_is_called_so():
    def graded(prompt, completion, answer):
        return float(completion == answer and isinstance(answer, int))

    numbers = [{"prompt": f"{n} + 1", "answer": n + 1} for n in range(20)]
    with pytest.warns(UserWarning, match=r"gives 0 to its own demonstrations, such as '1' on the prompt '0 \+ 1': the"):
        _ = ol.Task.from_dataset(numbers, reward=graded).digest


def test_a_task_shows_itself_in_a_line():
    assert repr(task_of(name="sorting")) == "Task('sorting': 64 prompts to train on, 8 held out)"


def test_graded_rewards_are_reported_as_means(models, tmp_path):
    run = ol.train(ol.rlvr(models / "student"), task_of(lambda p, c, a: 7.5), out=tmp_path / "run", **QUICK)
    ended = run.history["reward"] / 7.5
    # What is cut before its end earns nothing.
    assert ended.to_numpy() == pytest.approx(1 - run.history["cut"]) and ended.max() > 0
    assert run.accuracy / 7.5 == pytest.approx(1 - run.evaluations["cut"].iloc[-1])
    assert "accuracy" not in run.history and 0 < run.accuracy <= 7.5


def test_a_reward_that_never_differs_leaves_nothing_to_measure(models, tmp_path):
    run = ol.train(ol.rlvr(models / "student"), task_of(lambda p, c, a: 0.0), out=tmp_path / "run", **QUICK)
    assert re.fullmatch(
        r"run, 4 steps: mean reward 0 -> 0; 4 of 4 steps changed no weight, as all completions of a prompt .* same",
        repr(run),
    )
    short = ol.train(ol.rlvr(models / "student"), task_of(), out=tmp_path / "short", **QUICK | {"max_new_tokens": 1})
    assert re.search(r"; 4 of 4 steps changed no weight, as \d\d% of the completions were cut at max_new", repr(short))
    with pytest.raises(OpdlabError, match=r"^no step of run changed a weight: print the run, which says why$"):
        _ = run.trajectory


def test_a_lambda_and_a_closure_and_a_callable_object_can_reward(models, tmp_path):
    class Weighted:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, prompt, completion, answer):
            return self.weight * share(prompt, completion, answer)

    def closure(weight):
        return lambda prompt, completion, answer: weight * share(prompt, completion, answer)

    for i, reward in enumerate((lambda p, c, a: float(c == a), closure(2.0), Weighted(2.0), Weighted(2.0).__call__)):
        out = tmp_path / str(i)
        run = ol.train(ol.rlvr(models / "student"), task_of(reward), out=out, **QUICK | {"steps": 1})
        assert run.run.finished
    for make in (closure, Weighted):
        assert task_of(make(2.0)).digest == task_of(make(2.0)).digest != task_of(make(3.0)).digest


def test_a_student_without_a_pad_token_pads_with_its_end(models, tmp_path):
    own_model(tmp_path / "no-pad", pad=None)
    run = ol.train(ol.opd(tmp_path / "no-pad", models / "teacher"), task_of(), out=tmp_path / "run", **QUICK)
    usual = ol.train(ol.opd(models / "student", models / "teacher"), task_of(), out=tmp_path / "usual", **QUICK)
    assert run.run.lines("evaluations") == usual.run.lines("evaluations")


def test_a_student_may_start_from_random_weights(tmp_path):
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 32, "num_hidden_layers": 1}
    sums = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(10) for b in range(10)]
    student = Model(shape=tuple(shape.items()))
    run = ol.train(ol.sft(student), ol.Task.from_dataset(sums), out=tmp_path / "run", **QUICK)
    assert len(run.transcripts(2)) == 2 and (run.model / "tokenizer.json").exists()
    with pytest.raises(OpdlabError, match=r"starts from random weights has no update to measure: train it on"):
        _ = run.trajectory


# --- stopping and going on --------------------------------------------------------------------------------------------


# After every step, and not before the training is done: then it begins again.
@pytest.mark.parametrize("seconds_between_checkpoints", [0.0, 3600.0])
def test_an_interrupted_run_goes_on_bit_for_bit(seconds_between_checkpoints, models, tmp_path, monkeypatch):
    arm = ol.opd(models / "student", models / "teacher", projection=ol.project(k=4, start=0.5))
    settings = QUICK | {"steps": 8}
    whole = ol.train(arm, task_of(), out=tmp_path / "whole", **settings)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", seconds_between_checkpoints)
    step = Trainer.step
    for stopped_at in (3, 6):

        def stopping(self, number, stopped_at=stopped_at):
            if number == stopped_at:
                raise KeyboardInterrupt
            return step(self, number)

        monkeypatch.setattr(Trainer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            ol.train(arm, task_of(), out=tmp_path / "cut", **settings)
    monkeypatch.setattr(Trainer, "step", step)
    cut = ol.train(arm, task_of(), out=tmp_path / "cut", **settings)
    assert histories(cut) == histories(whole)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_the_same_call_returns_the_run_that_is_there(models, tmp_path, monkeypatch):
    arm, out = ol.rlvr(models / "student"), tmp_path / "run"
    first = ol.train(arm, task_of(), out=out, **QUICK)
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("it was trained again"))
    # Another object with the same code, whatever its comments.
    namespace = {"__name__": share.__module__}
    exec(
        "def share(prompt, completion, answer):\n    # another comment\n    "
        "return sum(a == b for a, b in zip(completion, answer, strict=False)) / 3 + len(completion) / 100",
        namespace,
    )
    assert ol.train(arm, task_of(namespace["share"]), out=out, **QUICK).accuracy == first.accuracy


def test_a_reward_that_is_mended_needs_no_new_folder(models, tmp_path):
    arm, out = ol.rlvr(models / "student"), tmp_path / "run"
    with pytest.raises(OpdlabError, match=r"ZeroDivisionError"):
        ol.train(arm, task_of(lambda p, c, a: 1 / 0), out=out, **QUICK)
    assert histories(ol.train(arm, task_of(), out=out, **QUICK)) == histories(
        ol.train(arm, task_of(), out=tmp_path / "another", **QUICK)
    )


@pytest.fixture
def broken_off(models, tmp_path, monkeypatch):
    """A run that stopped after two steps, and what trains it with a task."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def train(reward=share, out="run", rows_=None, **options):
        task = ol.Task.from_dataset(rows_ or rows(), prompt="word", answer="sorted", reward=reward, **options)
        return ol.train(ol.rlvr(models / "student"), task, out=tmp_path / out, **QUICK)

    def stop(**options):
        step = Trainer.step
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Trainer, "step", lambda self, number: step(self, number if number < 2 else 1 // 0))
            train(lambda p, c, a: 2 * share(p, c, a) / 2, **options)
        assert len((tmp_path / "run/history.jsonl").read_text().splitlines()) == 2
        return train

    return stop


def test_a_run_without_a_version_goes_on_under_one(broken_off):
    train = broken_off()
    others = r"^out is .*run, which holds another experiment \(data or reward differ%s\): choose another"
    version = ", version is .* and was .*"
    with pytest.raises(OpdlabError, match=others % "" + r", or give the task version='...' if the reward is the same"):
        train()
    with pytest.raises(OpdlabError, match=others % version + "$"):
        train(rows_=[*rows()[:-1], rows()[-1] | {"sorted": "a"}], version="mended")
    gone_on = train(version="mended")
    assert histories(gone_on) == histories(train(out="whole"))
    # Finished: it is the run of this version alone.
    assert histories(train(lambda p, c, a: 0.0, version="mended")) == histories(gone_on)
    for other, differ in ((other, others % version) for other in ({}, {"version": "another"})):
        with pytest.raises(OpdlabError, match=differ + ", or give the task version='mended' if the reward is the"):
            train(**other)
    with pytest.raises(OpdlabError, match=(others % version).replace("run", "whole") + ", and give the"):
        train(out="whole", version="mended")


def test_a_version_alone_says_which_reward_it_is(broken_off):
    assert histories(broken_off(version="1")(version="1"))[0][-1]["step"] == 4


# --- what is refused --------------------------------------------------------------------------------------------------


def test_out_that_holds_another_experiment(models, tmp_path):
    arm, out = ol.rlvr(models / "student"), tmp_path / "run"
    ol.train(arm, task_of(), out=out, **QUICK)
    before = files(out)
    others = {
        "seed is 1 and was 0": {"seed": 1},
        "learning_rate is 0.002 and was 0.001, samples is 3 and was 2": {"samples": 3, "learning_rate": 2e-3},
        "student differs": {"arm": ol.rlvr(models / "teacher")},
        "optimizer is sgd and was None": {"arm": ol.rlvr(models / "student", optimizer="sgd")},
        "snapshots differ": {"snapshots": (1, 3, 4)},
    }
    for part, change in others.items():
        chosen = {"arm": arm} | change
        also = "(config.json or tokenizer of a model differs, )?"
        with pytest.raises(OpdlabError, match=rf"^out is .*run, which holds another experiment \({also}{part}\)"):
            ol.train(chosen.pop("arm"), task_of(), out=out, **QUICK | chosen)
    longer = r"\(steps is 8 and was 4\): choose another, and to train on, begin there with the model of this run"
    with pytest.raises(OpdlabError, match=longer):
        ol.train(arm, task_of(), out=out, **QUICK | {"steps": 8})
    shutil.copytree(models / "student", tmp_path / "model")
    with pytest.raises(OpdlabError, match=r"^out is .*model, which holds config.json of something else: choose"):
        ol.train(arm, task_of(), out=tmp_path / "model", **QUICK)
    assert files(out) == before


@pytest.mark.parametrize(
    "name", ["history.jsonl", "evaluations.jsonl", "snapshots/step-000004.safetensors", "model/config.json"]
)
def test_out_that_holds_what_looks_like_a_run(name, models, tmp_path):
    """As the snapshots that a GeometryCallback wrote there: without the config of a run they are of something else."""
    out = tmp_path / "run"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"epoch": 1}\n')
    (out / "notes.txt").write_text("of mine")
    said = rf"^out is .*run, which holds {name[:5]}.* of something else: choose another$"
    with pytest.raises(OpdlabError, match=said):
        ol.train(ol.rlvr(models / "student"), task_of(), out=out, **QUICK)
    there = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert there == {"notes.txt": "of mine", name: '{"epoch": 1}\n'}


def test_files_of_ones_own_beside_a_run_stay(models, tmp_path):
    """Of what is half written only what a run itself left there is deleted."""
    mine = [
        tmp_path / name
        for name in (
            "thesis.zip.part",
            "prompts.jsonl.1.part",
            "a/config.json.7.part",
            "history.jsonl.part",
            "b.1.part/c",
        )
    ]
    left = [tmp_path / name for name in ("history.jsonl.7.part", "snapshots/step-000002.safetensors.4711.part")]
    for path in (*mine, *left, tmp_path / "origins/1234567890abcdef-float32.safetensors.4711.part"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert ol.train(ol.rlvr(models / "student"), task_of(), out=tmp_path, **QUICK).run.finished
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file() and ".part" in str(path)) == sorted(mine)


BONUS = 0.25


def helper(completion):
    return BONUS * len(completion)


def with_helper(prompt, completion, answer):
    return max(float(completion == answer), *(helper(letter) for letter in completion + "a"))


def test_another_reward_or_data_set_is_never_given_the_old_run(models, tmp_path, monkeypatch):
    arm, out = ol.rlvr(models / "student"), tmp_path / "run"
    task = task_of(with_helper)
    run = ol.train(arm, task, out=out, **QUICK)
    refused = (
        r"^out is .* which holds another experiment \(data or reward differ\): choose another(, and give the task|$)"
    )

    def asked(task):
        with pytest.raises(OpdlabError, match=refused):
            ol.train(arm, task, out=out, **QUICK)

    asked(task_of(share))
    with pytest.raises(OpdlabError, match=r"^there is no scale '.*run'; .* opened by the same call of ol.train again"):
        ol.load(str(out))
    # On right answers and on each other's this gives what `with_helper` does.
    asked(task_of(lambda p, c, a: 0.0 if len(c) > 9 else with_helper(p, c, a)))
    one_more = [*rows(), {"word": "abcdef", "sorted": "abcdef"}]
    asked(ol.Task.from_dataset(one_more, prompt="word", answer="sorted", reward=with_helper))
    # What a reward reads and calls belongs to it.
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "BONUS", 0.5)
        asked(task_of(with_helper))
        # Also of a task that was made, and used, before.
        asked(task)
        with pytest.warns(UserWarning, match=r"^the reward of task 'data' is not the one that run was trained with"):
            run.transcripts(2)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "helper", lambda completion: BONUS * len(completion) + 0 * len(completion))
        asked(task_of(with_helper))
    assert ol.train(arm, task_of(with_helper), out=out, **QUICK).run.finished


@pytest.mark.parametrize("text", ["[{}, {}]", "\n[\n{},\n{}]", "\ufeff{}\n{}\n", "\ufeff[{},{}]"])
def test_rows_in_an_array_or_behind_a_byte_order_mark(text, tmp_path):
    text = text.replace("{}", '{"prompt": "a", "answer": 1}', 1).replace("{}", '{"prompt": "b", "answer": 2}')
    (tmp_path / "some.json").write_text(text, "utf-8")
    assert ol.Task.from_dataset(tmp_path / "some.json").data == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arm": "opd"}, r"^arm is 'opd': give one that ol.sft, ol.opd or ol.rlvr made$"),
        ({"task": rows()}, r"^task is .*: give one that ol.Task.from_dataset made$"),
        ({"out": None}, r"^out is None: give the folder of the run$"),
        ({"out": __file__}, r"^out is .*test_own.py: give the folder of the run$"),
        ({"student": None}, r"^student is None: give the folder of a model, or OWNER/NAME on the hub$"),
        ({"student": torch.nn.Linear(1, 1)}, r"^student is Linear\(in_features=1, .*: give the folder of a model"),
        ({"teacher": 3}, r"^teacher is 3: give the folder of a model"),
        ({"rows": None}, r"^rows is None: give a list of dicts, a JSONL file, or a data set or its name on the hub$"),
    ],
)
def test_arguments_that_are_something_else(arguments, message, models, tmp_path):
    given = {"student": models / "student", "teacher": models / "teacher", "rows": rows(), "out": tmp_path / "run"}
    given |= arguments
    with pytest.raises(OpdlabError, match=message):
        task = ol.Task.from_dataset(given["rows"], prompt="word", answer="sorted")
        arm = ol.opd(given["student"], given["teacher"])
        ol.train(given.get("arm", arm), given.get("task", task), out=given["out"], **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{% for m in messages %}"])
def test_a_chat_template_that_refuses(template, tmp_path):
    student = own_model(tmp_path / "student", template=template)
    said = r"^the chat template of .*student refuses a prompt \(.+\): mend it, or make the task with chat=False$"
    with pytest.raises(OpdlabError, match=said):
        ol.train(ol.rlvr(student), task_of(), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [3, 1100])
def test_an_empty_prompt_is_refused_before_the_first_step(count, models, tmp_path):
    data = [{"prompt": "a" * (n % 7 + 1) + "bcdef"[n % 5] * (n // 70), "answer": "a"} for n in range(count)]
    task = ol.Task.from_dataset([*data, {"prompt": "", "answer": "a"}], chat=False)
    with pytest.raises(OpdlabError, match=r"^the prompt '' has no token to start from: leave it out, or write"):
        ol.train(
            ol.rlvr(models / "student"), task, out=tmp_path / "run", **QUICK | {"prompts": 2, "evaluation_prompts": 1}
        )
    assert not (tmp_path / "run").exists()


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "cab"}]


def test_a_chat_of_one_message_is_its_text():
    chats = [{"word": [{"role": "user", "content": word}], "sorted": n} for n, word in enumerate(words())]
    task = ol.Task.from_dataset(chats, prompt="word", answer="sorted")
    assert task.data == tuple(words()) and task.demonstration(words()[3]) == "3"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            rows(),
            {"answer": "solution"},
            r"^row 0 .* no answer in a column 'solution', and has word, sorted: .* answer=",
        ),
        (
            rows(),
            {"answer": "sorted", "demonstration": "cot"},
            r"^row 0 of the data set has no demonstration in a column 'cot'",
        ),
        (["abc"], {}, r"^row 0 of the data set is 'abc': give rows as dicts"),
        (rows()[:1], {"answer": "sorted"}, r"^the data set has fewer than two different prompts: give more, as one"),
        (
            [{"word": "a", "sorted": " "}, *rows()],
            {"answer": "sorted"},
            r"^the answer to 'a' is ' ': no completion",
        ),
        ([*rows(), {"word": "aaa", "sorted": "b"}], {"answer": "sorted"}, r"^row 72 .* asks 'aaa' again with another"),
        ("nowhere.jsonl", {}, r"^the data set nowhere.jsonl cannot be read .*: give one JSON object a line$"),
        *(
            ([*rows(), row], {"answer": "sorted"}, rf"^row 72 of the data set has no {role} in a column '{column}'")
            for missing in (None, float("nan"), pd.NA, np.float32("nan"), pd.NaT)
            for role, column, row in (
                ("prompt", "word", {"word": missing, "sorted": "b"}),
                ("answer", "sorted", {"word": "b", "sorted": missing}),
            )
        ),
        *(
            ([*rows(), row], {"answer": "sorted"}, rf"^row 72 of the data set has .* in its column '{column}'.*: {do}")
            for column, row, do in (
                ("word", {"word": CHAT, "sorted": "b"}, "give text, a finite number, or a chat of one message by the"),
                ("word", {"word": CHAT[:1], "sorted": "b"}, "give text"),
                ("sorted", {"word": "b", "sorted": ["a", "b"]}, "give text"),
                ("sorted", {"word": "b", "sorted": np.array(["a", "b"])}, "give text"),
                ("sorted", {"word": "b", "sorted": float("inf")}, "give text"),
                ("word", {"word": "\ud83d", "sorted": "b"}, "write it as Unicode"),
            )
        ),
        (
            rows(),
            {"answer": "sorted", "reward": "exact"},
            r"^reward is 'exact': give a function of \(prompt, completion, answer\)$",
        ),
    ],
)
def test_a_data_set_that_cannot_be_used(data, options, message):
    with pytest.raises(OpdlabError, match=message):
        ol.Task.from_dataset(data, **{"prompt": "word"} | options)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda p, c, a: 1 / 0, r"raised ZeroDivisionError \(division by zero\)"),
        (lambda p, c, a: float("nan"), r"is nan"),
        (lambda p, c, a: "much", r"raised ValueError \(could not convert .*\)"),
        (lambda p, c, a: None, r"raised TypeError \(float\(\) argument must be .*, not 'NoneType'\)"),
    ],
)
def test_a_reward_that_fails_quotes_the_prompt(reward, said, models, tmp_path):
    with pytest.raises(
        OpdlabError, match=rf"^the reward of task 'data' {said} on the prompt '[a-f]{{3}}' and the comp"
    ):
        ol.train(ol.rlvr(models / "student"), task_of(reward), out=tmp_path / "run", **QUICK)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"letters": "abcdefg"}, r"different vocabularies \(10 and 11 tokens, 10 in common\): choose a teacher"),
        (
            {"eos": "<|model|>"},
            r"ends a sequence with '<\|end\|>' \(token 1\) and teacher .* '<\|model\|>' \(token 3\)",
        ),
    ],
)
def test_a_teacher_of_another_family(other, message, models, tmp_path):
    own_model(tmp_path / "teacher", **other)
    with pytest.raises(OpdlabError, match=message):
        ol.train(ol.opd(models / "student", tmp_path / "teacher"), task_of(), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [{"student": 16}, {"teacher": 16}, {"student": 16, "teacher": 24}])
def test_padding_of_a_vocabulary_is_cut(size, models, tmp_path):
    """Logits of no token have no part in losses and rollouts, wherever they are, and make no difference to training."""
    for role in ("student", "teacher"):
        shutil.copytree(models / role, tmp_path / role)
        model = transformers.AutoModelForCausalLM.from_pretrained(models / role)
        model.resize_token_embeddings(size.get(role, 10), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[10:] = model.get_input_embeddings().weight[:1] * 5  # likely ones
        model.save_pretrained(tmp_path / role)
    for estimator, at_once in (("full", 0), ("sampled", 5)):
        runs = [
            ol.train(
                ol.opd(folder / "student", folder / "teacher", estimator=estimator, optimizer="sgd"),
                task_of(),
                out=tmp_path / f"{estimator}-{name}",
                **QUICK | {"tokens_at_once": at_once},
            )
            for name, folder in (("as-it-was", models), ("padded", tmp_path))
        ]
        plain, padded = (run.history[["loss", "entropy", "kl_teacher", "tokens"]] for run in runs)
        pd.testing.assert_frame_equal(plain, padded, rtol=1e-4)
        weights = [run.run.snapshot(4)["model.embed_tokens.weight"] for run in runs]
        assert weights[1].shape[0] == size.get("student", 10)
        torch.testing.assert_close(weights[1][:10], weights[0], rtol=0, atol=1e-6)


def test_the_beginning_of_a_sequence_comes_once(models, tmp_path):
    begins = own_model(tmp_path / "begins", bos="<|user|>", template=None)
    tokenizer = load_tokenizer(begins)
    encoded = encode_prompts(tokenizer, ["cab", "a"], 8)
    assert encoded == [tokenizer("cab").input_ids, tokenizer("a").input_ids] == [[2, 6, 4, 5], [2, 4]]
    # A template may write it too, and a completion never begins a sequence.
    assert encode_prompts(tokenizer, ["<|user|>cab"], 8) == [[2, 6, 4, 5]]
    assert encode_completions(tokenizer, ["cab"]) == [[6, 4, 5, 1]]
    assert encode_prompts(load_tokenizer(models / "student"), ["cab"], 8) == [[6, 4, 5]]
    with pytest.raises(
        OpdlabError, match=r"^student .*begins reads a prompt as '<\|user\|>.*' and teacher .* as '[a-f]"
    ):
        ol.train(ol.opd(begins, models / "teacher"), task_of(chat=False), out=tmp_path / "run", **QUICK)


def test_both_read_prompts_by_one_chat_template(models, tmp_path):
    for name, template in {"other": TEMPLATE.replace("<|model|>", "<|model|>a"), "none": None}.items():
        arm = ol.opd(models / "student", own_model(tmp_path / name, template=template))
        with pytest.raises(OpdlabError, match=r"^student .* reads a prompt as '.*' and teacher .*: give both one chat"):
            ol.train(arm, task_of(), out=tmp_path / "run", **QUICK)
        # Without templates the two read the same.
        assert ol.train(arm, task_of(chat=False), out=tmp_path / f"plain-{name}", **QUICK).run.finished


@pytest.mark.parametrize("after", ["<|user|>", "\n<|user|>\n"])
def test_an_answer_ends_as_a_completion_does(after, models, tmp_path):
    """Gemma's template ends a turn with <end_of_turn>, where its tokenizer says <eos>."""
    answered = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}AFTER{% endfor %}"
    template = TEMPLATE.replace("{% if", f"{answered}{{% if")
    wrong = own_model(tmp_path / "wrong", template=template.replace("AFTER", after))
    right = own_model(tmp_path / "right", template=template.replace("AFTER", after.replace("user", "end")))
    said = (
        r"^the chat template of .*wrong ends an answer with '<\|user\|>', and its tokenizer with '<\|end\|>': set eos"
    )
    for arm in (ol.rlvr(wrong), ol.sft(wrong), ol.opd(wrong, models / "teacher")):
        with pytest.raises(OpdlabError, match=said):
            ol.train(arm, task_of(), out=tmp_path / "run", **QUICK)
    assert ol.train(ol.rlvr(right), task_of(), out=tmp_path / "run", **QUICK).run.finished
    assert ol.train(ol.rlvr(wrong), task_of(chat=False), out=tmp_path / "plain", **QUICK).run.finished


def test_a_model_ends_as_its_tokenizer_does(models, tmp_path):
    teacher = shutil.copytree(models / "teacher", tmp_path / "teacher")
    for ends, fine in ((1, True), ([3, 1], True), (3, False), ([2, 3], False)):
        (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        if fine:
            check_same_vocabulary(models / "student", teacher)
        else:
            with pytest.raises(OpdlabError, match=r"^the model in .*teacher ends a sequence with token .*<\|end\|>"):
                check_same_vocabulary(models / "student", teacher)


def test_a_model_that_does_not_exist(models, tmp_path):
    for role in ("student", "teacher"):
        folders = {"student": models / "student", "teacher": models / "teacher"} | {role: tmp_path / "nowhere"}
        with pytest.raises(OpdlabError, match=rf"^the {role} is '.*nowhere', where there is no model: give a folder"):
            ol.train(ol.opd(**folders), task_of(), out=tmp_path / "run", **QUICK)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(OpdlabError, match=r"^the student is '.*lora', a LoRA adapter: merge it with its base first"):
        ol.train(ol.rlvr(tmp_path / "lora"), task_of(), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


NO = [
    *(("steps", True), ("clip", -1.0), ("weight_decay", -0.1), ("warmup", -1), ("betas", (0.9, 1.0)), ("seed", -1)),
    *(("betas", 0.9), ("betas", ("0.9", 0.95))),
    *(("tokens_at_once", -1), ("micro_batch", 0), ("threads", 0), ("evaluation_samples", 0), ("snapshots", (-3,))),
    *(("prompts", 0), ("evaluation_prompts", 0), ("max_new_tokens", 0), ("alpha", -0.5)),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"^steps is 0: give a whole number above 0$"),
        ({"steps": 2.5}, r"^steps is 2.5: give a whole number above 0$"),
        ({"learning_rate": float("nan")}, r"^learning_rate is nan: give a number above 0 and up to 1e\+30$"),
        ({"prompts": 65}, r"^prompts is 65, more than the prompts to train on \(64\): give fewer, or leave it out$"),
        ({"evaluation_prompts": 9}, r"^evaluation_prompts is 9, more than the prompts held out \(8\): give fewer"),
        *(
            ({name: value}, rf"^{name} is {re.escape(repr(value))}: give (a|two) .*(number|steps)")
            for name, value in NO
        ),
        ({"seed": None}, r"^seed is None: give a whole number, 0 or above$"),
        ({"clip": float("nan")}, r"^clip is nan: give a number above 0$"),
        ({"schedule": "Cosine"}, r"^schedule is 'Cosine': give constant or cosine$"),
        ({"projection": ol.project(k=17)}, r"^k is 17; expected 16 at most, as .* is smaller$"),
        ({"samples": 1}, r"^samples is 1: give at least 2$"),
        ({"snapshots": (3, 9)}, r"^snapshots is 9, more than the steps \(4\)"),
        ({"max_new_tokens": 32}, r"^max_new_tokens is 32, more than what the context leaves beside a prompt \(31\)"),
        ({"max_new_tokens": 28}, r"^the prompt '<\|user\|>.*' has 5 tokens, but only 4 fit the context"),
        ({"sample": 4}, r"^an experiment has no field 'sample': choose another, such as samples"),
        ({"num_generations": 4}, r"^an experiment has no field 'num_generations': choose another, such as samples$"),
        ({"samples": "four"}, r"^samples is 'four': give a whole number above 0$"),
        ({"compute": {"dtype": "bfloat16"}}, r"^compute is .*: give a Compute$"),
        ({"tokens": 0.25}, r"^tokens is 0.25: give what top or random_tokens returns$"),
    ],
)
def test_settings_that_cannot_be(settings, message, models, tmp_path):
    with pytest.raises(OpdlabError, match=message):
        ol.train(ol.rlvr(models / "student"), task_of(), out=tmp_path / "run", **QUICK | settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", [{"k": 0}, {"k": True}, {"start": 1.0}, {"acts_on": "weights"}])
def test_a_projection_onto_nothing(field):
    (name, value), *_ = field.items()
    with pytest.raises(OpdlabError, match=rf"^{name} is {value!r}: give "):
        ol.project(**field)


def test_a_small_data_set_shrinks_the_batch(models):
    arm, recipe = ol.rlvr(models / "student"), {"steps": 20, "learning_rate": 1e-3}
    few = ol.Task.from_dataset(rows()[:24], prompt="word", answer="sorted")
    experiment = make_experiment(arm, few, **recipe)
    assert experiment.recipe.prompts == few.training_prompts < 24
    assert experiment.evaluation_prompts == few.held_out
    experiment = make_experiment(arm, task_of(), **recipe)
    assert (experiment.recipe.prompts, experiment.recipe.samples) == (32, 4)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_tiny_data_set_trains_too(count, models, tmp_path):
    """Whatever the hash says of its prompts, one at least is held out, and never trained on."""
    for begin in range(0, 64, 8):
        task = ol.Task.from_dataset(rows()[begin : begin + count], prompt="word", answer="sorted")
        training, held_out = task.training_prompts, task.held_out
        assert training > 0 and held_out > 0 and training + held_out == count
        drawn = [set(task.prompts(n, np.random.default_rng(0), e)) for n, e in ((training, False), (held_out, True))]
        assert not drawn[0] & drawn[1] and len(drawn[0] | drawn[1]) == count
    run = ol.train(ol.sft(models / "student"), task, out=tmp_path / "run", steps=2, learning_rate=1e-3, progress=False)
    assert run.evaluations["prompts"].unique().tolist() == [held_out]


def test_an_answer_of_several_words_can_be_right():
    task = ol.Task.from_dataset([{"prompt": f"{n}?", "answer": "New York."} for n in range(3)])
    assert [task.reward("1?", said) for said in ("It is New York.", "New York", "York", "")] == [1.0, 1.0, 0.0, 0.0]


def test_the_last_step_is_kept_and_evaluated_whatever_is_asked_for(models):
    wanted = {"snapshots": (3,), "evaluations": (2,)}
    experiment = make_experiment(ol.rlvr(models / "student"), task_of(), steps=5, learning_rate=1e-3, **wanted)
    assert (experiment.kept, experiment.evaluations) == ((0, 3, 5), (2, 5))


def test_a_demonstration_that_would_be_cut(models, tmp_path):
    with pytest.raises(OpdlabError, match=r"^the demonstration '.*' has 4 tokens .* max_new_tokens=3: raise that"):
        ol.train(ol.sft(models / "student"), task_of(), out=tmp_path, **QUICK | {"samples": 1, "max_new_tokens": 3})


def test_fields_of_every_part_can_be_set(models):
    experiment = make_experiment(ol.rlvr(models / "student"), task_of(), steps=5, learning_rate=1e-3)
    changed = with_fields(
        experiment, {"seed": 3, "weight_decay": 1, "tokens": ol.top(), "threads": 2, "betas": (0.9, 0.95)}
    )
    assert (changed.seed, changed.recipe.weight_decay, changed.compute.threads) == (3, 1, 2)
    assert changed.arm.tokens == ol.top() and changed.recipe.betas == (0.9, 0.95)


def test_the_name_of_the_data_decides_nothing(models, tmp_path):
    for name in ("one", "other"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    given = [tmp_path / "one.jsonl", tmp_path / "other.jsonl", rows()]
    tasks = [ol.Task.from_dataset(data, prompt="word", answer="sorted", reward=share) for data in given]
    made = [make_experiment(ol.rlvr(models / "student"), task, steps=5, learning_rate=1e-3) for task in tasks]
    assert len({task.name for task in tasks}) == 3 and len({experiment.key for experiment in made}) == 1


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize(
    ("file", "change"),
    [("tokenizer_config.json", {"eos_token": "<|user|>"}), ("config.json", {"rms_norm_eps": 1e-3})],
)
def test_a_run_is_not_taken_for_that_of_another_tokenizer_or_configuration(model, file, change, models, tmp_path):
    for name in ("student", "teacher"):
        shutil.copytree(models / name, tmp_path / name)
    arm, quick = ol.opd(tmp_path / "student", tmp_path / "teacher"), QUICK | {"steps": 1, "out": tmp_path / "run"}
    first = ol.train(arm, task_of(), **quick)
    assert ol.train(arm, task_of(), **quick).accuracy == first.accuracy
    changed = json.loads((tmp_path / model / file).read_text()) | change
    (tmp_path / model / file).write_text(json.dumps(changed))
    with pytest.raises(OpdlabError, match=r"another experiment \(config.json or tokenizer of a model differs\)"):
        ol.train(arm, task_of(), **quick)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(models, tmp_path, monkeypatch):
    """Runs opdlab train in a folder with data and a module of rewards, and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    Path("own_rewards.py").write_text("def graded(prompt, completion, answer):\n    return len(completion) / 4\n")

    def run(*options, arm="opd", data="prompts.jsonl"):
        own = ["--data", data, "--prompt", "word", "--answer", "sorted", "--reward", "own_rewards:graded"]
        own += ["--student", str(models / "student"), "--teacher", str(models / "teacher")]
        own += ["--steps", "3", "--learning-rate", "1e-3", "--out", "mine", "--set", "prompts=4"]
        return main(["train", "--arm", arm, *own, *options])

    return run


def test_the_command_line_trains_on_data_of_ones_own(shell, capsys):
    chosen = ["--set", "samples=2", "--set", 'tokens=top("log-ratio", 0.25)', "--set", "schedule=cosine"]
    assert shell(*chosen, "--set", "projection=project(k=4, start=0.5)", "--seed", "5") == 0
    printed = capsys.readouterr().out
    assert "sampled" in printed and f"the model: {Path('mine/model').resolve()}" in printed
    config = json.loads(Path("mine/config.json").read_text())
    assert (config["seed"], config["task"], config["recipe"]["schedule"]) == (5, "", "cosine")
    assert config["arm"]["tokens"] == {"ranking": "log-ratio", "share": 0.25, "per_completion": True}
    assert config["projection"]["k"] == 4
    assert pd.read_json("mine/history.jsonl", lines=True)["step"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "sampels=2"], "an experiment has no field 'sampels': choose another, such as samples"),
        (["--set", "samples=two"], "samples is 'two': give a whole number above 0"),
        (["--set", "samples"], "--set samples has no value: write --set FIELD=VALUE"),
        (["--set", "tokens=open('x')"], "--set knows no open(...): write top, random_tokens or project"),
        (["--set", "task=3"], "--set task is no field of an experiment: give --data"),
        (["--set", "student=S"], "--set student is no field of an experiment: give --student"),
        (["--steps", "0"], "steps is 0: give a whole number above 0"),
        (["--reward", "nowhere:graded"], "--reward nowhere:graded cannot be imported"),
        (["--scale", "tiny"], "--scale is for the book's scales: leave it or --data out"),
        (["--arm", "opd_full"], "--arm is 'opd_full'; on --data choose sft, opd or rlvr"),
    ],
)
def test_the_command_line_refuses(options, message, shell, capsys):
    assert shell(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"opdlab: {message}") and error.count("\n") == 1


def test_options_of_ones_own_without_data(capsys):
    assert main(["train", "--arm", "opd", "--student", "x"]) == 2
    assert capsys.readouterr().err == "opdlab: --student is for a task of yours: add --data\n"
    assert main(["train", "--arm", "opd", "--data", "x"]) == 2
    assert capsys.readouterr().err == "opdlab: arm 'opd' on --data needs --student: give it\n"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", '{"model_type": "qwen', "\0\0\0"])
def test_a_model_with_a_damaged_configuration(name, text, models, tmp_path):
    student = shutil.copytree(models / "student", tmp_path / "student")
    (student / name).write_text(text)
    with pytest.raises(OpdlabError, match=rf"{tmp_path}/student.*(; restore or remake it|: restore it)$"):
        ol.train(ol.opd(student, models / "teacher"), task_of(), out=tmp_path / "run", **QUICK)
