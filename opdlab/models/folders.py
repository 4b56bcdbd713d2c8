"""Open and save models and tokenizers as ordinary Hugging Face folders, the lab's own and Qwen3-8B alike.

Weights are loaded in float32 by default (the cast to bf16 is something to measure). Only safetensors are read, and code
in a model folder is never run. ``transformers.AutoModelForCausalLM`` is always spelt out because transformers imports
such a name when it is first used, which takes seconds.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models.files import read_json
from opdlab.models.pieces import weight_files

#: Of the lab's tokenizer, the end-of-sequence token, the padding token, and all tokens in the order of their ids.
EOS = "$"
PAD = "_"
ALPHABET = "0123456789+-=;#?:,QASDRMOT" + EOS + PAD


# Files of a folder that say what a model computes with its weights, and what tokens are.
_SETTINGS = re.compile(r"(config|tokenizer|special_tokens|added_tokens|vocab|merges|spiece).*|.*\.(model|tiktoken)")


def settings_digest(folder: str) -> str:
    """Return 8 hex digits of the SHA-256 of what weights are used with: a folder's config.json and its tokenizer."""
    said = [file for file in sorted(Path(folder).iterdir()) if file.is_file() and _SETTINGS.fullmatch(file.name)]
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in said)).hexdigest()[:8]


def character_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Build the lab's tokenizer: one token per character of :data:`opdlab.models.folders.ALPHABET`, left-padded.

    >>> tokenizer = character_tokenizer()
    >>> tokenizer("17+5").input_ids, tokenizer.decode([1, 7, 10, 5])
    ([1, 7, 10, 5], '17+5')
    """
    tokenizer = Tokenizer(tokenizer_models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=PAD, padding_side="left"
    )


def new_model(shape: dict, seed: int) -> transformers.Qwen3ForCausalLM:
    """Build a Qwen3 model for the character tokenizer, with random weights; the global random state is left unchanged.

    Its ``shape`` is the fields of ``Qwen3Config`` that set its size.
    """
    config = transformers.Qwen3Config(
        vocab_size=len(ALPHABET),
        eos_token_id=ALPHABET.index(EOS),
        pad_token_id=ALPHABET.index(PAD),
        bos_token_id=None,
        tie_word_embeddings=True,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.Qwen3ForCausalLM(config).float()


def load_model(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """Load the causal language model in ``folder``, in evaluation mode.

    Raises:
        OpdlabError: if the folder or its weights are missing, pickled or damaged.
    """
    weight_files(Path(folder))
    with _opening("model", folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    # transformers decorates `to`, which hides its type.
    return model.to(device).eval()  # type: ignore[arg-type]


def load_config(folder: Path | str) -> transformers.PreTrainedConfig:
    """Load the configuration of the model in ``folder``, of its language model if it has several parts.

    Raises:
        OpdlabError: if it is missing or of a kind that transformers does not know.
    """
    with _opening("configuration", folder):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()


@contextmanager
def _opening(what: str, folder: Path | str) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        # The first line says what is wrong, and others list all that transformers knows.
        why = str(problem).partition("\n")[0]
        raise OpdlabError(f"the {what} in {folder} cannot be opened ({why}); restore or remake it") from problem


def context_length(config: transformers.PreTrainedConfig) -> int:
    """Return how many tokens a model reads at most; one that only biases attention by distance has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def with_weights(model: transformers.PreTrainedModel, weights: dict[str, Tensor]) -> transformers.PreTrainedModel:
    """Return a model like another one with the weights of a snapshot.

    They are named as the model's parameters, or as ``save_pretrained`` names them, which in a mixture of experts
    differs.
    """
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=weights, dtype=model.dtype)
    loaded.generation_config = model.generation_config  # its ends are of its folder
    return loaded.to(model.device).eval()  # type: ignore[arg-type]  # as in load_model


def load_tokenizer(folder: Path | str) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer in ``folder``, set to pad on the left; without a padding token, it pads with end-of-sequence.

    Raises:
        OpdlabError: if the tokenizer is missing, cannot be loaded or has no end-of-sequence token.
    """
    if not any(Path(folder).glob("tokenizer*")):
        raise OpdlabError(f"the model folder {folder} has no tokenizer: it needs tokenizer.json and its configuration")
    with _opening("tokenizer", folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise OpdlabError(f"the tokenizer in {folder} has no end-of-sequence token, so a rollout could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # Padding is masked everywhere, so any token will do.
    return tokenizer


def save_model(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save a model and its tokenizer as an ordinary Hugging Face folder: config, safetensors and tokenizer files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def round_model(source: Path, dtype: str, folder: Path) -> None:
    """Make ``folder`` a copy of a model whose weights are rounded to ``dtype``."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_model(load_model(source, dtype=getattr(torch, dtype)), load_tokenizer(source), part)
    if (source / "source.json").is_file():
        shutil.copy(source / "source.json", part)
    part.rename(folder)


def link_model(weights: Path, tokenizer: Path, folder: Path) -> None:
    """Make ``folder`` a model of links: the weights of one, and tokenizer, chat template and ends of another."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for source, whose in ((weights, True), (tokenizer, False)):
        for file in source.iterdir():
            if file.name.startswith(("model", "config.json", "source.json")) == whose:
                (part / file.name).symlink_to(file.resolve())
    part.rename(folder)


def check_same_vocabulary(student: Path, teacher: Path) -> None:
    """Raise an OpdlabError unless all vocabularies and ends of sequences agree, as every distillation loss assumes."""
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        raise OpdlabError(
            f"student {student} and teacher {teacher} have different vocabularies ({len(mine)} and {len(other)} "
            f"tokens, {len(mine.items() & other.items())} in common): choose a teacher of the same family"
        )
    if ours.eos_token_id != theirs.eos_token_id:
        raise OpdlabError(
            f"student {student} ends a sequence with {ours.eos_token!r} (token {ours.eos_token_id}) and teacher "
            f"{teacher} with {theirs.eos_token!r} (token {theirs.eos_token_id}): set the same eos_token in both "
            "tokenizer_config.json files"
        )
    for folder in (student, teacher):
        file = folder / "generation_config.json"
        ends = read_json(file).get("eos_token_id") if file.is_file() else None
        if ends is not None and ours.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
            raise OpdlabError(
                f"the model in {folder} ends a sequence with token {ends} (generation_config.json) and its tokenizer "
                f"with {ours.eos_token!r} (token {ours.eos_token_id}): make the two agree"
            )


def common_tokens(
    models: Sequence[transformers.PreTrainedModel], tokenizer: transformers.PreTrainedTokenizerBase
) -> int:
    """Return how many logits are of tokens: families such as Qwen2.5 pad their vocabularies, larger models further."""
    logits = [model.config.get_text_config().vocab_size for model in models]
    return min(max(tokenizer.get_vocab().values()) + 1, *logits)


def cut_vocabulary(
    models: Sequence[transformers.PreTrainedModel], tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Leave the logits of models without those that are no token of all, in place. The weights stay as they are."""
    count = common_tokens(models, tokenizer)
    for model in models:
        if model.config.get_text_config().vocab_size > count:
            model.get_output_embeddings().register_forward_hook(lambda layer, given, logits: logits[..., :count])
