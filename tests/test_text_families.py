"""Every family of transformers' text encoders: read as transformers reads it, or refused by name in one line.

docs/models.md has these lists as a table; a test holds the two together.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_as_exact, assert_same, in_float64
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast

from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.text_families import BERT_FAMILY, check_encoder, max_positions
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig

#: Rows of each encoder's table of positions, and tokens of its vocabulary.
ROWS, WORDS = 40, 96

SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": ROWS, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
ALONE: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 1, "initializer_range": 0.3}
GPT = ALONE | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": ROWS, "bos_token_id": 0, "eos_token_id": 2}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
DEBERTA = SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
XLM = ALONE | {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": ROWS}

#: Families that are read as transformers reads them, and settings of a small one.
READ: dict[str, dict[str, Any]] = {
    "albert": SMALL | {"embedding_size": 16},
    "bert": SMALL,
    "bert-generation": SMALL,
    "big_bird": SMALL | {"block_size": 4, "num_random_blocks": 1},
    "camembert": SMALL,
    "data2vec-text": SMALL,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA | {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "distilbert": ALONE
    | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": ROWS},
    "electra": SMALL | {"embedding_size": 16},
    "ernie": SMALL,
    "esm": SMALL | {"mask_token_id": 4, "position_embedding_type": "absolute"},
    "eurobert": GROUPED,
    "flaubert": XLM,
    "gte": SMALL,
    "ibert": SMALL,
    "jina_embeddings_v3": SMALL,
    "layoutlm": SMALL,
    "longformer": SMALL | {"attention_window": 8},
    "luke": SMALL | {"entity_vocab_size": 10, "entity_emb_size": 32},
    "markuplm": SMALL | {"max_depth": 4},
    "megatron-bert": SMALL,
    "modernbert": SMALL | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpnet": SMALL,
    "nomic_bert": SMALL,
    "rembert": SMALL | {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": SMALL,
    "roberta-prelayernorm": SMALL,
    "roc_bert": SMALL | {"pronunciation_vocab_size": 9, "shape_vocab_size": 9, "enable_shape": False,
                         "enable_pronunciation": False},
    "roformer": SMALL | {"embedding_size": 32},
    "splinter": SMALL,
    "squeezebert": SMALL | {"embedding_size": 32},
    "tapas": SMALL,
    "xlm": XLM,
    "xlm-roberta": SMALL,
    "xlm-roberta-xl": SMALL,
    "xlnet": ALONE | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "xmod": SMALL | {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip

CAUSAL, PADDED, DECODER, MORE = "causal", "padded caption", "encoder with a decoder", "does not read captions alone"

#: Families that are refused, settings of a small one, and why.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bart": (ALONE | {"d_model": 32}, DECODER),
    "biogpt": (SMALL, CAUSAL),
    "bloom": (ALONE | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, CAUSAL),
    "bros": (SMALL, MORE),
    "canine": (SMALL | {"num_hash_buckets": 64}, PADDED),
    "clip_text_model": (SMALL, CAUSAL),
    "codegen": (GPT | {"rotary_dim": 4}, CAUSAL),
    "convbert": (SMALL | {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2}, PADDED),
    "dpr": (SMALL, "no last hidden state"),
    "falcon": (SMALL, CAUSAL),
    "fnet": (SMALL, PADDED),
    "gemma3_text": (GROUPED, CAUSAL),
    "gpt2": (GPT, CAUSAL),
    "gpt_neo": (
        ALONE | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                 "max_position_embeddings": ROWS, "bos_token_id": 0, "eos_token_id": 2},
        CAUSAL,
    ),
    "gptj": (GPT | {"rotary_dim": 4}, CAUSAL),
    "llama": (GROUPED, CAUSAL),
    "mamba": (ALONE | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, CAUSAL),
    "mbart": (ALONE | {"d_model": 32}, DECODER),
    "mistral": (GROUPED, CAUSAL),
    "mobilebert": (SMALL | {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32}, PADDED),
    "mt5": (ALONE | {"d_model": 32}, DECODER),
    "nystromformer": (SMALL | {"num_landmarks": 4, "segment_means_seq_len": ROWS}, MORE),
    "openai-gpt": (GPT, CAUSAL),
    "opt": (SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, CAUSAL),
    "phi3": (GROUPED, CAUSAL),
    "qwen3": (GROUPED, CAUSAL),
    "t5": (ALONE | {"d_model": 32}, DECODER),
    "vit": ({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32}, MORE),
    "yoso": (SMALL, PADDED),
}  # fmt: skip

HERE = [kind for kind in READ if kind in CONFIG_MAPPING]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; padding has the number 1, as RoBERTa's has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{number}" for number in range(WORDS - 5))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>", cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


@torch.no_grad()
def save(folder: Path, kind: str, settings: dict[str, Any]) -> Any:
    """A small encoder with random weights, padding's embedding no zeros (as in published ones); returns it."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(CONFIG_MAPPING[kind](**settings))
    for module in encoder.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].normal_()
    encoder.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return encoder.eval()


