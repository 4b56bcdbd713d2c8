"""Families of models at a random small size: each pass is that of every sequence alone, and all arms train.

The references share no code with opdlab: transformers' pass over one sequence without padding, and its ``generate``.
"""

import json

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import opdlab as ol
from opdlab.errors import OpdlabError
from opdlab.models.folders import load_model, load_tokenizer
from opdlab.training import opening, rollouts
from opdlab.training.rollouts import Rollouts, logits_of, micro_batches, sample
from opdlab.training.trained import make_experiment

TOKENS = ["<pad>", "<end>", *"abcdefgh"]
SIZE = {
    "vocab_size": len(TOKENS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
#: By name, the first word of a family's configuration, and what it has besides SIZE. Completions outgrow all windows.
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", HEAD),
    "qwen3 eager": ("Qwen3", HEAD),
    "gemma2": ("Gemma2", HEAD | {"sliding_window": 6}),
    "gemma3": ("Gemma3Text", HEAD | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {}),
    "qwen3 moe": ("Qwen3Moe", HEAD | EXPERTS),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt-oss": ("GptOss", HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "mistral 4": ("Mistral", {"sliding_window": 4}),
    "mistral 8": ("Mistral", {"sliding_window": 8}),
    "bloom": ("Bloom", {}),  # no positions, and no length of the context
    "granite": ("Granite", {"logits_scaling": 3.0}),  # something is done to the logits after the output layer
}
PROMPTS = ["abcdefgh", "bd", "hgfedcba"]
QUICK = {"steps": 2, "learning_rate": 1e-3, "progress": False, "prompts": 3, "samples": 2, "max_new_tokens": 12}
QUICK |= {"evaluation_prompts": 2, "evaluations": (), "snapshots": ()}


def write(folder, name, seed):
    first, options = FAMILIES[name]
    config = getattr(transformers, f"{first}Config")(**SIZE | options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Far from uniform, so that a wrong mask shows.
        for weight in model.parameters():
            weight.data.mul_(4 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    if name.endswith("eager"):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "eager"}))
    tokenizer = Tokenizer(tokenizer_models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with a student and a teacher of each family, of which equal ones have equal weights."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in FAMILIES:
        for seed, role in enumerate(("student", "teacher")):
            write(folder / name / role, name, seed)
    return folder


@pytest.fixture(scope="module")
def task():
    letters = "abcdefgh"
    rows = [{"prompt": a + b + letters[::step], "answer": b + a} for a in letters for b in letters for step in (1, 2)]
    return ol.Task.from_dataset(rows, reward=lambda prompt, said, answer: float(len(said)))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_sampled_as_each_sequence_alone(name, zoo):
    model, tokenizer = load_model(zoo / name / "student"), load_tokenizer(zoo / name / "student")
    batch = sample(model, tokenizer, PROMPTS, max_new_tokens=12, samples=2, generator=torch.Generator().manual_seed(0))
    seen = 0
    for part in micro_batches(batch, 4, model.device, torch.arange(6.0)):
        with torch.no_grad():
            packed = part.logits(model)
            torch.testing.assert_close(logits_of(model, part.hidden(model)), packed, rtol=0, atol=1e-5)
        for i, number in enumerate(part.advantages.long().tolist()):
            prompt, completion = batch.prompts[number // 2], batch.completions[number]
            with torch.no_grad():
                alone = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            found, expected = packed[i, part.mask[i]].log_softmax(-1), alone.log_softmax(-1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            seen += len(completion)
    assert seen == batch.tokens > 30, "the test needs completions longer than the windows"
    greedy = sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0)
    for prompt, mine in zip(greedy.prompts, greedy.completions, strict=True):
        model.generation_config.pad_token_id = 0
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=1)
        assert mine == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_arms_train(name, zoo, task, tmp_path):
    student, teacher = zoo / name / "student", zoo / name / "teacher"
    arms = {"sft": ol.sft(student), "opd": ol.opd(student, teacher), "rlvr": ol.rlvr(student)}
    for arm, made in arms.items():
        run = ol.train(made, task, out=tmp_path / arm, **QUICK | ({"samples": 1} if arm == "sft" else {}))
        assert run.history["loss"].notna().all() and (run.history["update_norm"] > 0).all()


def test_attention_decides_nothing(zoo, task, tmp_path):
    """Eager attention, with a row for each completion, learns what PyTorch's kernel learns from packed rows."""
    weights = []
    for name in ("qwen3", "qwen3 eager"):
        arm = ol.opd(zoo / name / "student", zoo / name / "teacher", estimator="full")
        # SGD, as Adam makes much of the last digits of a small gradient.
        run = ol.train(arm, task, out=tmp_path / name, optimizer="sgd", **QUICK | {"learning_rate": 0.1})
        weights.append(run.run.snapshot(2))
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, rtol=0, atol=1e-5)


