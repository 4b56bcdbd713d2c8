"""Models as a run opens them: checked before the first step, so that none is trained on something else than it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import OpdlabError
from opdlab.models import folders
from opdlab.training.config import Experiment
from opdlab.training.rollouts import Rollouts, Sampling, encode_prompts, logits_of, micro_batches

Model = PreTrainedModel
#: Of two prompts so many tokens are read, each followed by so many of both.
PROMPT, COMPLETION = 32, 8


def encode(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, model: Model, prompts: Sequence[str]
) -> list[list[int]]:
    """Return prompts as the token ids that ``model`` reads; with a completion they must fit into its context."""
    room = folders.context_length(model.config) - experiment.max_new_tokens
    return encode_prompts(tokenizer, experiment.task.texts(tokenizer, prompts), room)


def load_student(experiment: Experiment, device: torch.device | str = "cpu") -> tuple[PreTrainedTokenizerBase, Model]:
    """Return the tokenizer and the model that a run starts from."""
    source = experiment.arm.student
    if source.shape:
        # transformers wraps the method "to", and its type with it.
        model = folders.new_model(dict(source.shape), experiment.seed).to(device).eval()  # type: ignore[arg-type]
        return folders.character_tokenizer(), model
    return folders.load_tokenizer(source.folder), folders.load_model(source.folder, device)


def open_models(
    experiment: Experiment, prompts: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, Model, Any]:
    """Return tokenizer, student and teacher (or None) of a run, once they have read some prompts of its task rightly.

    The student is in float32, and the teacher in ``dtype``, that of the passes: nothing is learned there, so nothing is
    lost. Raises what :func:`open_alike` and :func:`check_passes` raise.
    """
    arm = experiment.arm
    tokenizer, student, encoded = open_alike(experiment, prompts, device)
    if experiment.compute.recompute:
        student.activation_checkpointing_enable()
        drop_nothing(student)
    check_passes(student, f"the student {arm.student.folder or 'with random weights'}", encoded)
    teacher = folders.load_model(arm.teacher.folder, device, dtype) if arm.teacher else None
    if arm.teacher and teacher:
        check_passes(teacher, f"the teacher {arm.teacher.folder}", encoded)
    folders.cut_vocabulary([student, teacher] if teacher else [student], tokenizer)
    return tokenizer, student, teacher


def open_for_trl(
    experiment: Experiment, prompts: list[str], dtype: torch.dtype, taught: bool
) -> tuple[PreTrainedTokenizerBase, Model, Any, Callable[..., list[list[int]]]]:
    """Return tokenizer, student and teacher (or None), made ready for TRL, and what turns prompts into token ids.

    They are as in :func:`open_models`, but only compared; a teacher that has not ``taught`` is not loaded.

    Raises:
        OpdlabError: as :func:`open_alike` does.
    """
    arm = experiment.arm
    tokenizer, student, _ = open_alike(experiment, prompts)
    teacher: Any = folders.load_model(arm.teacher.folder, dtype=dtype) if arm.teacher and taught else None
    drop_nothing(student)
    # Where the two differ, IWOPD takes a sampled padding token at the end of a completion for padding.
    tokenizer.pad_token = tokenizer.eos_token
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # Nothing else of the folder's own, such as a penalty for repetition, may change what is sampled.
    student.generation_config = GenerationConfig(**ends)
    models = [student, teacher] if teacher else [student]
    count, size = folders.common_tokens(models, tokenizer), student.config.get_text_config().vocab_size
    if teacher and teacher.config.get_text_config().vocab_size != size:
        teacher.resize_token_embeddings(size, mean_resizing=False)
    for model in models if count < size else ():
        _hide_padding(model, count, dtype)
    return tokenizer, student, teacher, partial(encode, experiment, tokenizer, student)


def _hide_padding(model: Model, count: int, dtype: torch.dtype) -> None:
    """Leave what is no token without probability, by a bias: TRL reads weights and bias of the output layer itself."""
    layer = model.get_output_embeddings()
    assert layer.bias is None, "no model of the scales has a bias there"
    bias = torch.zeros(len(layer.weight), dtype=dtype)
    bias[count:] = -1e4
    del layer.bias  # to be no weight, but a buffer that is not saved
    layer.register_buffer("bias", bias, persistent=False)


def link_for_vllm(student: Model, folder: Path) -> Path:
    """Return a folder of links to the student's files, but for its generation config, which vLLM reads by itself."""
    student.generation_config.save_pretrained(folder)
    for file in Path(str(student.name_or_path)).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return folder


