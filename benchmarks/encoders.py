"""Text encoders with random weights in their published layouts, and tokens for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

#: Tokens that a sliding window has on each side.
WINDOW = 64


def save_encoder(kind: str, folder: Path) -> Path:
    """An encoder of its published size in transformers' layout; the tokenizer is MiniLM's, none is needed here."""
    import transformers

    from clipvisionalign.models.text_weights import find_text_folder

    target = folder / kind
    if not target.exists():
        torch.manual_seed(0)
        if kind == "longformer":
            shape: Any = transformers.LongformerConfig(
                vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1, layer_norm_eps=1e-5,
                attention_window=512, pad_token_id=1,
            )  # fmt: skip
        elif kind == "distilbert":
            shape = transformers.DistilBertConfig()
        else:
            shape = transformers.AutoConfig.from_pretrained(find_text_folder("all-MiniLM-L6-v2"))
        model = transformers.AutoModel.from_config(shape)
        # Biases start at zero, where a difference about them would not show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(find_text_folder("all-MiniLM-L6-v2")).save_pretrained(target)
    return target


def tower(kind: str, folder: Path, attention: str = "dense") -> Any:
    """The text tower over such an encoder."""
    from clipvisionalign.models.packed_linear import pack_linears
    from clipvisionalign.models.text_tower import TextTower, TextTowerConfig

    source = str(save_encoder(kind, folder))
    encoder = TextTower(TextTowerConfig(source, attention=attention, window=WINDOW, max_tokens=4096)).eval()
    # As `load_aligner` does with all that it loads.
    pack_linears(encoder)
    return encoder


def rival_longformer(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.LongformerModel.from_pretrained(save_encoder("longformer", folder)).eval()


def tokens(
    batch: int, length: int, lengths: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, and the first token as the only global one: (B, T) each."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 30000, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if lengths is not None:
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        ids = ids.masked_fill(mask == 0, 1)
    first = torch.zeros_like(ids)
    first[:, 0] = 1
    return ids, mask, first