@pytest.mark.parametrize("kind", HERE)
def test_a_family_is_read_as_transformers_reads_it(tmp_path, kind):
    """Three tokens, nine, and as many as there are positions: alone, and padded beside a longer caption."""
    rival = save(tmp_path, kind, READ[kind])
    exact = copy.deepcopy(rival).double()
    tower = TextTower(TextTowerConfig(str(tmp_path), max_tokens=ROWS)).eval()
    assert tower.max_tokens == open_tokenizer(tmp_path, ROWS).max_tokens
    assert tower.max_positions == max_positions(rival.config)
    longer = torch.randint(5, WORDS, (1, tower.max_tokens))
    for length in (3, 9, tower.max_tokens):
        ids = torch.randint(5, WORDS, (1, length))
        padded = torch.full_like(longer, tower.pad)
        padded[:, :length] = ids
        mask = torch.ones(2, tower.max_tokens, dtype=torch.long)
        mask[0, length:] = 0
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kind == "longformer":
            given["global_attention_mask"] = (torch.arange(length) == 0).long()[None]
        with torch.inference_mode():
            expected, best = (each(**given).last_hidden_state[0] for each in (rival, exact))
            alone = tower(ids, torch.ones_like(ids)).tokens[0]
            beside = tower(torch.cat([padded, longer]), mask).tokens[0, :length]
        for hidden_states in (alone, beside):
            assert_as_exact(hidden_states, expected, best, terms=64)


@pytest.mark.parametrize("kind", sorted(BERT_FAMILY))
def test_berts_kin_takes_sliding_windows(tmp_path, kind):
    """A window over all is dense attention, a narrow one is not; learned positions are repeated, padding's are not."""
    rival = save(tmp_path, kind, READ[kind])
    dense, wide, narrow = (
        TextTower(TextTowerConfig(str(tmp_path), max_tokens=ROWS, **more)).eval()
        for more in ({}, {"attention": "sliding", "window": 2 * ROWS}, {"attention": "sliding", "window": 2})
    )
    ids = torch.randint(5, WORDS, (2, dense.max_positions))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        a, b, c, best = (tower(ids, mask).pooled for tower in (dense, wide, narrow, in_float64(dense)))
    assert_same(a, b, best)
    assert not torch.allclose(c, a, atol=1e-3)
    assert wide.max_positions == 4096
    learned = rival.embeddings.position_embeddings.weight[ROWS - dense.max_positions :]
    assert torch.equal(
        wide.encoder.embeddings.position_embeddings.weight[-4096:][: 2 * dense.max_positions], learned.repeat(2, 1)
    )


@pytest.mark.parametrize("kind", sorted({*HERE} - BERT_FAMILY - {"longformer"}))
def test_no_other_family_is_given_windows(tmp_path, kind):
    CONFIG_MAPPING[kind](**READ[kind]).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{kind}' cannot be given sliding windows"):
        TextTower(TextTowerConfig(str(tmp_path), weights="random", attention="sliding"))


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in CONFIG_MAPPING])
def test_a_family_is_refused_by_name(tmp_path, kind):
    settings, why = REFUSED[kind]
    if why == PADDED:
        save(tmp_path, kind, settings)
    else:
        CONFIG_MAPPING[kind](**settings).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=why) as error:
        TextTower(TextTowerConfig(str(tmp_path), weights="auto" if why == PADDED else "random"))
    message = str(error.value)
    assert f"'{kind}'" in message
    assert "distilbert-base-uncased" in message
    assert "\n" not in message


def test_a_saved_sliding_tower_has_the_positions_it_was_saved_with(tmp_path):
    """Runs saved when RoBERTa's kin was extended without its offset have 4,096 rows, and their weights have too."""
    settings = READ["data2vec-text"] | {"max_position_embeddings": 4096, "attention_window": 8}
    CONFIG_MAPPING["data2vec-text"](**settings).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tower = TextTower(TextTowerConfig("elsewhere", attention="sliding", max_tokens=4096), tmp_path, load_weights=False)
    assert tower.encoder.embeddings.position_embeddings.num_embeddings == 4096
    assert tower.max_tokens == 4094


def test_a_bert_that_decodes_is_refused(tmp_path):
    save(tmp_path, "bert", SMALL | {"is_decoder": True})
    with pytest.raises(ValueError, match="'bert' is causal"):
        TextTower(TextTowerConfig(str(tmp_path)))


def test_a_tokenizer_of_more_tokens_than_the_encoder_is_refused(tmp_path):
    save(tmp_path, "bert", SMALL | {"vocab_size": WORDS - 1})
    with pytest.raises(ValueError, match=f"up to {WORDS - 1}, but the encoder 'bert' has embeddings for {WORDS - 1}"):
        TextTower(TextTowerConfig(str(tmp_path)))


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_modes_and_random_states_alone(training):
    class Drawing(nn.Module):
        """An encoder that draws at random, from all generators that there are."""

        config = CONFIG_MAPPING["roformer"](**READ["roformer"])

        def forward(self, input_ids, attention_mask):
            torch.rand(1), np.random.rand(1), random.random()
            raise RuntimeError("no more\nthan that")

    encoder = Drawing().train(training)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(ValueError, match="'roformer' does not read captions alone: no more;"):
        check_encoder(encoder, 1, "folder")
    assert encoder.training is training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_the_documents_table_is_that_of_these_tests():
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in text


def table() -> str:
    """The families as docs/models.md has them."""
    sliding = BERT_FAMILY | {"longformer"}
    rows = [
        ("with sliding windows too", sorted(sliding)),
        ("with transformers' own attention", sorted({*READ} - sliding)),
        ("refused: causal", sorted(kind for kind, (_, why) in REFUSED.items() if why == CAUSAL)),
        ("refused: an encoder with a decoder", sorted(kind for kind, (_, why) in REFUSED.items() if why == DECODER)),
        ("refused: padding changes a caption", sorted(kind for kind, (_, why) in REFUSED.items() if why == PADDED)),
        (
            "refused: needs more than a caption, or gives no vector for each token",
            sorted(kind for kind, (_, why) in REFUSED.items() if why not in (CAUSAL, DECODER, PADDED)),
        ),
    ]
    lines = [f"| {name} | {', '.join(f'`{kind}`' for kind in kinds)} |" for name, kinds in rows]
    return "\n".join(["| support | model types of transformers |", "|---|---|", *lines])
