"""Pretrained dual encoders with random weights in the real layouts, saved by transformers and open_clip themselves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch

CAPTIONS = (
    "a dog", "Two children play on a swing in the garden.", "a man in a red coat, walking; his dog runs ahead!",
    "the quick brown fox jumps over the lazy dog", "sky", "a brown horse and a white cow stand on a green meadow",
)  # fmt: skip

#: Words to train small tokenizers on.
CORPUS = [*CAPTIONS, *(f"{size} {colour} {thing} number {n}" for n in range(12) for size in ("small", "large")
          for colour in ("red", "green", "blue") for thing in ("ball", "house", "bird"))]  # fmt: skip

#: Families in transformers' layout, and in open_clip's by the kind of its towers.
TRANSFORMERS = ("clip", "siglip", "siglip2", "naflex", "chinese_clip", "vision_text")
OPEN_CLIP = ("oc_vit", "oc_quickgelu", "oc_resnet", "oc_timm", "oc_cnn", "oc_siglip", "oc_hf")
FAMILIES = (*TRANSFORMERS, *OPEN_CLIP)

#: Widths of the two sizes: hidden, heads, layers, feed-forward, common space; pixels and patch.
SIZES = {"tiny": (32, 2, 2, 64, 24, 32, 8), "base": (768, 12, 12, 3072, 512, 224, 32)}


def make_pretrained(family: str, folder: Path, size: str = "tiny", seed: int = 0) -> Path:
    """A folder as the family's own library saves it: config, weights, tokenizer, preprocessing."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if family in OPEN_CLIP:
        _make_open_clip(family, folder, size)
    else:
        globals()[f"_make_{family}"](folder, size)
    return folder


def _randomise(model: Any) -> Any:
    """Weights of a size that lets every input through: libraries start some at zero, or next to it (He et al.,
    arXiv:1502.01852, for the scale)."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" in name:
                continue
            if parameter.ndim < 2:
                spread = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(spread + (1.0 if name.endswith(("weight", "gamma")) else 0.0))
            else:
                spread = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(spread / (parameter.numel() / len(parameter)) ** 0.5)
    return model


def _clip_merges() -> list[tuple[str, str]]:
    """CLIP's own merges, most frequent first, from the package open_clip."""
    import open_clip.tokenizer as tokenizer

    with gzip.open(tokenizer.default_bpe()) as file:
        lines = file.read().decode("utf-8").split("\n")
    return [(first, second) for first, second in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]


def clip_tokenizer(size: str = "tiny", max_length: int = 77) -> Any:
    """transformers' CLIP tokenizer: "base" with CLIP's own vocabulary of 49,408 tokens, "tiny" with its first 2,514,
    which loads in a twentieth of the time."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    merges = _clip_merges() if size == "base" else _clip_merges()[:2000]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _text_sizes(size: str, positions: int, vocab: int) -> dict[str, Any]:
    hidden, heads, layers, inner = SIZES[size][:4]
    if size == "base":
        hidden, heads, inner = 512, 8, 2048
    return {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": inner,
        "max_position_embeddings": positions, "vocab_size": vocab,
    }  # fmt: skip


def _vision_sizes(size: str) -> dict[str, Any]:
    hidden, heads, layers, inner, _, pixels, patch = SIZES[size]
    return {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": inner,
        "image_size": pixels, "patch_size": patch,
    }  # fmt: skip


def _make_clip(folder: Path, size: str) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer(size)
    text = _text_sizes(size, 77, len(tokenizer)) | {
        "eos_token_id": len(tokenizer) - 1, "bos_token_id": len(tokenizer) - 2, "pad_token_id": 1,
        "hidden_act": "quick_gelu",
    }  # fmt: skip
    config = CLIPConfig(
        text_config=text, vision_config=_vision_sizes(size) | {"hidden_act": "quick_gelu"},
        projection_dim=SIZES[size][4], logit_scale_init_value=4.6052,
    )  # fmt: skip
    _randomise(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = SIZES[size][5]
    CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}).save_pretrained(
        folder
    )


def _sentencepiece(folder: Path) -> Any:
    import sentencepiece
    from transformers import SiglipTokenizer

    corpus = folder / "corpus.tmp"
    corpus.write_text("\n".join(CORPUS).lower())
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, model_type="unigram", unk_id=2,
        eos_id=1, pad_id=0, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    for name in ("corpus.tmp", "spiece.vocab"):
        (folder / name).unlink()
    return SiglipTokenizer(
        str(folder / "spiece.model"), model_max_length=64, model_input_names=["input_ids"], pad_token="</s>"
    )


def _make_siglip(folder: Path, size: str) -> None:
    _make_fixed_siglip(folder, size, _sentencepiece(folder), 1)


def _make_siglip2(folder: Path, size: str) -> None:
    _make_fixed_siglip(folder, size, _gemma(), 0)


def _gemma() -> Any:
    """A tokenizer of SigLIP 2's class with a small vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import Siglip2Tokenizer

    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    model = json.loads(trained.to_str())["model"]
    tokenizer = Siglip2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=64,
        padding_side="right", model_input_names=["input_ids"],
    )  # fmt: skip
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def _make_fixed_siglip(folder: Path, size: str, tokenizer: Any, pad: int) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    hidden, pixels = SIZES[size][0], SIZES[size][5]
    text = _text_sizes(size, 64, max(len(tokenizer), 400)) | {
        "hidden_size": hidden, "num_attention_heads": SIZES[size][1], "intermediate_size": SIZES[size][3],
        "projection_size": hidden, "pad_token_id": pad, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    model = _randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=_vision_sizes(size))))
    _set_scale(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": pixels, "width": pixels}).save_pretrained(folder)


def _set_scale(model: Any) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(4.76)
        model.logit_bias.fill_(-16.5)


def _make_naflex(folder: Path, size: str) -> None:
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    hidden, heads, layers, inner, _, _, patch = SIZES[size]
    patch, patches = (8, 16) if size == "tiny" else (16, 256)
    vision = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": inner,
        "patch_size": patch, "num_patches": patches,
    }  # fmt: skip
    tokenizer = _gemma()
    text = _text_sizes(size, 64, max(len(tokenizer), 400)) | {
        "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner, "projection_size": hidden,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    model = _randomise(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)))
    _set_scale(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=patch, max_num_patches=patches).save_pretrained(folder)


def _bert_tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizer

    words = sorted({word for text in CORPUS for word in text.lower().replace(",", " ").replace(".", " ").split()})
    letters = list("abcdefghijklmnopqrstuvwxyz,.;!'-0123456789")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join([*tokens, *(word for word in words if word not in tokens)]))
    return BertTokenizer.from_pretrained(folder, model_max_length=128)


