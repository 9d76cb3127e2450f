"""Judges from outside: the list, networks in their published layout, and files that must be refused."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compdiff import backbones, features, paths, stages, weights
from compdiff.inception import InceptionV3
from compdiff.request import Request

PARAMETERS = {  # as torchvision documents them: 1,000 classes, Inception with its auxiliary classifier
    InceptionV3: 27_161_264, backbones.resnet50: 25_557_032, backbones.resnet34: 21_797_672}  # fmt: skip


@pytest.fixture(scope="module", params=list(PARAMETERS), ids=lambda f: f.__name__)
def network(request):
    torch.manual_seed(0)
    return request.param, request.param(1000).eval()


def test_networks_have_the_published_number_of_parameters_and_features(network):
    build, net = network
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[build]
    with torch.inference_mode():
        x = torch.randn(1, 3, *((299, 299) if build is InceptionV3 else (64, 64)))
        found = net(x)
        assert found.shape == (1, net.width) and net.head(found).shape == (1, 1000)


def test_inception_names_its_tensors_as_torchvision():
    """Some keys of every kind of block, from torchvision's file."""
    shapes = {k: tuple(v.shape) for k, v in InceptionV3().state_dict().items()}
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.bn.running_var": (64,), "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7), "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3), "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "AuxLogits.conv1.conv.weight": (768, 128, 5, 5), "AuxLogits.fc.bias": (1000,), "fc.weight": (1000, 2048),
    }  # fmt: skip
    assert {k: shapes.get(k) for k in expected} == expected


