"""FairDiffusion's weights and gap on hand-worked batches, its windows, its Bayesian update, and resuming it."""

import json

import numpy as np
import pytest
import torch
from botorch.exceptions.errors import ModelFittingError
from safetensors.torch import load, save

from compdiff import fairdiffusion
from compdiff.attributes import Attribute, Schema
from compdiff.config import FairConfig
from compdiff.fairdiffusion import FAILED, FITTED, NO_UPDATE, FairReweighter, loss_gap, propose

SIZES = (3, 2)


def rng(seed):
    return torch.Generator().manual_seed(seed)


# --- weights --------------------------------------------------------------------------------------------------------
def test_weights_by_hand():
    attributes = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 0], [2, 1]])
    sigma = [0.1, 0.5, 1.0, 0.25, 0.75]  # three categories of the first attribute, two of the second
    eps = torch.randn(5, 2, generator=rng(0)).tolist()
    named = [(0.1, 0.75), (1.0, 0.25), (0.5, 0.75), (0.1, 0.25), (1.0, 0.75)]  # sigma of each row, read off by eye
    expected = np.array([1 + s * e[0] + t * e[1] for (s, t), e in zip(named, eps)])
    assert expected.min() < 0.1, "the case must exercise the clamp"

    original = FairReweighter(SIZES, FairConfig(weighting="original"))
    original.sigma = torch.tensor(sigma, dtype=torch.float64)
    np.testing.assert_allclose(original.weights(attributes, rng(0)).numpy(), expected, rtol=1e-6)

    port = FairReweighter(SIZES, FairConfig(weighting="normalised"))
    port.sigma = torch.tensor(sigma, dtype=torch.float64)
    clamped = np.maximum(expected, 0.1)
    weights = port.weights(attributes, rng(0))
    np.testing.assert_allclose(weights.numpy(), clamped / clamped.sum() * 5, rtol=1e-6)
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0])  # the port's sum of (weights that sum to 1) x l = our mean of w l
    assert (weights.numpy() * losses).mean() == pytest.approx((clamped / clamped.sum() * losses).sum())


def test_weights_have_mean_one_and_the_variance_of_their_groups():
    fair = FairReweighter(SIZES, FairConfig(weighting="original"))
    fair.sigma = torch.tensor([0.6, 0.0, 0.0, 0.8, 0.0], dtype=torch.float64)
    for row, std in (([0, 0], 1.0), ([0, 1], 0.6), ([1, 0], 0.8), ([2, 1], 0.0)):  # 0.6^2 + 0.8^2 = 1
        weights = fair.weights(torch.tensor([row]).repeat(20_000, 1), rng(0))
        assert weights.mean().item() == pytest.approx(1, abs=0.03)
        assert weights.std().item() == pytest.approx(std, abs=0.03)


def test_groups_may_be_some_attributes_only():
    """The recipe of FairDiffusion: race, sex and ethnicity, but no age; what age a sample has then changes nothing."""
    schema = Schema((Attribute("age", tuple("abc")), Attribute("sex", ("m", "f")), Attribute("race", ("x", "y"))))
    chosen = FairConfig(groups=("race", "sex", "ethnicity"), weighting="original")
    columns = fairdiffusion.columns_of(schema, chosen)
    assert columns == [1, 2] and fairdiffusion.columns_of(schema, FairConfig()) == [0, 1, 2]
    some = FairReweighter(schema.sizes, chosen, columns)
    alone = FairReweighter((2, 2), FairConfig(weighting="original"))
    rows = torch.tensor([[0, 1, 0], [2, 0, 1], [1, 1, 1], [0, 0, 0]])
    for step in range(3):
        assert torch.equal(some.weights(rows, rng(step)), alone.weights(rows[:, 1:], rng(step)))
        losses = torch.rand(4, generator=rng(step + 10))
        some.observe(losses, rows, rng(step + 20), step)
        alone.observe(losses, rows[:, 1:], rng(step + 20), step)
    assert some.history == alone.history and some.history[0]["gap"] > 0
    with pytest.raises(ValueError, match="ethnicity: none is an attribute here; known: age, sex, race"):
        fairdiffusion.columns_of(schema, FairConfig(groups=("ethnicity",)))


