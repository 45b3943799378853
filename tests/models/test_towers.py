"""Towers: captions that are trimmed, sorted and encoded once give open_clip's own features and gradients."""

from __future__ import annotations

from copy import deepcopy
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP, SimpleTokenizer
from open_clip.transformer import PatchDropout
from timm.layers import DropPath
from torch import Tensor, nn

from accel_clip.models.towers import (
    can_trim,
    caption_lengths,
    encode_image,
    encode_text,
    end_token,
    is_deterministic,
    length_groups,
    text_chunks,
    trimmed,
    unique_captions,
)
from helpers.comparison import assert_equal_to_rounding

CONTEXT, END = 24, 49407
TOKENIZER = SimpleTokenizer(context_length=CONTEXT)
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": CONTEXT, "vocab_size": END + 1, "width": 32, "heads": 2, "layers": 2}
AT_END = {"pool_type": "eos", "eos_id": END}
OWN_BLOCKS = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
CAPTIONS = ["a frog", "", "two small birds on one branch, seen from below", "word " * 100, "a frog", "a white peahen"]
# {name: (class of the model, keys of its text tower)}
TRIMMABLE: dict[str, tuple[type, dict[str, Any]]] = {
    "argmax": (CLIP, {}),
    "end token": (CLIP, AT_END),
    "linear projection": (CLIP, {"proj_bias": True}),
    "no projection": (CLIP, {"proj_type": "none"}),
    "layer scale": (CLIP, {"ls_init_value": 0.1}),
    "own blocks": (CLIP, OWN_BLOCKS),
    "custom": (CustomTextCLIP, {}),
    "custom, end token": (CustomTextCLIP, AT_END),
    "custom, linear projection": (CustomTextCLIP, {"proj_bias": True}),
    "custom, own blocks": (CustomTextCLIP, OWN_BLOCKS),
}
UNTRIMMABLE: dict[str, tuple[type, dict[str, Any]]] = {
    "last": (CLIP, {"pool_type": "last"}),
    "unmasked": (CLIP, {"no_causal_mask": True}),
    "custom, first": (CustomTextCLIP, {"pool_type": "first"}),
    "custom, unmasked, last": (CustomTextCLIP, {"no_causal_mask": True, "pool_type": "last"}),
    "custom, class token": (CustomTextCLIP, {"embed_cls": True}),
    "CoCa": (CoCa, {"embed_cls": True, "output_tokens": True}),
}


def build(name: str) -> Any:
    """Return a model of the tables above, its weights far enough from their start for all of them to matter."""
    kind, text = {**TRIMMABLE, **UNTRIMMABLE}[name]
    vision, options = dict(VISION), {"quick_gelu": name == "layer scale"}
    if kind is CoCa:
        vision.update(attentional_pool=True, attn_pooler_heads=2, output_tokens=True)
        options["multimodal_cfg"] = dict(TEXT)
    torch.manual_seed(1)
    clip = kind(embed_dim=32, vision_cfg=vision, text_cfg={**TEXT, **text}, **options)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


def in_chunks(clip: Any, tokens: Tensor, max_rows: int) -> Tensor:
    """Return features of captions that were sorted, cut and trimmed, in the order of the captions."""
    end = end_token(clip)
    chunks = text_chunks(tokens, max_rows, end)
    features = torch.cat([encode_text(clip, trimmed(tokens[rows], end)) for rows in chunks])
    return features[torch.cat(chunks).argsort()]


