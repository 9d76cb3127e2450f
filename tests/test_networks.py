"""Networks of the classifiers: what they are made of, and the way in for ImageNet weights in torchvision's layout."""

import re

import pytest
import torch
from monai.networks.nets import DenseNet121
from safetensors.torch import save_file
from torch import nn

from compdiff import networks


@pytest.mark.parametrize("name", ["small", "small_vit", "densenet121", "efficientnet_lite0"])
def test_every_network_maps_grey_images_to_logits(name):
    torch.manual_seed(0)
    network = networks.build(name, 7, 64, 0.1).eval()
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert network(x).shape == (2, 7) and not torch.equal(network(x)[0], network(x)[1])
        assert network(x[..., :32, :32]).shape == (2, 7)  # images smaller than in training
    assert name in networks.TITLES


def test_vit_b_has_its_published_size():
    with torch.device("meta"):
        network = networks.build("vit_b", 1000, 224)
    colours = 2 * 16 * 16 * 768  # the published one has three input channels
    assert sum(p.numel() for p in network.parameters()) + colours == 86_567_656


def test_unknown_network_raises():
    with pytest.raises(ValueError, match="unknown network 'resnet'; known: small"):
        networks.build("resnet", 1, 64)


def test_drop_path_drops_whole_images_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = networks.DropPath(0.25), torch.ones(4000, 3, 2)
    y = drop(x)
    assert y.unique().tolist() == [0, pytest.approx(4 / 3)] and (y.flatten(1).std(1) == 0).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(drop.eval()(x), x)


def test_a_vits_branches_are_dropped_more_with_depth():
    network = networks.build("small_vit", 2, 32, 0.3)
    rates = [m.p for m in network.modules() if isinstance(m, networks.DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    x = torch.rand(8, 1, 32, 32)
    assert not torch.equal(network.train()(x), network(x)) and torch.equal(network.eval()(x), network(x))


def test_layer_decay_slows_the_lower_layers():
    network = networks.build("small_vit", 2, 32)
    groups = networks.parameter_groups(network, 1.0, 0.5)
    assert [g["lr"] for g in groups] == [2.0**-k for k in (5, 4, 3, 2, 1, 0)]  # embeddings, four layers, the rest
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    patches, last = network.body.embeddings.patch_embeddings.projection.weight, network.out.weight
    assert any(p is patches for p in groups[0]["params"]) and any(p is last for p in groups[5]["params"])
    assert [len(g["params"]) for g in networks.parameter_groups(nn.Linear(2, 2), 0.1, 0.5)] == [2]


# --- ImageNet start ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def published():
    """A random DenseNet-121 for colour images, and its weights under torchvision's names."""
    torch.manual_seed(0)
    network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000).eval()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    renamed = {k.replace(".layers.", "."): v for k, v in network.state_dict().items()}
    plain = {k.replace("class_layers.out", "classifier"): v for k, v in renamed.items()}
    assert {"features.conv0.weight", "features.norm0.running_mean", "features.denseblock1.denselayer1.conv1.weight",
            "features.denseblock4.denselayer16.norm2.running_var", "features.transition3.conv.weight",
            "features.norm5.bias", "classifier.weight"} <= set(plain) and len(plain) == 727  # fmt: skip
    return network, plain


@pytest.mark.parametrize("layout", ["new.pth", "old.pth", "new.safetensors"])
def test_a_file_in_torchvisions_layout_is_a_start(published, tmp_path, layout):
    network, state = published
    if layout.startswith("old"):  # torchvision's files of 2017: norm.1 for norm1, no counters
        state = {k: v for k, v in state.items() if "num_batches" not in k}
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in state.items()}
    file = tmp_path / layout
    (save_file if file.suffix == ".safetensors" else torch.save)({k: v.contiguous() for k, v in state.items()}, file)
    weights, note = networks.imagenet_start("densenet121", str(file))
    assert note.startswith(f"DenseNet-121, ImageNet start ({layout}, sha256 ")
    ours = networks.build("densenet121", 5, 64).eval()
    done = ours.load_state_dict(weights, strict=False)
    assert set(done.missing_keys) == {"class_layers.out.weight", "class_layers.out.bias"} and not done.unexpected_keys
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        theirs = network.features(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(ours.features(grey), theirs, rtol=1e-3, atol=1e-4)


def test_a_file_in_another_layout_or_absent_is_refused(published, tmp_path):
    _, state = published
    torch.save({k: v for k, v in state.items() if "denseblock3" not in k}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="weights missing or odd, first features.denseblock3"):
        networks.imagenet_start("densenet121", str(tmp_path / "part.pth"))
    with pytest.raises(ValueError, match="gone.pth: no such file"):
        networks.imagenet_start("densenet121", str(tmp_path / "gone.pth"))


def test_code_in_a_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"features.conv0.weight": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        networks.imagenet_start("densenet121", str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()


def test_without_a_file_the_note_says_what_the_start_is():
    weights, note = networks.imagenet_start("densenet121", "")
    assert weights is None and "trained from scratch" in note and "not available; remedy: IMAGENET=" in note
    assert networks.imagenet_start("small", "anything") == (None, "small CNN, from scratch")
