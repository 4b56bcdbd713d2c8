"""Open and save models and tokenizers as ordinary Hugging Face folders, the lab's own and Qwen3-8B alike.

Weights are loaded in float32 by default (the cast to bf16 is something to measure, not something that training does).
Only safetensors are read, and code in a model folder is never run. ``transformers.AutoModelForCausalLM`` is always
spelt out because transformers imports such a name when it is first used, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.models.formats import weight_files

#: Of the lab's tokenizer, the end-of-sequence token, the padding token, and all tokens in the order of their ids.
EOS = "$"
PAD = "_"
ALPHABET = "0123456789+-=;#?:,QASDRMOT" + EOS + PAD


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
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except Exception as problem:
        raise OpdlabError(f"the model in {folder} cannot be opened ({problem}); restore or remake it") from problem
    # transformers decorates `to`, which hides its type.
    return model.to(device).eval()  # type: ignore[arg-type]


def with_weights(model: transformers.PreTrainedModel, weights: dict[str, Tensor]) -> transformers.PreTrainedModel:
    """Return a model like another one with the weights of a snapshot, by the names of either.

    A run of opdlab's own loop names them as the model's parameters, and one of TRL's as ``save_pretrained`` does, which
    in a mixture of experts are other names.
    """
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=weights, dtype=model.dtype)
    return loaded.to(model.device).eval()  # type: ignore[arg-type]  # as in load_model


def load_tokenizer(folder: Path | str) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer in ``folder``, set to pad on the left; without a padding token, it pads with end-of-sequence.

    Raises:
        OpdlabError: if the tokenizer is missing, cannot be loaded or has no end-of-sequence token.
    """
    if not any(Path(folder).glob("tokenizer*")):
        raise OpdlabError(f"the model folder {folder} has no tokenizer: it needs tokenizer.json and its configuration")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as problem:
        raise OpdlabError(f"the tokenizer in {folder} cannot be opened ({problem}); restore or remake it") from problem
    if tokenizer.eos_token_id is None:
        raise OpdlabError(f"the tokenizer in {folder} has no end-of-sequence token, so a rollout could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # Padding is masked everywhere, so any token will do.
    return tokenizer


def chat_template(folder: Path | str) -> str:
    """Return the chat template of the tokenizer in ``folder``, or "" if it has none."""
    return str(load_tokenizer(folder).chat_template or "")


def save_model(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save a model and its tokenizer as an ordinary Hugging Face folder: config, safetensors and tokenizer files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_same_vocabulary(student: Path, teacher: Path) -> None:
    """Check that student and teacher share one vocabulary and one end of sequence, as every distillation loss assumes.

    Raises:
        OpdlabError: if the vocabularies, the end-of-sequence tokens or the numbers of logits differ, naming the folders
            and the difference.
    """
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
    sizes = [
        transformers.AutoConfig.from_pretrained(folder).get_text_config().vocab_size for folder in (student, teacher)
    ]
    if len(set(sizes)) > 1:  # as in Qwen2.5, whose larger models have padded more
        raise OpdlabError(
            f"student {student} has {sizes[0]} logits and teacher {teacher} has {sizes[1]}, though their tokenizers "
            "agree: choose a teacher with as many, or resize the embeddings of one"
        )
