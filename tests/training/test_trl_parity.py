"""The objectives against TRL 1.16 on the same batches: values and gradients, in float32 on the CPU, offline.

TRL is an independent implementation, and the one that readers will scale up with. Names that it keeps private appear
in one section only. ``pytest -rP`` shows the differences.
"""

import os

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
pytest.importorskip("trl")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from opdlab.measuring.callback import GeometryCallback
from opdlab.training import objectives as obj

# float32 holds seven digits. VALUE is absolute, for losses of order 1; GRADIENT is a share of the largest entry, taken
# to be at least 0.01.
VALUE, GRADIENT = 1e-6, 2e-6
V, MAX_LENGTH = 23, 8
# TRL's JSD is forward KL at beta 0 and reverse KL at beta 1.
KLS = [(0, obj.forward_kl), (1, obj.reverse_kl)]

# --- TRL's private names ----------------------------------------------------------------------------------------------


def trl_jsd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, normalizer: int | None = None) -> Tensor:
    """GKD's loss, from logits."""
    from trl.experimental.gkd import GKDTrainer

    labels = torch.where(mask, 0, -100)
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, num_items_in_batch=normalizer)


def trl_chunked(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, normalizer: int | None = None) -> Tensor:
    """DistillationTrainer's loss, from hidden states; the identity as output layer makes the logits its input."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    head = torch.eye(student.shape[-1])
    return _chunked_divergence_loss(student, teacher, head, head, mask, beta, num_items_in_batch=normalizer)[0]


def trl_grpo(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    """GRPOTrainer's loss of one micro-batch, one such making a step."""
    trainer.loss_type, trainer.current_gradient_accumulation_steps = "dapo", 1
    return trainer._compute_loss(trainer.model, batch)


def trl_grpo_advantages(trainer: GRPOTrainer, rewards: Tensor) -> Tensor:
    """GRPOTrainer's advantages of the completions that it samples, for the rewards that they are said to get."""
    trainer.scale_rewards = "group"
    trainer._calculate_rewards = lambda inputs, *rest: rewards[:, None]
    prompts = [{"prompt": f"w{i // trainer.num_generations}"} for i in range(len(rewards))]
    return trainer._generate_and_score_completions(prompts)["advantages"]


# --- what both are given ----------------------------------------------------------------------------------------------


def tiny_model(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    # A wide initialisation: the default one gives nearly uniform, and so nearly equal, predictions.
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=V, initializer_range=0.5, pad_token_id=0, **shape, **heads))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(V - 2)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="module")
def grpo_trainer(tmp_path_factory) -> GRPOTrainer:
    settings = GRPOConfig(
        str(tmp_path_factory.mktemp("grpo")),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=MAX_LENGTH,
        epsilon=0.2,
        epsilon_high=0.28,
    )
    trainer = GRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["w1", "w2"]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    return trainer


# Four sequences of a prompt of three tokens and at most six more; the third has no completion.
IDS = torch.randint(2, V, (4, 9), generator=torch.Generator().manual_seed(1))
PROMPT = 3
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_parity(ours: Tensor, theirs: Tensor, parameters: list[Tensor]) -> None:
    """Compare two losses, and their gradients to ``parameters``."""
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (ours, theirs)]
    value, largest = (ours - theirs).abs().item(), gradients[1].abs().max().item()
    gradient = (gradients[0] - gradients[1]).abs().max().item()
    print(f"value {theirs.item():.3g} +- {value:.1e}; gradient up to {largest:.3g} +- {gradient:.1e}")
    assert largest > 0
    assert value <= VALUE
    assert gradient <= GRADIENT * max(largest, 0.01)


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", [trl_jsd, trl_chunked])
@pytest.mark.parametrize("normalizer", [None, 30])
@pytest.mark.parametrize(("beta", "kl"), KLS)
def test_distillation(oracle, normalizer, beta, kl):
    student, teacher = normal(4, 6, V, seed=2).mul(2).requires_grad_(), normal(4, 6, V, seed=3).mul(2)
    ours = obj.token_mean(kl(student, teacher), MASK, normalizer)
    assert_parity(ours, oracle(student, teacher, MASK, beta, normalizer), [student])