def test_logits_held_in_parts_are_the_same(zoo, task, tmp_path):
    """What a model does to its logits after the output layer is done to parts of them too."""
    for name in ("gemma2", "granite"):
        arm, losses = ol.opd(zoo / name / "student", zoo / name / "teacher", estimator="full"), []
        for at_once in (0, 7):
            settings = {"tokens_at_once": at_once, "recompute": bool(at_once)}
            run = ol.train(arm, task, out=tmp_path / f"{name}-{at_once}", **QUICK | settings)
            losses.append(run.history["loss"].tolist())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


STATEFUL = {
    "mamba": transformers.MambaConfig(vocab_size=10, hidden_size=32, num_hidden_layers=2, state_size=4),
    "qwen3_next": transformers.Qwen3NextConfig(**SIZE | HEAD | EXPERTS, num_local_experts=2),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_model_with_a_state_is_refused_by_name(name, zoo, task, tmp_path):
    transformers.AutoModelForCausalLM.from_config(STATEFUL[name]).save_pretrained(tmp_path / "model")
    load_tokenizer(zoo / "llama" / "student").save_pretrained(tmp_path / "model")
    for arm in (ol.rlvr(tmp_path / "model"), ol.sft(tmp_path / "model")):
        with pytest.raises(
            OpdlabError, match=rf"^the student .*model \({name}\) carries a state .*: opdlab can measure"
        ):
            ol.train(arm, task, out=tmp_path / "run", **QUICK | {"samples": 2})


def test_a_kind_that_writes_no_text_is_refused(zoo, task, tmp_path):
    config = transformers.T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    load_tokenizer(zoo / "llama" / "student").save_pretrained(tmp_path / "t5")
    with pytest.raises(OpdlabError, match=r"^the model in .*t5 cannot be opened \(Unrecognized .*T5Config[^\n]*$"):
        ol.train(ol.rlvr(tmp_path / "t5"), task, out=tmp_path / "run", **QUICK)
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(OpdlabError, match=r"^the configuration in .*t5 cannot be opened \([^\n]*$"):
        ol.train(ol.rlvr(tmp_path / "t5"), task, out=tmp_path / "run", **QUICK)


def test_passes_that_are_wrong_are_refused_by_name(zoo, task, monkeypatch):
    """As they were when eager attention was handed a mask that it adds to its scores."""
    monkeypatch.setattr(rollouts, "obeys_masks", lambda model, length: True)
    for name in ("qwen3 eager", "mistral 4", "gpt-oss"):
        arm = ol.opd(zoo / name / "student", zoo / name / "teacher")
        experiment = make_experiment(arm, task, steps=1, learning_rate=1e-3)
        with pytest.raises(OpdlabError, match=r"^the student .* (gives log-probabilities|cannot read a batch)"):
            opening.open_models(experiment, PROMPTS[:2], torch.device("cpu"), torch.float32)


def test_the_check_takes_no_time(zoo, task):
    import time

    model = load_model(zoo / "qwen3" / "student")
    began = time.process_time()
    opening.check_passes(model, "the student", [list(range(2, 10)) * 4, list(range(2, 10)) * 2])
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("batch", [Rollouts([[1, 2]], [[]]), Rollouts([[]], [[1]]), Rollouts([], [])])
def test_nothing_to_learn_from(batch):
    with pytest.raises(OpdlabError, match="without a token: give each at least one"):
        next(micro_batches(batch, 4, torch.device("cpu")))


def test_nothing_to_start_from(zoo):
    model, tokenizer = load_model(zoo / "qwen3" / "student"), load_tokenizer(zoo / "qwen3" / "student")
    for prompts, said in (([], "there are no prompts"), (["ab", ""], "the prompt '' has no token to start from")):
        with pytest.raises(OpdlabError, match=said):
            sample(model, tokenizer, prompts, max_new_tokens=2, temperature=0)