# --- gap ------------------------------------------------------------------------------------------------------------
def test_gap_by_hand():
    attributes = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 1], [2, 1]])
    losses = torch.tensor([1.0, 3.0, 7.0, 2.0, 4.0])
    # first attribute: means 2, 7, 3 -> 5. second: (1 + 7) / 2 = 4 and (3 + 2 + 4) / 3 = 3 -> 1
    assert loss_gap(losses, attributes, SIZES) == pytest.approx(6)


def test_absent_groups_do_not_count():
    attributes = torch.tensor([[0, 1], [2, 1], [2, 1]])  # category 1 of the first, 0 of the second are absent
    losses = torch.tensor([1.0, 3.0, 4.0])
    assert loss_gap(losses, attributes, SIZES) == pytest.approx(2.5)  # 3.5 - 1, and 0 for a single present group
    assert loss_gap(losses[:1], attributes[:1], SIZES) == 0


def test_losses_that_are_not_finite_raise():
    fair, losses = FairReweighter(SIZES, FairConfig()), torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="not finite"):
        fair.observe(losses, torch.zeros(2, 2).long(), rng(0), 0)


# --- the course of training: windows and perturbation -----------------------------------------------------------------
def run(fair, first, last):
    """Steps [first, last) on batches that depend on the step only."""
    for step in range(first, last):
        generator = rng(step)
        attributes = torch.stack([torch.randint(n, (8,), generator=generator) for n in fair.schema_sizes], 1)
        fair.weights(attributes, generator)
        fair.observe(torch.rand(8, generator=generator), attributes, generator, step)
    return fair


@pytest.fixture
def fits(monkeypatch):
    """Replaces the Bayesian update by sigma = 0.5 and collects the records it is given."""
    calls = []

    def fake(sigma, reward, config, seed):
        calls.append((sigma, reward, seed))
        return torch.full_like(sigma[0], 0.5)

    monkeypatch.setattr(fairdiffusion, "propose", fake)
    return calls


def test_first_window_holds_31_records_the_others_30(fits):
    fair = run(FairReweighter(SIZES, FairConfig()), 0, 100)
    assert [len(sigma) for sigma, _, _ in fits] == [31, 30, 30]
    assert [row["step"] for row in fair.history if row["update"] == FITTED] == [30, 60, 90]
    assert {row["update"] for row in fair.history} == {NO_UPDATE, FITTED}
    assert len({seed for _, _, seed in fits}) == 3
    names = ["sigma_0_0", "sigma_0_1", "sigma_0_2", "sigma_1_0", "sigma_1_1"]
    for start, (sigma, reward, _) in zip((0, 31, 61), fits):
        rows = fair.history[start : start + len(sigma)]
        assert reward.tolist() == [-row["gap"] for row in rows]
        assert sigma.tolist() == [[row[n] for n in names] for row in rows]
    assert [fair.history[0][n] for n in names] == [1, 1, 1, 1, 1]


def test_every_step_mixes_in_five_percent_uniform_noise_also_after_an_update(fits):
    fair = FairReweighter(SIZES, FairConfig(time_window=3))
    attributes, losses = torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0])
    sigma = torch.ones(5, dtype=torch.float64)
    for step in range(5):
        fair.observe(losses, attributes, rng(step), step)
        if step == 3:  # the end of the first window of 3 + 1 records
            sigma = torch.full((5,), 0.5, dtype=torch.float64)
        sigma = 0.95 * sigma + 0.05 * torch.rand(5, generator=rng(step), dtype=torch.float64)
        torch.testing.assert_close(fair.sigma, sigma, rtol=0, atol=1e-15)
    assert 0 <= fair.sigma.min() and fair.sigma.max() <= 1 and fits


