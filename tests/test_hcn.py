"""HCN against independent computations: numpy for the forward pass, hand numbers for the losses, and a second
implementation with the authors' parameter names for their checkpoints."""

import dataclasses
import json
import math
import os
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compdiff.auxiliary import AGE_LOSSES
from compdiff.config import HCNConfig
from compdiff.hcn import HCN

SMALL = HCNConfig(d_node=6, aux_hidden=7)
SCHEMAS = [(2, 3), (5, 2, 4), (3, 2, 2, 4)]


class RowNoise:
    """Noise of one rank: drawn for the global batch from a generator seeded by the name, rows [start, stop)."""

    def __init__(self, n, start=0, stop=None):
        self.n, self.rows, self.names = n, slice(start, stop), []

    def _draw(self, draw, name, shape):
        self.names.append(name)
        return draw(self.n, *shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))[self.rows]

    def normal(self, name, shape):
        return self._draw(torch.randn, name, shape)

    def uniform(self, name, shape):
        return self._draw(torch.rand, name, shape)


def rows(sizes, n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(c, (n,), generator=generator) for c in sizes], 1)


def make(sizes=(5, 2, 4), d_ctx=8, **settings):
    """HCN in which every parameter counts: N(0, 0.5) instead of the small, or constant, initial values."""
    torch.manual_seed(1)
    model = HCN(sizes, d_ctx, dataclasses.replace(SMALL, **settings), age_index=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    if model.logsigma_head:
        model.logsigma_head.bias.data = torch.tensor([-9.0, -7.0, -3.0, -1.0, 3.0, 5.0])  # so that both clamps act
    return model


# --- the forward pass, recomputed in numpy --------------------------------------------------------------------
def recompute(model, attributes, noise):
    """Token, h, mu, logsigma and logits in float64 from the state dict; `noise` None = evaluation."""
    w = {key: value.double().numpy() for key, value in model.state_dict().items()}
    p, a = model.config.dropout, attributes.numpy()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x, name, draw):
        x = linear(norm(x, f"{name}.norm"), f"{name}.hidden")
        x = x / (1 + np.exp(-x))
        if noise is not None:
            x = np.where(noise.uniform(draw, (x.shape[1],)).numpy() < p, 0, x / (1 - p))
        return linear(x, f"{name}.out")

    k = a.shape[1]
    e = [w[f"embed.{i}.weight"][a[:, i]] for i in range(k)]
    pairs = []
    for i in range(k):
        for j in range(i + 1, k):
            pairs.append(mlp(np.hstack([e[i], e[j]]), f"compose_pair.{len(pairs)}", f"hcn.pair.{i}.{j}"))
    h = pairs[0] if k == 2 else mlp(np.hstack(pairs), "compose_all", "hcn.all")
    mu, logsigma = linear(h, "mu_head"), np.clip(linear(h, "logsigma_head"), -5, 1)
    z = mu if noise is None else mu + np.exp(logsigma) * noise.normal("hcn.z", (mu.shape[1],)).numpy()
    token = linear(norm(z, "project.0"), "project.1")
    return token, h, mu, logsigma, [mlp(token, f"classify.{i}", f"hcn.classify.{i}") for i in range(k)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SCHEMAS)
