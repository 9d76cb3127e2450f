"""A run folder to train on in seconds: 32-pixel chest phantoms, an untrained base of width 16, cached latents.

As a script: trains in child processes that are killed at awkward moments, or in several at once (test_restarts.py,
test_processes.py).
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from compdiff import base, cardiac_cohorts, cardiac_models, checkpoint, datasets, diffusion, latents, methods, paths, record
from compdiff import train, untrained
from compdiff.config import DataConfig, settings

DIALS = dict(steps=8, batch=4, microbatch=4, d_node=16, aux_hidden=16, time_window=4, restarts=1, raw_samples=4,
             train_n=24, val_n=8, test_per_cell=1, validate_every=0.25, checkpoint_every=0.25)  # fmt: skip
HEART = dict(size=32, steps=2, vae_steps=2, unet_steps=2, batch=4, microbatch=4, hearts=18, test_hearts=6, folds=3,
             variants=1, sample_steps=2, copy_guidance=1.5, random_guidance=2.5, prevalence=0.4, d_node=8, aux_hidden=8)  # fmt: skip

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(paths.ROOT), str(Path(__file__).parent)])}


def config(root, method="", **values):
    return settings("smoke", "chest", method, base=str(root / "base"), **(DIALS | values))


def run_folder(root, seed=0):
    return paths.RunFolder(str(root), "smoke", "chest", seed)


def create(root):
    """Base, data and latents below `root`, as notebook 01 leaves them."""
    untrained.build_tiny(base.corpus(), root / "tokenizer", size=32, width=16).save(root / "base")
    folder, data = run_folder(root), config(root).data
    datasets.prepare("chest", folder.data, DataConfig(data.size, data.train_n, data.val_n, data.test_per_cell))
    model, sha256 = diffusion.load_for(folder, config(root))
    latents.write(folder.latents, datasets.load(folder.data), model, sha256)
    return root


def inputs(root, method, c, seed=0, frozen_text=False):
    """The arguments of `train.run` up to the folder, and the method's parts."""
    folder = run_folder(root)
    model, sha256 = diffusion.load_for(folder, c)
    data = datasets.load(folder.data)
    parts = methods.build(method, data.schema, model.d_ctx, c, seed)
    if frozen_text:
        latents.write_text(folder.latents, data, model, sha256, parts.named)
    rows, valid = (latents.read(folder.latents, data, model, sha256, s, parts.named, frozen_text) for s in ("train", "val"))
    return [c, model, sha256, rows, valid, parts.conditioner, parts.reweighter], parts


def fit(root, method, out, frozen_text=False, seed=0, **values):
    """Train a method into `out` in this process; returns the log."""
    arguments, parts = inputs(root, method, config(root, method, **values), seed, frozen_text)
    return train.run(*arguments, out, parts.columns, seed)


def weights(folder):
    return load_file(folder / "weights.safetensors")


def distance(a, b):
    """Largest difference of any weight of two runs."""
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def with_models(root):
    """Train two methods for two steps where notebooks 02 and 03 would, with their records; flat is left unfinished."""
    folder = run_folder(root)
    for method, stage in (("text", "03_train_baselines"), ("hcn", "02_train_hcn")):
        fit(root, method, folder.train(method), steps=2)
        sent = {"parameters": {"overrides": DIALS | {"steps": 2}}}
        record.write_json(folder.executed / f"{stage}.run.json", sent)
    folder.train("flat").mkdir()
    (folder.train("flat") / "weights.safetensors").touch()
    return root


def with_heart(root, token=False):
    """Train a ControlNet of hearts for two steps where notebook 09 would, on the base below `root`, with its record."""
    folder, dials = paths.RunFolder(str(root), "smoke", "cardiac", 0), HEART | {"token": token}
    c = settings("smoke", "cardiac", base=str(root / "base"), **dials)
    studies, place = cardiac_cohorts.studies("cardiac", "", c), folder.seed / "base" / "all"
    fold = cardiac_cohorts.folds(studies.table, "heart failure", 3, ("sex",), seed=0)[0]
    cardiac_models.adapt(studies, fold.train, fold.val, c, place)
    cardiac_models.fit(studies, fold.train, fold.val, place, folder.train("control") / "all", c, seed=0)
    sent = {"parameters": {"overrides": dials | {"base": "base"}}}
    record.write_json(folder.executed / "09_cardiac_generation.run.json", sent)
    return root


# --- killed runs -------------------------------------------------------------------------------------------------
def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still():
    time.sleep(3600)


def killed_after_step(root, method, out, step, by=kill_myself, **values):
    """A run that ends, or stands still, right after it has logged `step`."""
    arguments, parts = inputs(root, method, config(root, method, **values))
    original = train.train

    def until(*given):
        for row in original(*given):
            if row["step"] == step:
                by()
            yield row

    train.train = until
    train.run(*arguments, out, parts.columns, 0)


