"""The first blocks of an image tower as they are, their outputs on disk, the others trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_going_on
import timm
import torch
from test_going_on import assert_same, cut_off, silent, undisturbed
from tolerance import assert_rounds_to

from clipvisionalign import load_aligner, read_captioned_images
from clipvisionalign.log import log_to
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.aligner_config import AlignerConfig
from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
from clipvisionalign.training import feature_cache, precision
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.feature_cache import augmentation_views, open_image_features, tower_fingerprint
from clipvisionalign.training.fine_tuning import freeze, set_train_mode
from clipvisionalign.training.ineffective_settings import ineffective_settings
from clipvisionalign.training.train import resume
from clipvisionalign.training.trainer import Trainer

settings = test_going_on.settings

#: One of each kind, with its number of blocks.
BACKBONES = {
    "tf_efficientnet_lite0": 7, "mobilenetv3_small_050": 6, "test_efficientnet": 5, "test_resnet": 4, "test_vit": 6,
    "vit_tiny_patch16_224": 12, "deit_tiny_distilled_patch16_224": 12,
}  # fmt: skip


def tower_of(name: str, size: int = 0) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(ImageTowerConfig(name, weights="random", size=size)).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_both_parts_one_after_the_other_are_the_tower(name):
    tower = tower_of(name)
    count = len(tower.parts().blocks)
    assert count == BACKBONES[name]
    pixels = tower.image_transform.random_pixels(2)
    with torch.no_grad():
        whole = tower(pixels)
        for blocks in (1, count // 2, count):
            divided = tower(tower.early_features(pixels, blocks))
            assert torch.equal(divided.pooled, whole.pooled)
            assert torch.equal(divided.patches, whole.patches)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_early_parameters_are_those_that_the_first_blocks_depend_on(name):
    tower = tower_of(name)
    features = tower.early_features(tower.image_transform.random_pixels(2), 2).features
    (features * torch.randn_like(features)).sum().backward()
    early = {id(each) for each in tower.parts().early_parameters(2)}
    assert early == {id(each) for each in tower.parameters() if each.grad is not None}
    # Whatever of them changes, the outputs that are kept are other ones.
    before = tower_fingerprint(tower, 2)
    for each in tower.parts().early_parameters(2):
        with torch.no_grad():
            each.flatten()[0].add_(1)
        assert tower_fingerprint(tower, 2) != before
        before = tower_fingerprint(tower, 2)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_a_backbone_that_is_not_divided_is_named(name):
    with pytest.raises(ValueError, match=f"--freeze_blocks: {name} is not divided into blocks"):
        tower_of(name).parts()


def test_every_backbone_that_is_divided_computes_the_same_in_parts():
    """All of timm's small ones: a division is taken only where it is right."""
    divided = 0
    for name in timm.list_models("test_*"):
        try:
            tower = tower_of(name)
            parts = tower.parts()
        except ValueError:
            continue
        pixels = tower.image_transform.random_pixels(1)
        with torch.no_grad():
            assert torch.equal(tower(tower.early_features(pixels, 1)).patches, tower(pixels).patches), name
        divided += bool(parts.blocks)
    assert divided >= 5


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("augment", ["none", "flip+crop"])
def test_what_is_kept_goes_on_as_pixels_do(name, augment, tmp_path, scenes_folder):
    tower = tower_of(name, 32)
    data = read_captioned_images(scenes_folder).split("dev")
    views = augmentation_views(augment, 2)
    cached = open_image_features(tmp_path, data, tower, views, torch.float32, "dev", 2)
    whole = open_image_features(tmp_path, data, tower, views, torch.float32, "dev")
    assert cached.views == whole.views == len(views)
    index = torch.tensor([3, 0, 5])
    for view in range(len(views)):
        early, expected = (each(index, torch.full((3,), view), torch.device("cpu")) for each in (cached, whole))
        with torch.no_grad():
            ours = tower(early)
        for one, other in zip(ours, expected, strict=True):
            # In float16 before the last blocks, or behind them.
            assert_rounds_to(one, other, 4, size=float(other.abs().max()), dtype=torch.float16)
    # Other weights behind the blocks are other features of the whole tower, and the same ones of the blocks.
    with torch.no_grad():
        for module in tower.parts().blocks[2:]:
            for parameter in module.parameters():
                parameter.add_(0.1)
    again = [open_image_features(tmp_path, data, tower, views, torch.float32, "dev", blocks) for blocks in (2, 0, 1)]
    assert again[0].folder == cached.folder
    assert whole.folder != again[1].folder
    assert again[2].folder != cached.folder
    with torch.no_grad():
        next(iter(tower.parts().early_parameters(2))).add_(0.1)
    changed = open_image_features(tmp_path, data, tower, views, torch.float32, "dev", 2)
    assert changed.folder != cached.folder