def test_forward_is_the_papers_formula(sizes, training):
    model, attributes = make(sizes).train(training), rows(sizes)
    output = model(attributes, RowNoise(9))
    token, h, mu, logsigma, logits = recompute(model, attributes, RowNoise(9) if training else None)
    assert output.tokens.shape == (9, 1, 8) and output.nodes.shape == (9, len(sizes), 6)
    assert output.pairs.shape == (9, math.comb(len(sizes), 2), 6)
    assert (logsigma == -5).any() and (logsigma == 1).any() and (abs(logsigma) < 1).any()  # both clamps and neither
    for ours, expected in zip((output.tokens[:, 0], output.h, output.mu, output.logsigma), (token, h, mu, logsigma)):
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(output.logits, logits, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_without_uncertainty_the_token_comes_from_h_and_nothing_is_sampled():
    model, attributes = make(uncertainty=False, dropout=0.0), rows((5, 2, 4))
    output = model(attributes, RowNoise(9))
    assert output.mu is None and output.logsigma is None and torch.equal(output.z, output.h)
    assert torch.equal(output.tokens, model.eval()(attributes).tokens)
    assert set(model.penalties(output, attributes, 1.0)) == {"consistency", "aux"}
    assert not any("mu_head" in key or "sigma" in key for key in model.state_dict())


def test_initialisation():
    torch.manual_seed(0)
    model = HCN((50, 40), 64, HCNConfig(), None)
    parts = {model.embed[0]: 0.02, model.embed[1]: 0.02, model.mu_head: 0.01, model.logsigma_head: 0.01}
    for part, std in parts.items():
        assert part.weight.std().item() == pytest.approx(std, rel=0.05) and abs(part.weight.mean().item()) < std / 20
    assert (model.mu_head.bias == 0).all() and (model.logsigma_head.bias == -1).all()


# --- randomness -------------------------------------------------------------------------------------------------
def test_evaluation_is_deterministic_and_training_is_not():
    model, attributes = make(), rows((5, 2, 4))
    torch.manual_seed(3)
    first, second = model(attributes).tokens, model(attributes).tokens
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(attributes).tokens, first)
    state = torch.get_rng_state()
    model(attributes, RowNoise(9))
    model.eval()
    assert torch.equal(model(attributes).tokens, model(attributes, RowNoise(9)).tokens)
    assert torch.equal(torch.get_rng_state(), state), "global random state was used although noise was given"


