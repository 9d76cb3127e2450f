"""run.json beside tables and figures: which runs they rest on, what they are, and nothing that names a place."""

import hashlib
import os

import pytest
from toy import asked

from compdiff import paths, provenance, record, request, stages

COMMITTED = sorted(paths.FIGURES.glob("*/run.json"))


def test_every_notebook_before_is_told_by_the_hash_that_the_door_compares(finished):
    steps = list(stages.steps(finished, request.parse(asked(finished), "smoke")))
    root = steps[0].folder.root
    labels = [(s.executed.parent.parent.relative_to(root) / s.stage.name).as_posix() for s in steps]
    told = provenance.before(root, [0], "")
    assert {name: t["outputs"] for name, t in told.items()} == dict(zip(labels, (s.digest() for s in steps), strict=True))
    assert told["seed0/02_hcn"]["settings"]["steps"] == 6 and told["seed0/02_hcn"]["minutes"] > 0
    assert set(told) - set(provenance.before(root, [0], "02_hcn")) == {"seed0/02_hcn"}, "not the notebook itself"
    assert not any(name.startswith("seed") for name in provenance.before(root, [], ""))


def test_the_record_stands_only_beside_finished_pages(finished, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    sent = {"dataset": "toy", "runs": str(tmp_path)}
    origin = provenance.begin(tmp_path, finished.root / "runs/smoke/toy", "08_figures", sent, [0])
    assert not (tmp_path / "run.json").exists()
    for name in ("table.csv", ".table.csv.part.csv", "other.txt"):
        (tmp_path / name).write_text(name)
    provenance.finish(origin)
    made, text = record.read_run(tmp_path), (tmp_path / "run.json").read_text()
    assert set(made["outputs"]) == {"table.csv"}
    assert made["outputs"]["table.csv"]["sha256"] == hashlib.sha256(b"table.csv").hexdigest()
    assert {"commit", "versions", "machine", "minutes", "peak_memory_mib"} <= set(made) and made["seeds"] == [0]
    assert "seed0/02_hcn" in made["inputs"]["runs before"] and "compdiff/plots_groups.py" in made["inputs"]
    assert not any(place in text for place in (str(tmp_path), str(finished.root), os.path.expanduser("~") + "/"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f.parent.name)
def test_committed_figures_are_those_that_their_record_hashed(file):
    known = record.read_run(file)["outputs"]
    there = {f.name for f in file.parent.iterdir() if f.suffix in provenance.ENDINGS}
    assert set(known) == there
    assert [n for n, entry in known.items() if record.sha256_file(file.parent / n) != entry["sha256"]] == []
