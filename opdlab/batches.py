"""Micro-batches: completions packed for one forward pass, each prompt read once for all of its completions.

A row of the packed batch is a prompt and, side by side behind it, all its completions. Each completion sees the prompt
and itself, and counts its positions from the prompt's end: what the model says of it is what it would say of prompt
and completion alone, at a fraction of the tokens. No cache is involved, so gradients flow as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from opdlab.rollouts import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """R prompts and their C completions, packed into R rows of length L.

    Attributes:
        ids: (R, L) prompts, each followed by its completions, padded on the right.
        positions: (R, L) of each token within its own prompt and completion.
        visible: (R, 1, L, L) True where the token of the third axis sees that of the fourth.
        row: (C, 1) the packed row of each completion.
        source: (C, T) where in its row the model predicts each token of a completion: at the token before it.
        tokens: (C, T) the completions, padded on the right.
        mask: (C, T) False on the padding of ``tokens``.
        advantages: (C,) of RLVR, or None.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    row: Tensor
    source: Tensor
    tokens: Tensor
    mask: Tensor
    advantages: Tensor | None

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
        for start in range(0, completions, size):
            part = slice(start, start + size)
            advantages = None if self.advantages is None else self.advantages[part]
            yield (
                part,
                replace(
                    self,
                    row=self.row[part],
                    source=self.source[part],
                    tokens=self.tokens[part],
                    mask=self.mask[part],
                    advantages=advantages,
                ),
            )


def micro_batches(
    rollouts: Rollouts, sequences: int, device: torch.device, advantages: Tensor | None = None
) -> Iterator[MicroBatch]:
    """Split prompts and completions into micro-batches of about ``sequences`` completions, like lengths together.

    The completions of one prompt stay together, and prompts come by falling length, within a micro-batch too.

    Args:
        rollouts: B completions and their prompts.
        sequences: completions in a micro-batch, about.
        device: where the micro-batches go.
        advantages: (B,) of all completions, if the arm listens to rewards.
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
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    # What a token belongs to: 0 the prompt, 1, 2 ... a completion, -1 padding (which sees itself, or would be NaN).
    owner = torch.full((len(rows), width), -1)
    completions = [completion for _, group in rows for completion in group]
    longest = max(map(len, completions))
    row = torch.tensor([[i] for i, (_, group) in enumerate(rows) for _ in group])
    source = torch.zeros(len(completions), longest, dtype=torch.long)
    tokens = torch.zeros(len(completions), longest, dtype=torch.long)
    mask = torch.zeros(len(completions), longest, dtype=torch.bool)
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
            mask[c, :n] = True
            end, c = end + n, c + 1
    same = owner[:, :, None] == owner[:, None, :]
    visible = ((same | (owner[:, None, :] == 0)) & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    ids, positions, visible, row, source, tokens, mask = (
        tensor.to(device) for tensor in (ids, positions, visible, row, source, tokens, mask)
    )
    return MicroBatch(ids, positions, visible, row, source, tokens, mask, advantages)
