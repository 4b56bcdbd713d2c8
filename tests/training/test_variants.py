"""Which tokens count, and what training is confined to."""

from dataclasses import replace

import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.lab.grid import ARMS, PAPER, RECORDED, ancestor
from opdlab.lab.laboratory import Laboratory
from opdlab.training.arms import Projection, Tokens, changed_fields
from opdlab.training.losses import LOSSES, RANKINGS, token_weights
from opdlab.training.optimizers import make_optimizers
from opdlab.training.projection import Projector

NAME = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("per_completion", [True, False])
def test_kept_tokens_make_up_for_the_others(share, per_completion):
    random = torch.Generator().manual_seed(0)
    key, mask = torch.rand(5, 40, generator=random), torch.arange(40) < torch.tensor([[40], [30], [20], [10], [1]])
    weights = token_weights(key, mask, share, per_completion)
    assert not weights[~mask].any()
    groups = zip(weights, key, mask, strict=True) if per_completion else [(weights, key, mask)]
    for w, k, m in groups:
        assert float(w.sum()) == pytest.approx(float(m.sum()), rel=1e-5)
        assert (w > 0).sum() == max(1, round(share * int(m.sum())))
        kept, dropped = k[(w > 0) & m], k[(w == 0) & m]
        assert len(dropped) == 0 or kept.min() >= dropped.max()


def test_rankings():
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, generator=random), torch.randn(2, 3, 4, generator=random)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    noise = torch.rand(2, 3, generator=random)
    keys = {name: key(student, tokens, teacher, noise) for name, key in RANKINGS.items()}
    ratio = (student.log_softmax(-1) - teacher.log_softmax(-1))[..., 0]
    torch.testing.assert_close(keys["log-ratio"], ratio)
    torch.testing.assert_close(keys["entropy"], torch.distributions.Categorical(logits=student).entropy())
    assert keys["random"] is noise
    with pytest.raises(OpdlabError, match=r"^ranking is 'best': give log-ratio, .* or last$"):
        Tokens("best", 0.5)
    with pytest.raises(OpdlabError, match=r"^share is 0.0: give a number above 0 and up to 1$"):
        Tokens("log-ratio", 0.0)


def test_first_and_last_tokens():
    tokens, mask = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[True] * 5 + [False]])
    first, last = (
        token_weights(RANKINGS[ranking](torch.zeros(1, 6, 3), tokens), mask, 0.4) for ranking in ("first", "last")
    )
    assert first.tolist() == [[2.5, 2.5, 0, 0, 0, 0]] and last.tolist() == [[0, 0, 0, 2.5, 2.5, 0]]


@pytest.fixture
def weights():
    random = torch.Generator().manual_seed(1)
    w0 = torch.randn(24, 16, generator=random)
    return {NAME: w0}, {NAME: w0 + torch.randn(24, 16, generator=random)}


@pytest.mark.parametrize("space", ["update", "weights", "random"])
def test_a_projection_applied_twice_is_one(space, weights):
    projector = Projector(Projection(k=3, space=space), *weights, seed=4)
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    once = projector.apply(NAME, gradient)
    torch.testing.assert_close(projector.apply(NAME, once), once)
    assert once.norm() < gradient.norm()
    assert torch.linalg.matrix_rank(once, rtol=1e-5) == 3
    if space == "update":  # the best approximation of rank 3 keeps the update's largest directions
        delta = weights[1][NAME] - weights[0][NAME]
        values = torch.linalg.svdvals(delta.double())
        assert float(projector.apply(NAME, delta).norm()) == pytest.approx(float(values[:3].norm()), rel=1e-5)


def test_a_rescaled_update_keeps_its_norm(weights):
    origin, after = weights
    parameters = {NAME: after[NAME].clone()}
    Projector(Projection(k=2, rescale=True), origin, after).project_update(parameters, origin)
    step = parameters[NAME] - origin[NAME]
    assert float(step.norm()) == pytest.approx(float((after[NAME] - origin[NAME]).norm()), rel=1e-5)
    assert torch.linalg.matrix_rank(step, rtol=1e-4) == 2


def test_what_cannot_be_projected(weights):
    with pytest.raises(OpdlabError, match="expected 16 at most"):
        Projector(Projection(k=17), *weights)
    with pytest.raises(OpdlabError, match=r"^space is 'here': give update, weights or random"):
        Projector(Projection(k=2, space="here"), *weights)


def test_every_arm_can_be_told_apart_by_what_decides_it():
    described = [
        (
            changed_fields(arm.arm),
            arm.start,
            arm.teacher,
            arm.recipe,
            arm.lr_factor,
            arm.arm.projection,
            arm.directions(0, 1),
        )
        for arm in ARMS.values()
    ]
    for i, (arm, one) in enumerate(zip(ARMS.values(), described, strict=True)):
        # The makers of models differ in their shapes too, which a scale has.
        assert arm.produces or one not in described[:i], arm.name
    for name, arm in ARMS.items():
        assert set(arm.arm.losses) <= set(LOSSES) and sum(arm.arm.losses.values()) == pytest.approx(1)
        assert ancestor(name) in PAPER or arm.produces
        assert not arm.parent or arm.parent in ARMS
    assert set(PAPER) < set(RECORDED)
    with pytest.raises(OpdlabError, match="no arm makes the model 'x'"):
        Laboratory.at("smoke").maker_of("x")


def test_every_weight_has_one_optimizer(pair):
    from opdlab.models.folders import load_model
    from opdlab.training.config import Recipe

    model = load_model(pair[0])
    for name in ("adamw", "sgd", "muon"):
        optimizers = make_optimizers(model, Recipe(1), name)
        ours = [id(w) for o in optimizers for group in o.param_groups for w in group["params"]]
        assert sorted(ours) == sorted(map(id, model.parameters()))
    with pytest.raises(OpdlabError, match=r"^optimizer is 'lion': give adamw, sgd or muon$"):
        replace(ARMS["opd"].arm, optimizer="lion")
