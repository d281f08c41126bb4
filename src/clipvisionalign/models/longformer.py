"""Longformer with the outputs of the published one, at a cost that grows with the captions instead of their padding.

Reads the layout of transformers' `LongformerModel` (Beltagy, Peters and Cohan, arXiv:2004.05150) and gives the same
outputs and gradients:

- No sequence is padded to a multiple of the window. One that lies inside a window is dense attention; a longer one runs
  in bands (`attention.py`).
- A global token's query meets keys and values of their own projections. Those two projections are moved to the query's
  side of the product: (q Wq)(x Wk)^T = (q Wq Wk^T) x^T, and the softmax of one query is the same whatever constant the
  key's bias adds. For one global token that is H rows of products instead of T.
- Query, key and value of the window are one matrix product.
- If only the first token's vector is asked for, the last layer computes that row alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.models.attention import (
    attention,
    find_global_positions,
    is_global,
    join_heads,
    scatter_rows,
    split_heads,
)
from clipvisionalign.models.dropout import Dropout, drop
from clipvisionalign.models.weight_files import read_tensors, weights_files


class LongformerAttention(nn.Module):
    """Self attention of one layer: windows, and global tokens with projections of their own.

    Args:
        width: W, width of a token.
        heads: Number of attention heads.
        window: Number of neighbouring tokens, half of them on either side.
        dropout: Share of the attention weights that is dropped during training.
    """

    def __init__(self, width: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.window, self.dropout = heads, window, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.query_global = nn.Linear(width, width)
        self.key_global = nn.Linear(width, width)
        self.value_global = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None, global_positions: Tensor | None, first_only: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, W).
            mask: (B, T) true on tokens, false on padding; None without padding.
            global_positions: (B, G) positions of global tokens, -1 where a sequence has fewer; None for none.
            first_only: Whether the output of the first token alone is computed.

        Returns:
            (B, T, W), 0 on padding; or (B, 1, W).
        """
        dropout = self.dropout if self.training else 0.0
        if first_only:
            return self._first_row(x, mask, global_positions, dropout)
        q, k, v = (split_heads(part, self.heads) for part in self.query_key_value(x).chunk(3, dim=-1))
        out = attention(q, k, v, mask, self.window, global_positions, dropout)
        if global_positions is not None:
            out = scatter_rows(out, self._global_rows(x, mask, global_positions, dropout), global_positions)
        out = join_heads(out)
        # A padded token attends to nothing; transformers has zeros there.
        return out if mask is None else out * mask[..., None].to(out.dtype)

    def _first_row(self, x: Tensor, mask: Tensor | None, global_positions: Tensor | None, dropout: float) -> Tensor:
        if global_positions is not None and bool((global_positions[:, 0] == 0).all()):
            return join_heads(self._global_rows(x, mask, global_positions[:, :1], dropout))
        width = x.shape[-1]
        weight, bias = self.query_key_value.weight, self.query_key_value.bias
        q = F.linear(x[:, :1], weight[:width], bias[:width])
        k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        # The first token's window, its half to the right, and the global tokens wherever they stand.
        attention_mask = torch.arange(x.shape[1], device=x.device) <= self.window // 2
        attention_mask = attention_mask[None].expand(len(x), -1)
        if global_positions is not None:
            attention_mask = attention_mask | is_global(global_positions, x.shape[1])
        if mask is not None:
            attention_mask = attention_mask & mask
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        out = attention(q, k, v, attention_mask, dropout=dropout)
        if global_positions is not None:
            # Where the first token is global after all, its own row is the global one.
            out = scatter_rows(
                out,
                self._global_rows(x, mask, global_positions, dropout),
                global_positions.masked_fill(global_positions > 0, -1),
            )
        return join_heads(out)

    def _global_rows(self, x: Tensor, mask: Tensor | None, global_positions: Tensor, dropout: float) -> Tensor:
        """What the global tokens get, (B, H, G, d): they see all tokens, through their own projections."""
        index = global_positions.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
        q = split_heads(self.query_global(x.gather(1, index)), self.heads)
        head = q.shape[-1]
        if global_positions.shape[1] >= head:
            k, v = split_heads(self.key_global(x), self.heads), split_heads(self.value_global(x), self.heads)
            return attention(q, k, v, mask, dropout=dropout)
        to_keys = self.key_global.weight.unflatten(0, (self.heads, head))
        queries = torch.einsum("bhgd,hdw->bhgw", q * head**-0.5, to_keys.to(q.dtype))
        scores = queries.flatten(1, 2) @ x.transpose(1, 2).to(q.dtype)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        shares = drop(scores.softmax(dim=-1), dropout).to(q.dtype)
        mixed = (shares @ x.to(q.dtype)).unflatten(1, (self.heads, -1))
        to_values = self.value_global.weight.unflatten(0, (self.heads, head))
        # What dropout left of the shares may not sum to 1, and the bias is shared out with them.
        bias = shares.sum(dim=-1, keepdim=True).unflatten(1, (self.heads, -1))
        bias = bias * self.value_global.bias.unflatten(0, (self.heads, 1, head))
        return torch.einsum("bhgw,hdw->bhgd", mixed, to_values.to(q.dtype)) + bias.to(q.dtype)


