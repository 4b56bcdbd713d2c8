import numpy as np
import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.lab.tasks import RUNNING_SUM
from opdlab.models.folders import load_model, load_tokenizer
from opdlab.training import rollouts
from opdlab.training.rollouts import micro_batches, sample


@pytest.fixture(scope="module")
def writer(lab):
    """A model, its tokenizer and prompts."""
    folder = lab.models / "teacher"
    model = load_model(folder)
    # A model that ends its answers at all sorts of lengths.
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model, load_tokenizer(folder), RUNNING_SUM.prompts(12, np.random.default_rng(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_is_generate(writer):
    model, tokenizer, prompts = writer
    ours = sample(model, tokenizer, prompts, max_new_tokens=24, temperature=0)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    theirs = model.generate(**batch, do_sample=False, max_new_tokens=24)[:, batch.input_ids.shape[1] :].tolist()
    for mine, reference in zip(ours.completions, theirs, strict=True):
        assert mine == reference[: len(mine)]
        assert len(mine) == 24 or mine[-1] == tokenizer.eos_token_id


def test_a_row_does_not_depend_on_its_neighbours(writer):
    model, tokenizer, prompts = writer
    settings = {"max_new_tokens": 24, "samples": 3}
    together = sample(model, tokenizer, prompts, generator=generator(), **settings)
    again = sample(model, tokenizer, prompts, generator=generator(), **settings)
    assert together == again
    assert len({len(row) for row in together.completions}) > 3, "the test needs rows that end at different times"
    # The first prompts come first in the stream of random numbers, so they alone sample the same completions.
    alone = sample(model, tokenizer, prompts[:4], generator=generator(), **settings)
    assert alone.completions == together.completions[:12]
    assert together != sample(model, tokenizer, prompts, generator=generator(1), **settings)


def test_rows_choose_in_parts_what_they_choose_together(writer, monkeypatch):
    model, tokenizer, prompts = writer
    settings = {"max_new_tokens": 24, "samples": 3}
    together = sample(model, tokenizer, prompts, generator=generator(), **settings)
    monkeypatch.setattr(rollouts, "ROWS", 5)
    assert together == sample(model, tokenizer, prompts, generator=generator(), **settings)


def test_a_body_that_someone_wrapped_stays_wrapped(writer):
    model, tokenizer, prompts = writer
    [part] = micro_batches(rollouts.Rollouts(tokenizer(prompts[:2]).input_ids, [[1, 2], [3]]), 2, model.device)
    body = model.get_decoder()
    with torch.no_grad():
        hidden = part.hidden(model)
        expected = rollouts.logits_of(model, hidden)
        assert "forward" not in vars(body)
        body.forward = wrapper = lambda *given, **named: type(body).forward(body, *given, **named)
        try:
            assert torch.equal(rollouts.logits_of(model, hidden), expected) and vars(body)["forward"] is wrapper
        finally:
            del body.forward


def test_samples_follow_the_model(writer):
    model, tokenizer, prompts = writer
    rollouts = sample(model, tokenizer, prompts[:1], max_new_tokens=1, samples=20_000, generator=generator())
    counts = torch.bincount(torch.tensor(rollouts.completions)[:, 0], minlength=len(tokenizer)) / 20_000
    with torch.no_grad():
        expected = model(**tokenizer(prompts[:1], return_tensors="pt")).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 4 * 0.5 / 20_000**0.5


def test_completions_end_at_the_first_eos(writer):
    model, tokenizer, prompts = writer
    rollouts = sample(model, tokenizer, prompts, max_new_tokens=24, samples=4, generator=generator())
    for row in rollouts.completions:
        assert tokenizer.eos_token_id not in row[:-1]
    assert rollouts.prompts == tokenizer(prompts).input_ids
    assert rollouts.samples == 4 and rollouts.tokens == sum(map(len, rollouts.completions))


def test_a_prompt_longer_than_the_context(writer):
    model, tokenizer, _ = writer
    with pytest.raises(OpdlabError, match=r"'Q1\+1.*has 205 tokens, but only 104 fit"):
        sample(model, tokenizer, ["Q" + "1+" * 100 + "1=?A:"[1:]], max_new_tokens=24)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("samples", [1, 3])
def test_packed_logits_are_those_of_each_completion_alone(rows, samples, writer):
    model, tokenizer, prompts = writer
    rollouts = sample(model, tokenizer, prompts, max_new_tokens=24, samples=samples, generator=generator())
    count = len(rollouts.completions)
    seen = []
    for part in micro_batches(rollouts, rows, model.device, torch.arange(float(count))):
        assert len(part.ids) == min(max(1, rows // samples), len(part.ids))
        assert part.mask[:, -1].any(), "padding that no completion needs"
        with torch.no_grad():
            logits = part.logits(model)
        assert logits.isfinite().all()
        for i, number in enumerate(part.advantages.long().tolist()):
            prompt, completion = rollouts.prompts[number // samples], rollouts.completions[number]
            assert part.tokens[i, part.mask[i]].tolist() == completion
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits[i, part.mask[i]], alone, rtol=1e-4, atol=1e-5)
            seen.append(number)
    assert sorted(seen) == list(range(count))


def test_padding_has_no_gradient(writer):
    model, tokenizer, prompts = writer
    rollouts = sample(model, tokenizer, prompts, max_new_tokens=24, samples=2, generator=generator())
    gradients = []
    for rows in (2, 24):
        model.zero_grad()
        for part in micro_batches(rollouts, rows, model.device):
            part.logits(model).logsumexp(-1)[part.mask].sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


class Apple(torch.Tensor):
    """A tensor on Apple's GPU as far as sampling sees it: it is nowhere in float64."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def to(self, where, *dtype):
        plain = self.as_subclass(torch.Tensor)
        return plain if where == "cpu" else plain.as_subclass(Apple)


def test_on_apples_gpu_float64_is_on_the_processor():
    logits, uniform = torch.randn(5, 7, generator=generator()), torch.rand(5, generator=generator()).double()
    on_apple = rollouts._choose(logits.as_subclass(Apple), 1.0, rollouts._float64(uniform, torch.device("mps")))
    assert on_apple.tolist() == rollouts._choose(logits, 1.0, uniform).tolist()
