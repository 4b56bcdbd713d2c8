"""Rollouts: completions sampled from a model, and how they are packed into micro-batches for training.

Batched, left-padded and cached. A row stops at the end-of-sequence token and is then dropped from the batch, so that
no work is spent on finished rows. Each row has its own stream of random numbers: what a row samples depends neither on
its neighbours nor on when they finish.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import OpdlabError
from opdlab.models.folders import context_length


@dataclass(frozen=True)
class Rollouts:
    """Prompts and completions of one batch, as token ids without padding; ``samples`` in a row belong to one prompt."""

    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def samples(self) -> int:
        """The number of completions of each prompt."""
        return len(self.completions) // len(self.prompts)

    @property
    def tokens(self) -> int:
        """The number of tokens in all completions."""
        return sum(map(len, self.completions))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], room: int) -> list[list[int]]:
    """Turn prompts into token ids of at most ``room`` tokens.

    They begin with the beginning of the sequence where the tokenizer writes it by itself, once, though a chat template
    may have written it too.

    Raises:
        OpdlabError: if there is no prompt, one has no token, or one has more than ``room``, quoting it.
    """
    if not prompts:
        raise OpdlabError("there are no prompts to start from: give at least one")
    encoded = tokenizer(list(prompts), add_special_tokens=False).input_ids
    begin = [tokenizer.bos_token_id]
    if tokenizer("").input_ids[:1] == begin:
        encoded = [ids if ids[:1] == begin else begin + ids for ids in encoded]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise OpdlabError(f"the prompt {prompt!r} has no token to start from: leave it out, or write something")
        if len(ids) > room:
            raise OpdlabError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, but only {room} fit the context beside the "
                "completion: shorten it or lower max_new_tokens"
            )
    return encoded


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Turn texts into completions: token ids that end with the end of the sequence."""
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
        OpdlabError: if there is no prompt, one is empty or does not fit the model's context, or the temperature is
            negative or not finite.
    """
    if not 0 <= temperature < math.inf:
        raise OpdlabError(f"the temperature is {temperature}: give 0, which is greedy, or a number above")
    encoded = encode_prompts(tokenizer, prompts, context_length(model.config) - max_new_tokens)
    batch = Sampling(model, encoded, samples, max_new_tokens)
    # Inverse-transform sampling: one uniform number per row and position, drawn in advance.
    uniforms = _float64(torch.rand(batch.rows, max_new_tokens, generator=generator, dtype=torch.float64), model.device)
    eos = tokenizer.eos_token_id
    out = torch.full((batch.rows, max_new_tokens), eos, device=model.device)
    for t in range(max_new_tokens):
        drawn = uniforms[batch.alive.to(uniforms.device), t]
        tokens = _choose(batch.logits, temperature, drawn).to(model.device)
        out[batch.alive, t] = tokens
        going = tokens != eos
        if t + 1 == max_new_tokens or not going.any():
            break
        batch.read(tokens, going, t)
    return Rollouts(encoded, [row[: row.index(eos) + 1] if eos in row else row for row in out.tolist()])


class Sampling:
    """The rows of a batch that are still being written: their cache, and the logits of their next token."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], samples: int, room: int):
        """Read the prompts, each once, however many samples of at most ``room`` tokens are drawn from it."""
        self.model, self.rows, self.width = model, len(prompts) * samples, max(map(len, prompts))
        ids = _padded(prompts, side="left")
        mask = _padded([[1] * len(prompt) for prompt in prompts], side="left").to(model.device)
        self.cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._read(ids.to(model.device), mask, positions, logits_to_keep=1)  # (B, V)
        self.cache.batch_repeat_interleave(samples)
        self.logits = logits.repeat_interleave(samples, 0)
        # The mask of all steps to come.
        mask = torch.cat([mask, mask.new_ones(len(mask), room)], 1).repeat_interleave(samples, 0)
        # In the shape that attention wants, which spares making it at every step.
        self.mask = mask.bool()[:, None, None] if obeys_masks(model, self.width + room) else mask
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
        return _call(self.model, ids, mask, positions, past_key_values=self.cache, **options).logits[:, -1]