def open_alike(
    experiment: Experiment, prompts: list[str], device: torch.device | str = "cpu"
) -> tuple[PreTrainedTokenizerBase, Model, list[list[int]]]:
    """Return tokenizer, student and prompts as the student's token ids, once they are known to be the teacher's too.

    Raises:
        OpdlabError: if a model cannot be opened, the two differ in vocabulary, in ends, or in the tokens that they read
            a prompt as, or a chat template ends an answer in another way than its tokenizer.
    """
    folder, teacher = experiment.arm.student.folder, experiment.arm.teacher
    tokenizer, student = load_student(experiment, device)
    if experiment.task.chat:
        _check_end(tokenizer, folder)
    ours = encode(experiment, tokenizer, student, prompts)
    if teacher:
        folders.check_same_vocabulary(Path(folder), Path(teacher.folder))
        other = folders.load_tokenizer(teacher.folder)
        theirs = encode(experiment, other, student, prompts)
        if ours != theirs:
            raise OpdlabError(
                f"student {folder} reads a prompt as {tokenizer.decode(ours[0])!r} and teacher {teacher.folder} as "
                f"{other.decode(theirs[0])!r}: give both one chat template and one beginning of the sequence, or make "
                "the task with chat=False"
            )
    return tokenizer, student, ours


def _check_end(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Refuse a chat template that ends an answer with another special token than a completion, as Gemma's and Phi's."""
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
    their size, averaged over the vocabulary: 1e-5 in float32. Of ``prompts``, token ids, the first and the last are
    read; ``title`` is for messages.

    Raises:
        OpdlabError: if they differ by more, are not finite, or cannot be computed.
    """
    what, only = f"{title} ({model.config.model_type})", "opdlab can measure it, but not train it or with it"
    if model._is_stateful:
        raise OpdlabError(f"{what} carries a state from token to token, and is not made of attention alone: {only}")
    half = min(PROMPT, folders.context_length(model.config) // 2)
    first, second = prompts[0][:half], prompts[-1][: max(1, min(half, len(prompts[-1])) // 2)]
    one, other = first[:COMPLETION], second[:COMPLETION]
    rollouts = Rollouts([first, second], [one, other, other, one])
    try:
        pairs = zip([first, first, second, second], rollouts.completions, strict=True)
        read = [model(torch.tensor([p + c], device=model.device)).logits[0, len(p) - 1 : -1] for p, c in pairs]
        alone = [logits.log_softmax(-1, torch.float32) for logits in read]
        found = ((logits.log_softmax(-1, torch.float32), alone[i][t]) for i, t, logits in _in_batches(model, rollouts))
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
    """Yield which completion, which token of it, and its logits (V,), in all ways that training has."""
    for part in micro_batches(rollouts, 4, model.device, torch.arange(4.0)):
        assert part.advantages is not None, "these number the completions"
        for logits in (part.logits(model), logits_of(model, part.hidden(model))):
            for i, row, mask in zip(part.advantages.long().tolist(), logits, part.mask, strict=True):
                yield from ((i, t, found) for t, found in enumerate(row[mask]))
    lengths = torch.tensor([len(completion) for completion in rollouts.completions], device=model.device)
    sampling = Sampling(model, rollouts.prompts, 2, int(lengths.max()))
    for t in range(int(lengths.max())):
        alive = sampling.alive.tolist()
        yield from ((i, t, found) for i, found in zip(alive, sampling.logits, strict=True))
        going = lengths[sampling.alive] > t + 1
        if going.any():
            sampling.read(torch.tensor([rollouts.completions[i][t] for i in alive], device=model.device), going, t)