def _make_chinese_clip(folder: Path, size: str) -> None:
    from transformers import ChineseCLIPConfig, ChineseCLIPImageProcessor, ChineseCLIPModel

    tokenizer, pixels = _bert_tokenizer(folder), SIZES[size][5]
    config = ChineseCLIPConfig(
        text_config=_text_sizes(size, 512, 200 + len(tokenizer)),
        vision_config=_vision_sizes(size) | {"hidden_act": "quick_gelu"}, projection_dim=SIZES[size][4],
    )  # fmt: skip
    _randomise(ChineseCLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ChineseCLIPImageProcessor(size={"height": pixels, "width": pixels}, do_center_crop=False).save_pretrained(folder)


def _make_vision_text(folder: Path, size: str) -> None:
    from transformers import (
        BertConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    tokenizer, pixels = _bert_tokenizer(folder), SIZES[size][5]
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**_vision_sizes(size)), BertConfig(**_text_sizes(size, 128, 200 + len(tokenizer))),
        projection_dim=SIZES[size][4],
    )  # fmt: skip
    _randomise(VisionTextDualEncoderModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": pixels, "width": pixels}).save_pretrained(folder)


def _make_open_clip(family: str, folder: Path, size: str) -> None:
    import open_clip
    from safetensors.torch import save_file

    hidden, heads, layers, _, width, pixels, patch = SIZES[size]
    vision: dict[str, Any] = {
        "image_size": pixels, "layers": layers, "width": hidden, "head_width": hidden // heads, "patch_size": patch,
    }  # fmt: skip
    text: dict[str, Any] = {
        "context_length": 77, "vocab_size": 49408, "width": hidden, "heads": heads, "layers": layers,
    }  # fmt: skip
    config: dict[str, Any] = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}
    preprocess: dict[str, Any] = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic",
                                  "resize_mode": "shortest"}  # fmt: skip
    if family == "oc_quickgelu":
        config["quick_gelu"] = True
    if family == "oc_resnet":
        config["vision_cfg"] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    if family == "oc_timm":
        config["vision_cfg"] = {
            "timm_model_name": "test_vit2", "timm_pool": "", "timm_proj": "linear", "image_size": 160,
        }  # fmt: skip
    if family == "oc_cnn":
        config["vision_cfg"] = {
            "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160,
        }  # fmt: skip
    if family == "oc_siglip":
        config |= {"init_logit_bias": -10.0, "custom_text": True}
        text |= {
            "context_length": 64, "vocab_size": 400, "hf_tokenizer_name": "local", "no_causal_mask": True,
            "pool_type": "last", "proj_type": "none" if hidden == width else "linear", "proj_bias": True,
            "tokenizer_kwargs": {"clean": "canonicalize"},
        }  # fmt: skip
        preprocess |= {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
        _gemma().save_pretrained(folder)
    if family == "oc_hf":
        from transformers import BertConfig

        tokenizer = _bert_tokenizer(folder)
        tokenizer.save_pretrained(folder)
        inner = folder / "hf_text_config"
        inner.mkdir()
        BertConfig(**_text_sizes(size, 128, 200 + len(tokenizer)), pad_token_id=0).save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        config["text_cfg"] = {
            "hf_model_name": str(inner), "hf_tokenizer_name": "local", "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler", "context_length": 40, "hf_model_pretrained": False,
        }  # fmt: skip
    kwargs = {key: value for key, value in config.items() if key != "custom_text"}
    custom = family in ("oc_siglip", "oc_hf")
    model = _randomise((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**kwargs))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    if family == "oc_hf":
        config["text_cfg"]["hf_model_name"] = "bert-base-uncased"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
