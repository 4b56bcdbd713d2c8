"""Rollouts: a batch of completions sampled from a model.

Batched, left-padded and cached. A row stops at the end-of-sequence token and is then dropped from the batch, so that
no work is spent on finished rows. Each row has its own stream of random numbers: what a row samples depends neither on
its neighbours nor on when they finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

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
    """Sample ``samples`` completions for each prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; completions end with (and include) its end-of-sequence token.
        prompts: B questions.
        max_new_tokens: a completion is cut at this many tokens.
        samples: completions per prompt.
        temperature: of the softmax; 0 is greedy decoding, the same tokens as ``model.generate(do_sample=False)``.
        generator: the source of randomness (on the CPU), needed unless greedy.

    Returns:
        The B x samples completions, prompt by prompt.

    Raises:
        OpdlabError: if a prompt does not fit the model's context.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    encoded = encode_prompts(tokenizer, prompts, room)
    device = model.device
    width = max(map(len, encoded))
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in encoded], device=device)

    rows = len(encoded) * samples
    # Inverse-transform sampling: one uniform number per row and position, drawn in advance.
    uniforms = torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64).to(device)
    out = torch.full((rows, max_new_tokens), tokenizer.eos_token_id, device=device)
    length = torch.full((rows,), max_new_tokens, device=device)

    cache = transformers.DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]  # (B, V)
    # The prompt is read once, however many samples are drawn from it.
    cache.batch_repeat_interleave(samples)
    logits = logits.repeat_interleave(samples, 0)
    # The mask of all steps to come, in the shape that attention wants (rows, 1, 1, width + max_new_tokens).
    mask = torch.cat([mask.bool(), mask.new_ones(len(mask), max_new_tokens).bool()], 1)
    mask = mask.repeat_interleave(samples, 0)[:, None, None]
    position = positions[:, -1:].repeat_interleave(samples, 0)
    alive = torch.arange(rows, device=device)  # the rows of `out` that the batch still holds

    for t in range(max_new_tokens):
        tokens = _choose(logits, temperature, uniforms[alive, t])
        out[alive, t] = tokens
        going = tokens != tokenizer.eos_token_id
        length[alive[~going]] = t + 1
        if t + 1 == max_new_tokens or not going.any():
            break
        if not going.all():
            alive, tokens, mask, position = alive[going], tokens[going], mask[going], position[going]
            cache.batch_select_indices(going.nonzero().squeeze(1))
        position = position + 1
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask[..., : width + t + 1],
            position_ids=position,
            past_key_values=cache,
        ).logits[:, -1]

    completions = [row[:n] for row, n in zip(out.tolist(), length.tolist(), strict=True)]
    return Rollouts(encoded, completions)


def _choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return one token for each row of ``logits`` (B, V), given uniform numbers (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # Scaled by the last entry, which rounding may leave a hair under 1.
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)
