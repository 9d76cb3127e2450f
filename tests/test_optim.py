"""The optimizer by its formula, its state stored and given back, and what is missing said in words."""

import copy
import math
import shutil
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from compdiff import diffusion, optim, train
from compdiff.config import TrainConfig

C = TrainConfig(lr=1e-2, head_lr=3e-2)


def parameters(n=5000):
    """Large enough for 8-bit moments; a conditioner's and another one."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(n, generator=generator)) for name in ("unet.a", "conditioner.b")}


def steps(optimizer, params, numbers):
    """Steps on the loss sum(p^2 cos(step)), whose gradient is known."""
    for step in numbers:
        for p in params.values():
            p.grad = 2 * p.detach() * math.cos(step)
        optimizer.step()


def test_adamw_is_its_formula_with_a_rate_of_its_own_for_the_conditioner():
    params = parameters(7)
    start = {n: p.detach().double() for n, p in params.items()}
    optimizer = optim.build(params, C)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    steps(optimizer, params, range(4))
    for name, rate in (("unet.a", 1e-2), ("conditioner.b", 3e-2)):
        p, m, v = start[name], 0.0, 0.0
        for step in range(4):
            g = 2 * p * math.cos(step)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            unbiased = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p = p - rate * 1e-2 * p - rate * unbiased
        assert torch.allclose(params[name].detach().double(), p, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_state_from_a_file_goes_on_in_the_same_bits(kind, tmp_path):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = replace(C, optimizer=kind)
    whole, halves = parameters(), parameters()
    steps(optim.build(whole, config), whole, range(5))
    first = optim.build(halves, config)
    steps(first, halves, range(3))
    save_file(optim.tensors(first), tmp_path / "state.safetensors")
    second = optim.build(halves, config)
    optim.restore(second, load_file(tmp_path / "state.safetensors"))
    steps(second, halves, range(3, 5))
    assert all(torch.equal(whole[n], halves[n]) for n in whole)
    fresh = parameters()
    steps(optim.build(fresh, config), fresh, range(3))
    steps(optim.build(fresh, config), fresh, range(3, 5))
    assert not torch.equal(fresh["unet.a"], whole["unet.a"]), "the state matters"


def test_eight_bit_adam_is_near_adam_and_smaller(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes, found = [], []
    for kind in ("adamw", "adamw8bit"):
        params = parameters()
        optimizer = optim.build(params, replace(C, optimizer=kind))
        steps(optimizer, params, range(3))
        state = optim.tensors(optimizer)
        sizes.append(sum(v.numel() * v.element_size() for n, v in state.items() if "qmap" not in n))
        found.append(params["unet.a"].detach())
    assert sizes[1] < 0.3 * sizes[0]
    assert 0 < (found[0] - found[1]).abs().mean() < 3e-3  # three steps of about 1e-2


def test_what_cannot_be_had_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match="optimizer=adamw8bit needs `pip install bitsandbytes`"):
        optim.build(parameters(), replace(C, optimizer="adamw8bit"))
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; known: adamw, adamw8bit"):
        optim.build(parameters(), replace(C, optimizer="sgd"))


@pytest.mark.parametrize("norm", [0.5, 1.0 - 1e-6, 1.0, 1.0 + 1e-6, 3.0, math.inf, math.nan])
def test_clipping_gives_torchs_bits_and_leaves_small_gradients_untouched(norm):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.zeros(n)) for n in (7, 5000, 1)]  # the last one has no gradient
    for p in ours[:2]:
        p.grad = torch.randn(p.shape, generator=generator)
    whole = torch.cat([p.grad for p in ours[:2]]).norm()
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in ours]
    for p, q in zip(ours[:2], theirs[:2], strict=True):
        p.grad.mul_(norm / whole)
        q.grad = p.grad.clone()
    versions = [p.grad._version for p in ours[:2]]
    found, expected = optim.clip(Accelerator(cpu=True), ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    bits = [torch.cat([p.grad for p in ps[:2]]).view(torch.int32) for ps in (ours, theirs)]
    assert torch.equal(*bits) and torch.equal(*(n.view(torch.int32) for n in (found, expected)))
    if norm == 0.5:
        assert [p.grad._version for p in ours[:2]] == versions, "not written to"


def test_another_memory_layout_trains_alike(tiny_root, tmp_path):
    base = diffusion.load(str(tiny_root / "base"))
    optim.quicken(base.unet, TrainConfig(channels_last=True))
    assert base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    one, other = (
        tiny.fit(tiny_root, "text", tmp_path / str(kind), steps=4, channels_last=kind)["loss"] for kind in (False, True)
    )
    assert other.tolist() == pytest.approx(one.tolist(), rel=1e-3)


def test_only_the_unet_is_compiled_and_names_stay(tiny_root, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, *rest, **more: compiled.append(call) or call)
    base = diffusion.load(str(tiny_root / "base"))
    names = list(base.unet.state_dict())
    optim.quicken(base.unet, TrainConfig())
    assert not compiled
    tiny.fit(tiny_root, "text", tmp_path, steps=1, compile=True)
    assert [call.__self__.__class__.__name__ for call in compiled] == ["UNet2DConditionModel"]
    assert set(load_file(tmp_path / "weights.safetensors")) >= {f"unet.{n}" for n in names}


class Convolutions(torch.nn.Module):
    """A class of our own: torch.compile leaves torch's containers as they are."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 1, 3)

    def forward(self, x):
        return self.two(torch.nn.functional.silu(self.one(x)))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_a_compiled_module_computes_and_learns_as_it_did(monkeypatch, tmp_path):
    """torch.compile itself, on two convolutions: the UNet of a run takes minutes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    plain = Convolutions()
    quick, x = copy.deepcopy(plain), torch.randn(2, 2, 8, 8)
    optim.quicken(quick, TrainConfig(compile=True, channels_last=True))
    out, expected = quick(x), plain(x)
    assert list(tmp_path.rglob("*.so")), "compiled"
    out.square().mean().backward(), expected.square().mean().backward()
    assert torch.allclose(out, expected, atol=1e-5)
    for (name, p), (same, q) in zip(quick.named_parameters(), plain.named_parameters(), strict=True):
        assert name == same and torch.allclose(p.grad, q.grad, atol=1e-5), name
    torch._dynamo.reset()


def test_a_batch_is_the_next_rows_of_the_epochs_permutation():
    for n, batch, step in ((24, 4, 3), (10, 4, 7), (3, 8, 2)):
        expected = []
        for place in range(step * batch, (step + 1) * batch):
            generator = torch.Generator().manual_seed(5 * 1_000_003 + place // n)
            expected.append(torch.randperm(n, generator=generator)[place % n].item())
        assert train.batch_rows(n, batch, step, seed=5).tolist() == expected