def test_two_ranks_make_the_same_batch_as_one():
    model, attributes = make(), rows((5, 2, 4))
    noise = RowNoise(9)
    whole = model(attributes, noise)
    parts = [model(attributes[s], RowNoise(9, s.start, s.stop)) for s in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(torch.cat([p.tokens for p in parts]), whole.tokens)
    losses = [model.penalties(part, attributes[s], 0.3) for part, s in zip(parts, (slice(0, 4), slice(4, 9)))]
    for name, loss in model.penalties(whole, attributes, 0.3).items():
        assert loss.shape == (9,)
        torch.testing.assert_close(torch.cat([part[name] for part in losses]), loss)
    assert len(set(noise.names)) == len(noise.names) == 3 + 1 + 1 + 3, "each draw needs its own name"


# --- losses -----------------------------------------------------------------------------------------------------
def test_kl_is_the_closed_form_of_torch_distributions():
    model, attributes = make(aux_weight=0.0, consistency_weight=0.0), rows((5, 2, 4))
    output = model(attributes, RowNoise(9))
    q = torch.distributions.Normal(output.mu, output.logsigma.exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    losses = model.penalties(output, attributes, progress=1.0)
    assert list(losses) == ["kl"]
    torch.testing.assert_close(losses["kl"], 0.005 * expected)


def test_kl_weight_rises_linearly_then_stays():
    model, attributes = make(kl_ramp=0.2), rows((5, 2, 4))
    output = model(attributes, RowNoise(9))
    kl = {p: model.penalties(output, attributes, p)["kl"] for p in (0.0, 0.05, 0.1, 0.2, 0.7, 1.0)}
    full = kl[1.0]
    for progress, share in ((0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (0.7, 1.0)):
        torch.testing.assert_close(kl[progress], share * full)
    assert make(kl_ramp=0.0).beta(0.0) == 0.005
    assert HCN((2, 2), 8, SMALL).beta(2_500 / 30_000) == pytest.approx(0.0025)  # half of the published 5,000 steps


def test_consistency_is_zero_where_h_is_the_sum_of_the_nodes():
    model, attributes = make(), rows((5, 2, 4))
    output = model(attributes, RowNoise(9))
    total = output.nodes.sum(1)
    for h, expected in ((total, 0.0), (3 * total, 0.0), (-total, 0.2)):  # 0.1 (1 - cos), cos = 1, 1, -1
        loss = model.penalties(dataclasses.replace(output, h=h), attributes, 1.0)["consistency"]
        torch.testing.assert_close(loss, torch.full((9,), expected))
    n, t = output.h[0].detach().numpy(), total[0].detach().numpy()
    cosine = (n * t).sum() / math.sqrt((n * n).sum() * (t * t).sum())
    loss = model.penalties(output, attributes, 1.0)["consistency"]
    assert loss[0].item() == pytest.approx(0.1 * (1 - cosine), rel=1e-4)


def test_auxiliary_loss_is_the_weighted_mean_of_the_cross_entropies():
    attributes = rows((5, 2, 4))
    plain, weighted = make(aux_weight=0.7), HCN((5, 2, 4), 8, SMALL, 0, attribute_weights=(1, 2, 5))
    output = plain(attributes, RowNoise(9))
    each = [-logits.log_softmax(1)[range(9), attributes[:, k]] for k, logits in enumerate(output.logits)]
    torch.testing.assert_close(plain.penalties(output, attributes, 1.0)["aux"], 0.7 * (each[0] + each[1] + each[2]) / 3)
    torch.testing.assert_close(
        weighted.penalties(output, attributes, 1.0)["aux"], (each[0] + 2 * each[1] + 5 * each[2]) / 8
    )


def test_auxiliary_loss_reaches_projection_and_embeddings():
    model = make()
    attributes = torch.tensor([[0, 0, 0], [1, 0, 2]])
    output = model(attributes, RowNoise(2))
    model.penalties(output, attributes, 1.0)["aux"].sum().backward()
    pair = model.compose_pair[2]
    for module in (*model.project, model.mu_head, model.compose_all.out, pair.hidden):
        assert module.weight.grad.abs().sum() > 0
    for k, embedding in enumerate(model.embed):
        reached = embedding.weight.grad.abs().sum(1) > 0
        assert reached.nonzero().flatten().tolist() == sorted(set(attributes[:, k].tolist()))


def test_a_loss_of_weight_zero_is_absent_and_leaves_no_idle_parameters():
    model, attributes = make(aux_weight=0.0, consistency_weight=0.0, kl_weight=0.0), rows((5, 2, 4))
    assert model.penalties(model(attributes), attributes, 1.0) == {}
    assert not any(name.startswith("classify") for name, _ in model.named_parameters())


@pytest.mark.parametrize("sizes", SCHEMAS)
def test_every_parameter_gets_a_gradient(sizes):
    model, attributes = make(sizes), rows(sizes, n=40)
    output = model(attributes, RowNoise(40))
    (output.tokens.mean() + sum(loss.mean() for loss in model.penalties(output, attributes, 0.0).values())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


HALF, QUARTER = math.log(2), math.log(4)  # -log p of the logits below: p = 1/2, 1/4, 1/4
SOFT_0 = [1, math.exp(-0.5 / 0.75**2), math.exp(-2 / 0.75**2)]  # Gaussian of 0.75 bins around bin 0
SOFT_1 = [SOFT_0[1], 1, SOFT_0[1]]
HAND = {
    "ce": [HALF, QUARTER],
    "soft_ce": [
        (SOFT_0[0] * HALF + (SOFT_0[1] + SOFT_0[2]) * QUARTER) / sum(SOFT_0),
        (SOFT_1[0] * HALF + (SOFT_1[1] + SOFT_1[2]) * QUARTER) / sum(SOFT_1),
    ],
    # CDF 1/2, 3/4, 1 against 1, 1, 1 and 0, 1, 1
    "ordinal": [HALF + 0.5 * (0.25 + 0.0625), QUARTER + 0.5 * (0.25 + 0.0625)],
    "mse": [0.75**2, 0.25**2],  # expected bin 1/4 + 2/4
    "focal": [
        (SOFT_0[0] * 0.25 * HALF + (SOFT_0[1] + SOFT_0[2]) * 0.5625 * QUARTER) / sum(SOFT_0),
        (SOFT_1[0] * 0.25 * HALF + (SOFT_1[1] + SOFT_1[2]) * 0.5625 * QUARTER) / sum(SOFT_1),
    ],
}


@pytest.mark.parametrize("name", HAND)
def test_age_losses_against_hand_numbers(name):
    assert set(HAND) == set(AGE_LOSSES)
    logits = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]).log()
    torch.testing.assert_close(AGE_LOSSES[name](logits, torch.tensor([0, 1])), torch.tensor(HAND[name]))


def test_the_age_loss_is_for_age_only():
    attributes = rows((5, 5))
    output = (ce := HCN((5, 5), 8, SMALL, 0))(attributes, RowNoise(9))
    config = dataclasses.replace(SMALL, age_loss="mse")
    aux = {index: HCN((5, 5), 8, config, index).penalties(output, attributes, 1.0)["aux"] for index in (None, 0, 1)}
    torch.testing.assert_close(aux[None], ce.penalties(output, attributes, 1.0)["aux"])
    for index in (0, 1):
        logits, other = output.logits[index], output.logits[1 - index]
        mse = ((logits.softmax(1) * torch.arange(5)).sum(1) - attributes[:, index]) ** 2
        cross_entropy = -other.log_softmax(1)[range(9), attributes[:, 1 - index]]
        torch.testing.assert_close(aux[index], (mse + cross_entropy) / 2)


# --- the rest of the interface ----------------------------------------------------------------------------------
def test_null_tokens_are_zeros_in_the_same_place():
    model = make()
    assert model.null_tokens(3).shape == model(rows((5, 2, 4), 3)).tokens.shape and not model.null_tokens(3).any()


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="at least two"):
        HCN((5,), 8, SMALL)
    with pytest.raises(ValueError, match="unknown age_loss 'corn'"):
        HCN((5, 2), 8, dataclasses.replace(SMALL, age_loss="corn"))
    with pytest.raises(ValueError, match="age_index 2"):
        HCN((5, 2), 8, SMALL, age_index=2)
    with pytest.raises(ValueError, match="2 attribute weights for 3"):
        HCN((5, 2, 4), 8, SMALL, attribute_weights=(1, 1))
    with pytest.raises(ValueError, match=r"must be \[B, 3\]"):
        make()(torch.zeros(4, 2, dtype=torch.long))
    for bad in ([[5, 0, 0]], [[0, -1, 0]]):  # unknown categories never become class 0
        with pytest.raises(IndexError):
            make()(torch.tensor(bad))


# --- the authors' checkpoints: a second implementation with their names -------------------------------------------
class TheirMLP(nn.Module):
    def __init__(self, d_in, d):
        super().__init__()
        layers = nn.LayerNorm(d_in), nn.Linear(d_in, 2 * d), nn.SiLU(), nn.Dropout(0.1), nn.Linear(2 * d, d)
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


class TheirHCN(nn.Module):
    """Straightforward, for age, sex, race only, written from the format's description."""

    def __init__(self, c):
        super().__init__()
        d, self.c = c["d_node"], c
        for name, size in (("age", "num_age_bins"), ("sex", "num_sex"), ("race", "num_race")):
            if name == "age" and not c["encode_age"]:
                continue
            setattr(self, f"emb_{name}", nn.Embedding(c[size], d))
            if c["use_aux_loss"]:
                first, second = nn.Linear(c["d_ctx"], c["aux_hidden_dim"]), nn.Linear(c["aux_hidden_dim"], c[size])
                layers = nn.LayerNorm(c["d_ctx"]), first, nn.SiLU(), nn.Dropout(0.1), second
                setattr(self, f"{name}_classifier", nn.Sequential(*layers))
        self.compose_sex_race = TheirMLP(2 * d, d)
        if c["encode_age"]:
            self.compose_age_sex, self.compose_age_race = TheirMLP(2 * d, d), TheirMLP(2 * d, d)
            self.compose_all = TheirMLP(3 * d, d)
        if c["use_uncertainty"]:
            self.mu_head, self.logsigma_head = nn.Linear(d, d), nn.Linear(d, d)
        self.proj_ctx = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, c["d_ctx"]))

    def forward(self, age, sex, race):
        sex, race = self.emb_sex(sex), self.emb_race(race)
        h = self.compose_sex_race(torch.cat([sex, race], 1))
        if self.c["encode_age"]:
            age = self.emb_age(age)
            age_sex = self.compose_age_sex(torch.cat([age, sex], 1))
            age_race = self.compose_age_race(torch.cat([age, race], 1))
            h = self.compose_all(torch.cat([age_sex, age_race, h], 1))
        return self.proj_ctx(self.mu_head(h) if self.c["use_uncertainty"] else h)


