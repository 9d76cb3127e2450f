"""The training loop: restarts, processes and microbatches change nothing; EMA, schedule, targets and weights by hand."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from compdiff import diffusion, latents, methods, paths, record, train
from compdiff.config import FairConfig, TrainConfig
from compdiff.fairdiffusion import FairReweighter
from compdiff.interfaces import Condition, NoConditioner, NoReweighter

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(paths.ROOT), str(Path(__file__).parent)])}


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-identity is promised on the same CPU with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder):
    return load_file(folder / "weights.safetensors")


def distance(a, b):
    """Largest difference of any weight of two runs."""
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- restarts ----------------------------------------------------------------------------------------------------
def test_killed_runs_end_in_the_same_bits_as_the_uninterrupted_one(tiny_root, tmp_path):
    command = [sys.executable, Path(__file__).with_name("tiny.py"), tiny_root, "hcn_fairdiffusion", tmp_path]
    subprocess.run(command, check=True, env=ONE_THREAD, timeout=300)
    whole = tmp_path / "whole"
    for killed in ("step3", "step7", "write3", "write4", "any"):
        for name in ("weights.safetensors", "checkpoint.safetensors", "log.csv"):
            assert (tmp_path / killed / name).read_bytes() == (whole / name).read_bytes(), (killed, name)
        assert not list((tmp_path / killed).glob(".*")), "half-written files were left"
    state = load_file(whole / "checkpoint.safetensors")
    assert state["reweighter.updates"].item() == 1 and len(state["reweighter.history"]) == tiny.DIALS["steps"]


def test_a_finished_run_is_not_repeated_and_other_inputs_start_afresh(tiny_root, tmp_path, monkeypatch):
    first = tiny.fit(tiny_root, "text", tmp_path, steps=2)
    steps, original = [], train.step_losses
    monkeypatch.setattr(train, "step_losses", lambda *given: steps.append(given) or original(*given))
    assert tiny.fit(tiny_root, "text", tmp_path, steps=2).equals(first) and not steps
    (tmp_path / "weights.safetensors").unlink()
    tiny.fit(tiny_root, "text", tmp_path, steps=2)
    assert len(steps) == 2 and (tmp_path / "weights.safetensors").exists()
    tiny.fit(tiny_root, "text", tmp_path, steps=2, lr=2 * tiny.config(tiny_root, "text").train.lr)
    assert len(steps) == 4


def stopping(root, out, by):
    """A process that trains `text` for four steps and, after the third, is killed or stands still."""
    work = "import sys, tiny; from pathlib import Path as P; root, out, by = sys.argv[1:]; "
    work += "tiny.killed_after_step(P(root), 'text', P(out), 3, getattr(tiny, by), steps=4)"
    return subprocess.Popen([sys.executable, "-c", work, root, out, by], env=ONE_THREAD)


def no_step(monkeypatch):
    monkeypatch.setattr(train, "step_losses", lambda *given: pytest.fail("trained again"))


def test_a_finished_run_without_its_checkpoint_is_not_repeated(tiny_root, tmp_path, monkeypatch):
    log = tiny.fit(tiny_root, "text", tmp_path, steps=2)
    kept = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "checkpoint.safetensors").unlink()
    no_step(monkeypatch)
    assert tiny.fit(tiny_root, "text", tmp_path, steps=2).equals(log)
    assert (tmp_path / "weights.safetensors").read_bytes() == kept and not (tmp_path / "checkpoint.safetensors").exists()


def test_a_run_killed_before_run_json_gets_it_with_no_step_trained(tiny_root, tmp_path, monkeypatch):
    tiny.fit(tiny_root, "text", tmp_path, steps=2)
    before = record.read_run(tmp_path)
    (tmp_path / "run.json").unlink()
    no_step(monkeypatch)
    tiny.fit(tiny_root, "text", tmp_path, steps=2)
    after = record.read_run(tmp_path)
    assert all(after[name] == before[name] for name in ("inputs", "outputs", "parameters", "seeds"))


def test_a_changed_result_is_made_again_even_in_two_goes(tiny_root, tmp_path):
    tiny.fit(tiny_root, "text", tmp_path, steps=4)
    made, names = record.read_run(tmp_path)["outputs"], ("weights.safetensors", "log.csv")
    with open(tmp_path / "weights.safetensors", "ab") as file:
        file.write(b" ")
    with stopping(tiny_root, tmp_path, "kill_myself") as run:
        assert run.wait(timeout=300) == -signal.SIGKILL
    assert not (tmp_path / "run.json").exists(), "it stands beside a finished run only"
    tiny.fit(tiny_root, "text", tmp_path, steps=4)
    again = record.read_run(tmp_path)["outputs"]
    assert [again[name]["sha256"] for name in names] == [made[name]["sha256"] for name in names]


def test_one_folder_is_trained_by_one_command_at_a_time(tiny_root, tmp_path):
    """The other one is a living process that has begun and stands still, its half-written file beside it."""
    out = tmp_path / "out"
    with stopping(tiny_root, out, "stand_still") as other:
        while not (out / "log.csv").exists() and other.poll() is None:
            time.sleep(0.02)
        (half := out / ".weights.safetensors.half").touch()
        with pytest.raises(RuntimeError, match=f"another command trains in {out}: let it finish or end it"):
            tiny.fit(tiny_root, "text", out, steps=4)
        assert half.exists(), "a living run's files are left alone"
        other.kill()
    assert len(tiny.fit(tiny_root, "text", out, steps=4)) == 4 and not half.exists(), "the lock ended with the process"


def test_the_inputs_hash_counts_the_validation_rows(tiny_root):
    (c, _, sha256, rows, valid, conditioner, reweighter), parts = tiny.inputs(tiny_root, "text", tiny.config(tiny_root))
    other = replace(valid, moments=valid.moments + 1)
    hashes = {train.inputs_hash(c, sha256, rows, v, conditioner, reweighter, parts.columns, 0) for v in (valid, valid, other)}
    assert len(hashes) == 2


# --- processes and microbatches ------------------------------------------------------------------------------------
STEPS = 36
TOLERANCE = 5e-4  # of every weight after 36 steps of AdamW at lr 4e-4, head_lr 4e-3; the sums' order is what differs
LONG = dict(steps=STEPS, time_window=14, warmup=0.1)
SHORT = dict(steps=12, time_window=8)


@pytest.fixture(scope="module")
def one_process(tiny_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    return tiny.fit(tiny_root, "hcn_fairdiffusion", folder, **LONG), weights(folder)


@pytest.fixture(scope="module")
def short(tiny_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    torch.set_num_threads(1)
    tiny.fit(tiny_root, "hcn_fairdiffusion", folder, **SHORT)
    return weights(folder)


def several(tiny_root, folder, *how):
    command = [sys.executable, Path(__file__).with_name("tiny.py"), tiny_root, "hcn_fairdiffusion", folder, json.dumps(LONG), *how]
    done = subprocess.run(command, check=True, env=ONE_THREAD, timeout=300, stdout=subprocess.PIPE, text=True)
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_gloo(tiny_root, tmp_path_factory):
    """(folder of the runs of `tiny.processes`, exit codes of each)."""
    return several(tiny_root, tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def under_fsdp(tiny_root, tmp_path_factory):
    """(folder of the runs of `tiny.spread`, exit codes of each)."""
    return several(tiny_root, tmp_path_factory.mktemp("fsdp"), "fsdp")


@pytest.mark.parametrize("world", ["two", "four"])
def test_several_processes_train_the_weights_of_one(on_gloo, one_process, world):
    folder, codes = on_gloo
    log, found = one_process
    assert set(codes[world]) == {0}
    assert distance(weights(folder / world), found) < TOLERANCE  # 2: 1.5e-5 when written; noise per rank: 4e-2
    again = train.pd.read_csv(folder / world / "log.csv")
    assert list(again["step"]) == list(range(1, STEPS + 1))
    assert (again["loss"] - log["loss"]).abs().max() < TOLERANCE  # the same samples, times and noise at every step
    state = load_file(folder / world / "checkpoint.safetensors")
    assert state["reweighter.updates"].item() == 2 and len(state["reweighter.history"]) == STEPS


def test_weights_spread_by_fsdp_are_trained_to_those_of_one_process(under_fsdp, one_process):
    folder, codes = under_fsdp
    log, found = one_process
    assert codes["fsdp"] == [0, 0]
    parts = json.loads((folder / "parts.json").read_text())
    assert parts["held"] < 0.6 * parts["all"] and parts["held"] == parts["moments"] == parts["average"], "a process holds half"
    assert distance(weights(folder / "fsdp"), found) < TOLERANCE
    again = train.pd.read_csv(folder / "fsdp" / "log.csv")
    off = (again - log).abs().max()
    assert off["loss"] < TOLERANCE and off["val_loss"] < 10 * TOLERANCE
    # the norm bends where the loss does not: rounding reached 1e-3 after 30 steps on one machine, 1.3e-2 on another;
    # the norm of a process's own half would be off by 0.3 from the first step on
    assert (again["grad_norm"] - log["grad_norm"])[:5].abs().max() < TOLERANCE and off["grad_norm"] < 200 * TOLERANCE
    spread, whole = (load_file(folder / name / "checkpoint.safetensors") for name in ("fsdp", "fsdp killed, ddp"))
    assert {n: v.shape for n, v in spread.items()} == {n: v.shape for n, v in whole.items()}
    assert max((spread[n] - whole[n]).abs().max() for n in whole if n.startswith(("model.", "ema."))) < TOLERANCE


def test_a_killed_run_under_fsdp_goes_on_under_fsdp_and_without(under_fsdp):
    folder, codes = under_fsdp
    assert codes["fsdp killed"] == [1] and codes["fsdp killed, again"] == codes["fsdp killed, ddp"] == [0, 0]
    assert "ConnectionError: process 0 of 2" in (folder / "fsdp killed.txt").read_text()
    for name in ("weights.safetensors", "checkpoint.safetensors", "log.csv"):
        assert (folder / "fsdp killed" / name).read_bytes() == (folder / "fsdp" / name).read_bytes(), name
    assert distance(weights(folder / "fsdp killed, ddp"), weights(folder / "fsdp")) < TOLERANCE


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_loss_of_a_process_ends_the_run_in_words_and_the_next_goes_on(on_gloo, how):
    folder, codes = on_gloo
    said = (folder / f"{how}.txt").read_text()
    assert "ConnectionError: process 0 of 2: another process has ended or does not answer, after step" in said
    assert "of 36. Start the same command again: it goes on from the last checkpoint" in said
    assert codes[how] == [1] and codes[f"{how}, again"] == [0, 0]
    for name in ("weights.safetensors", "checkpoint.safetensors", "log.csv"):
        assert (folder / how / name).read_bytes() == (folder / "two" / name).read_bytes(), name


def test_launch_trains_what_the_notebook_then_finds_finished(tiny_root, one_process, monkeypatch):
    words = [f"{name}={value}" for name, value in (tiny.DIALS | LONG).items()]
    words += [f"BASE={tiny_root / 'base'}", f"RUNS={tiny_root}", "PROFILE=smoke"]
    # --multi_gpu is what starts processes, on gloo without a GPU: with --cpu accelerate starts one, unless there is MPI
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    command = [*launch, "-m", "compdiff.launch", "train", "chest", "hcn_fairdiffusion", *words]
    folder = tiny.run_folder(tiny_root).train("hcn_fairdiffusion")
    with subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True) as run:
        while not (folder / "checkpoint.safetensors").exists() and run.poll() is None:
            time.sleep(0.02)
        ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if "compdiff.launch" in p.cmdline()]
        ranks[-1].kill()
        assert "Signal 9 (SIGKILL)" in run.communicate(timeout=300)[1] and run.returncode != 0
    done = subprocess.run(command, env=ONE_THREAD, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    says = "train chest hcn_fairdiffusion: 36 steps, best validation loss"
    assert done.stdout.count(says) == 1 and "2 process(es)" in done.stdout, "only the main process prints"
    assert distance(weights(folder), one_process[1]) < TOLERANCE
    monkeypatch.setattr(train, "step_losses", lambda *given: pytest.fail("trained again"))
    c = tiny.config(tiny_root, "hcn_fairdiffusion", **LONG)
    assert len(methods.fit("hcn_fairdiffusion", tiny.run_folder(tiny_root), c, seed=0)) == STEPS


def test_another_mode_that_shards_the_weights_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(train.Accelerator, "distributed_type", train.DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DEEPSPEED shards the weights.*--multi_gpu.*--fsdp_version 2.*MICROBATCH.*LORA_RANK"):
        train.new_accelerator(TrainConfig())


@pytest.mark.parametrize(("given", "says"), [
    (dict(fsdp_version=1), "add --fsdp_version 2"),
    (dict(fsdp_version=2, cpu_ram_efficient_loading=True), "add --fsdp_cpu_ram_efficient_loading false")])  # fmt: skip
def test_an_fsdp_that_would_train_something_else_is_refused_in_words(monkeypatch, given, says):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it
    monkeypatch.setattr(train.Accelerator, "distributed_type", train.DistributedType.FSDP)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", FullyShardedDataParallelPlugin(**given), raising=False)
    with pytest.raises(ValueError, match=says):
        train.new_accelerator(TrainConfig())


@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_change_nothing_and_show_every_sample_once_an_epoch(tiny_root, tmp_path, monkeypatch, short, microbatch):
    seen, original = [], train.step_losses

    def spy(wrapped, model, base, data, rows, *rest):
        seen.extend(rows.tolist())
        return original(wrapped, model, base, data, rows, *rest)

    monkeypatch.setattr(train, "step_losses", spy)
    tiny.fit(tiny_root, "hcn_fairdiffusion", tmp_path, microbatch=microbatch, **SHORT)
    assert distance(weights(tmp_path), short) < TOLERANCE
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24)) and seen[:24] != seen[24:]


def test_noise_drawn_per_rank_would_be_noticed(tiny_root, tmp_path, monkeypatch, short):
    class PerRank(train.StepNoise):
        """Each half of the batch draws for itself, from a generator seeded by the step."""

        def normal(self, name, shape=()):
            return torch.randn(len(range(self.batch)[self.rows]), *shape, generator=self.generator(name))

    monkeypatch.setattr(train, "StepNoise", PerRank)
    tiny.fit(tiny_root, "hcn_fairdiffusion", tmp_path, **SHORT, microbatch=2)
    assert distance(weights(tmp_path), short) > 10 * TOLERANCE


@pytest.mark.parametrize("microbatch", [4, 1])
def test_noise_drawn_once_a_step_trains_the_bits_of_noise_drawn_anew_by_each_microbatch(tiny_root, tmp_path, monkeypatch, microbatch):
    """hcn_fairdiffusion asks for all of it: noise, times, dropout, the posterior of z, perturbation."""
    asked, original = [], train.StepNoise.generator

    class Anew(train.StepNoise):
        """The formula: every request draws the global batch and takes its rows."""

        def normal(self, name, shape=()):
            return torch.randn(self.batch, *shape, generator=original(self, name))[self.rows]

        def uniform(self, name, shape=()):
            return torch.rand(self.batch, *shape, generator=original(self, name))[self.rows]

    monkeypatch.setattr(train.StepNoise, "generator", lambda self, name: asked.append((self.key, name)) or original(self, name))
    once = tiny.fit(tiny_root, "hcn_fairdiffusion", tmp_path / "once", steps=3, microbatch=microbatch)
    training = [key for key in asked if not key[0].startswith("7/")]  # 7: the seed of validation
    assert {"posterior", "noise", "time", "perturb", "hcn.z", "hcn.pair.0.1"} <= {name for _, name in training}
    assert len(training) == len(set(training)), "a name is drawn once a step, whatever the microbatches"
    monkeypatch.setattr(train, "StepNoise", Anew)
    anew = tiny.fit(tiny_root, "hcn_fairdiffusion", tmp_path / "anew", steps=3, microbatch=microbatch)
    assert distance(weights(tmp_path / "once"), weights(tmp_path / "anew")) == 0 and once.equals(anew)


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
