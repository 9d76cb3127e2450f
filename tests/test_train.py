"""The training loop: EMA, schedule, targets, noise and weights by hand; what is trained, in which precision."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from tiny import distance, weights

from compdiff import diffusion, latents, methods, paths, train
from compdiff.config import FairConfig, TrainConfig
from compdiff.fairdiffusion import FairReweighter
from compdiff.interfaces import Condition, NoConditioner, NoReweighter

pytestmark = pytest.mark.usefixtures("one_thread")  # bit-identity is promised with the same number of threads


def test_every_step_trains_in_training_mode_and_all_modules_are_walked_only_after_validation(tiny_root, tmp_path, monkeypatch):
    modes, walks, step_losses, walk = [], [], train.step_losses, torch.nn.Module.train

    def spy(wrapped, model, *rest):
        modes.append({module.training for module in model.modules()})
        return step_losses(wrapped, model, *rest)

    def count(module, mode=True):
        walks.extend([mode] if isinstance(module, diffusion.Denoiser) else [])
        return walk(module, mode)

    monkeypatch.setattr(train, "step_losses", spy)
    monkeypatch.setattr(torch.nn.Module, "train", count)
    tiny.fit(tiny_root, "hcn", tmp_path, steps=8, validate_every=0.5)
    assert modes == 8 * [{True}] and walks == [True, False, True, False]


def test_an_indivisible_batch_raises(tiny_root, tmp_path):
    arguments, parts = tiny.inputs(tiny_root, "text", tiny.config(tiny_root))
    arguments[0] = replace(arguments[0], train=replace(arguments[0].train, microbatch=3))
    with pytest.raises(ValueError, match="batch=4 must be a multiple of 1 processes x microbatch=3"):
        train.run(*arguments, tmp_path, parts.columns)


@pytest.mark.parametrize(("n", "batch"), [(24, 4), (10, 4), (3, 8)])
def test_batches_run_through_whole_epochs(n, batch):
    steps = 3 * n
    rows = torch.cat([train.batch_rows(n, batch, step, seed=5) for step in range(steps)])
    epochs = rows.reshape(-1, n).tolist()
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert not torch.equal(rows, torch.cat([train.batch_rows(n, batch, step, seed=6) for step in range(steps)]))


def test_noise_of_a_slice_is_the_slice_of_the_noise():
    whole = train.StepNoise(1, 2, 8, slice(None))
    for draw in ("normal", "uniform"):
        parts = [getattr(train.StepNoise(1, 2, 8, rows), draw)("x", (3, 2)) for rows in (slice(0, 3), slice(3, 8))]
        drawn = getattr(whole, draw)("x", (3, 2))
        assert torch.equal(drawn, torch.cat(parts))
        others = [(1, 2, "y"), (1, 3, "x"), (2, 2, "x")]
        assert all(not torch.equal(drawn, getattr(train.StepNoise(a, b, 8, slice(None)), draw)(n, (3, 2))) for a, b, n in others)
        quarters = [getattr(whole.part(slice(i, i + 2), "cpu"), draw)("x", (3, 2)) for i in range(0, 8, 2)]
        assert torch.equal(drawn, torch.cat(quarters))
    many = train.StepNoise(0, 0, 20_000, slice(None))
    assert abs(many.normal("x").mean()) < 0.03 and abs(many.normal("x").std() - 1) < 0.03
    assert abs(many.uniform("x").mean() - 0.5) < 0.01 and many.uniform("x").min() >= 0


# --- EMA, schedule -------------------------------------------------------------------------------------------------
def test_ema_is_the_plain_recursion():
    steps, horizon = 60, 0.2  # decay 1 - 1/12
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = train.EMA({"p": p}, steps, horizon), [1.0, -2.0]
    for step in range(steps):
        values = [math.sin(step), math.cos(3 * step)]
        with torch.no_grad():
            p.copy_(torch.tensor(values))
        ema.update(step)
        decay = min(1 - 1 / 12, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * v for e, v in zip(expected, values, strict=True)]
    assert torch.allclose(ema.shadow["p"], torch.tensor(expected), atol=1e-5)
    raw = p.detach().clone()
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.equal(p, ema.shadow["p"])
        raise RuntimeError
    assert torch.equal(p, raw)


@pytest.mark.parametrize("steps", [1, 2, 10, 300, 30_000])
def test_learning_rate_has_one_shape_at_every_length(steps):
    c = TrainConfig(steps=steps, warmup=0.1)
    warm = max(1, steps // 10)
    factors = [train.learning_rate(step, c) for step in range(steps)]
    assert factors[:warm] == pytest.approx([(i + 1) / warm for i in range(warm)])
    assert all(0 < factor <= 1 for factor in factors)
    assert all(a >= b for a, b in zip(factors[warm:], factors[warm + 1 :], strict=False))
    if steps >= 300:
        middle, near_end = factors[warm + (steps - warm) // 2], factors[warm + (steps - warm) * 3 // 4]
        assert middle == pytest.approx(0.5, abs=0.01)
        assert near_end == pytest.approx(0.5 * (1 - math.sqrt(0.5)), abs=0.01)
        assert factors[-1] < 1e-3
    constant = replace(c, lr_schedule="constant")
    assert all(train.learning_rate(step, constant) == 1 for step in range(warm, steps))


def test_an_unknown_schedule_raises():
    with pytest.raises(ValueError, match="unknown lr_schedule 'linear'; known: cosine, constant"):
        train.learning_rate(5, TrainConfig(lr_schedule="linear", warmup=0.0))


# --- one step --------------------------------------------------------------------------------------------------------
def alpha_bar(t, start=0.00085, end=0.012, n=1000):
    """Cumulative product of 1 - beta of Stable Diffusion's "scaled linear" schedule."""
    betas = torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[t].float().view(-1, 1, 1, 1)


