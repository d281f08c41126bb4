"""Every attention kernel against one dense definition; Longformer against transformers', number for number."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact, assert_rounds_to
from torch import Tensor

from clipvisionalign.models import attention as kernels
from clipvisionalign.models.attention import attend, attention, find_global_positions
from clipvisionalign.models.longformer import Longformer

GPU = pytest.param("flex on a GPU", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def definition(q, k, v, mask=None, window=0, is_global=None) -> Tensor:
    """Attention as a table of who sees whom, in float64."""
    length = q.shape[2]
    attention_mask = torch.ones(q.shape[0], length, k.shape[2], dtype=torch.bool)
    if window:
        positions = torch.arange(length)
        attention_mask = ((positions[:, None] - positions).abs() <= window // 2).expand(q.shape[0], -1, -1).clone()
        if is_global is not None:
            attention_mask |= is_global[:, None, :] | is_global[:, :, None]
    if mask is not None:
        attention_mask = attention_mask & mask[:, None, :]
    scores = (q.double() @ k.double().transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~attention_mask[:, None], -torch.inf)
    return scores.softmax(-1) @ v.double()


def terms_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, float]:
    """How many terms an attention sums, and the largest sum of their absolute values: a mean of values, whose weights
    are exponentials of scores and so off, relatively, by what the scores are off."""
    scores = q.abs().double() @ k.abs().double().transpose(-1, -2) * q.shape[-1] ** -0.5
    return k.shape[2] + q.shape[-1], float(((1 + scores.max()) * v.abs().max()).detach())


@st.composite
def problems(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 90))
    window = draw(st.sampled_from([2, 3, 4, 8, 10, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    q, k, v = (torch.randn(batch, 2, length, 4, generator=generator) for _ in range(3))
    lengths = torch.tensor(draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch)))
    mask = torch.arange(length) < lengths[:, None]
    share = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    is_global = (torch.rand(batch, length, generator=generator) < share) & mask
    return q, k, v, mask, window, is_global


def run_kernel(name, q, k, v, mask, window, global_positions) -> Tensor:
    if name == "banded":
        return kernels._banded(q, k, v, mask, window, global_positions, 0.0)
    if name == "flex, as plain code":
        return kernels._flex(q, k, v, mask, window, global_positions, compiled=False)
    if name == "flex on a GPU":
        q, k, v, mask = (x.cuda() for x in (q, k, v, mask))
        global_positions = None if global_positions is None else global_positions.cuda()
        return kernels._flex(q, k, v, mask, window, global_positions, compiled=True).cpu()
    attention_mask = kernels._window_mask(mask, q.shape[2], window, global_positions, q)
    return (kernels._plain if name == "plain" else kernels._fused)(q, k, v, attention_mask, 0.0)


@pytest.mark.parametrize("name", ["fused", "plain", "banded", "flex, as plain code", GPU])
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_every_kernel_computes_the_definition(name, problem):
    q, k, v, mask, window, is_global = problem
    actual = run_kernel(name, q, k, v, mask, window, find_global_positions(is_global))
    assert actual.isfinite().all()
    expected = definition(q, k, v, mask, window, is_global)
    # Weights that sum to 1, of values up to the largest; each weight off as its score is, a product of `head` terms.
    assert_rounds_to(actual.transpose(1, 2)[mask], expected.transpose(1, 2)[mask], *terms_of(q, k, v))


def test_gradients_of_every_kernel_are_those_of_the_definition():
    q, k, v = (torch.randn(2, 2, 70, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.arange(70) < torch.tensor([70, 41])[:, None]
    is_global = torch.zeros(2, 70, dtype=torch.bool)
    is_global[0, [0, 9]] = is_global[1, 3] = True
    weights = torch.randn(2, 70, 2, 4, dtype=torch.float64)[mask]

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out.transpose(1, 2)[mask] * weights).sum(), (q, k, v))

    expected = gradients(definition(q, k, v, mask, 6, is_global))
    for name in ("fused", "plain", "banded"):
        actual = gradients(run_kernel(name, q, k, v, mask, 6, find_global_positions(is_global)))
        for ours, theirs in zip(actual, expected, strict=True):
            # The same, once more for each way back through the two products.
            terms, size = terms_of(q, k, v)
            assert_rounds_to(ours, theirs, terms, size * float(weights.abs().max()), steps=4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("length", "window", "dtype", "kernel"),
    [
        (20, 0, torch.float32, "fused"),
        (20, 0, torch.bfloat16, "plain"),
        (20, 8, torch.float32, "fused"),
        (4096, 0, torch.bfloat16, "fused"),
        (4096, 64, torch.float32, "banded"),
        (4096, 64, torch.bfloat16, "banded"),
        (257, 512, torch.float32, "fused"),
    ],
)
def test_the_kernel_is_chosen_by_length_window_and_format(length, window, dtype, kernel):
    q = torch.empty(1, 1, length, 8, dtype=dtype)
    assert kernels.choose_kernel(q, q, window) == kernel


def test_dropout_needs_training_and_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 8) for _ in range(3))
    global_positions = torch.zeros(1, 1, dtype=torch.long)
    still = attention(q, k, v, window=8, global_positions=global_positions)
    dropped = torch.stack(
        [attention(q, k, v, window=8, global_positions=global_positions, dropout=0.2) for _ in range(400)]
    )
    assert (dropped[0] != dropped[1]).any()
    assert (dropped.mean(0) - still).abs().mean() < 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_padding_alone_is_finite(dtype, dropout):
    q = torch.randn(2, 2, 6, 4, dtype=dtype)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    assert torch.isfinite(attention(q, q, q, mask, dropout=dropout)).all()


def test_a_window_of_one_is_refused():
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match="2 tokens or more"):
        attention(q, q, q, window=1)


def test_attend_takes_all_heads_in_one_vector():
    q, k = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    actual = attend(q, k, k, 2)
    split = [x.view(2, -1, 2, 4).transpose(1, 2) for x in (q, k)]
    expected = definition(split[0], split[1], split[1]).transpose(1, 2).reshape(2, 5, 8)
    assert_rounds_to(actual, expected, *terms_of(*split, split[1]))


def test_global_places_count_from_the_left_and_end_in_minus_one():
    is_global = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert find_global_positions(is_global).tolist() == [[1, 3], [0, -1], [-1, -1]]
    assert find_global_positions(torch.zeros(2, 4, dtype=torch.bool)) is None


# --- Longformer ------------------------------------------------------------------------------------------------------


def longformers(tmp_path, **shape):
    """transformers' LongformerModel with random weights, saved; and ours, read from there."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        **{
            "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 140, "type_vocab_size": 1, "attention_window": 8,
            "layer_norm_eps": 1e-5, "initializer_range": 0.3, **shape,
        }
    )  # fmt: skip
    theirs = transformers.LongformerModel(config).eval()
    # Biases start at zero, where a mistake about them would not show.
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    return theirs, Longformer.from_pretrained(tmp_path).eval()


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 60, (len(lengths), longest), generator=generator)
    return ids.masked_fill(mask == 0, 1), mask


