"""The cavity finder: Dice counted by hand, ejection fractions, a tiny network that learns phantoms in seconds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compdiff import cardiac, heart, segment


def test_dice_by_hand():
    a, b = np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    a[0, :2], b[0, 1:3] = 1, 1  # 8 and 8 pixels, 4 in common
    a[1, 0, 0], b[1, 3, 3] = 1, 1  # nothing in common
    a[2], b[2] = 2, 3  # myocardium and right ventricle do not count: both empty
    assert segment.dice(a, b).tolist() == [0.5, 0.0, 1.0]
    with pytest.raises(ValueError, match="different shapes"):
        segment.dice(a, b[:2])


@given(arrays(np.uint8, (2, 5, 5), elements=st.integers(0, 3)), arrays(np.uint8, (2, 5, 5), elements=st.integers(0, 3)))
def test_dice_is_the_dice_of_sets(a, b):
    for value, x, y in zip(segment.dice(a, b), a, b, strict=True):
        p, q = ({tuple(at) for at in np.argwhere(m == 1)} for m in (x, y))
        assert value == (pytest.approx(2 * len(p & q) / (len(p) + len(q))) if p or q else 1.0)
    assert np.array_equal(segment.dice(a, b), segment.dice(b, a)) and (segment.dice(a, a) == 1).all()


def test_ejection_fractions():
    hearts = [
        heart.draw(f"e{n}", {"age": "60-80", "sex": "Female", "bmi": "obese"}, {"heart failure": n % 2}, seed=0)
        for n in range(4)
    ]
    ed, es = (np.stack(m) for m in zip(*(heart.pair(h)[1] for h in hearts), strict=True))
    found = segment.ejection_fractions(ed, es)
    assert found == pytest.approx([heart.implied_ejection_fraction(a, b) for a, b in zip(ed, es, strict=True)])
    assert np.abs(found - [h.truth["ejection_fraction"] for h in hearts]).max() < 0.05
    ed[2] = 0
    with pytest.raises(ValueError, match=r"no cavity at ED in row 2 \(1 in all\)"):
        segment.ejection_fractions(ed, es)


@pytest.fixture(scope="module")
def trained():
    """A network of width 8 after 200 steps on 48 phantoms of 32 pixels, ED and ES; its losses."""
    train = cardiac.phantom_studies(24, "train", seed=0)
    images, masks = (np.concatenate([read("slice", 32), read("frame", 32)]) for read in (train.images, train.masks))
    losses = []
    for _, loss, net in segment.fit(images, masks, steps=200, width=8, lr=1e-2):
        losses.append(loss)
    return net, losses


def test_a_tiny_network_finds_the_cavity(trained):
    net, losses = trained
    test = cardiac.phantom_studies(12, "test", seed=0, prevalence=0.5)
    found = {name: segment.predict(net, test.images(name, 32)) for name in ("slice", "frame")}
    scores = {name: segment.dice(found[name], test.masks(name, 32)).mean() for name in found}
    print(scores, losses[0], losses[-1])
    assert min(scores.values()) > 0.8 and losses[-1] < losses[0] / 2
    implied = segment.ejection_fractions(found["slice"], found["frame"])
    assert np.corrcoef(implied, test.table["true_ejection_fraction"])[0, 1] > 0.8
    other = segment.dice(np.roll(found["slice"], 1, axis=0), test.masks("slice", 32)).mean()
    assert other < scores["slice"], "another patient's cavity fits worse"


def test_the_same_seed_trains_the_same_network(trained):
    train = cardiac.phantom_studies(6, "train", seed=0)
    before = torch.random.get_rng_state()
    nets = [
        list(segment.fit(train.images("slice", 32), train.masks("slice", 32), steps=2, batch=4, width=8, seed=s))[-1][2]
        for s in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = ([p.detach() for p in net.parameters()] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_without_a_cavity_nothing_can_be_learnt():
    with pytest.raises(ValueError, match="some mask must show a cavity"):
        next(segment.fit(np.zeros((2, 32, 32), np.uint8), np.zeros((2, 32, 32), np.uint8)))