@pytest.fixture
def step(tiny_root):
    """Calls step_losses with a model that predicts zeros; returns losses and what the model was shown."""
    (_, model, _, rows, _, _, _), _ = tiny.inputs(tiny_root, "text", tiny.config(tiny_root))

    def one(n=8, kind="v_prediction", **dials):
        model.scheduler = DDPMScheduler.from_config(model.scheduler.config, prediction_type=kind)
        shown = {}

        def predict(noisy, t, text, attributes, noise, keep):
            shown.update(noisy=noisy, t=t, text=text, keep=keep)
            return torch.zeros_like(noisy), Condition(torch.zeros(len(noisy), 0, model.d_ctx))

        chosen = torch.arange(n) % len(rows)
        noise, c = train.StepNoise(3, 4, n, slice(None)), TrainConfig(**dials)
        denoiser = diffusion.Denoiser(model, NoConditioner(model.d_ctx), [])
        losses, _ = train.step_losses(predict, denoiser, model, rows, chosen, noise, c, 0.0)
        mean, logvar = rows.moments[chosen].chunk(2, dim=1)
        shape = mean.shape[1:]
        z = (mean + (0.5 * logvar).exp() * noise.normal("posterior", shape)) * model.vae.config.scaling_factor
        return losses, shown | {"z": z, "eps": noise.normal("noise", shape), "perturb": noise.normal("perturb", shape),
                                "empty": rows.empty, "rows": rows.text[chosen]}  # fmt: skip

    return one


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_targets_and_input_perturbation_follow_their_formulas(step, kind, perturbation):
    losses, shown = step(kind=kind, input_perturbation=perturbation)
    abar = alpha_bar(shown["t"])
    eps, z = shown["eps"], shown["z"]
    noisy = abar.sqrt() * z + (1 - abar).sqrt() * (eps + perturbation * shown["perturb"])
    assert torch.allclose(shown["noisy"], noisy, atol=1e-4)
    target = eps if kind == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * z  # of the clean noise
    assert torch.allclose(losses, target.square().mean(dim=(1, 2, 3)), rtol=1e-4)
    assert shown["t"].min() >= 0 and shown["t"].max() < 1000 and len(set(shown["t"].tolist())) > 4


def test_an_unknown_prediction_type_raises(step):
    with pytest.raises(ValueError, match="'sample' is not supported"):
        step(kind="sample")


def test_prompt_and_tokens_are_dropped_together_and_tokens_also_alone(step):
    _, shown = step(n=2000, prompt_dropout=0.1, demographic_dropout=0.3)
    dropped = (shown["text"] == shown["empty"]).all(dim=1)
    assert torch.equal(shown["text"][~dropped], shown["rows"][~dropped])
    assert not shown["keep"][dropped].any()
    assert abs(dropped.float().mean() - 0.1) < 0.025  # 3.7 standard deviations
    assert abs(shown["keep"].mean() - 0.9 * 0.7) < 0.04
    _, shown = step(n=200, prompt_dropout=0.0)
    assert torch.equal(shown["text"], shown["rows"]) and shown["keep"].all()