def killed_in_write(root, method, out, nth, **values):
    """A run that ends in the middle of its `nth` write of weights or checkpoint, half of the bytes being there."""
    original, calls = checkpoint.save_file, []

    def half(tensors, path, **given):
        calls.append(path)
        original(tensors, path, **given)
        if len(calls) == nth:
            os.truncate(path, os.path.getsize(path) // 2)
            kill_myself()

    checkpoint.save_file = half
    fit(root, method, out, **values)


def in_child(work, *given, kill_when=None, **values):
    """Run `work` in a forked child; True if it ended by SIGKILL. `kill_when`: kill it when that file appears."""
    child = os.fork()
    if child == 0:
        with suppress(KeyboardInterrupt):
            work(*given, **values)
            os._exit(0)
        os._exit(1)
    while kill_when is not None and not kill_when.exists():
        time.sleep(0.001)
    if kill_when is not None:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a training run failed")
    return os.WIFSIGNALED(status)


def main(root, method, out):
    """Runs below `out`: whole, and one per way to be killed, each run again afterwards until it is done."""
    torch.set_num_threads(1)
    for folder in ("whole", "step3", "step7", "write3", "write4", "any"):
        shutil.rmtree(out / folder, ignore_errors=True)
    assert not in_child(fit, root, method, out / "whole")
    for step in (3, 7):
        assert in_child(killed_after_step, root, method, out / f"step{step}", step)
    for nth in (3, 4):  # the second weights, the second checkpoint
        assert in_child(killed_in_write, root, method, out / f"write{nth}", nth)
    assert in_child(fit, root, method, out / "any", kill_when=out / "any" / "checkpoint.safetensors")
    for folder in ("step3", "step7", "write3", "write4", "any"):
        assert not (out / folder / "checkpoint.safetensors").exists() or _steps(out / folder) < DIALS["steps"]
        assert not in_child(fit, root, method, out / folder)


def _steps(folder):
    """Finished steps according to the folder's log."""
    return len((folder / "log.csv").read_text().splitlines()) - 1


# --- several processes -------------------------------------------------------------------------------------------
def under_fsdp():
    """From here on this process trains under FSDP. On the CPU accelerate has to be told so: there --use_fsdp means nothing.

    The validation losses of all processes but the main one only get worse: its own must decide what is kept, for all.
    """
    ordinary, save, score, asked = train.new_accelerator, checkpoint.Checkpoint.save, train.validation_loss, []
    layers = dict(auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["BasicTransformerBlock", "CLIPEncoderLayer"])

    def accelerator(c):
        made = ordinary(c)
        PartialState._shared_state["distributed_type"] = made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **layers)
        return made

    def count(self, step):
        """Numbers that this process holds of all the trained weights, of their average and of the first moments."""
        local = lambda tensors: sum(t.to_local().numel() for t in tensors)  # noqa: E731
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        parts = {"all": sum(p.numel() for p in self.params.values()), "held": local(self.params.values()),
                 "average": local(self.ema.shadow.values()), "moments": local(moments)}  # fmt: skip
        if self.accelerator.is_main_process:
            record.write_json(self.folder.parent / "parts.json", parts)
        save(self, step)

    def worse(*given):
        asked.append(given)
        return score(*given) + (len(asked) if os.environ["RANK"] != "0" else 0)

    train.new_accelerator, checkpoint.Checkpoint.save, train.validation_loss = accelerator, count, worse


def in_processes(root, method, out, world, end=None, by=kill_myself, fsdp=False, **values):
    """Train on `world` forked processes, as `accelerate launch` starts them but without its supervisor.

    The last one is killed (or whatever `by` does) after step `end`. Returns the exit codes of the others; what they say
    then is in <out>.txt.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        if end is not None:
            os.dup2(os.open(out.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if fsdp:
            under_fsdp()
        if by is stand_still:
            train.TIMEOUT = timedelta(seconds=15)
        if end is not None and rank == world - 1:
            killed_after_step(root, method, out, end, by, **values)
        else:
            fit(root, method, out, **values)
        os._exit(0)
    last = [] if end is None else [children.pop()]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for child in last:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return codes


def processes(root, method, out, values):
    """2 and 4 processes to the end; 2 of which one is killed, or stands still; and 2 that go on from there."""
    torch.set_num_threads(1)
    codes = {"two": in_processes(root, method, out / "two", 2, **values), "four": in_processes(root, method, out / "four", 4, **values)}
    for name, by in (("killed", kill_myself), ("stopped", stand_still)):
        codes[name] = in_processes(root, method, out / name, 2, end=20, by=by, **values)
        codes[f"{name}, again"] = in_processes(root, method, out / name, 2, **values)
    print(json.dumps(codes))


def spread(root, method, out, values):
    """Under FSDP: 2 processes to the end; 2 of which one is killed; and 2 that go on from there, under FSDP and without."""
    torch.set_num_threads(1)
    values = values | dict(microbatch=1)  # two microbatches: the gradients of the first are kept without a word to the others
    codes = {"fsdp": in_processes(root, method, out / "fsdp", 2, fsdp=True, **values)}
    codes["fsdp killed"] = in_processes(root, method, out / "fsdp killed", 2, end=20, fsdp=True, **values)
    shutil.copytree(out / "fsdp killed", out / "fsdp killed, ddp")
    codes["fsdp killed, again"] = in_processes(root, method, out / "fsdp killed", 2, fsdp=True, **values)
    codes["fsdp killed, ddp"] = in_processes(root, method, out / "fsdp killed, ddp", 2, **values)
    print(json.dumps(codes))


if __name__ == "__main__":
    if sys.argv[4:]:
        (spread if sys.argv[5:] == ["fsdp"] else processes)(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
