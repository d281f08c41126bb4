"""Training steps of this project and of its rivals, over the same towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoders import save_encoder
from torch import nn


def open_train(data: str, folder: Path) -> Any:
    """The training split of a data set, or of drawn scenes."""
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.scene_dataset import write_scenes

    return read_captioned_images(data or write_scenes(folder / "scenes", 300)).split("train")


def our_step(
    folder: Path, train: Any, images: int, formats: tuple[torch.dtype, torch.dtype]
) -> tuple[Callable[[], Any], Any, int]:
    """A whole step of this project's on one batch; the step, and how many captions it has."""
    from clipvisionalign.data.batches import CaptionedBatches
    from clipvisionalign.models.aligner import Aligner, AlignerConfig
    from clipvisionalign.models.image_tower import ImageTowerConfig
    from clipvisionalign.models.text_tower import TextTowerConfig
    from clipvisionalign.training.contrastive import DualEncoderLoss, LossConfig
    from clipvisionalign.training.distributed import Distributed
    from clipvisionalign.training.fine_tuning import freeze, optimizer_groups
    from clipvisionalign.training.forward import PrecomputedFeatures, Towers
    from clipvisionalign.training.step import Step

    config = AlignerConfig(
        image_tower=ImageTowerConfig("resnet50", "random"),
        text_tower=TextTowerConfig(str(save_encoder("distilbert", folder))),
    )
    aligner = Aligner(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    freeze(aligner, "none", [])
    # The rivals train their word embeddings too.
    aligner.requires_grad_(True)
    aligner.train()
    step = Step(Towers(aligner, DualEncoderLoss(LossConfig()), formats), Distributed(torch.device("cpu")))
    rates = {"text_tower": 1e-5, "image_tower": 1e-5}
    groups = optimizer_groups(step.towers.named_parameters(), aligner, rates, 1e-4, 0.05, 1.0)
    optimizer = torch.optim.AdamW(groups, fused=True)
    tower = aligner.text_tower
    batches = CaptionedBatches(train, tower.tokenize, tower.pad, aligner.image_tower.image_transform.image_loader())
    batch = batches[(0, list(range(images)))]

    def work() -> None:
        with step.timings("all"):
            step.backward(batch, PrecomputedFeatures())
            nn.utils.clip_grad_norm_(step.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return work, step, len(batch.caption_image)


class PlainModel(nn.Module):
    """The model of small CLIP scripts: two towers, two linear heads."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        import timm
        import transformers

        self.images = timm.create_model("resnet50", num_classes=0)
        self.captions = transformers.AutoModel.from_pretrained(save_encoder("distilbert", folder))
        self.image_head, self.caption_head = nn.Linear(2048, 256), nn.Linear(768, 256)
        self.scale = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states = self.captions(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        images = nn.functional.normalize(self.image_head(self.images(pixels)), dim=-1)
        captions = nn.functional.normalize(self.caption_head(states[:, 0]), dim=-1)
        return images, captions, self.scale.exp()


def open_clip_model(folder: Path) -> Any:
    """open_clip's classes around the same towers: its timm tower and its Hugging Face text encoder."""
    import open_clip
    import transformers
    from open_clip.hf_model import HFTextEncoder, arch_dict
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(timm_model_name="resnet50", timm_pool="avg", timm_proj="linear", image_size=224)
    model = open_clip.CustomTextCLIP(256, vision, CLIPTextCfg(layers=1))
    # Its table of widths does not know DistilBERT.
    arch_dict.setdefault("distilbert", {"config_names": {"width": "hidden_size"}, "pooler": "mean_pooler"})
    config = transformers.AutoConfig.from_pretrained(save_encoder("distilbert", folder))
    model.text = HFTextEncoder("", 256, config, "mean_pooler", "linear", pretrained=False)
    return model


def rows(train: Any, images: int, folder: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row for each caption: pixels (M, 3, 224, 224), float32 and NCHW; ids (M, length), padded."""
    import transformers
    from torchvision import transforms

    transform = transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )
    from clipvisionalign.images import open_image

    some = train.rows[:images]
    pixels = torch.stack([transform(open_image(row.image)) for row in some for _ in row.captions])
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_encoder("distilbert", folder))
    captions = [caption for row in some for caption in row.captions]
    encoding = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return pixels, encoding["input_ids"]


def rival_step(
    model: nn.Module, loss: Callable[..., torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    """A step of a plain loop."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(*model(pixels, ids))
        value.backward()
        optimizer.step()

    return work


def plain_loss(images: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows against rows, as small scripts have it."""
    logits = scale * images @ captions.T
    target = torch.arange(len(logits))
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
