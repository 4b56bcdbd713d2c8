"""Tasks with a verifiable answer: where prompts come from, how a solution is written, what earns a reward.

No text holds the end of the sequence: that is a token, which differs from model to model.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.training.identity import identity

if TYPE_CHECKING:
    import transformers

# One prompt in eight is kept for evaluation, by a hash of its text: the two sets cannot overlap, whatever the seed.
EVALUATION_SHARE = 8
# On so many prompts the digest of a task looks at demonstrations and rewards.
DIGESTED = 64

Reward = Callable[[str, str, str], float]


def is_evaluation(prompt: str) -> bool:
    """Tell whether ``prompt`` belongs to the evaluation set; the rest is for training.

    >>> [is_evaluation(f"Q1+{n}=?A:") for n in (1, 2, 3)]
    [False, False, False]
    """
    return _hashed(prompt)[0] % EVALUATION_SHARE == 0


def _hashed(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=8).digest()


@dataclass(frozen=True, repr=False)
class Task:
    """A named task, made of functions, or by :meth:`from_dataset`."""

    name: str
    draw: Callable[[np.random.Generator], str] | None  #: a prompt; None where the prompts are those of ``data``
    demonstration: Callable[[str], str]  #: a correct completion of a prompt, which SFT imitates
    score: Callable[[str, str], float]  #: the reward of (prompt, completion)
    data: tuple[str, ...] = ()  #: the prompts of a data set, in order
    chat: bool = False  #: write prompts through the chat template of the tokenizer, where it has one
    rows: str = ""  #: a digest of a data set
    content: str | Callable[[], str] = ""  #: one of it and its reward, or what gives it as the reward is now
    version: str = ""  #: what stands for the reward in the digest; empty for its code and what it gives
    #: Writes a completion of a prompt by chance, for SFT on authors who do not always write the same.
    author: Callable[[str, np.random.Generator], str] | None = None

    @classmethod
    def from_dataset(
        cls,
        rows: Any,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        reward: Reward | None = None,
        demonstration: str | None = None,
        name: str = "",
        chat: bool = True,
        version: str = "",
    ) -> Task:
        """Make a task of a data set, with one prompt in eight held out for evaluation, chosen by a hash of its text.

        Of a set so small that the hash holds out none, or all, it is the one prompt with the smallest hash. Of rows
        that repeat a prompt the first is kept.

        The reward belongs to the task: with another one (its code, or the values that it reads from around it) the
        task is another, and a run on the old one does not go on. Not seen are what other modules do and hold, files,
        networks, and objects of other modules but arrays, tensors, models' weights, and plain values such as dates.
        A reward with a cache, a counter or chance in it looks like another one each time, and so does a mended one:
        give a ``version``, and it alone says which reward it is. A run that began without a version goes on under one
        until it is finished, if its rows and all else are the same.

        Args:
            rows: dicts, a data frame, a JSONL, JSON or CSV file, a ``datasets.Dataset``, or its name on the hub.
            prompt: the column with the question.
            answer: the column with the right answer, which only the reward and SFT see, a number as text ("4").
            reward: (prompt, completion, answer) -> any number; by default 1.0 where the completion ends with the words
                of the answer, and 0.0 elsewhere (:func:`last_word`). A completion that is cut before its end earns 0.0.
            demonstration: the column that SFT imitates; by default ``answer``.
            name: of the task; by default that of the file or data set.
            chat: write prompts through the tokenizer's chat template, where it has one.
            version: a name of yours that stands for the reward: its code, its values and what it gives.

        Raises:
            OpdlabError: if the rows cannot be read, are of fewer than two prompts, lack a column, or have two answers
                to a prompt; or if the reward is no function, or by default could never find an answer.

        >>> rows = [{"question": f"{a} + {b} = ?", "answer": a + b} for a in range(10) for b in range(10)]
        >>> task = Task.from_dataset(rows, prompt="question", reward=lambda prompt, said, answer: float(said == answer))
        >>> task, task.reward("2 + 3 = ?", "5")
        (Task('data': 87 prompts to train on, 13 held out), 1.0)
        """
        records, found_name = _read_rows(rows)
        table = _table(records, {"prompt": prompt, "answer": answer, "demonstration": demonstration or answer})
        reward = _checked(reward, table)
        content = partial(_content, table, reward, version)
        functions = None, partial(_demonstration, table), partial(_graded, table, reward)
        return cls(name or found_name, *functions, tuple(table), chat, _sha256(table), content, version)

    def __repr__(self) -> str:
        """Say how many prompts there are, without writing them out."""
        if not self.data:
            return f"Task({self.name!r})"
        return f"Task({self.name!r}: {self.training_prompts} prompts to train on, {self.held_out} held out)"

    @property
    def training_prompts(self) -> int | None:
        """The number of different prompts to train on, or None where they are drawn without end."""
        return len(self.data) - len(self._evaluation) if self.data else None

    @property
    def held_out(self) -> int | None:
        """The number of prompts held out for evaluation, or None where they are drawn without end."""
        return len(self._evaluation) if self.data else None

    @cached_property
    def _evaluation(self) -> set[str]:
        chosen = set(filter(is_evaluation, self.data))
        return chosen if 0 < len(chosen) < len(self.data) else {min(self.data, key=_hashed)}

    def reward(self, prompt: str, completion: str) -> float:
        """Return the reward of a completion, or raise an OpdlabError that quotes it if there is no finite one."""
        where = f"on the prompt {prompt[:60]!r} and the completion {completion[:60]!r}"
        try:
            reward = float(self.score(prompt, completion))
        except OpdlabError:
            raise
        except Exception as problem:
            why = f"{type(problem).__name__} ({(str(problem).splitlines() or ['without a message'])[0]})"
            message = f"the reward of task {self.name!r} raised {why} {where}: mend the reward function"
            named = "" if self.version or not self.data else ", and give its task a version=... if a run is to go on"
            raise OpdlabError(message + named) from problem
        if not math.isfinite(reward):
            raise OpdlabError(f"the reward of task {self.name!r} is {reward} {where}: return a finite number")
        return reward

    def prompts(self, count: int, rng: np.random.Generator, evaluation: bool = False) -> list[str]:
        """Draw ``count`` prompts of the training set, or ``count`` different ones of the evaluation set.

        From a data set, a batch has no prompt twice. If there are not so many, an OpdlabError is raised.
        """
        if self.data:
            chosen = [prompt for prompt in self.data if (prompt in self._evaluation) == evaluation]
            if count > len(chosen):
                kind = "evaluation" if evaluation else "training"
                raise OpdlabError(f"task {self.name!r} has {len(chosen)} {kind} prompts, not {count}; ask for fewer")
            return [chosen[i] for i in rng.permutation(len(chosen))[:count]]
        assert self.draw, "a task has data or draws its prompts"
        drawn: list[str] = []
        for _ in range(1000 * count):
            prompt = self.draw(rng)
            if is_evaluation(prompt) == evaluation and not (evaluation and prompt in drawn):
                drawn.append(prompt)
            if len(drawn) == count:
                return drawn
        raise OpdlabError(f"task {self.name!r} has fewer than {count} evaluation prompts; ask for fewer")

    def demonstrations(self, prompts: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Return a completion of each prompt for SFT to imitate, by the author where the task has one."""
        return [self.author(prompt, rng) if self.author else self.demonstration(prompt) for prompt in prompts]

    def texts(self, tokenizer: transformers.PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
        """Return prompts as a model reads them: through its chat template, if the task wants it and there is one."""
        if not (self.chat and tokenizer.chat_template):
            return list(prompts)
        asked = ([{"role": "user", "content": prompt}] for prompt in prompts)
        try:
            return [str(tokenizer.apply_chat_template(a, tokenize=False, add_generation_prompt=True)) for a in asked]
        except Exception as problem:  # whatever the template's own code raises, or Jinja about it
            what = f"the chat template of {tokenizer.name_or_path} refuses a prompt ({str(problem).splitlines()[0]})"
            raise OpdlabError(f"{what}: mend it, or make the task with chat=False") from problem

    @cached_property
    def digest(self) -> str:
        """The identity of prompts, demonstrations and rewards, 8 hex digits.

        It hashes what the reward gives for 64 demonstrations, each with its own prompt and with another's, and of a
        data set also all rows and the code of the reward. So a comment in it changes nothing, and a value does. Of a
        reward with a version only that is hashed.
        """
        prompts, random = list(self.data[:DIGESTED]), np.random.default_rng(0)
        if self.draw:
            prompts = [self.draw(random) for _ in range(DIGESTED)]
        texts = self.demonstrations(prompts, random)
        scrambled = texts[1:] + texts[:1]
        compared = () if self.version else (texts, scrambled)
        rewards = [[_tried(self.score, p, t) for p, t in zip(prompts, of, strict=True)] for of in compared]
        if self.data and compared and not any(rewards[0]):
            first = f"{texts[0][:40]!r} on the prompt {prompts[0][:40]!r}"
            warnings.warn(
                f"the reward of task {self.name!r} gives 0 to its own demonstrations, such as {first}: the answer is "
                "given to it as text",
                stacklevel=2,
            )
        content = self.content() if callable(self.content) else self.content
        told = [self.name if not self.data else "", content, prompts, texts, rewards, self.chat]
        return _sha256(told)[:8]


def _content(table: Mapping[str, tuple[str, str]], reward: Reward, version: str) -> str:
    return _sha256([table, {"version": version} if version else identity(reward)])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _table(rows: Iterable[Any], columns: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return answers and demonstrations by prompt; ``columns`` names the column of each."""
    table: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        this = f"row {number} of the data set"
        if not isinstance(row, Mapping):
            raise OpdlabError(f"{this} is {str(row)[:60]!r}: give rows as dicts, such as one split")
        for role, column in columns.items():
            value = row.get(column)
            if pd.api.types.is_scalar(value) and pd.isna(value):
                has = f"has no {role} in a column {column!r}, and has {', '.join(map(str, row))}"
                raise OpdlabError(f"{this} {has}: say which column it is by {role}=, or leave the row out")
        prompt, answer, demonstration = (_text(row[column], column, this) for column in columns.values())
        if table.setdefault(prompt, (answer, demonstration)) != (answer, demonstration):
            raise OpdlabError(f"{this} asks {prompt[:60]!r} again with another {columns['answer']!r}: keep one of them")
    if len(table) < 2:
        raise OpdlabError("the data set has fewer than two different prompts: give more, as one at least is held out")
    return table


def _text(value: Any, column: str, row: str) -> str:
    """Return a text or a finite number as text, and a chat that is one message of the user by what it says."""
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == "user" else value
    if not isinstance(value, str | int | float | np.integer | np.floating | Decimal) or value in (math.inf, -math.inf):
        raise OpdlabError(
            f"{row} has {str(value)[:60]!r} in its column {column!r}: give text, a finite number, or a chat of one "
            "message by the user"
        )
    text = str(value)
    if text.encode("utf-8", "ignore").decode() != text:
        raise OpdlabError(f"{row} has half a character in its column {column!r}: write it as Unicode")
    return text


def _demonstration(table: Mapping[str, tuple[str, str]], prompt: str) -> str:
    return table[prompt][1]


def _graded(table: Mapping[str, tuple[str, str]], reward: Reward, prompt: str, completion: str) -> float:
    return reward(prompt, completion, table[prompt][0])


def last_word(prompt: str, completion: str, answer: str) -> float:
    """Return 1.0 if a completion, without a full stop, ends with the answer, word for word, and 0.0 otherwise.

    It is strict: ``**4**``, ``$4$``, ``4.0`` and ``4 apples`` are not the answer ``4``.

    >>> last_word("2 + 2?", "It is 4.", "4"), last_word("2 + 2?", "4 or 5", "4"), last_word("Capital?", "", "")
    (1.0, 0.0, 0.0)
    """
    words, right = completion.strip().rstrip(".").split(), answer.strip().rstrip(".").split()
    return float(bool(right) and words[-len(right) :] == right)


def _checked(reward: Reward | None, table: Mapping[str, tuple[str, str]]) -> Reward:
    """Return a reward that is a function, or else :func:`last_word` if that can find the answers."""
    if reward is not None:
        if not callable(reward):
            raise OpdlabError(f"reward is {reward!r}: give a function of (prompt, completion, answer)")
        return reward
    for asked, (right, _) in table.items():
        if not last_word(asked, right, right):
            raise OpdlabError(f"the answer to {asked[:60]!r} is {right!r}: no completion can end with it; mend it")
    return last_word


def _tried(score: Callable[[str, str], float], prompt: str, text: str) -> float | str:
    """Return a reward for the digest; one that fails on a scrambled answer is known by its error."""
    try:
        return float(score(prompt, text))
    except Exception as problem:
        return type(problem).__name__


def _row(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as problem:
        raise ValueError(f"line {number}: {str(problem).replace('line 1 ', '')}") from problem


def _read_rows(rows: Any) -> tuple[Iterable[Any], str]:
    """Return the rows of whatever a data set is given as, and a name for it."""
    if isinstance(rows, pd.DataFrame):
        return rows.to_dict("records"), "data"
    if not isinstance(rows, str | Path | Iterable):
        raise OpdlabError(f"rows is {rows!r}: give a list of dicts, a JSONL file, or a data set or its name on the hub")
    if not isinstance(rows, str | Path):
        return rows, getattr(getattr(rows, "info", None), "dataset_name", None) or "data"
    path = Path(rows).expanduser()
    if path.suffix in (".jsonl", ".json", ".csv") or path.exists():
        try:
            if path.suffix == ".csv":
                return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"), path.stem
            text = path.read_text("utf-8-sig")
            if text.lstrip().startswith("["):
                return json.loads(text), path.stem
            return [_row(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()], path.stem
        except (OSError, ValueError) as problem:
            what = f"the data set {path} cannot be read ({problem})"
            raise OpdlabError(f"{what}: give one JSON object a line") from problem
    try:
        from datasets import load_dataset

        return load_dataset(str(rows), split="train"), str(rows)
    except Exception as problem:  # The library has an error of its own for each way to fail.
        raise OpdlabError(
            f"there is no file {rows}, and the hub's data set of this name cannot be had ({problem}): give a JSONL "
            "file or a list of rows, or install opdlab[real] and check the network and HF_HUB_OFFLINE"
        ) from problem
