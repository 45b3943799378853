"""Optimizers, weight decay and rates against torch's own and against open_clip models."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import timm.optim
import torch
from accelerate import Accelerator
from torch import nn

from accel_clip.config import OptimConfig
from accel_clip.faults import ConfigError
from accel_clip.models.names import matches
from accel_clip.optim.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    check_optimizer,
    list_optimizers,
    parameter_groups,
    set_learning_rate,
)
from helpers.comparison import EPSILON, assert_equal_to_rounding

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
DECODER = {**TEXT, "attn_pooler_heads": 2}
SOME_OF_TIMM = ["adopt", "lamb", "lion", "nadamw", "rmsprop", "sgdw"]
ELSEWHERE = ("bnb*", "fused*")  # need bitsandbytes or apex, and a CUDA device
SECOND_ORDER = ("adahessian",)


def clip() -> nn.Module:
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, init_logit_bias=-10)


def coca() -> nn.Module:
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "output_tokens": True, "attn_pooler_heads": 2}
    return open_clip.CoCa(embed_dim=32, multimodal_cfg=DECODER, text_cfg=text, vision_cfg=vision)


MODELS = {
    "CLIP": clip,
    "CustomTextCLIP": lambda: open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT),
    "CoCa": coca,
}


def build(config: OptimConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(parameters.items(), config)


# Which parameters a pattern means


@pytest.mark.parametrize("name", MODELS)
def test_image_and_text_are_what_the_towers_compute_with(name):
    model = MODELS[name]()
    for pattern, output in [
        ("image", lambda: model.encode_image(torch.randn(2, 3, 16, 16))),
        ("text", lambda: model.encode_text(torch.randint(1, 50, (2, 7 if name == "CoCa" else 8)))),
    ]:
        model.zero_grad()
        output().pow(2).sum().backward()
        used = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        named = {key for key, _ in model.named_parameters() if matches(pattern, key)}
        assert len(used) > 10
        assert used == named


def test_patterns_are_whole_names_with_wildcards():
    assert matches("logit_scale", "logit_scale")
    assert matches("*.resblocks.0.*", "visual.transformer.resblocks.0.ln_1.weight")
    assert not matches("visual", "visual.proj")
    assert not matches("image", "logit_scale")
    assert not matches("text", "text_decoder.text_projection")


# Groups


def test_biases_norms_scales_and_listed_names_never_decay():
    model = clip()
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model.named_parameters(), config, model.no_weight_decay())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {"positional_embedding", "visual.positional_embedding", "visual.class_embedding"}
    decayed = 0
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.ndim < 2 or name in kept else 1 - 0.1 * 0.5
        decayed += factor < 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=4 * EPSILON, atol=0, msg=name)
    assert 10 < decayed < len(before)
    assert len(optimizer.param_groups) == 2


def test_the_first_pattern_that_matches_decides_the_rate():
    model = clip()
    model.logit_bias.requires_grad_(False)
    config = OptimConfig(lr=1e-3, lr_by_name={"visual.proj": 1e-2, "image": 1e-4, "logit_scale": 1e-4})
    groups = parameter_groups(model.named_parameters(), config)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if name == "logit_bias":
            assert id(parameter) not in rates
        elif name == "visual.proj":
            assert rates[id(parameter)] == 1e-2
        else:
            assert rates[id(parameter)] == (1e-4 if name.startswith("visual.") or name == "logit_scale" else 1e-3), name
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())
    pairs = [(group["lr"], group["weight_decay"]) for group in groups]
    assert pairs == [(1e-3, 0.2), (1e-3, 0.0), (1e-2, 0.2), (1e-4, 0.2), (1e-4, 0.0)]


def test_the_rate_to_log_is_optim_lr_where_there_is_one():
    weights = {"a.weight": nn.Parameter(torch.ones(2, 2)), "b.bias": nn.Parameter(torch.ones(2))}
    optimizer = build(OptimConfig(lr=1e-3, lr_by_name={"a.*": 1e-1}), weights)
    assert set_learning_rate(optimizer, 0.5) == 0.5e-3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5e-3, 0.5e-1]
    optimizer = build(OptimConfig(lr=1e-3, lr_by_name={"*": 1e-1}), weights)
    assert set_learning_rate(optimizer, 0.5) == 0.5e-1


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"vision.*": 1e-4}, ["'vision.*'", "matches no trainable parameter", "visual."]),
        ({"logit_bias": 1e-4}, ["'logit_bias'", "matches no trainable parameter"]),
        ({"image": 1e-4, "visual.proj": 1e-2}, ["'visual.proj'", "decides nothing", "write it first"]),
    ],
)
def test_a_rate_that_reaches_nothing_is_refused(patterns, words):
    model = clip()
    model.logit_bias.requires_grad_(False)
    with pytest.raises(ConfigError) as caught:
        parameter_groups(model.named_parameters(), OptimConfig(lr_by_name=patterns))
    assert all(word in str(caught.value) for word in ["optim.lr_by_name", *words]), str(caught.value)


def test_a_model_with_nothing_to_train_is_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"model\.freeze"):
        parameter_groups(frozen.named_parameters(), OptimConfig())


# Steps


def test_adamw_is_torchs_with_clips_constants():
    def torchs(model):
        matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in model.no_weight_decay()]
        rest = [p for n, p in model.named_parameters() if not any(p is matrix for matrix in matrices)]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-2, betas=(0.9, 0.98), eps=1e-6, fused=False, foreach=False,
        )  # fmt: skip

    def after_five_steps(model, optimizer):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            optimizer.step()
        return {name: weight.detach() for name, weight in model.named_parameters()}

    ours = clip()
    single, exact = deepcopy(ours), deepcopy(ours).double()
    optimizer = build_optimizer(ours.named_parameters(), OptimConfig(lr=1e-2), ours.no_weight_decay())
    assert_equal_to_rounding(
        after_five_steps(ours, optimizer),
        after_five_steps(single, torchs(single)),
        after_five_steps(exact, torchs(exact)),
    )


def test_adamw_is_fused_unless_told_otherwise():
    weights = {"w": nn.Parameter(torch.ones(2, 2))}
    assert build(OptimConfig(), weights).defaults["fused"] is True
    assert not build(OptimConfig(options={"fused": False}), weights).defaults["fused"]
    assert not build(OptimConfig(options={"foreach": True}), weights).defaults["fused"]


def test_options_reach_the_optimizer():
    weights = {"w": nn.Parameter(torch.ones(2, 2))}
    group = build(OptimConfig(options={"betas": [0.8, 0.9], "eps": 1e-4}), weights).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-4)
    assert build(OptimConfig(name="sgd"), weights).param_groups[0]["momentum"] == 0.9
    assert build(OptimConfig(name="sgd", options={"momentum": 0.5}), weights).param_groups[0]["momentum"] == 0.5
    assert build(OptimConfig(name="nadamw", options={"eps": 1e-3}), weights).param_groups[0]["eps"] == 1e-3


def check_steps(name: str, tolerance: float = 0) -> None:
    """Take steps at several rates and decays and see that each is honoured; smaller changes do not count."""
    torch.manual_seed(0)
    matrices = dict.fromkeys(["slow.weight", "still.weight", "idle.weight"], (4, 3))
    shapes = {**matrices, "norm": (4,), "idle": (4,), "scale": ()}
    weights = {key: nn.Parameter(torch.randn(shape) + 1) for key, shape in shapes.items()}
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    config = OptimConfig(name=name, lr=0.02, weight_decay=0.1, lr_by_name={"slow.*": 0.01, "still.*": 0.0})
    optimizer = build(config, weights)

    def moved_at(multiplier: float) -> set[str]:
        assert set_learning_rate(optimizer, multiplier) == 0.02 * multiplier
        for key, weight in weights.items():
            weight.grad = torch.zeros_like(weight) if key.startswith("idle") else torch.randn_like(weight)
        optimizer.step()
        return {key for key, weight in weights.items() if (weight - before[key]).abs().max() > tolerance}

    assert moved_at(0.0) == set(), "a multiplier of 0 must keep every weight"
    # No gradient: the decay alone moves a matrix, and nothing moves a vector.
    assert moved_at(0.5) | moved_at(1.0) == {"slow.weight", "norm", "scale", "idle.weight"}
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("name", [*OPTIMIZERS.names(), *SOME_OF_TIMM])
def test_an_optimizer_honours_rates_and_decay(name):
    check_steps(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.optim.list_optimizers(exclude_filters=[*ELSEWHERE, *SECOND_ORDER]))
def test_every_optimizer_of_timm_honours_rates_and_decay(name):
    with torch.compiler.set_stance("force_eager"):  # kron would compile for a minute
        check_steps(name, tolerance=1e-3 if name.startswith("madgrad") else 0)  # madgrad adds 1e-6 to every rate


def test_rates_survive_preparing_saving_and_loading():
    def fresh():
        torch.manual_seed(0)
        linear = nn.Linear(3, 3)
        return linear, build_optimizer(linear.named_parameters(), OptimConfig(lr=0.1, lr_by_name={"bias": 0.01}))

    accelerator = Accelerator(cpu=True)
    linear, optimizer = accelerator.prepare(*fresh())
    linear(torch.ones(1, 3)).sum().backward()
    assert set_learning_rate(optimizer, 0.5) == 0.05
    optimizer.step()
    again = fresh()[1]
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.05, 0.005]
    assert set_learning_rate(again, 1.0) == 0.1
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.01]


# A user's own


def test_a_torch_class_works_as_it_stands(own_entries):
    OPTIMIZERS.register("theirs")(torch.optim.NAdam)
    weights = {"w": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = build(OptimConfig(name="theirs", lr=0.3, options={"momentum_decay": 0.1}), weights)
    assert type(optimizer) is torch.optim.NAdam
    assert [(group["weight_decay"], group["momentum_decay"]) for group in optimizer.param_groups] == [
        (0.2, 0.1),
        (0, 0.1),
    ]


def test_a_class_without_weight_decay_asks_for_none(own_entries):
    OPTIMIZERS.register("theirs")(torch.optim.Rprop)
    weights = {"w": nn.Parameter(torch.ones(2, 2))}
    assert type(build(OptimConfig(name="theirs", weight_decay=0), weights)) is torch.optim.Rprop
    with pytest.raises(ConfigError, match=r"optim\.weight_decay.*theirs.*set it to 0"):
        build(OptimConfig(name="theirs"), weights)


def test_an_optimizer_that_makes_its_own_groups_still_follows_the_schedule(own_entries):
    @OPTIMIZERS.register("splits")
    def splits(parameter_groups, lr, weight_decay, **options):
        """One group a parameter, keeping the rate alone."""
        groups = [{"params": [p], "lr": group["lr"]} for group in parameter_groups for p in group["params"]]
        return torch.optim.SGD(groups, weight_decay=weight_decay, **options)

    weights = {"w": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = build(OptimConfig(name="splits", lr=0.3, lr_by_name={"b": 0.1}, options={"momentum": 0.7}), weights)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.03, 0.01])
    assert optimizer.param_groups[0]["momentum"] == 0.7


# Names and options


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adamww"}, ["optim.name", "'adamww'", "did you mean 'adamw'", "adamw, sgd"]),
        ({"name": "lionn"}, ["optim.name", "did you mean 'lion'"]),
        ({"name": "adahessian"}, ["optim.name", "second derivatives"]),
        ({"options": {"beta": [0.9, 0.9]}}, ["optim.options", "adamw", "'beta'", "betas, eps", "did you mean 'betas'"]),
        ({"options": {"lr": 1.0}}, ["optim.options", "'lr'"]),
        ({"options": {"eps": -1.0}}, ["optim.options", "adamw", "-1.0"]),
        ({"options": {"eps": "small"}}, ["optim.options", "small"]),
        ({"name": "lion", "options": {"eps": 1e-8}}, ["optim.options", "lion", "'eps'"]),
        ({"name": "nadamw", "options": {"layer_decay": 0.7}}, ["optim.options", "nadamw", "'layer_decay'"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, words):
    with pytest.raises(ConfigError) as caught:
        build(OptimConfig(**settings), {"w": nn.Parameter(torch.ones(2, 2))})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for an optimizer that needs CUDA")
def test_an_optimizer_for_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.name: 'bnbadam8bit' cannot be used on this machine: CUDA"):
        check_optimizer(OptimConfig(name="bnbadam8bit"))


def test_the_list_has_ours_first_and_every_name_once():
    names = [name for name, _ in list_optimizers()]
    assert names[: len(OPTIMIZERS.names())] == OPTIMIZERS.names()
    assert len(set(names)) == len(names)
    assert set(timm.optim.list_optimizers()) - set(names) == set(SECOND_ORDER)
    assert all(description for _, description in list_optimizers())