@pytest.mark.parametrize("blocks", [0, 2])
def test_outputs_beyond_half_precision_are_refused_and_not_kept_as_infinity(blocks, tmp_path, scenes_folder):
    tower = tower_of("test_resnet", 32)
    data = read_captioned_images(scenes_folder).split("dev")
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 1e5)
    with pytest.raises(ValueError, match="above 65,504, the largest number that is kept on disk: give --cache off"):
        open_image_features(tmp_path, data, tower, augmentation_views("none", 1), torch.float32, "dev", blocks)
    assert not list((tmp_path / "features").iterdir())


def test_what_is_frozen_has_no_gradient_and_gathers_no_statistics(tiny_model):
    model = tiny_model()
    aligner = Aligner(replace(model, image_tower=replace(model.image_tower, name="test_resnet", size=32)))
    freeze(aligner, "none", [], 2)
    set_train_mode(aligner, "none", 2)
    tower = aligner.image_tower
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower(tower.image_transform.random_pixels(4)).pooled.square().sum().backward()
    parts = tower.parts()
    early = {id(each) for module in parts.early_modules(2) for each in (*module.parameters(), *module.buffers())}
    assert early
    for name, each in (*tower.named_parameters(), *tower.named_buffers()):
        is_early = id(each) in early
        if isinstance(each, torch.nn.Parameter):
            assert (each.grad is None) == is_early, name
        elif "running_mean" in name:
            assert torch.equal(each, before[name]) == is_early, name


@pytest.mark.parametrize(("name", "blocks"), [("mobilenetv3_small_050", 6), ("test_resnet", 4), ("test_vit", 6)])
def test_the_dtype_is_timed_for_what_is_trained_whatever_that_is(name, blocks, tiny_model):
    model = tiny_model()
    model = replace(model, image_tower=replace(model.image_tower, name=name, size=32))
    for frozen in (0, blocks):
        config = RunConfig(model=model, freeze="none", freeze_blocks=frozen, precision="auto")
        aligner = Aligner(model)
        freeze(aligner, "none", [], frozen)
        known = len(precision._CHOSEN_DTYPES)
        dtypes = precision.choose_dtypes(config, aligner, None)
        assert frozen or dtypes.kept_blocks == dtypes.image
        # Other blocks are another work.
        assert len(precision._CHOSEN_DTYPES) == known + 1