class LongformerLayer(nn.Module):
    """Attention and feed-forward part, each followed by its norm.

    Args:
        config: A LongformerConfig of transformers, or anything with its names.
        window: Number of neighbouring tokens that a token attends to.
    """

    def __init__(self, config: Any, window: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = LongformerAttention(
            width, config.num_attention_heads, window, config.attention_probs_dropout_prob
        )
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.activation = _activation(config.hidden_act)

    def forward(
        self, x: Tensor, mask: Tensor | None, global_positions: Tensor | None, first_only: bool = False
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: (B, T, W).
            mask: As in `LongformerAttention.forward`.
            global_positions: As in `LongformerAttention.forward`.
            first_only: As in `LongformerAttention.forward`.

        Returns:
            (B, T, W), or (B, 1, W).
        """
        attended = self.dropout(self.attention_out(self.attention(x, mask, global_positions, first_only)))
        x = self.attention_norm(attended + (x[:, :1] if first_only else x))
        return self.norm(self.dropout(self.down(self.activation(self.up(x)))) + x)


class LongformerEmbeddings(nn.Module):
    """Words, positions and token types. Positions count the tokens that are no padding, from RoBERTa's offset on.

    Args:
        config: A LongformerConfig of transformers, or anything with its names.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=self.pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width, padding_idx=self.pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed tokens.

        Args:
            ids: (B, T) token ids.

        Returns:
            (B, T, W).
        """
        is_token = (ids != self.pad).long()
        positions = is_token.cumsum(dim=1) * is_token + self.pad
        x = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class Longformer(nn.Module):
    """Longformer's encoder.

    Args:
        config: A LongformerConfig of transformers, or anything with its names.

    Raises:
        ValueError: A window is odd, or not given for each layer.

    Source: Beltagy, Peters and Cohan, "Longformer", arXiv:2004.05150.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        layers = config.num_hidden_layers
        windows = config.attention_window
        windows = [windows] * layers if isinstance(windows, int) else list(windows)
        if len(windows) != layers or any(window < 2 or window % 2 for window in windows):
            raise ValueError(
                f"attention_window should be an even number, or one for each of {layers} layers: {windows}"
            )
        self.config = config
        self.embeddings = LongformerEmbeddings(config)
        self.layers = nn.ModuleList(LongformerLayer(config, window) for window in windows)
        #: Dense and tanh over the first token, as published; the projection heads of an aligner do without it.
        self.pooler: nn.Linear | None = nn.Linear(config.hidden_size, config.hidden_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: Any = None) -> Longformer:
        """The model of a folder in transformers' layout.

        Args:
            folder: config.json, and safetensors or PyTorch weights; no pickle is loaded.
            config: A config to use instead of the folder's; None for that.

        Returns:
            The model, in training mode as every new module.

        Raises:
            WeightsNotFound: There are no weights.
            ValueError: A tensor is missing, unknown, or of another shape.
        """
        if config is None:
            import transformers

            config = transformers.LongformerConfig.from_pretrained(folder, local_files_only=True)
        model = cls(config)
        files = weights_files(Path(folder))
        tensors = {name: tensor for path in files for name, tensor in read_tensors(path).items()}
        model.load_published(tensors, str(files[0]))
        return model

    def load_published(self, tensors: Mapping[str, Tensor], source: str = "weights") -> None:
        """Load tensors under transformers' names; without the pooler's the model has no pooler.

        Args:
            tensors: Tensors by name; those of other heads are ignored.
            source: Where they are from, for messages.

        Raises:
            ValueError: A tensor is missing, unknown, or of another shape.
        """
        state = {}
        for name, tensor in _merge_projections(tensors).items():
            local_name = _local_name(name)
            if local_name is not None:
                state[local_name] = tensor
        if self.pooler is not None and "pooler.weight" not in state:
            self.pooler = None
        if self.pooler is None:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
        expected = self.state_dict()
        unknown = [name for name in state if name not in expected]
        missing = [name for name in expected if name not in state]
        if unknown or missing:
            raise ValueError(f"{source}: not a Longformer of this config: missing {missing[:3]}, unknown {unknown[:3]}")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{source}: not a Longformer of this config: {str(error).splitlines()[1].strip()}"
            ) from None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights as transformers draws them."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings.

        Returns:
            (vocabulary, W).
        """
        return self.embeddings.word_embeddings

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """The last hidden states.

        Args:
            ids: (B, T) token ids.
            mask: (B, T) 1 on tokens, 0 on padding; None without padding.
            global_attention_mask: (B, T) 1 on global tokens; None for none.
            first_only: Whether the state of the first token alone is computed.

        Returns:
            (B, T, W); or (B, 1, W).

        Raises:
            ValueError: There are more tokens than positions.
        """
        max_tokens = self.config.max_position_embeddings - self.embeddings.pad - 1
        if ids.shape[1] > max_tokens:
            raise ValueError(f"{ids.shape[1]} tokens, but this Longformer has positions for {max_tokens}")
        token_mask = None if mask is None or bool(mask.all()) else mask.bool()
        global_positions = None
        if global_attention_mask is not None:
            global_positions = find_global_positions(
                global_attention_mask.bool() if token_mask is None else global_attention_mask.bool() & token_mask
            )
        x = self.embeddings(ids)
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, token_mask, global_positions, first_only and number == len(self.layers))
        return x

    def pool(self, states: Tensor) -> Tensor:
        """The published pooler.

        Args:
            states: (B, T, W) last hidden states.

        Returns:
            (B, W).

        Raises:
            ValueError: The weights came without a pooler.
        """
        if self.pooler is None:
            raise ValueError("this Longformer has no pooler: its weights came without one")
        return torch.tanh(self.pooler(states[:, 0]))


def _activation(name: str) -> nn.Module:
    import transformers.activations

    return nn.GELU() if name == "gelu" else transformers.activations.ACT2FN[name]


#: transformers' names of a layer's parts, and ours.
_LAYER_NAMES = {
    "attention.self.query_key_value": "attention.query_key_value",
    "attention.self.query_global": "attention.query_global",
    "attention.self.key_global": "attention.key_global",
    "attention.self.value_global": "attention.value_global",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


def _merge_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each window as one tensor; the names without the model's own prefix."""
    plain = {name.removeprefix("longformer."): tensor for name, tensor in tensors.items()}
    merged = {}
    for name, tensor in plain.items():
        if ".self.query." in name:
            parts = [plain.get(name.replace(".self.query.", f".self.{part}.")) for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                merged[name.replace(".query.", ".query_key_value.")] = torch.cat(parts)  # type: ignore[arg-type]
        elif ".self.key." not in name and ".self.value." not in name:
            merged[name] = tensor
    return merged


def _local_name(name: str) -> str | None:
    """Our name of a published tensor; None for those of heads that are not the encoder's, and for buffers."""
    if name.startswith("embeddings."):
        return None if name.endswith("position_ids") else name
    if name.startswith("pooler.dense."):
        return name.replace("pooler.dense.", "pooler.")
    if not name.startswith("encoder.layer."):
        return None
    number, _, rest = name.removeprefix("encoder.layer.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"layers.{number}.{_LAYER_NAMES.get(part, part)}.{kind}"
