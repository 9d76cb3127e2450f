"""Training that is killed, stopped, repeated or found finished ends in the same bits, and two never train in one folder."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from tiny import ONE_THREAD

from compdiff import record, train

pytestmark = pytest.mark.usefixtures("one_thread")  # bit-identity is promised with the same number of threads


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