def their_checkpoint(folder, weights_file="pytorch_model.bin", **settings):
    config = dict(num_age_bins=5, num_sex=2, num_race=4, d_node=6, d_ctx=8, dropout=0.1, use_uncertainty=True,
                  use_aux_loss=True, aux_hidden_dim=7, encode_age=True) | settings  # fmt: skip
    torch.manual_seed(2)
    model = TheirHCN(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if weights_file.endswith("safetensors") else torch.save
    save(model.state_dict(), folder / weights_file)
    return model


@pytest.mark.parametrize("weights_file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"encode_age": False}, {"use_uncertainty": False}, {"use_aux_loss": False}, {"num_race": 3}],
    ids=str,
)
def test_reference_checkpoint_gives_the_same_outputs(tmp_path, settings, weights_file):
    theirs = their_checkpoint(tmp_path, weights_file, **settings)
    ours = HCN.load_reference(tmp_path)
    attributes = rows((5, 2, settings.get("num_race", 4)), n=30)
    encoded = attributes if settings.get("encode_age", True) else attributes[:, 1:]
    output = ours(encoded)
    torch.testing.assert_close(output.tokens[:, 0], theirs(*attributes.T))
    assert not ours.training and ours.age_index == (0 if encoded.shape[1] == 3 else None)
    names = ("age", "sex", "race")[-encoded.shape[1] :]
    for logits, name in zip(output.logits, names):
        torch.testing.assert_close(logits, getattr(theirs, f"{name}_classifier")(output.tokens[:, 0]))
    assert len(output.logits) == (0 if settings.get("use_aux_loss") is False else len(names))


def test_reference_checkpoint_with_other_keys_is_refused_by_name(tmp_path):
    state = their_checkpoint(tmp_path).state_dict()
    file = tmp_path / "pytorch_model.bin"
    moved = {key.replace("compose_age_sex.net.4.bias", "film.bias"): value for key, value in state.items()}
    torch.save(moved, file)
    expected = r"pytorch_model\.bin: missing compose_age_sex\.net\.4\.bias; unexpected film\.bias"
    with pytest.raises(ValueError, match=expected):
        HCN.load_reference(tmp_path)
    torch.save(state | {"emb_race.weight": torch.zeros(3, 6)}, file)
    with pytest.raises(ValueError, match=r"emb_race\.weight has shape \[3, 6\], expected \[4, 6\]"):
        HCN.load_reference(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_film_output": True}))
    with pytest.raises(ValueError, match=r"config\.json.*use_film_output"):
        HCN.load_reference(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reference_checkpoint_is_never_executed(tmp_path):
    their_checkpoint(tmp_path)
    torch.save({"emb_age.weight": Bomb(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="plain state dict"):
        HCN.load_reference(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("weights_file", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_or_absent_reference_files_are_named(tmp_path, weights_file):
    with pytest.raises(FileNotFoundError, match="config.json"):
        HCN.load_reference(tmp_path)
    their_checkpoint(tmp_path, weights_file)
    file = tmp_path / weights_file
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"rubbish"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=weights_file):
            HCN.load_reference(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights file"):
        HCN.load_reference(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="config.json"):
        HCN.load_reference(tmp_path)
