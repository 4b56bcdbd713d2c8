"""Rollouts: completions sampled from a model, and how they are packed into micro-batches for training.

Batched, left-padded and cached. A row stops at the end-of-sequence token and is then dropped from the batch, so that
no work is spent on finished rows. Each row has its own stream of random numbers: what a row samples depends neither on
its neighbours nor on when they finish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from opdlab.errors import OpdlabError


@dataclass(frozen=True)
class Rollouts:
    """Prompts and completions of one batch, as token ids without padding; ``samples`` in a row belong to one prompt."""

    prompts: list[list[int]]
    completions: list[list[int]]

    def __add__(self, other: Rollouts) -> Rollouts:
        """Return both batches as one."""
        return Rollouts(self.prompts + other.prompts, self.completions + other.completions)

    @property
    def samples(self) -> int:
        """The number of completions of each prompt."""
        return len(self.completions) // len(self.prompts)

    @property
    def tokens(self) -> int:
        """The number of tokens in all completions."""
        return sum(map(len, self.completions))


def encode_prompts(
    tokenizer: transformers.PreTrainedTokenizerBase, prompts: Sequence[str], room: int
) -> list[list[int]]:
    """Turn prompts into token ids, leaving ``room`` tokens free after the prompt.

    Raises:
        OpdlabError: if a prompt has more than ``room`` tokens, quoting it.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=False).input_ids
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > room:
            raise OpdlabError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, but only {room} fit the context beside the "
                "completion: shorten it or lower max_new_tokens"
            )
    return encoded