def test_blocks_that_are_kept_have_the_dtype_that_is_fastest_forward(tiny_model, monkeypatch):
    model = tiny_model()
    config = RunConfig(model=model, freeze="none", freeze_blocks=2, precision="auto")
    aligner, timed = Aligner(model), []
    freeze(aligner, "none", [], 2)

    def dtype_by_gradients(device, work, given, small_work):
        grads = []
        monkeypatch.setattr(torch.Tensor, "backward", lambda self: grads.append(1))
        work(), small_work()
        timed.append(len(grads))
        return torch.float32 if grads else torch.bfloat16

    monkeypatch.setattr(precision, "fastest_dtype", dtype_by_gradients)
    monkeypatch.setattr(precision, "_CHOSEN_DTYPES", {})
    dtypes = precision.choose_dtypes(config, aligner, None)
    assert (timed, dtypes) == ([2, 2, 0], (torch.float32, torch.float32, torch.bfloat16))
    assert precision.choose_dtypes(config, aligner, {"precision": ["float32", "bfloat16", "bfloat16"]}) == (
        torch.float32, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip
    # A checkpoint of before: they were computed in the tower's dtype.
    assert precision.choose_dtypes(config, aligner, {"precision": ["float32", "bfloat16"]}).kept_blocks is torch.float32


@pytest.fixture
def half(settings):
    """Settings of a tiny run of which the image tower's last blocks are trained."""

    def make(name: str, **more: object) -> RunConfig:
        config = settings(name, **{"freeze_blocks": 2, "augment": "flip+crop", "views": 3, **more})
        model = config.model
        return replace(
            config, model=replace(model, image_tower=replace(model.image_tower, name="test_resnet", size=32))
        )

    return make


MORE = {
    "kept": {"freeze": "none"},
    "not kept": {"freeze": "none", "cache": "off"},
    "late": {"freeze": "none", "design": "late"},
    "text frozen": {"freeze": "text"},
    "stages": {"stages": "heads:1,all:1", "epochs": RunConfig().epochs},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_run_that_is_cut_off_ends_as_the_undisturbed_one_and_its_first_blocks_as_they_were(name, half, monkeypatch):
    config = half(f"whole {name}", **MORE[name])
    undisturbed(config)
    stopped = replace(config, out=f"{config.out} stopped")
    cut_off(stopped, monkeypatch, before=5)
    resume(stopped.out, silent)
    assert_same(stopped.out, config.out)
    trained = load_aligner(config.out).image_tower
    parts = trained.parts()
    # Statistics of a tower at random begin at zero, and those of its first blocks stay there.
    early, late = (
        [module for part in some for module in part.modules() if hasattr(module, "running_mean")]
        for some in (parts.early_modules(2), parts.blocks[2:])
    )
    assert early
    assert late
    assert not any(module.running_mean.any() or module.num_batches_tracked for module in early)
    assert all(module.running_mean.any() for module in late)


@pytest.mark.slow
def test_no_image_is_opened_again_and_one_that_is_cut_short_is_counted(half, scenes_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(scenes_folder, tmp_path / "scenes"))
    image = test_going_on.training_images(folder)[5]
    image.write_bytes(image.read_bytes()[:-200])
    config = half("", data=str(folder), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    undisturbed(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images_left_out"] == config.epochs
    monkeypatch.setattr(feature_cache, "_compute", lambda *given: pytest.fail("features are computed again"))
    undisturbed(replace(config, out=str(tmp_path / "again")))
    assert_same(tmp_path / "run", tmp_path / "again")


def lines_of(config: RunConfig) -> list[str]:
    """What the setup of a run logs of its towers."""
    lines: list[str] = []
    with log_to(lines.append), Trainer(config):
        pass
    return [line for line in lines if line.startswith(("image tower", "text tower"))]


@pytest.mark.parametrize("frozen", ["blocks", "image", "both"])
def test_what_is_frozen_and_kept_is_logged_with_its_folder_and_size(frozen, half, tmp_path):
    more = {"blocks": {"freeze": "none"}, "image": {"freeze": "image"}, "both": {"freeze": "both", "design": "late"}}
    config = half("", **more[frozen], out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    lines = lines_of(config)
    data = read_captioned_images(config.data)
    dev = data.split("dev")
    captions = len(data.split("train").first_by_hash(48).captions)

    def size(kind: str) -> str:
        files = list((tmp_path / "cache" / kind).rglob("*.npy"))
        # Without the head of each file.
        size = sum(np.load(each, mmap_mode="r").nbytes for each in files)
        assert size
        return f"{size / 2**20:.1f} MiB"

    what = "first 2 of 4 blocks frozen" if frozen == "blocks" else "frozen"
    expected = [
        f"image tower: {what}; 3 views of 48 train images and 1 view of {len(dev)} dev images kept in "
        f"{tmp_path / 'cache' / 'features'} ({size('features')})"
    ]
    if frozen == "both":
        expected.append(
            f"text tower: frozen; outputs of {captions} train captions and {len(dev.captions)} dev captions kept in "
            f"{tmp_path / 'cache' / 'captions'} ({size('captions')})"
        )
    assert lines == expected


def test_blocks_whose_outputs_are_not_kept_are_logged_as_frozen_too(half, tmp_path):
    own = {"freeze": "none", "cache": "off"}
    assert lines_of(half("", **own, out=str(tmp_path / "blocks"))) == [
        "image tower: first 2 of 4 blocks frozen; their outputs are not kept: images pass through them in every step"
    ]
    assert not lines_of(half("", **own, freeze_blocks=0, out=str(tmp_path / "none")))


def test_settings_that_do_not_fit_are_named_and_those_without_effect_too(tiny_model):
    def refused(match: str, **more: object) -> None:
        with pytest.raises(ValueError, match=match):
            check_settings(RunConfig(data="scenes", freeze="none", **more))

    refused("--freeze_blocks should be at least 0, not -1", freeze_blocks=-1)
    refused("--freeze_blocks is for an image tower by timm", freeze_blocks=2, model=AlignerConfig(pretrained="a/b"))
    lora = RunConfig().lora
    refused("and --peft lora all of it", freeze_blocks=2, peft="lora", lora=replace(lora, towers="image"))
    model = tiny_model()
    aligner = Aligner(replace(model, image_tower=replace(model.image_tower, name="test_resnet", size=32)))
    with pytest.raises(ValueError, match="--freeze_blocks 5: test_resnet has 4; --freeze image freezes all"):
        freeze(aligner, "none", [], 5)
    whole = RunConfig(freeze="image", freeze_blocks=2)
    assert any("freeze_blocks" in line and "frozen as a whole" in line for line in ineffective_settings(whole))
    assert not any("freeze_blocks" in line for line in ineffective_settings(replace(whole, freeze="none")))
    # Views are of what is kept.
    views = RunConfig(freeze="none", views=2)
    assert any("--views" in line for line in ineffective_settings(views))
    assert not any("--views" in line for line in ineffective_settings(replace(views, freeze_blocks=1)))
