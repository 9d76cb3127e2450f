"""Processes (DDP, FSDP, `accelerate launch`) and microbatches change nothing in what is trained, and a lost one ends it in words."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny import ONE_THREAD, distance, weights

from compdiff import methods, train
from compdiff.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")  # bit-identity is promised with the same number of threads
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
    assert state["reweighter.updates"].item() == 2
    assert state["reweighter.history"][:, 0].tolist() == list(range(1, STEPS + 1)), "the log's steps"


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


def test_launch_trains_what_the_notebook_then_finds_finished(tiny_root, one_process, tmp_path, monkeypatch):
    tiny_root = shutil.copytree(tiny_root, tmp_path / "runs")
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
