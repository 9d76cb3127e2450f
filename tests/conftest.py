"""Fixtures: a throw-away project (toy.py) that has run once and copies of it, a tiny run folder, trees of real layouts."""

import shutil

import hypothesis
import pytest
import toy
from layouts import LAYOUTS, Tree
from xdist.scheduler import LoadFileScheduling

from compdiff import run, skeleton

hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("patient")


class Files(LoadFileScheduling):
    """Of two processes (`-n 2`) each takes a file at a time, whose tests share fixtures; all notebooks go to one, in order."""

    def _split_scope(self, nodeid):
        return "notebooks" if nodeid.startswith("notebooks/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Files(config, log)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project whose four stages have run once, through the door."""
    project = toy.create(tmp_path_factory.mktemp("finished"))
    assert run.main(["smoke", *toy.asked(project)], project) == 0
    assert toy.executions(project) == toy.ALL
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy of it to edit and break."""
    shutil.copytree(finished.root, tmp_path / "copy", symlinks=True)
    copy = toy.project_at(tmp_path / "copy")
    (copy.root / "runs" / "executions.txt").unlink()
    return copy


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A folder with a tiny base, data and latents (tiny.py); tests that write there copy it first."""
    import tiny  # loads torch and diffusers, which most tests do without

    return tiny.create(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def one_thread():
    """Bit-identity is promised on the same CPU with the same number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def studio_root(tiny_root, tmp_path_factory):
    """A copy of it with two trained methods, their notebooks' records, and a training that was not finished."""
    import tiny

    return tiny.with_models(shutil.copytree(tiny_root, tmp_path_factory.mktemp("studio") / "runs"))


@pytest.fixture(scope="session")
def heart_root(studio_root, tmp_path_factory):
    """A copy of it with a ControlNet of hearts."""
    import tiny

    return tiny.with_heart(shutil.copytree(studio_root, tmp_path_factory.mktemp("heart") / "runs"))


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    made = {}
    for dataset, kind in [*((d, "") for d in LAYOUTS), ("mimic", "dcm")]:
        made[dataset, kind] = skeleton.write(dataset, tmp_path_factory.mktemp(dataset) / "tree", kind, patients=24)
    made["fairgenmed", "jpg"] = made["fairgenmed", ""]
    return made


@pytest.fixture
def copy(trees, tmp_path):
    def make(dataset, kind=""):
        shutil.copytree(trees[dataset, kind], tmp_path / dataset / "tree")
        return Tree(dataset, tmp_path / dataset / "tree", kind)

    return make