@pytest.mark.parametrize(("beta", "kl"), KLS)
def test_distillation_in_float64(beta, kl):
    """What is left between the two in float32 is rounding (TRL's other loss has no float64)."""
    student, teacher = normal(4, 6, V, seed=2).double().requires_grad_(), normal(4, 6, V, seed=3).double()
    losses = obj.token_mean(kl(student, teacher), MASK), trl_jsd(student, teacher, MASK, beta)
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses), rtol=0, atol=1e-14)


@pytest.mark.parametrize("oracle", [trl_jsd, trl_chunked])
def test_distillation_without_tokens(oracle):
    student, teacher = normal(4, 6, V, seed=2), normal(4, 6, V, seed=3)
    nothing = torch.zeros_like(MASK)
    assert obj.token_mean(obj.reverse_kl(student, teacher), nothing) == oracle(student, teacher, nothing, 1) == 0


# --- RLVR -------------------------------------------------------------------------------------------------------------


def test_grpo(grpo_trainer):
    model, advantages = grpo_trainer.model, torch.tensor([1.2, -0.7, 0.3, -0.8])
    logps = obj.token_logps(model(IDS[:, :-1]).logits, IDS[:, 1:])[:, PROMPT - 1 :]
    batch = {
        "prompt_ids": IDS[:, :PROMPT],
        "prompt_mask": torch.ones(4, PROMPT, dtype=torch.long),
        "completion_ids": IDS[:, PROMPT:],
        "completion_mask": MASK.long(),
        "advantages": advantages,
        "num_items_in_batch": MASK.sum(),
    }
    per_token = obj.policy_gradient(logps, advantages)
    ours = obj.token_mean(per_token, MASK)
    assert_parity(ours, trl_grpo(grpo_trainer, batch), list(model.parameters()))


def test_grpo_advantages(grpo_trainer):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.1, 0.9, 0.3, 0.0])
    ours, oracle = obj.grpo_advantages(rewards, 4), trl_grpo_advantages(grpo_trainer, rewards)
    print(f"value up to {oracle.abs().max():.3g} +- {(ours - oracle).abs().max():.1e}")
    torch.testing.assert_close(ours, oracle, rtol=0, atol=VALUE)


# --- SFT --------------------------------------------------------------------------------------------------------------

LABELS = torch.cat([torch.full((4, PROMPT), -100), torch.where(MASK, IDS[:, PROMPT:], -100)], dim=1)


def our_sft(model: Qwen3ForCausalLM, normalizer: int | None = None) -> Tensor:
    per_token = obj.cross_entropy(model(IDS[:, :-1]).logits, IDS[:, 1:])
    return obj.token_mean(per_token[:, PROMPT - 1 :], MASK, normalizer)


def test_sft_of_transformers():
    model = tiny_model()
    assert_parity(our_sft(model), model(IDS, labels=LABELS).loss, list(model.parameters()))


@pytest.mark.parametrize("normalizer", [None, 30])
def test_sft_of_trl(normalizer, tmp_path):
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3"]}),
        processing_class=tiny_tokenizer(),
    )
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
    theirs = trainer.compute_loss(trainer.model, batch, num_items_in_batch=normalizer)
    assert_parity(our_sft(trainer.model, normalizer), theirs, list(trainer.model.parameters()))


def test_the_callback_logs_where_trl_does(tmp_path):
    options = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2, "save_strategy": "no"}
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(str(tmp_path), **options),
        train_dataset=Dataset.from_dict({"input_ids": [[2, 3, 4, 5]] * 16}),
        processing_class=tiny_tokenizer(),
    )
    trainer.add_callback(GeometryCallback(trainer, every=1, k=2))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "geometry/stable_rank" in entry]
    assert [entry["step"] for entry in logged] == [1, 2] and "geometry/sim_right_K2" in logged[1]