def obeys_masks(model: PreTrainedModel, length: int) -> bool:
    """Tell whether attention takes a mask of which token sees which as it is, in rows of ``length`` tokens.

    PyTorch's own kernel does, where no layer's window is shorter. Elsewhere transformers makes the mask: eager
    attention would add this one to the scores, others have no place for one, and a window would be lost.
    """
    config = model.config.get_text_config()
    cache: Any = DynamicCache(config=config)
    windows = [layer.sliding_window for layer, slides in zip(cache.layers, cache.is_sliding, strict=True) if slides]
    return config._attn_implementation == "sdpa" and min(windows, default=length) >= length


def _call(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Any:
    """Let a model read; one that has no positions, but biases of attention instead, makes these of the mask."""
    kind: Any = type(model)
    if _has_positions(kind):
        options["position_ids"] = positions
    return model(input_ids=ids, attention_mask=mask, **options)


@cache
def _has_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


#: So many rows choose their next tokens at once.
ROWS = 128


def _choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return one token for each row of ``logits`` (B, V), given uniform numbers (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    if len(logits) > ROWS:  # in float64 all of an evaluation's would take gigabytes
        parts = zip(logits.split(ROWS), uniform.split(ROWS), strict=True)
        return torch.cat([_choose(part, temperature, drawn) for part, drawn in parts])
    cumulative = torch.softmax(_float64(logits, logits.device) / temperature, -1).cumsum(-1)
    # Scaled by the last entry, which rounding may leave a hair under 1.
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def _float64(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in float64, on a device if that has such numbers, and on the CPU if it is Apple's."""
    return tensor.to("cpu" if device.type == "mps" else device).double()


# --- micro-batches: completions packed for one forward pass, each prompt read once for all of its completions ---------
#
# A row of the packed batch is a prompt and, side by side behind it, all its completions. Each completion sees the
# prompt and itself, and counts its positions from the prompt's end: what the model says of it is what it would say of
# prompt and completion alone, at a fraction of the tokens. A model that does not obey such a mask reads each completion
# in a row of its own.


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
    advantages: Tensor | None  #: (C,) of RLVR, or (C, T)
    noise: Tensor | None = None  #: (C, T) by which chance ranks tokens

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Return the logits (C, T, V) with which ``model`` predicts the tokens; on the padding, anything finite."""
        return self._read(model, model, "logits")

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """Return what ``model`` makes logits of (C, T, H) by :func:`logits_of`, since V is much larger than H.

        The two agree but for rounding, and :meth:`logits` also reads the output of the prompts' tokens.
        """
        return self._read(model, model.get_decoder(), "last_hidden_state")

    def _read(self, model: PreTrainedModel, part: nn.Module, output: str) -> Tensor:
        """Return an output of a part of the model (C, T, ...) at the places that predict the tokens."""
        longest = int(self.positions.max()) + 1
        if obeys_masks(model, longest):
            read = _call(part, self.ids, self.visible, self.positions, use_cache=False)
            return read[output][self.row, self.source]
        # Each completion in a row of its own, behind its prompt.
        (count, width), at = self.tokens.shape, torch.arange(longest, device=self.ids.device)
        last = self.source[:, :1]  # (C, 1) token of the prompt
        place = at - last - 1  # (C, L) of each token in its completion, below 0 in the prompt
        ids = self.ids[self.row, at].where(place < 0, self.tokens.gather(1, place.clamp(0, width - 1)))
        seen = (place < self.mask.sum(1, keepdim=True)).long()
        read = _call(part, ids, seen, at.expand(count, -1), use_cache=False)
        source = (last + at[:width]).clamp(max=longest - 1)
        return read[output][torch.arange(count, device=at.device)[:, None], source]

    def pieces(self, tokens: int) -> Iterator[tuple[slice, MicroBatch]]:
        """Split the completions, not their packed rows: a piece has about ``tokens`` tokens, padding counted."""
        size, names = max(1, tokens // self.tokens.shape[1]), ("row", "source", "tokens", "mask", "advantages", "noise")
        for start in range(0, len(self.tokens), size):
            part = slice(start, start + size)
            changes: Any = {name: whole[part] for name in names if (whole := getattr(self, name)) is not None}
            yield part, replace(self, **changes)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the logits (C, T, V) that a model makes of hidden states (C, T, H), with all that it does to them."""
    states = _States([hidden])
    states.last_hidden_state = hidden
    # The model's own code runs around a body that has these states already: some scale or cap what the layer gives.
    body = vars(model.get_decoder())
    wrapped = {name: body[name] for name in ("forward",) if name in body}  # by whoever measures or spreads a model
    body["forward"] = lambda *_, **__: states
    try:
        return model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)).logits
    finally:
        del body["forward"]
        body.update(wrapped)


class _States(list):
    """The output of a model's body, which besides hidden states has nothing, whatever a family asks it for."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        return None


def micro_batches(
    rollouts: Rollouts, sequences: int, device: torch.device, advantages: Tensor | None = None
) -> Iterator[MicroBatch]:
    """Split prompts and completions into micro-batches of about ``sequences`` completions, prompts by falling length.

    The completions of one prompt stay together. ``advantages`` (B,) are of all completions, if there are any.

    Raises:
        OpdlabError: if there is no prompt, or a prompt or a completion is empty.
    """
    if not (rollouts.prompts and all(rollouts.prompts) and all(rollouts.completions)):
        raise OpdlabError("there is no prompt, or a prompt or a completion without a token: give each at least one")
    samples = rollouts.samples
    groups = [rollouts.completions[i : i + samples] for i in range(0, len(rollouts.completions), samples)]
    lengths = torch.tensor([len(p) + sum(map(len, group)) for p, group in zip(rollouts.prompts, groups, strict=True)])
    for chosen in lengths.argsort(descending=True, stable=True).split(max(1, sequences // samples)):
        rows = [(rollouts.prompts[i], groups[i]) for i in chosen.tolist()]
        part = None if advantages is None else advantages.reshape(-1, samples)[chosen].flatten().to(device)
        yield _pack(rows, device, part)


def _pack(rows: list[tuple[list[int], list[list[int]]]], device: torch.device, advantages: Tensor | None) -> MicroBatch:
    # What a token belongs to is 0 for the prompt, 1, 2 ... for a completion, and -1 for padding, which sees itself.
    ids, positions, owners, source = (list[list[int]]() for _ in range(4))
    for prompt, group in rows:
        start = end = len(prompt)
        ids.append([*prompt, *chain(*group)])
        positions.append([*range(start), *(start + t for completion in group for t in range(len(completion)))])
        owners.append([0] * start + [number for number, completion in enumerate(group, 1) for _ in completion])
        for completion in group:
            source.append([start - 1, *range(end, end + len(completion) - 1)])
            end += len(completion)
    row = torch.tensor([[i] for i, (_, group) in enumerate(rows) for _ in group])
    tokens = [completion for _, group in rows for completion in group]
    owner_of = _padded(owners, -1)
    visible = ((owner_of[:, :, None] == owner_of[:, None]) | (owner_of[:, None] == 0)).tril()[:, None]
    mask = _padded([[True] * len(completion) for completion in tokens])
    found = (_padded(ids), _padded(positions), visible, row, _padded(source), _padded(tokens), mask)
    packed: Any = (tensor.to(device) for tensor in found)
    return MicroBatch(*(*packed, advantages))


def _padded(rows: Sequence[Sequence[int]], value: int = 0, side: str = "right") -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)