GLOBALS = {"none": [], "first": [0], "several": [0, 3, 11], "many": list(range(0, 20, 2)), "not the first": [5]}


@pytest.mark.parametrize("global_set", GLOBALS)
@pytest.mark.parametrize("lengths", [[1], [4, 2], [8, 7, 9], [15, 16, 17], [33, 20], [130, 64, 1]])
def test_longformer_is_transformers_longformer(tmp_path, lengths, global_set):
    theirs, ours = longformers(tmp_path)
    ids, mask = batch_of(lengths)
    is_global = torch.zeros_like(mask)
    is_global[:, [position for position in GLOBALS[global_set] if position < ids.shape[1]]] = 1
    given = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": is_global}
    expected, exact = theirs(**given), copy.deepcopy(theirs).double()(**given)
    hidden_states = ours(ids, mask, is_global)
    assert_as_exact(hidden_states, expected.last_hidden_state, exact.last_hidden_state, terms=16)
    assert_as_exact(ours.pool(hidden_states), expected.pooler_output, exact.pooler_output, terms=16)
    first = ours(ids, mask, is_global, first_only=True)
    assert_as_exact(first, expected.last_hidden_state[:, :1], exact.last_hidden_state[:, :1], terms=16)


def test_longformer_gives_each_row_its_own_global_tokens(tmp_path):
    theirs, ours = longformers(tmp_path)
    ids, mask = batch_of([40, 31, 12])
    is_global = torch.zeros_like(mask)
    is_global[0, 0] = is_global[1, [0, 7, 30]] = is_global[2, 20] = 1  # the last stands on padding: no global token
    given = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": is_global}
    expected, exact = (each(**given).last_hidden_state for each in (theirs, copy.deepcopy(theirs).double()))
    assert_as_exact(ours(ids, mask, is_global), expected, exact, terms=16)
    first = ours(ids, mask, is_global, first_only=True)
    assert_as_exact(first, expected[:, :1], exact[:, :1], terms=16)


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("global_set", ["none", "first", "several", "many"])
def test_gradients_are_those_of_transformers(tmp_path, global_set, first_only):
    theirs, ours = longformers(tmp_path)
    ids, mask = batch_of([40, 23])
    is_global = torch.zeros_like(mask)
    is_global[:, GLOBALS[global_set]] = 1
    weights = torch.randn(2, 40, 16) * mask[..., None]
    if first_only:
        weights[:, 1:] = 0
    from clipvisionalign.models.longformer import _local_name, _merge_projections

    def published(model, *batches: tuple[slice, slice]) -> dict[str, Tensor]:
        for own in batches:
            given = {"attention_mask": mask[own], "global_attention_mask": is_global[own]}
            (model(ids[own], **given).last_hidden_state * weights[own]).sum().backward()
        return _merge_projections(
            {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
        )

    rival = published(theirs, (slice(2), slice(40)))
    # Row by row without padding: where padding sees nothing but padding, transformers' gradient in float64 is no number.
    theirs.zero_grad()
    exact = published(copy.deepcopy(theirs).double(), (slice(0, 1), slice(40)), (slice(1, 2), slice(23)))
    (ours(ids, mask, is_global, first_only) * (weights[:, :1] if first_only else weights)).sum().backward()
    known = dict(ours.named_parameters())
    compared = 0
    for name, expected in exact.items():
        if name.startswith("pooler"):
            continue
        gradient = known[_local_name(name)].grad
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        # A key's bias moves all scores of a softmax alike: what it sums, over 63 tokens, is as large as for a query's
        # bias, and comes to nothing but rounding.
        query_name = name.replace("key", "query")
        size = float(max(expected.abs().max(), exact[query_name].abs().max() if query_name in exact else 0))
        assert_as_exact(gradient, rival[name], expected, size, terms=int(mask.sum()))
        compared += 1
    assert compared == 4 + 1 + 3 * 18


@given(
    windows=st.lists(st.sampled_from([2, 4, 6, 10]), min_size=2, max_size=2),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    globals_at=st.lists(st.integers(0, 59), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_longformer_with_a_window_for_each_layer_is_the_window_as_a_mask(windows, lengths, globals_at):
    """Against a dense reference of the same weights, in which the window is nothing but a mask."""
    import transformers

    config = transformers.LongformerConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=70, type_vocab_size=1, attention_window=windows, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Longformer(config).eval()
    model.reset_parameters()
    ids, mask = batch_of(lengths)
    is_global = torch.zeros_like(mask)
    is_global[:, [position for position in globals_at if position < ids.shape[1]]] = 1
    hidden_states = model(ids, mask, is_global)
    real, global_attention_mask = mask.bool(), is_global.bool() & mask.bool()

    def heads(y):
        return y.unflatten(-1, (2, 8)).transpose(1, 2)

    def dense(model) -> Tensor:
        x = model.embeddings(ids)
        for layer, window in zip(model.layers, windows, strict=True):
            own = layer.attention
            q, k, v = (heads(y) for y in own.query_key_value(x).chunk(3, -1))
            local = definition(q, k, v, real, window, global_attention_mask)
            parts = (own.query_global, own.key_global, own.value_global)
            everywhere = definition(*(heads(part(x)) for part in parts), real)
            mixed = torch.where(global_attention_mask[:, None, :, None], everywhere, local).nan_to_num().to(x.dtype)
            x = layer.attention_norm(layer.attention_out(mixed.transpose(1, 2).flatten(2)) + x)
            x = layer.norm(layer.down(layer.activation(layer.up(x))) + x)
        return x[real]

    assert_as_exact(hidden_states[real], dense(model), dense(copy.deepcopy(model).double()), terms=16)


def test_longformer_says_what_does_not_fit(tmp_path):
    import transformers

    _, ours = longformers(tmp_path)
    with pytest.raises(ValueError, match="positions for 138"):
        ours(torch.full((1, 139), 5))
    with pytest.raises(ValueError, match="even number"):
        Longformer(transformers.LongformerConfig(attention_window=7))
    with pytest.raises(FileNotFoundError, match="no weights"):
        Longformer.from_pretrained(tmp_path / "nowhere", ours.config)
    with pytest.raises(ValueError, match="missing"):
        ours.load_published({"embeddings.word_embeddings.weight": torch.zeros(60, 16)})