class Twice(NoReweighter):
    def weights(self, attributes, generator):
        return 2 * super().weights(attributes, generator)


def test_loss_weights_of_one_change_nothing_and_two_doubles_the_gradient(tiny_root, tmp_path):
    def fitted(name, reweighter):
        arguments, parts = tiny.inputs(tiny_root, "text", tiny.config(tiny_root, steps=3, clip=1e9))
        arguments[-1] = reweighter
        return train.run(*arguments, tmp_path / name, parts.columns)

    still = FairReweighter((5, 2, 4), FairConfig(weighting="original", exploitation=1.0))
    still.sigma = torch.zeros(11, dtype=torch.float64)
    plain, fair, twice = fitted("plain", NoReweighter()), fitted("fair", still), fitted("twice", Twice())
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "fair")) == 0
    assert plain["loss"].equals(fair["loss"])
    assert twice["grad_norm"][0] == pytest.approx(2 * plain["grad_norm"][0], rel=1e-4)
    assert twice["loss"][0] == plain["loss"][0], "the log holds unweighted losses"


# --- validation and errors ---------------------------------------------------------------------------------------------
def test_the_best_weights_by_validation_are_kept(tiny_root, tmp_path, monkeypatch):
    scores, snapshots = iter([3.0, 1.0, 2.0, 1.5]), []

    def score(model, *rest):
        snapshots.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        return next(scores)

    monkeypatch.setattr(train, "validation_loss", score)
    log = tiny.fit(tiny_root, "text", tmp_path, steps=4)
    assert log["val_loss"].tolist() == [3.0, 1.0, 2.0, 1.5]
    assert distance(weights(tmp_path), snapshots[1]) == 0 < distance(weights(tmp_path), snapshots[2])


def test_training_reads_train_and_val_only(tiny_root, tmp_path, monkeypatch):
    asked, read = [], latents.read
    monkeypatch.setattr(latents, "read", lambda *given: asked.append(given[4]) or read(*given))
    monkeypatch.setattr(methods.datasets.Data, "images", lambda *given: pytest.fail("training read images"))
    monkeypatch.setattr(paths.RunFolder, "train", lambda self, method: tmp_path)
    methods.fit("text", tiny.run_folder(tiny_root), tiny.config(tiny_root, "text", steps=2), seed=0)
    assert asked == ["train", "val"]
    assert (tmp_path / "weights.safetensors").exists()


class Poisoned(NoConditioner):
    def penalties(self, output, attributes, progress):
        return {"kl": torch.full((len(attributes),), math.nan)}


@pytest.mark.parametrize("what", ["loss", "kl", "val_loss"])
def test_a_loss_that_is_not_a_number_raises_and_leaves_no_result(tiny_root, tmp_path, what):
    arguments, parts = tiny.inputs(tiny_root, "text", tiny.config(tiny_root, steps=1))
    poisoned = {"loss": 3, "val_loss": 4}.get(what)
    if poisoned:
        arguments[poisoned] = replace(arguments[poisoned], moments=torch.full_like(arguments[poisoned].moments, math.nan))
    else:
        arguments[5] = Poisoned(arguments[1].d_ctx)
    with pytest.raises(FloatingPointError, match=f"{what} is nan at step 1"):
        train.run(*arguments, tmp_path, parts.columns)
    assert not (tmp_path / "weights.safetensors").exists() and not (tmp_path / "checkpoint.safetensors").exists()