def encode_completions(tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Turn texts into completions: token ids that end with the end of the sequence."""
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


@torch.inference_mode()
def sample(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """Sample completions for each prompt, B x samples in all, prompt by prompt.

    Args:
        model: a causal language model.
        tokenizer: of the model; completions include its end-of-sequence token, unless they are cut before.
        prompts: B texts.
        max_new_tokens: where a completion is cut.
        samples: completions per prompt.
        temperature: of the softmax; 0 is greedy decoding, the same tokens as ``model.generate(do_sample=False)``.
        generator: the source of randomness (on the CPU), needed unless greedy.

    Raises:
        OpdlabError: if a prompt does not fit the model's context.
    """
    encoded = encode_prompts(tokenizer, prompts, model.config.max_position_embeddings - max_new_tokens)
    batch = _Sampling(model, tokenizer, encoded, samples, max_new_tokens)
    # Inverse-transform sampling: one uniform number per row and position, drawn in advance.
    uniforms = torch.rand(batch.rows, max_new_tokens, generator=generator, dtype=torch.float64).to(model.device)
    out = torch.full((batch.rows, max_new_tokens), tokenizer.eos_token_id, device=model.device)
    length = torch.full((batch.rows,), max_new_tokens, device=model.device)
    for t in range(max_new_tokens):
        tokens = _choose(batch.logits, temperature, uniforms[batch.alive, t])
        out[batch.alive, t] = tokens
        going = tokens != tokenizer.eos_token_id
        length[batch.alive[~going]] = t + 1
        if t + 1 == max_new_tokens or not going.any():
            break
        batch.read(tokens, going, t)
    completions = [row[:n] for row, n in zip(out.tolist(), length.tolist(), strict=True)]
    return Rollouts(encoded, completions)


class _Sampling:
    """The rows of a batch that are still being written: their cache, and the logits of their next token."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        prompts: list[list[int]],
        samples: int,
        room: int,
    ):
        """Read the prompts, each once, however many samples are drawn from it."""
        self.model, self.rows, self.width = model, len(prompts) * samples, max(map(len, prompts))
        blanks = [self.width - len(ids) for ids in prompts]
        mask = torch.tensor([[0] * n + [1] * (self.width - n) for n in blanks]).to(model.device)
        ids = torch.tensor([[tokenizer.pad_token_id] * n + ids for n, ids in zip(blanks, prompts, strict=True)])
        self.cache = transformers.DynamicCache(config=model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._read(ids.to(model.device), mask, positions, logits_to_keep=1)  # (B, V)
        self.cache.batch_repeat_interleave(samples)
        self.logits = logits.repeat_interleave(samples, 0)
        # The mask of all steps to come, in the shape that attention wants (rows, 1, 1, width + room).
        mask = torch.cat([mask.bool(), mask.new_ones(len(mask), room).bool()], 1)
        self.mask = mask.repeat_interleave(samples, 0)[:, None, None]
        self.position = positions[:, -1:].repeat_interleave(samples, 0)
        self.alive = torch.arange(self.rows, device=model.device)

    def read(self, tokens: Tensor, going: Tensor, t: int) -> None:
        """Drop the rows that have ended, and read the token that was written at place ``t`` of the others."""
        if not going.all():
            self.alive, self.mask, self.position = self.alive[going], self.mask[going], self.position[going]
            tokens = tokens[going]
            self.cache.batch_select_indices(going.nonzero().squeeze(1))
        self.position = self.position + 1
        self.logits = self._read(tokens[:, None], self.mask[..., : self.width + t + 1], self.position)

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Tensor:
        """Return the logits (rows, V) after the last token."""
        options |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self.model(past_key_values=self.cache, **options).logits[:, -1]


def _choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return one token for each row of ``logits`` (B, V), given uniform numbers (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # Scaled by the last entry, which rounding may leave a hair under 1.
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


# --- micro-batches: completions packed for one forward pass, each prompt read once for all of its completions ---------
#
# A row of the packed batch is a prompt and, side by side behind it, all its completions. Each completion sees the
# prompt and itself, and counts its positions from the prompt's end: what the model says of it is what it would say of
# prompt and completion alone, at a fraction of the tokens. No cache is involved, so gradients flow as usual.


@dataclass(frozen=True)
class MicroBatch:
    """R prompts and their C completions, packed into R rows of length L."""

    ids: Tensor  #: (R, L) prompts, each followed by its completions, padded on the right
    positions: Tensor  #: (R, L) of each token within its own prompt and completion
    visible: Tensor  #: (R, 1, L, L) True where the token of the third axis sees that of the fourth
    row: Tensor  #: (C, 1) the packed row of each completion
    source: Tensor  #: (C, T) where in its row the model predicts each token of a completion, at the token before it
    tokens: Tensor  #: (C, T) the completions, padded on the right
    mask: Tensor  #: (C, T) False on the padding of ``tokens``
    advantages: Tensor | None  #: (C,) of RLVR

    def logits(self, model: transformers.PreTrainedModel) -> Tensor:
        """Return the logits (C, T, V) with which ``model`` predicts the tokens; on the padding, anything finite."""
        return self._packed(model).logits[self.row, self.source]

    def hidden(self, model: transformers.PreTrainedModel) -> Tensor:
        """Return what ``model`` makes logits of (C, T, H): its output layer is left out, since V is much larger than H.

        The two agree but for rounding, and :meth:`logits` also reads the output of the prompts' tokens.
        """
        return self._packed(model.base_model).last_hidden_state[self.row, self.source]

    def _packed(self, model: nn.Module) -> Any:
        return model(input_ids=self.ids, attention_mask=self.visible, position_ids=self.positions, use_cache=False)

    def pieces(self, tokens: int) -> Iterator[tuple[slice, MicroBatch]]:
        """Split the completions, not their packed rows: a piece has about ``tokens`` tokens, padding counted."""
        completions, longest = self.tokens.shape
        size = max(1, tokens // longest)
        of_completions = ("row", "source", "tokens", "mask", *([] if self.advantages is None else ["advantages"]))
        for start in range(0, completions, size):
            part = slice(start, start + size)
            changes: dict[str, Any] = {name: getattr(self, name)[part] for name in of_completions}
            yield part, replace(self, **changes)


def micro_batches(
    rollouts: Rollouts, sequences: int, device: torch.device, advantages: Tensor | None = None
) -> Iterator[MicroBatch]:
    """Split prompts and completions into micro-batches of about ``sequences`` completions, like lengths together.

    The completions of one prompt stay together, and prompts come by falling length, within a micro-batch too.
    ``advantages`` (B,) are of all completions, if the arm listens to rewards.
    """
    samples = rollouts.samples
    groups = [rollouts.completions[i : i + samples] for i in range(0, len(rollouts.completions), samples)]
    lengths = torch.tensor([len(p) + sum(map(len, group)) for p, group in zip(rollouts.prompts, groups, strict=True)])
    for chosen in lengths.argsort(descending=True, stable=True).split(max(1, sequences // samples)):
        rows = [(rollouts.prompts[i], groups[i]) for i in chosen.tolist()]
        part = None if advantages is None else advantages.reshape(-1, samples)[chosen].flatten().to(device)
        yield _pack(rows, device, part)


def _pack(rows: list[tuple[list[int], list[list[int]]]], device: torch.device, advantages: Tensor | None) -> MicroBatch:
    width = max(len(prompt) + sum(map(len, group)) for prompt, group in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    # What a token belongs to: 0 the prompt, 1, 2 ... a completion, -1 padding (which sees itself, or would be NaN).
    owner = torch.full((len(rows), width), -1)
    lengths = torch.tensor([len(completion) for _, group in rows for completion in group])
    row = torch.tensor([[i] for i, (_, group) in enumerate(rows) for _ in group])
    source, tokens = torch.zeros(2, len(lengths), int(lengths.max()), dtype=torch.long)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    c = 0
    for i, (prompt, group) in enumerate(rows):
        end = len(prompt)
        ids[i, :end], owner[i, :end], positions[i, :end] = torch.tensor(prompt), 0, torch.arange(end)
        for number, completion in enumerate(group, 1):
            n = len(completion)
            place = slice(end, end + n)
            ids[i, place] = tokens[c, :n] = torch.tensor(completion)
            positions[i, place] = torch.arange(len(prompt), len(prompt) + n)
            owner[i, place] = number
            source[c, :n] = torch.arange(end - 1, end + n - 1)
            source[c, 0] = len(prompt) - 1
            end, c = end + n, c + 1
    same = owner[:, :, None] == owner[:, None, :]
    visible = ((same | (owner[:, None, :] == 0)) & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    packed: Any = (tensor.to(device) for tensor in (ids, positions, visible, row, source, tokens, mask))
    return MicroBatch(*(*packed, advantages))
