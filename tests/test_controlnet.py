"""ControlNet: the base at step 0, a locked base stays as it was, zero convolutions by hand, tokens, both layouts."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from compdiff import base, cardiac, controlnet, diffusion, untrained
from compdiff.config import HCNConfig, TrainConfig
from compdiff.hcn import HCN
from compdiff.interfaces import NoConditioner

SIZES = (5, 2, 3)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """Grey VAE that divides by 4, three levels, 32 pixels."""
    return untrained.build_tiny(base.corpus(), tmp_path_factory.mktemp("tokenizer"), size=32, width=16)


@pytest.fixture(scope="module")
def sd_base(tiny_base):
    """SD-2.1-base's layout at a fraction of its width: RGB VAE that divides by 8, four levels, heads by level."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        cross_attention_dim=tiny_base.d_ctx,
        norm_num_groups=4,
        attention_head_dim=(1, 2, 4, 4),
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    return diffusion.Diffusion(tiny_base.tokenizer, tiny_base.text_encoder, vae, unet.eval(), tiny_base.scheduler)


@pytest.fixture(params=["tiny", "sd"])
def one(request):
    """A base and the side of its pictures."""
    return request.getfixturevalue(f"{request.param}_base"), {"tiny": 32, "sd": 64}[request.param]


def inputs(model, side, seed=0):
    """Noisy latents, timesteps, token ids, attributes and a condition picture for two samples."""
    g = torch.Generator().manual_seed(seed)
    down = 2 ** (len(model.vae.config.block_out_channels) - 1)
    z = torch.randn(2, 4, side // down, side // down, generator=g)
    ids = model.tokenize(["Male, heart failure", "healthy"])
    return (
        z,
        torch.tensor([3, 900]),
        ids,
        torch.tensor([[1, 0, 2], [4, 1, 0]]),
        torch.rand(2, 3, side, side, generator=g),
    )


def conditioner(kind, model):
    torch.manual_seed(1)
    return HCN(SIZES, model.d_ctx, HCNConfig(d_node=8, aux_hidden=8)) if kind == "hcn" else NoConditioner(model.d_ctx)


def copied(model):
    return {
        n: p.detach().clone()
        for part in (model.unet, model.text_encoder, model.vae)
        for n, p in part.state_dict().items()
    }


def learn(model, config, given, steps=3):
    """A few plain optimiser steps; returns what was trained."""
    params = diffusion.trainable(model, config)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
    z, t, ids, attributes, picture = given
    for step in range(steps):
        torch.manual_seed(step)
        prediction, _ = model(z, t, ids, attributes, picture=picture)
        (prediction - torch.randn_like(z)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return params


# --- step 0 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["none", "hcn"])
def test_at_step_0_it_is_the_base_exactly(one, kind):
    model, side = one
    tokens = conditioner(kind, model)
    plain, control = diffusion.Denoiser(model, tokens).eval(), controlnet.ControlDenoiser(model, tokens).eval()
    z, t, ids, attributes, picture = inputs(model, side)
    with torch.no_grad():
        expected, _ = plain(z, t, ids, attributes)
        found, condition = control(z, t, ids, attributes, picture=picture)
        assert torch.equal(found, expected) and expected.std() > 0.01
        assert condition.tokens.shape == (2, int(kind == "hcn"), model.d_ctx)
    again = controlnet.ControlDenoiser(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(control.control.parameters(), again.control.parameters(), strict=True))


def test_the_branch_starts_as_the_bases_encoder(tiny_base):
    control = controlnet.ControlDenoiser(tiny_base, NoConditioner(tiny_base.d_ctx)).control
    for name in ("conv_in", "down_blocks", "mid_block", "time_embedding"):
        ours, theirs = (dict(getattr(m, name).named_parameters()) for m in (control, tiny_base.unet))
        assert all(torch.equal(p, theirs[n]) and p.data_ptr() != theirs[n].data_ptr() for n, p in ours.items()), name


# --- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["none", "hcn"])
def test_a_locked_base_is_bit_identical_and_the_mask_counts(one, kind):
    model, side = one
    before = copied(model)
    denoiser = controlnet.ControlDenoiser(model, conditioner(kind, model))
    given = inputs(model, side)
    start = {n: p.detach().clone() for n, p in denoiser.named_parameters()}
    params = learn(denoiser, TrainConfig(trained=()), given)
    assert {n.split(".")[0] for n in params} == {"control"} | ({"conditioner"} if kind == "hcn" else set())
    assert all(torch.equal(p, before[n]) for n, p in copied(model).items())
    moved = {n for n, p in params.items() if not torch.equal(p, start[n])}
    assert any(n.startswith("control.controlnet_cond_embedding") for n in moved), (
        "the picture's encoder learns once the zeros have moved"
    )
    assert kind == "none" or any(n.startswith("conditioner.proj") or n.startswith("conditioner.emb") for n in moved)
    z, t, ids, attributes, picture = given
    denoiser.eval()
    with torch.no_grad():
        a, b = (denoiser(z, t, ids, attributes, picture=p)[0] for p in (picture, 1 - picture))
    assert (a - b).abs().max() > 1e-4


def test_an_unlocked_base_learns_too(tiny_base, tmp_path):
    tiny_base.save(tmp_path / "base")
    model = diffusion.load(str(tmp_path / "base"))
    before = copied(model)
    params = learn(
        controlnet.ControlDenoiser(model, NoConditioner(model.d_ctx)),
        TrainConfig(trained=("unet",)),
        inputs(model, 32),
        steps=1,
    )
    assert {n.split(".")[0] for n in params} == {"control", "unet"}
    assert any(not torch.equal(p, before[n]) for n, p in model.unet.state_dict().items())


def test_zero_convolutions_by_hand(tiny_base):
    """Every output of the branch is W x + b at each pixel; with W = b = 0 it is 0 but dW = sum g x is not."""
    denoiser = controlnet.ControlDenoiser(tiny_base, NoConditioner(tiny_base.d_ctx))
    control = denoiser.control
    z, t, ids, attributes, picture = inputs(tiny_base, 32)
    zeros = [*control.controlnet_down_blocks, control.controlnet_mid_block]
    assert all(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and not m.weight.any() and not m.bias.any() for m in zeros
    )
    seen = {}
    for n, module in enumerate(zeros):
        module.register_forward_hook(lambda _m, given, out, n=n: seen.update({n: (given[0], out)}))
    context, _ = denoiser.context(ids, attributes)
    for filled in (False, True):
        if filled:
            for module in zeros:
                nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        down, mid = control(z, t, context, picture, return_dict=False)
        for n, out in enumerate([*down, mid]):
            x = seen[n][0]
            by_hand = torch.einsum("oi,bihw->bohw", zeros[n].weight[:, :, 0, 0], x) + zeros[n].bias[None, :, None, None]
            assert torch.allclose(out, by_hand, atol=1e-4, rtol=1e-4) and bool(out.any()) == filled
        if not filled:
            g = torch.randn(mid.shape, generator=torch.Generator().manual_seed(0))
            (mid * g).sum().backward()
            expected = torch.einsum("bohw,bihw->oi", g, seen[len(zeros) - 1][0].detach())
            assert torch.allclose(zeros[-1].weight.grad[:, :, 0, 0], expected, atol=1e-3, rtol=1e-3) and expected.any()


def test_the_token_reaches_the_branch(tiny_base):
    """keep = 0 gives the branch the same context as an all-zero token: guidance has its unconditional branch."""
    denoiser = controlnet.ControlDenoiser(tiny_base, conditioner("hcn", tiny_base))
    given = inputs(tiny_base, 32)
    learn(denoiser, TrainConfig(trained=()), given, steps=1)
    z, t, ids, attributes, picture = given
    denoiser.eval()
    with torch.no_grad():
        dropped, _ = denoiser(z, t, ids, attributes, keep=torch.zeros(2), picture=picture)
        text = tiny_base.text_encoder(ids)[0]
        by_hand = denoiser.predict(z, t, torch.cat([text, denoiser.conditioner.null_tokens(2)], 1), picture)
        kept, _ = denoiser(z, t, ids, attributes, picture=picture)
    assert torch.equal(dropped, by_hand) and not torch.equal(kept, dropped)


# --- pictures ---------------------------------------------------------------------------------------------------------
def test_condition_pictures_by_hand():
    masks = np.zeros((1, 2, 2, 3), np.uint8)
    masks[0, 0, 1] = (1, 2, 3)
    picture = controlnet.to_picture(masks)
    assert (
        picture.shape == (1, 3, 2, 2)
        and picture[0, :, 0, 1].tolist() == pytest.approx([1 / 3, 2 / 3, 1])
        and picture.sum() == 2
    )
    assert controlnet.to_picture(masks, controlnet.CAVITY_ONLY)[0, :, 0, 1].tolist() == pytest.approx([1 / 3, 0, 0])
    for wrong in (masks + 1, masks[..., 0]):
        with pytest.raises(ValueError, match="masks must be"):
            controlnet.to_picture(wrong)


def test_a_widened_vae_treats_grey_as_before(tiny_base):
    wide = controlnet.stacked(tiny_base)
    grey = cardiac.phantom_studies(2, "test", seed=0).images("slice", 32)
    x = diffusion.to_model(grey, 1)
    with torch.no_grad():
        one = tiny_base.vae.encode(x).latent_dist.parameters
        three = wide.vae.encode(x.expand(-1, 3, -1, -1)).latent_dist.parameters
    assert torch.allclose(one, three, atol=1e-5) and one.std() > 0
    z = tiny_base.latents(one)
    found = wide.decode(z)
    assert found.shape == (2, 32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - tiny_base.decode(z)[..., None]).max() <= 1
    assert wide.unet is tiny_base.unet and tiny_base.vae.config.in_channels == 1


def test_an_rgb_vae_stays_as_it_is(sd_base):
    assert controlnet.stacked(sd_base).vae is sd_base.vae