def test_a_failed_fit_keeps_sigma_and_is_recorded(monkeypatch):
    def fail(sigma, reward, config, seed):
        raise ModelFittingError("no fit")

    monkeypatch.setattr(fairdiffusion, "propose", fail)
    fair = run(FairReweighter(SIZES, FairConfig(time_window=4)), 0, 5)
    assert [row["update"] for row in fair.history] == [NO_UPDATE] * 4 + [FAILED]
    before = torch.tensor(list(fair.history[-1].values())[3:], dtype=torch.float64)
    assert (fair.sigma - before).abs().max() <= 0.05 and not (fair.sigma == before).all()

    monkeypatch.setattr(fairdiffusion, "propose", lambda *a, **k: 1 / 0)  # anything else is a bug: it must be seen
    with pytest.raises(ZeroDivisionError):
        run(fair, 5, 9)


# --- the Bayesian update ----------------------------------------------------------------------------------------------
def synthetic(seed, n=30, g=4):
    """Random sigmas and the gap |sigma - best|^2 + noise of an unknown best point inside the cube."""
    generator = rng(seed)
    best = 0.2 + 0.6 * torch.rand(g, generator=generator, dtype=torch.float64)
    sigma = torch.rand(n, g, generator=generator, dtype=torch.float64)
    gap = ((sigma - best) ** 2).sum(1)
    return best, sigma, gap, gap + 0.01 * torch.randn(n, generator=generator, dtype=torch.float64)


def test_update_finds_a_better_sigma_than_chance():
    for seed in range(3):
        best, sigma, gap, observed = synthetic(seed)
        found = propose(sigma, -observed, FairConfig(), seed=0)
        assert found.dtype == torch.float64 and 0 <= found.min() and found.max() <= 1
        assert ((found - best) ** 2).sum() < 0.25 * gap.mean() and ((found - best) ** 2).sum() < gap.min()


def test_update_is_deterministic_and_leaves_the_random_state_alone():
    _, sigma, _, observed = synthetic(0, n=12, g=3)
    torch.manual_seed(5), np.random.seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = propose(sigma, -observed, FairConfig(), seed=0)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(6), np.random.seed(6)
    with torch.no_grad():  # as the training loop calls it
        assert torch.equal(propose(sigma, -observed, FairConfig(), seed=0), first)


@pytest.mark.filterwarnings("ignore:Data .outcome observations. is not standardized")
def test_update_survives_records_that_are_all_alike():
    fair = FairReweighter(SIZES, FairConfig(time_window=2))
    for step in range(3):
        fair.observe(torch.ones(4), torch.zeros(4, 2).long(), rng(0), step)  # gap 0 each time
    assert fair.history[-1]["update"] in (FITTED, FAILED) and torch.isfinite(fair.sigma).all()


@pytest.fixture(scope="module")
def whole():
    return run(FairReweighter(SIZES, FairConfig(time_window=4)), 0, 12)


@pytest.mark.parametrize("stop", [4, 5, 7])  # before the first update (after step 4), at it, within the second window
def test_resumed_equals_uninterrupted(whole, stop):
    config = FairConfig(time_window=4)
    state = load(save(run(FairReweighter(SIZES, config), 0, stop).state_dict()))  # through a file's bytes
    resumed = FairReweighter(SIZES, config)
    resumed.load_state_dict(state)
    run(resumed, stop, 12)
    assert torch.equal(resumed.sigma, whole.sigma) and resumed.updates == whole.updates == 2
    assert resumed.history == whole.history == json.loads(json.dumps(whole.history)) and len(whole.history) == 12
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_state_is_a_copy_and_must_fit():
    fair = FairReweighter(SIZES, FairConfig(time_window=4))
    state = load(save(fair.state_dict()))  # also before the first step, with nothing recorded
    assert state["window"].shape == (0, 6) and state["history"].shape == (0, 8)
    run(fair, 0, 2)
    kept = fair.state_dict()
    run(fair, 2, 4)
    assert len(kept["window"]) == 2 and not torch.equal(kept["sigma"], fair.sigma)
    with pytest.raises(ValueError, match="5 sigmas, this schema has 11"):
        FairReweighter((5, 2, 4), FairConfig()).load_state_dict(kept)


def test_wrong_settings_raise():
    with pytest.raises(ValueError, match="unknown weighting 'softmax'"):
        FairReweighter(SIZES, FairConfig(weighting="softmax"))
    with pytest.raises(ValueError, match="at least one step"):
        FairReweighter(SIZES, FairConfig(time_window=0))
