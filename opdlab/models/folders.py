"""Models and tokenizers as ordinary Hugging Face folders.

Everything is opened by ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``, so a model of
the lab and Qwen3-8B take the same path. Weights are float32 (the bf16 cast is something that diagnostics look at, not
something that training does), only safetensors are read, and no code from a model folder is ever run.

The library writes ``transformers.AutoModelForCausalLM`` with its module because ``transformers`` imports what is behind
such a name when it is first used: who only reads records does not wait for it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from opdlab.errors import OpdlabError
from opdlab.models.checkpoints import weight_files

#: The end of the sequence and the padding of the lab's tokenizer, and all its tokens.
EOS = "$"
PAD = "_"
ALPHABET = "0123456789+-=;#?:,QASDRMOT" + EOS + PAD


def character_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Build the lab's tokenizer: one token per character of :data:`opdlab.models.folders.ALPHABET`, padded on the left.

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
    """Build a randomly initialised Qwen3 model for the character tokenizer.

    Args:
        shape: the fields of ``Qwen3Config`` that give its size.
        seed: of the initial weights; the global random state is left as it was.
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
    """Open the causal language model in ``folder``, in evaluation mode.

    Args:
        folder: of the model.
        device: where it goes.
        dtype: of its weights.

    Raises:
        OpdlabError: if the folder or its weights are missing, pickled or damaged.
    """
    weight_files(Path(folder))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except Exception as problem:
        raise OpdlabError(f"the model in {folder} cannot be opened ({problem}); restore or remake it") from problem
    # transformers wraps the method, and its type with it.
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(folder: Path | str) -> transformers.PreTrainedTokenizerBase:
    """Open the tokenizer in ``folder``, padding on the left.

    Raises:
        OpdlabError: if it is missing or cannot be opened, or has no end-of-sequence token.
    """
    if not any(Path(folder).glob("tokenizer*")):
        raise OpdlabError(f"the model folder {folder} has no tokenizer: it needs tokenizer.json and its configuration")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as problem:
        raise OpdlabError(f"the tokenizer in {folder} cannot be opened ({problem}); restore or remake it") from problem
    if tokenizer.eos_token_id is None:
        raise OpdlabError(f"the tokenizer in {folder} has no end-of-sequence token, so a rollout could never end")
    return tokenizer


def chat_template(folder: Path | str) -> str:
    """Return the chat template of the tokenizer in ``folder``, or "" if it has none."""
    return str(load_tokenizer(folder).chat_template or "")


def save_model(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write an ordinary Hugging Face folder: config, safetensors and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_same_vocabulary(student: Path, teacher: Path) -> None:
    """Check that a token means the same to student and teacher, which every distillation loss takes for granted.

    Raises:
        OpdlabError: if the two vocabularies differ, naming the folders.
    """
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (student, teacher))
    if ours != theirs:
        raise OpdlabError(
            f"student {student} and teacher {teacher} have different vocabularies ({len(ours)} and {len(theirs)} "
            f"tokens, {len(ours.items() & theirs.items())} in common): choose a teacher of the same family"
        )