@pytest.mark.parametrize("build", [backbones.resnet34, backbones.resnet50])
def test_resnet_computes_what_transformers_resnet_does(build):
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(1)
    ours = build(0).eval()
    for buffer in (b for n, b in ours.named_buffers() if n.endswith("running_mean")):
        buffer.normal_(0, 0.1)
    sizes = [s * ours.layer1[0].growth for s in (64, 128, 256, 512)]
    kind = "bottleneck" if ours.layer1[0].growth == 4 else "basic"
    config = ResNetConfig(hidden_sizes=sizes, depths=[3, 4, 6, 3], layer_type=kind, downsample_in_first_stage=False)
    theirs = ResNetModel(config).eval()
    state = ours.state_dict()
    renamed = {}
    for key in theirs.state_dict():
        parts = key.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1").split(".")
        if parts[0] == "encoder":  # encoder.stages.i.layers.j.(layer.k | shortcut).(convolution | normalization).tensor
            block, norm = f"layer{int(parts[2]) + 1}.{parts[4]}", parts[-2] == "normalization"
            inner = f"downsample.{int(norm)}" if parts[5] == "shortcut" else f"{'bn' if norm else 'conv'}{int(parts[6]) + 1}"
            parts = [block, inner, parts[-1]]
        renamed[key] = state[".".join(parts)]
    theirs.load_state_dict(renamed, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        np.testing.assert_allclose(ours(x), theirs(x).pooler_output[:, :, 0, 0], rtol=1e-4, atol=1e-5)


# --- the list ---------------------------------------------------------------------------------------------------------
def test_every_entry_is_complete_and_leads_to_a_network():
    for name, known in weights.entries().items():
        assert known.title and known.remedy and known.licence, name
        assert known.normalise in features.NORMALISE and known.images in ("any", "chest")
        assert known.architecture is None or known.architecture in backbones.ARCHITECTURES
        assert known.sha256 is None or len(bytes.fromhex(known.sha256)) == 32
        assert known.crop <= known.size
        assert known.trained_on and isinstance(known.trained_on, tuple) and "" not in known.trained_on
    assert len(weights.entries()["xrv"].outputs) == 18
    with pytest.raises(ValueError, match="unknown extractor 'vgg'; known: lite0, inception"):
        weights.weight_file("vgg")


def test_listing_says_what_is_here(tmp_path):
    table = weights.listing(str(tmp_path))
    assert table["state"].to_dict() == dict.fromkeys(table.index, "not available") | {"lite0": "verified"}
    (tmp_path / weights.entries()["sex"].file).write_bytes(b"mine")
    expected = f"unverified, sha256 {hashlib.sha256(b'mine').hexdigest()[:12]}"
    assert weights.listing(str(tmp_path))["state"]["sex"] == expected


def test_an_incomplete_entry_is_named(tmp_path, monkeypatch):
    (tmp_path / "weights.yaml").write_text("mine: {title: Mine, colour: red}\n")
    monkeypatch.setattr(weights, "MANIFEST", tmp_path / "weights.yaml")
    with pytest.raises(ValueError, match="mine: keys .*'colour'.*'licence'"):
        weights.entries.__wrapped__()


def test_default_folder_lies_beside_the_notebooks_and_is_ignored_by_git(tmp_path):
    assert paths.weights_root() == paths.ROOT / "weights" and paths.weights_root(str(tmp_path)) == tmp_path
    assert "weights/" in (paths.ROOT / ".gitignore").read_text().split()


def test_another_file_of_a_judge_is_a_reason_to_run_06_and_no_other_notebook(tmp_path):
    folder = tmp_path / "mine"
    asked = Request("smoke", ("chest",), runs=str(tmp_path), overrides={"weights": str(folder)})
    every = {s.stage.name: s for s in stages.steps(stages.PROJECT, asked)}
    before = {name: step.inputs({}) for name, step in every.items()}
    folder.mkdir()
    (folder / "new.pt").write_bytes(b"new")
    after = {name: step.inputs({}) for name, step in every.items()}
    assert {n: [k for k in after[n] if after[n][k] != before[n].get(k)] for n in every if after[n] != before[n]} == {
        "06_metrics": ["files of judges"]}  # fmt: skip
    with pytest.raises(ValueError, match="unknown dataset 'weights'; known: .*chest"):
        stages.PROJECT.manifest("weights")


# --- loading ----------------------------------------------------------------------------------------------------------
PUBLISHED = {  # name -> key of our network -> key of the published file
    "inception": lambda k: k,
    "radimagenet": lambda k: "backbone." + k.replace("conv1.weight", "0.weight", k.startswith("conv1")).replace(
        "bn1", "1", k.startswith("bn1")).replace("layer4", "7").replace("layer3", "6").replace("layer2", "5").replace("layer1", "4"),
    "biovil": lambda k: k,
    "xrv": lambda k: k.removeprefix("net.").replace("layers.", "").replace("class_out", "classifier"),
    "sex": lambda k: "model." + k,
    "race": lambda k: "module." + k.replace("fc.", "fc.0."),
}  # fmt: skip


def published(name, seed=0):
    """Random weights of judge `name` in the layout of its published file, and the network that they belong to."""
    torch.manual_seed(seed)
    known = weights.entries()[name]
    build = backbones.ARCHITECTURES[known.architecture][0]
    net = build(known.outputs if isinstance(known.outputs, int) else len(known.outputs)).eval()
    state = {PUBLISHED[name](k.replace("class_layers.out", "class_out")): v for k, v in net.state_dict().items()}
    return state, net


@pytest.fixture
def without_hashes(monkeypatch):
    """The list as if nobody had seen any file, for files of random weights."""
    known = {n: replace(e, sha256=None) if n != "lite0" else e for n, e in weights.entries().items()}
    monkeypatch.setattr(weights, "entries", lambda: known)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_file_in_the_published_layout_gives_the_networks_features(name, tmp_path, without_hashes):
    state, net = published(name)
    known = weights.entries()[name]
    wrapped = {"state_dict": state, "epoch": 13} if name == "sex" else state  # a Lightning checkpoint
    torch.save(wrapped, tmp_path / known.file)
    images = np.random.default_rng(0).integers(0, 256, (2, 80, 80), dtype=np.uint8)
    size = 80 if name == "inception" else 64
    found = features.extract(images, name, size, folder=str(tmp_path))
    with torch.inference_mode():
        expected = net(features.prepare(images, size, known.normalise))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        if net.head is not None:
            logits = features.logits(found, name, str(tmp_path))
            np.testing.assert_allclose(logits, net.head(expected), rtol=1e-3, atol=1e-3)


def test_published_layouts_differ_from_ours_where_they_should():
    keys = {n: set(published(n)[0]) for n in ("radimagenet", "xrv", "race")}
    assert {"backbone.0.weight", "backbone.1.running_mean", "backbone.4.0.conv1.weight"} <= keys["radimagenet"]
    assert {"features.conv0.weight", "features.denseblock1.denselayer1.norm1.weight", "classifier.bias"} <= keys["xrv"]
    assert {"module.conv1.weight", "module.fc.0.weight"} <= keys["race"]


def test_a_safetensors_copy_is_taken_first_and_thresholds_may_stand_in_it(tmp_path, without_hashes):
    state, net = published("xrv")
    file = (tmp_path / weights.entries()["xrv"].file).with_suffix(".safetensors")
    save_file({k: v.contiguous() for k, v in state.items()} | {"op_threshs": torch.rand(18)}, file)
    (tmp_path / weights.entries()["xrv"].file).write_bytes(b"the published pickle")
    assert weights.weight_file("xrv", str(tmp_path)) == file
    loaded = features.load("xrv", str(tmp_path))
    assert torch.equal(loaded.head.weight, net.head.weight)


def test_wrong_bytes_keys_and_absent_files_are_named(tmp_path, without_hashes):
    folder, file = str(tmp_path), tmp_path / weights.entries()["sex"].file
    with pytest.raises(weights.NotAvailable, match="remedy: put mira_sex"):
        features.load("sex", folder)
    state, _ = published("sex")
    torch.save({k: v for k, v in state.items() if k != "model.fc.bias"}, file)
    with pytest.raises(ValueError, match=r"not a resnet34: .*Missing key.*fc\.bias"):
        features.load("sex", folder)
    torch.save(state | {"model.extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"Unexpected key.*extra"):
        features.load("sex", folder)


def test_a_listed_hash_must_match(tmp_path):
    (tmp_path / weights.entries()["biovil"].file).write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256 .* expected 118c4bb1"):
        weights.weight_file("biovil", str(tmp_path))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a stranger ran')",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript archive")
@pytest.mark.parametrize("kind", ["pickle", "torch", "module", "script", "text", "list"])
def test_files_that_hold_more_than_tensors_are_refused_not_run(kind, tmp_path):
    file = tmp_path / "judge.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    elif kind == "script":
        torch.jit.script(nn.Linear(2, 2)).save(file)
    elif kind == "text":
        file.write_text("not found")
    else:
        torch.save({"torch": {"a": torch.zeros(2), "b": Bomb()}, "module": nn.Linear(2, 2), "list": [torch.zeros(2)]}[kind], file)
    with pytest.raises(ValueError, match=r"judge\.pt: refused.*safetensors"):
        weights.state_dict(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_judge_that_is_not_built_in_says_so_of_the_users_own_file_too(tmp_path, suffix):
    file = (tmp_path / weights.entries()["age"].file).with_suffix(suffix)
    with pytest.raises(weights.NotAvailable, match="age judge.*is not available; remedy: none") as absent:
        features.load("age", str(tmp_path))
    assert weights.listing(str(tmp_path))["state"]["age"] == "not available" and "built in" not in absent.value.note
    save_file({"weight": torch.zeros(2)}, file)
    why = f"{file.name} is there, but its architecture is not built in"
    with pytest.raises(weights.NotAvailable, match=f"is not available: {why}; remedy: none") as present:
        features.load("age", str(tmp_path))
    assert present.value.note == f"not available: {why}; {weights.entries()['age'].remedy}"
    assert weights.listing(str(tmp_path))["state"]["age"] == f"not available: {why}"
