import numpy as np
import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.models import load_model, load_tokenizer
from opdlab.rollouts import sample
from opdlab.tasks import RUNNING_SUM
from opdlab.training import make_batch


@pytest.fixture(scope="module")
def lab(home, scale):
    folder = home.models(scale) / "teacher"
    model = load_model(folder)
    # A model that ends its answers at all sorts of lengths.
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model, load_tokenizer(folder), RUNNING_SUM.prompts(12, np.random.default_rng(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_is_generate(lab):
    model, tokenizer, prompts = lab
    ours = sample(model, tokenizer, prompts, max_new_tokens=24, temperature=0)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    theirs = model.generate(**batch, do_sample=False, max_new_tokens=24)[:, batch.input_ids.shape[1] :].tolist()
    for mine, reference in zip(ours.completions, theirs, strict=True):
        assert mine == reference[: len(mine)]
        assert len(mine) == 24 or mine[-1] == tokenizer.eos_token_id


def test_a_row_does_not_depend_on_its_neighbours(lab):
    model, tokenizer, prompts = lab
    settings = {"max_new_tokens": 24, "samples": 3}
    together = sample(model, tokenizer, prompts, generator=generator(), **settings)
    again = sample(model, tokenizer, prompts, generator=generator(), **settings)
    assert together == again
    assert len({len(row) for row in together.completions}) > 3, "the test needs rows that end at different times"
    # The first prompts come first in the stream of random numbers, so they alone sample the same completions.
    alone = sample(model, tokenizer, prompts[:4], generator=generator(), **settings)
    assert alone.completions == together.completions[:12]
    assert together != sample(model, tokenizer, prompts, generator=generator(1), **settings)


def test_samples_follow_the_model(lab):
    model, tokenizer, prompts = lab
    rollouts = sample(model, tokenizer, prompts[:1], max_new_tokens=1, samples=20_000, generator=generator())
    counts = torch.bincount(torch.tensor(rollouts.completions)[:, 0], minlength=len(tokenizer)) / 20_000
    with torch.no_grad():
        expected = model(**tokenizer(prompts[:1], return_tensors="pt")).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 4 * 0.5 / 20_000**0.5


def test_completions_end_at_the_first_eos(lab):
    model, tokenizer, prompts = lab
    rollouts = sample(model, tokenizer, prompts, max_new_tokens=24, samples=4, generator=generator())
    for row in rollouts.completions:
        assert tokenizer.eos_token_id not in row[:-1]
    assert rollouts.prompts[0] == rollouts.prompts[3] == tokenizer(prompts[0]).input_ids


def test_a_prompt_longer_than_the_context(lab):
    model, tokenizer, _ = lab
    with pytest.raises(OpdlabError, match=r"'Q1\+1.*has 205 tokens, but only 104 fit"):
        sample(model, tokenizer, ["Q" + "1+" * 100 + "1=?A:"[1:]], max_new_tokens=24)


def test_micro_batches_hold_each_sequence_once(lab):
    model, tokenizer, prompts = lab
    rollouts = sample(model, tokenizer, prompts, max_new_tokens=24, samples=2, generator=generator())
    advantages = torch.arange(24.0)
    batch = make_batch(rollouts, tokenizer.pad_token_id, torch.device("cpu"), advantages)
    parts = list(batch.micro_batches(7))
    assert [len(part.ids) for part in parts] == [7, 7, 7, 3]
    assert sum(int(part.mask.sum()) for part in parts) == sum(map(len, rollouts.completions)) == int(batch.mask.sum())
    for part in parts:
        assert part.mask[:, -1].any(), "padding that no row needs"
        for ids, mask, row in zip(part.ids, part.mask, part.advantages.long(), strict=True):
            assert ids[1:][mask].tolist() == rollouts.completions[row]
            assert ids[: len(rollouts.prompts[row])].tolist() == rollouts.prompts[row]