# --- less memory, less precision -----------------------------------------------------------------------------------
@pytest.fixture
def any_precision():
    """accelerate keeps one precision for a whole process: it is forgotten before and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_gradient_checkpointing_computes_blocks_again_and_changes_no_bit(tiny_root, tmp_path):
    seen = {}
    for name, on in (("kept", False), ("again", True)):
        arguments, parts = tiny.inputs(tiny_root, "hcn", tiny.config(tiny_root, "hcn", steps=3, gradient_checkpointing=on))
        passes = seen[name] = []
        block = arguments[1].unet.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *given, passes=passes: passes.append(torch.is_grad_enabled()))
        train.run(*arguments, tmp_path / name, parts.columns)
    assert (sum(seen["kept"]), sum(seen["again"])) == (3, 6), "forward once, and once more on the way back"
    assert distance(weights(tmp_path / "kept"), weights(tmp_path / "again")) == 0


def test_bf16_trains_almost_as_float32_does(tiny_root, tmp_path, any_precision):
    exact = tiny.fit(tiny_root, "hcn", tmp_path / "no", steps=3)
    AcceleratorState._reset_state()
    rough = tiny.fit(tiny_root, "hcn", tmp_path / "bf16", steps=3, precision="bf16")
    for name in ("loss", "grad_norm"):
        error = (rough[name] / exact[name] - 1).abs()
        assert 0 < error.max() < 0.02, name  # 8 bits of mantissa: each operation errs by at most 2^-9 = 0.2 %
    found = weights(tmp_path / "bf16")
    assert {value.dtype for value in found.values()} == {torch.float32}, "autocast: the weights themselves stay as they were"
    assert 0 < distance(found, weights(tmp_path / "no"))


# --- what is trained -----------------------------------------------------------------------------------------------------
def test_lora_trains_adapters_only_and_loads_back(tiny_root, tmp_path):
    c = tiny.config(tiny_root, steps=3, lora_rank=2, trained=("unet",), lr=1e-2, ema=False)
    arguments, parts = tiny.inputs(tiny_root, "text", c, frozen_text=True)
    train.run(*arguments, tmp_path, parts.columns)
    values = weights(tmp_path)
    assert values and all("lora_" in name for name in values)
    trained = arguments[1].unet.state_dict()
    before = diffusion.load(str(tiny_root / "base")).unet.state_dict()
    frozen = {n: v for n, v in trained.items() if "lora_" not in n}
    assert len(frozen) == len(before)
    assert all(torch.equal(v, before[n.replace(".base_layer", "")]) for n, v in frozen.items())
    fresh = diffusion.load(str(tiny_root / "base"))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = fresh.text_encoder(fresh.tokenize(["The heart is enlarged."]))[0]
        untrained = fresh.unet(z, 5, text).sample
        schema = methods.datasets.load(tiny.run_folder(tiny_root).data).schema
        model, _ = methods.restore("text", tmp_path, fresh, schema, c)
        assert distance({n: p for n, p in model.named_parameters() if "lora_" in n}, values) == 0
        assert not torch.allclose(model.unet(z, 5, text).sample, untrained, atol=1e-4)


def test_lora_starts_the_same_whatever_was_drawn_before(tiny_root):
    def adapters():
        base = diffusion.load(str(tiny_root / "base"))
        model = diffusion.Denoiser(base, NoConditioner(base.d_ctx), [])
        return diffusion.trainable(model, TrainConfig(lora_rank=2, trained=("unet",)))

    first = adapters()
    torch.rand(1)
    assert distance(first, adapters()) == 0


def test_a_frozen_text_encoder_may_be_cached(tiny_root, tmp_path):
    settings = dict(steps=4, trained=("unet",))
    for name, cached in (("ids", False), ("cached", True)):
        tiny.fit(tiny_root, "hcn", tmp_path / name, frozen_text=cached, **settings)
    found = weights(tmp_path / "cached")
    assert not any(name.startswith("text_encoder.") for name in found)
    assert distance(weights(tmp_path / "ids"), found) < 1e-4


def test_weights_of_another_method_are_refused(tiny_root, tmp_path):
    tiny.fit(tiny_root, "text", tmp_path, steps=1)
    base, schema = diffusion.load(str(tiny_root / "base")), methods.datasets.load(tiny.run_folder(tiny_root).data).schema
    with pytest.raises(ValueError, match="does not fit this method"):
        methods.restore("hcn", tmp_path, base, schema, tiny.config(tiny_root))


@pytest.mark.parametrize("trained", [("vae",), ("unet", "all")])
def test_only_known_parts_can_be_trained(tiny_root, trained):
    base = diffusion.load(str(tiny_root / "base"))
    with pytest.raises(ValueError, match="only \\['text_encoder', 'unet'\\] can be trained"):
        diffusion.trainable(diffusion.Denoiser(base, NoConditioner(base.d_ctx)), TrainConfig(trained=trained))
