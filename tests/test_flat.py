"""Flat demographic encoder against an independent computation, and the small shared parts of all conditioners."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from compdiff.config import HCNConfig
from compdiff.flat import FlatEncoder
from compdiff.interfaces import DefaultNoise, NoConditioner

SMALL = HCNConfig(d_node=6, aux_hidden=7)
SIZES = (5, 2, 4)


def rows(n=9):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(c, (n,), generator=generator) for c in SIZES], 1)


def make(mode, classifier="deep", **settings):
    torch.manual_seed(1)
    model = FlatEncoder(SIZES, 8, dataclasses.replace(SMALL, **settings), 0, mode, classifier)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def recompute(model, attributes, classifier):
    """Tokens and logits in float64 numpy, evaluation mode."""
    w = {key: value.double().numpy() for key, value in model.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def read(x, name):
        if classifier == "shallow":
            return linear(x, name)
        x = linear(norm(x, f"{name}.norm"), f"{name}.hidden")
        return linear(x / (1 + np.exp(-x)), f"{name}.out")

    e = [w[f"embed.{k}.weight"][attributes[:, k].numpy()] for k in range(3)]
    if model.n_tokens == 1:
        x = norm(linear(np.hstack(e), "project.0.0"), "project.0.1")
        tokens = [linear(0.5 * x * (1 + erf(x / np.sqrt(2))), "project.0.3")]
    else:
        tokens = [linear(e[k], f"project.{k}") for k in range(3)]
    logits = [read(tokens[k % len(tokens)], f"classify.{k}") for k in range(3)]
    return np.stack(tokens, 1), logits


@pytest.mark.parametrize("classifier", ["deep", "shallow"])
@pytest.mark.parametrize("mode, n_tokens", [("single", 1), ("separate", 3)])
def test_tokens_logits_and_loss(mode, n_tokens, classifier):
    model, attributes = make(mode, classifier, aux_weight=0.7).eval(), rows()
    output = model(attributes)
    tokens, logits = recompute(model, attributes, classifier)
    assert model.n_tokens == n_tokens and output.tokens.shape == (9, n_tokens, 8)
    np.testing.assert_allclose(output.tokens.detach().numpy(), tokens, rtol=1e-4, atol=1e-5)
    loss = np.zeros(9)
    for k, (ours, expected) in enumerate(zip(output.logits, logits, strict=True)):
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        p = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
        loss -= np.log(p[range(9), attributes[:, k].numpy()]) / 3
    losses = model.penalties(output, attributes, 0.0)
    assert list(losses) == ["aux"]
    np.testing.assert_allclose(losses["aux"].detach().numpy(), 0.7 * loss, rtol=1e-4)


@pytest.mark.parametrize("mode", ["single", "separate"])
def test_initialisation(mode):
    torch.manual_seed(0)
    model = FlatEncoder((40, 50), 64, HCNConfig(d_node=64), mode=mode)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.06)
        if isinstance(module, nn.Linear):
            assert not module.bias.any()


@pytest.mark.parametrize("mode", ["single", "separate"])
def test_dropout_is_of_the_classifiers_only_and_from_the_given_noise(mode):
    model, attributes = make(mode), rows()
    state = torch.get_rng_state()
    noise = DefaultNoise(9, attributes.device)
    first, second = model(attributes, noise), model(attributes, noise)
    assert torch.equal(first.tokens, second.tokens) and not torch.equal(first.logits[0], second.logits[0])
    torch.set_rng_state(state)
    assert torch.equal(model(attributes).logits[0], first.logits[0])  # no noise given: torch's default generator
    model.eval()
    assert torch.equal(model(attributes).logits[0], model(attributes).logits[0])


@pytest.mark.parametrize("mode", ["single", "separate"])
def test_auxiliary_loss_reaches_projections_and_embeddings(mode):
    model, attributes = make(mode), rows(40)
    model.penalties(model(attributes), attributes, 0.0)["aux"].mean().backward()
    for parameter in [*model.embed.parameters(), *model.project.parameters()]:
        assert parameter.grad.abs().sum() > 0


def test_without_auxiliary_loss_there_are_no_classifiers():
    model, attributes = make("single", aux_weight=0.0), rows()
    assert model.penalties(model(attributes), attributes, 0.0) == {} and not list(model.classify.parameters())


def test_guidance_gets_as_many_zero_tokens_as_tokens():
    for mode in ("single", "separate"):
        model = make(mode)
        null = model.null_tokens(9)
        assert null.shape == model(rows()).tokens.shape and not null.any()


def test_no_conditioner_adds_nothing():
    none = NoConditioner(8)
    output = none(rows())
    assert output.tokens.shape == none.null_tokens(9).shape == (9, 0, 8)
    assert none.penalties(output, rows(), 0.5) == {} and not list(none.parameters())


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="unknown mode 'both'"):
        FlatEncoder(SIZES, 8, SMALL, mode="both")
    with pytest.raises(ValueError, match="unknown classifier 'wide'"):
        FlatEncoder(SIZES, 8, SMALL, classifier="wide")
    with pytest.raises(ValueError, match=r"must be \[B, 3\]"):
        make("single")(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(IndexError):
        make("single")(torch.tensor([[0, 2, 0]]))
