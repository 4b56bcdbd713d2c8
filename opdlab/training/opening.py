"""Models as a run opens them: checked before the first step, so that none is trained on something else than it says.

A model that reads a batch in another way than each sequence alone is refused, and so is a pair whose tokenizers write
the same prompts, or their ends, as different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models.folders import (
    character_tokenizer,
    check_same_vocabulary,
    context_length,
    cut_vocabulary,
    load_model,
    load_tokenizer,
    new_model,
)
from opdlab.training.rollouts import Rollouts, Sampling, encode_prompts, logits_of, micro_batches

if TYPE_CHECKING:
    from opdlab.training.config import Experiment

Model = transformers.PreTrainedModel
#: Of two prompts so many tokens are read, each followed by so many of both.
PROMPT, COMPLETION = 32, 8


def load_student(
    experiment: Experiment, device: torch.device | str = "cpu"
) -> tuple[transformers.PreTrainedTokenizerBase, Model]:
    """Return the tokenizer and the model that a run starts from."""
    source = experiment.arm.student
    if source.shape:
        # transformers wraps the method "to", and its type with it.
        model = new_model(dict(source.shape), experiment.seed).to(device).eval()  # type: ignore[arg-type]
        return character_tokenizer(), model
    return load_tokenizer(source.folder), load_model(source.folder, device)


def open_models(
    experiment: Experiment, prompts: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[transformers.PreTrainedTokenizerBase, Model, Any]:
    """Return tokenizer, student and teacher (or None) of a run, once they have read some prompts of its task rightly.

    The student is in float32, and the teacher in ``dtype``, that of the passes: nothing is learned there, so nothing is
    lost.

    Raises:
        OpdlabError: if a model cannot be opened or its passes are wrong (:func:`check_passes`), or the two differ in
            vocabulary, in ends, or in the tokens that they read a prompt as.
    """
    arm = experiment.arm
    tokenizer, student = load_student(experiment, device)
    encoded = encode_alike(experiment, tokenizer, prompts, context_length(student.config) - experiment.max_new_tokens)
    if experiment.compute.recompute:
        student.activation_checkpointing_enable()
        drop_nothing(student)
    check_passes(student, f"the student {arm.student.folder or 'with random weights'}", encoded)
    if not arm.teacher:
        cut_vocabulary([student], tokenizer)
        return tokenizer, student, None
    teacher = load_model(arm.teacher.folder, device, dtype)
    check_passes(teacher, f"the teacher {arm.teacher.folder}", encoded)
    cut_vocabulary([student, teacher], tokenizer)
    return tokenizer, student, teacher


def encode_alike(
    experiment: Experiment, tokenizer: transformers.PreTrainedTokenizerBase, prompts: list[str], room: int
) -> list[list[int]]:
    """Return prompts as the student's token ids, once they are known to be the teacher's too.

    They are those of :func:`opdlab.training.rollouts.encode_prompts`.

    Raises:
        OpdlabError: if the two differ in vocabulary, in ends, or in the tokens that they read a prompt as, or a chat
            template ends an answer in another way than its tokenizer.
    """
    task, student, teacher = experiment.task, experiment.arm.student, experiment.arm.teacher
    if task.chat:
        check_end(tokenizer, student.folder)
    ours = encode_prompts(tokenizer, task.texts(tokenizer, prompts), room)
    if teacher:
        check_same_vocabulary(Path(student.folder), Path(teacher.folder))
        other = load_tokenizer(teacher.folder)
        theirs = encode_prompts(other, task.texts(other, prompts), room)
        if ours != theirs:
            raise OpdlabError(
                f"student {student.folder} reads a prompt as {tokenizer.decode(ours[0])!r} and teacher "
                f"{teacher.folder} as {other.decode(theirs[0])!r}: give both one chat template and one beginning of "
                "the sequence, or make the task with chat=False"
            )
    return ours


def check_end(tokenizer: transformers.PreTrainedTokenizerBase, folder: str) -> None:
    """Check that a chat template ends an answer with the token that ends a completion, if with any.

    Raises:
        OpdlabError: if it ends with another special token, as those of Gemma and Phi do.
    """
    talk = [{"role": role, "content": role.upper()} for role in ("user", "assistant")]
    try:
        _, answered, after = str(tokenizer.apply_chat_template(talk, tokenize=False)).rpartition("ASSISTANT")
    except Exception:  # whatever the template refuses: it says nothing about an end
        return
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [token for token in special if answered and after.lstrip().startswith(token)]
    if ends and tokenizer.eos_token not in ends:
        raise OpdlabError(
            f"the chat template of {folder} ends an answer with {max(ends, key=len)!r}, and its tokenizer with "
            f"{tokenizer.eos_token!r}: set eos_token in its tokenizer_config.json, or make the task with chat=False"
        )


def drop_nothing(model: Model) -> None:
    """Set every share of dropout to 0: training mode, in which alone a model recomputes, is not to change a pass."""
    for module in model.modules():
        shares = {name for name, value in vars(module).items() if isinstance(value, float) and "drop" in name}
        for name in shares | ({"p"} if isinstance(module, torch.nn.Dropout) else set()):
            setattr(module, name, 0.0)


@torch.no_grad()
def check_passes(model: Model, title: str, prompts: Sequence[list[int]]) -> None:
    """Check that a model says of completions in a batch what it says of each prompt and completion alone.

    In a packed batch, from hidden states, and while sampling, log-probabilities may differ by some 80 roundings of
    their size, averaged over the vocabulary: 1e-5 in float32.

    Args:
        model: the student or a teacher.
        title: of it, in messages.
        prompts: at least one, as token ids; the first and the last are read.

    Raises:
        OpdlabError: if they differ by more, are not finite, or cannot be computed.
    """
    what, only = f"{title} ({model.config.model_type})", "opdlab can measure it, but not train it or with it"
    if model._is_stateful:
        raise OpdlabError(f"{what} carries a state from token to token, and is not made of attention alone: {only}")
    half = min(PROMPT, context_length(model.config) // 2)
    first, second = prompts[0][:half], prompts[-1][: max(1, min(half, len(prompts[-1])) // 2)]
    one, other = first[:COMPLETION], second[:COMPLETION]
    rollouts = Rollouts([first, second], [one, other, other, one])
    try:
        pairs = zip([first, first, second, second], rollouts.completions, strict=True)
        alone = [_logps(model(torch.tensor([p + c], device=model.device)).logits[0, len(p) - 1 : -1]) for p, c in pairs]
        found = ((logps, alone[i][t]) for i, t, logps in _in_batches(model, rollouts))
        differences = [((logps - right).abs() / (1 + right.abs())).mean() for logps, right in found]
    except Exception as problem:  # of whatever is in the model's code
        raise OpdlabError(f"{what} cannot read a batch ({problem}): {only}") from problem
    if not torch.cat(alone).isfinite().all():
        raise OpdlabError(f"the logits of {what} are not finite: restore its weights, or take a model without -inf")
    worst = float(torch.stack(differences).max())
    if not worst <= 80 * torch.finfo(model.dtype).eps:
        raise OpdlabError(
            f"{what} gives log-probabilities in a batch that differ from those of each sequence alone, by {worst:.1g} "
            f"of their size: {only}"
        )


def _in_batches(model: Model, rollouts: Rollouts) -> Iterator[tuple[int, int, Tensor]]:
    """Yield which completion, which token of it, and its log-probabilities (V,), in all ways that training has."""
    for part in micro_batches(rollouts, 4, model.device, torch.arange(4.0)):
        assert part.advantages is not None, "these number the completions"
        for logits in (part.logits(model), logits_of(model, part.hidden(model))):
            for i, row, mask in zip(part.advantages.long().tolist(), _logps(logits), part.mask, strict=True):
                yield from ((i, t, found) for t, found in enumerate(row[mask]))
    lengths = torch.tensor([len(completion) for completion in rollouts.completions], device=model.device)
    sampling = Sampling(model, rollouts.prompts, 2, int(lengths.max()))
    for t in range(int(lengths.max())):
        alive = sampling.alive.tolist()
        yield from ((i, t, found) for i, found in zip(alive, _logps(sampling.logits), strict=True))
        going = lengths[sampling.alive] > t + 1
        if going.any():
            sampling.read(torch.tensor([rollouts.completions[i][t] for i in alive], device=model.device), going, t)


def _logps(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