def gradients(clip: nn.Module, features: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of features, made on the same weights each time."""
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    clip.zero_grad()
    (features * weights.to(features.dtype)).sum().backward()
    return {name: each.grad.clone() for name, each in clip.named_parameters() if each.grad is not None}


def assert_features(ours: Tensor, reference: Tensor, exact: Tensor) -> None:
    assert_equal_to_rounding({"features": ours}, {"features": reference}, {"features": exact})


@pytest.mark.parametrize("name", TRIMMABLE)
def test_trimmed_captions_have_the_features_and_gradients_of_full_ones(name: str) -> None:
    clip, tokens = build(name), TOKENIZER(CAPTIONS)
    assert can_trim(clip, TOKENIZER)
    reference, ours = clip.encode_text(tokens, normalize=True), in_chunks(clip, tokens, max_rows=2)
    single, made = gradients(clip, reference), gradients(clip, ours)
    clip.double()
    exact, ours_exact = clip.encode_text(tokens, normalize=True), in_chunks(clip, tokens, max_rows=2)
    expected, made_exact = gradients(clip, exact), gradients(clip, ours_exact)
    assert any(key.endswith("positional_embedding") for key in expected)
    assert all(value.any() for value in expected.values()), "a test of zeros"
    assert_features(ours, reference, exact)
    assert_equal_to_rounding(made, single, expected)
    torch.testing.assert_close(ours_exact, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made_exact, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["argmax", "custom, own blocks"])
def test_places_that_no_caption_reaches_are_not_computed(name: str) -> None:
    clip = build(name)
    blocks = (clip.text if hasattr(clip, "text") else clip).transformer.resblocks
    seen: list[torch.Size] = []
    blocks[-1].register_forward_hook(lambda block, args, output: seen.append(output.shape))
    tokens = torch.zeros(4, CONTEXT, dtype=torch.int64)
    for row, length in enumerate((3, 9, 2, 7)):
        tokens[row, length - 1] = END
    in_chunks(clip, tokens, max_rows=2)
    assert [shape[:2] for shape in seen] == [(2, 3), (2, 9)]


@pytest.mark.parametrize("name", ["argmax", "custom"])
def test_without_gradient_in_evaluation_mode_and_under_autocast(name: str) -> None:
    clip = build(name)
    clip.eval()
    tokens = TOKENIZER(CAPTIONS)
    with torch.no_grad():
        exact = deepcopy(clip).double().encode_text(tokens, normalize=True)
        assert_features(in_chunks(clip, tokens, max_rows=1), clip.encode_text(tokens, normalize=True), exact)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, reference = in_chunks(clip, tokens, max_rows=1), clip.encode_text(tokens, normalize=True)
        assert_features(rounded, reference, exact)
        assert (rounded - exact).norm() > 1e-4 * exact.norm(), "bfloat16 was not used"


def test_gradients_with_recomputed_activations() -> None:
    clip, tokens = build("argmax"), TOKENIZER(CAPTIONS)
    single = gradients(clip, clip.encode_text(tokens, normalize=True))
    exact = deepcopy(clip).double()
    clip.set_grad_checkpointing()
    made = gradients(clip, in_chunks(clip, tokens, max_rows=2))
    assert_equal_to_rounding(made, single, gradients(exact, exact.encode_text(tokens, normalize=True)))


@pytest.mark.parametrize("name", UNTRIMMABLE)
def test_towers_that_look_past_the_caption_are_left_alone(name: str) -> None:
    clip = build(name)
    tokens = TOKENIZER(CAPTIONS)
    assert not can_trim(clip, TOKENIZER)
    assert torch.equal(encode_text(clip, tokens), clip.encode_text(tokens, normalize=True))
    if name != "CoCa":
        with pytest.raises(AssertionError, match="takes 24 tokens a caption"):
            encode_text(clip, tokens[:, :7])


def test_a_tower_from_transformers_is_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    clip = build("custom")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=49408, **sizes)
    clip.text = HFTextEncoder("bert", output_dim=32, config=config, pooler_type="mean_pooler", proj_type="mlp")
    assert not is_deterministic(clip.text.train())
    tokens = TOKENIZER(CAPTIONS)
    clip.eval()
    assert not can_trim(clip, TOKENIZER) and is_deterministic(clip.text)
    assert torch.equal(encode_text(clip, tokens), clip.encode_text(tokens, normalize=True))


def test_the_numbers_decide_where_the_structure_looks_right() -> None:
    clip = build("argmax")
    clip.attn_mask.zero_()
    assert not can_trim(clip, TOKENIZER)


def test_asking_whether_captions_can_be_trimmed_leaves_no_trace() -> None:
    clip = build("argmax")
    clip.train()
    clip.transformer.resblocks[0].attn.dropout = 0.5
    clip.visual.eval()
    modes = [part.training for part in clip.modules()]
    state = {key: value.clone() for key, value in clip.state_dict().items()}
    random_state = torch.get_rng_state()

    def tokenizer(captions: list[str]) -> Tensor:
        torch.rand(3)  # as those do that drop words
        return TOKENIZER(captions)

    assert can_trim(clip, tokenizer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [part.training for part in clip.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in clip.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.parameters())


def test_lengths_reach_to_the_first_end_token() -> None:
    largest_is_end = torch.tensor([[1, 9, 0, 0, 0], [1, 2, 9, 9, 0], [9, 0, 0, 0, 0]])
    assert caption_lengths(largest_is_end).tolist() == [2, 3, 1]
    assert torch.equal(trimmed(largest_is_end), largest_is_end[:, :3])
    seven_is_end = torch.tensor([[1, 9, 7, 8, 8], [7, 9, 7, 9, 9], [1, 9, 2, 2, 2]])
    assert caption_lengths(seven_is_end, end=7).tolist() == [3, 1, 1]  # without one, open_clip pools the first place
    assert (end_token(build("custom, end token")), end_token(build("argmax"))) == (END, None)


def test_an_end_token_that_is_not_the_largest() -> None:
    clip = build("custom, end token")
    clip.text.eos_id = 7
    tokens = torch.randint(100, 200, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = 900  # the largest, before any end
    for row, place in enumerate((4, 11, 2)):  # two captions have none
        tokens[row, place] = 7
    assert caption_lengths(tokens, end_token(clip)).tolist() == [5, 12, 3, 1, 1]
    assert can_trim(clip, lambda captions: tokens[: len(captions)])
    exact = deepcopy(clip).double().encode_text(tokens, normalize=True)
    assert_features(in_chunks(clip, tokens, max_rows=2), clip.encode_text(tokens, normalize=True), exact)


@pytest.mark.parametrize("max_rows", [1, 3, 7, 100])
def test_chunks_hold_every_row_once_and_go_from_short_to_long(max_rows: int) -> None:
    tokens = torch.randint(1, 50, (20, 9), generator=torch.Generator().manual_seed(3))
    chunks = text_chunks(tokens, max_rows)
    rows = torch.cat(chunks)
    assert sorted(rows.tolist()) == list(range(20))
    assert all(0 < len(chunk) <= max_rows for chunk in chunks) and len(chunks) == -(-20 // max_rows)
    lengths = caption_lengths(tokens).tolist()
    assert rows.tolist() == sorted(range(20), key=lambda row: (lengths[row], row))


@pytest.mark.parametrize("cost_of_a_group", [0, 1, 5, 1000])
def test_groups_cost_least_of_all_divisions(cost_of_a_group: int) -> None:
    torch.manual_seed(cost_of_a_group)
    lengths = torch.randint(2, 12, (9,)).sort().values
    tokens = torch.zeros(9, 12, dtype=torch.int64).scatter_(1, lengths[:, None] - 1, 99)
    groups = length_groups(tokens, cost_of_a_group)
    assert [row.argmax().item() + 1 for group in groups for row in group] == lengths.tolist()
    assert all(group.shape[1] == group.argmax(1).max() + 1 for group in groups)

    def cost(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, 9]
        parts = pairwise(ends)
        return sum(cost_of_a_group + (end - start) * int(lengths[end - 1]) for start, end in parts)

    least = min(cost(cuts) for number in range(9) for cuts in combinations(range(1, 9), number))
    assert sum(cost_of_a_group + group.numel() for group in groups) == least


def test_groups_of_different_length_have_the_features_of_whole_captions() -> None:
    clip, tokens = build("argmax"), TOKENIZER(CAPTIONS)
    rows = caption_lengths(tokens).argsort(stable=True)
    groups = length_groups(tokens[rows], 1)
    assert len({group.shape[1] for group in groups}) > 2
    exact = deepcopy(clip).double().encode_text(tokens, normalize=True)
    assert_features(encode_text(clip, *groups), clip.encode_text(tokens, normalize=True)[rows], exact[rows])


def test_equal_captions_are_encoded_once() -> None:
    clip = build("argmax")
    tokens = TOKENIZER(["b", "a frog", "b", "c", "a frog", "b"])
    unique, inverse = unique_captions(tokens)
    assert torch.equal(unique, tokens[[0, 1, 3]]) and inverse.tolist() == [0, 1, 0, 2, 1, 0]
    assert torch.equal(unique[inverse], tokens)
    assert is_deterministic(clip.transformer.train())
    reference, ours = clip.encode_text(tokens, normalize=True), in_chunks(clip, unique, max_rows=2)[inverse]
    single, made = gradients(clip, reference), gradients(clip, ours)
    clip.double()
    exact = clip.encode_text(tokens, normalize=True)
    assert_features(ours, reference, exact)
    assert_equal_to_rounding(made, single, gradients(clip, exact))


def test_captions_without_repetition_stay_as_they_are() -> None:
    tokens = torch.randint(0, 1000, (30, 8), generator=torch.Generator().manual_seed(4))
    unique, inverse = unique_captions(tokens)
    assert torch.equal(unique, tokens) and inverse.tolist() == list(range(30))


class FloatRate(nn.Module):
    """A module that keeps its rate as a number, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.1


@pytest.mark.parametrize(
    ("part", "while_training"),
    [
        (nn.Dropout(0.1), False),
        (nn.Dropout(0.0), True),
        (nn.MultiheadAttention(4, 2, dropout=0.1), False),
        (nn.MultiheadAttention(4, 2), True),
        (PatchDropout(0.5), False),
        (PatchDropout(0.0), True),
        (DropPath(0.1), False),
        (DropPath(0.0), True),
        (FloatRate(), False),
        (nn.BatchNorm1d(4), False),
        (nn.LayerNorm(4), True),
    ],
    ids=repr,
)
def test_what_is_drawn_or_taken_from_the_batch_is_found(part: nn.Module, while_training: bool) -> None:
    tower = nn.Sequential(nn.Linear(4, 4), nn.Sequential(part))
    assert is_deterministic(tower.train()) is while_training
    assert is_deterministic(tower.eval())


def test_batch_norm_without_running_statistics_never_is_deterministic() -> None:
    assert not is_deterministic(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval())


@pytest.mark.parametrize("name", ["argmax", "custom", "CoCa"])
def test_pictures_go_through_the_models_own_tower(name: str) -> None:
    clip, pixels = build(name), torch.randn(2, 3, 32, 32)
    reference = clip.encode_image(pixels, normalize=True)
    exact = deepcopy(clip).double().encode_image(pixels.double(), normalize=True)
    assert_features(encode_image(clip, pixels), reference, exact)
