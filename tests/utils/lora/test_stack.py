"""Which layers a LoRA reaches, and that stacks leave no trace: order, strengths, fusing, and taking away."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diffsynth_backend.configs import demo_model as sizes
from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core.vram import enable_vram_management, onload_model
from diffsynth_backend.core.vram.adapters import LinearLayers
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.models.wan_video_dit import VaceWanModel, WanModel
from diffsynth_backend.models.wan_video_text_encoder import WanTextEncoder
from diffsynth_backend.pipelines.wan_video import WanVideoPipeline
from diffsynth_backend.utils.lora.formats import LoraError, parse_lora
from diffsynth_backend.utils.lora.matching import match_lora
from diffsynth_backend.utils.lora.stack import Lora, LoraStack
from diffsynth_backend.utils.state_dict_converters.qwen_image_text_encoder import published_text_encoder_keys
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import diffusers_keys
from diffsynth_backend.utils.state_dict_converters.wan_video_text_encoder import diffusers_text_encoder_keys
from tests.helpers.wan_denoiser import SIZES, VACE_SIZES
from tests.helpers.wan_pipeline import TEXT_ENCODER


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def content(model: nn.Module, seed: int = 0, dora: bool = False, prefix: str = "", rank: int = 2) -> dict[str, Tensor]:
    """A LoRA on every linear layer of a model, DoRA on those with an even number of outputs."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            out_features, in_features = linear.weight.shape
            tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator)
            tensors[f"{prefix}{name}.lora_B.weight"] = 0.1 * torch.randn(out_features, rank, generator=generator)
            if dora:
                tensors[f"{prefix}{name}.dora_scale"] = torch.rand(out_features, 1, generator=generator) + 0.5
    return tensors


def lora(model: nn.Module, strength: float = 1.0, fused: bool = False, **options) -> Lora:
    file = parse_lora(content(model, **options), "mine")
    return Lora(match_lora(file, [("dit", model)]), strength, fused)


def snapshot(model: nn.Module) -> tuple[dict, list[type]]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [type(m) for m in model.modules()]


def assert_untouched(model: nn.Module, before: tuple[dict, list[type]]) -> None:
    weights, classes = snapshot(model)
    assert list(weights) == list(before[0]) and all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert classes == before[1] and not list(model.buffers()) and not any("_add" in name for m in model.modules()
                                                                          for name in vars(m))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_taken_away_leaves_no_trace(net, fused, dora):
    before, plain, stack = snapshot(net), net(X), LoraStack()
    stack.put([lora(net, 0.5, fused, dora=dora), lora(net, 2, seed=1)])
    assert not torch.allclose(net(X), plain)
    stack.put([])
    assert_untouched(net, before)
    assert torch.equal(net(X), plain)


def test_hot_is_fused(net):
    for strength in (0.5, -1.0, 3.0):
        results = []
        for fused in (False, True):
            stack = LoraStack()
            stack.put([lora(net, strength, fused, dora=True), lora(net, 0.3, fused, seed=1)])
            results.append(net(X))
            stack.put([])
        assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()


@pytest.mark.parametrize("fused", [False, True])
def test_the_order_has_no_effect(net, fused):
    loras = [lora(net, strength, fused, seed=seed, dora=seed == 2) for seed, strength in ((0, 0.7), (1, 1.3), (2, 0.9),
                                                                                       (1, -0.2))]
    results = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        stack = LoraStack()
        stack.put([loras[i] for i in order])
        results.append(net(X))
        stack.put([])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_equal_file_twice_has_both_strengths(net):
    stack = LoraStack()
    stack.put([lora(net, 0.25), lora(net, 0.5)])
    twice = net(X)
    stack.put([lora(net, 0.75)])
    assert torch.allclose(twice, net(X), rtol=1e-5)


def test_a_strength_of_zero_is_dropped(net):
    before, stack = snapshot(net), LoraStack()
    stack.put([lora(net, 0.0), lora(net, 0.0, fused=True)])
    assert_untouched(net, before)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_none(net, strength):
    with pytest.raises(ValueError, match="strength of mine"):
        lora(net, strength)


def test_only_what_differs_is_touched(net, monkeypatch):
    stack, first = LoraStack(), lora(net)
    stack.put([first])
    seen = []
    original = LinearLayers.put
    monkeypatch.setattr(LinearLayers, "put", lambda self, names: (seen.append(set(names)), original(self, names)))
    stack.put([first])
    assert not seen
    only_second = {key: value for key, value in content(net, seed=1).items() if key.startswith("second")}
    stack.put([first, Lora(match_lora(parse_lora(only_second, "other"), [("dit", net)]), 1.0)])
    assert seen == [{"second"}, {"second"}]


def test_strengths_do_not_accumulate(net):
    stack = LoraStack()
    stack.put([lora(net, 0.5)])
    expected = net(X)
    for strength in (1.0, 0.2, 0.5):
        stack.put([lora(net, strength)])
    assert torch.equal(net(X), expected)


def test_an_interrupt_leaves_what_was_there(net, monkeypatch):
    stack = LoraStack()
    stack.put([lora(net, 0.5)])
    expected, original, calls = net(X), LinearLayers.put, []

    def interrupted(self, additions):
        calls.append(additions)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, additions)

    monkeypatch.setattr(LinearLayers, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stack.put([lora(net, 2.0, seed=1)])
    assert torch.equal(net(X), expected) and len(stack.loras) == 1


def test_made_in_inference_mode_used_outside(net):
    stack = LoraStack()
    with torch.inference_mode():
        stack.put([lora(net, dora=True), lora(net, fused=True, seed=1)])
    assert not any(buffer.is_inference() for buffer in net.buffers()) and not net.first.weight.is_inference()
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        net(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_gradients_through_every_kind(net):
    for options in ({}, {"dora": True}):
        hot, fused = LoraStack(), LoraStack()
        grads = []
        for stack, is_fused in ((hot, False), (fused, True)):
            stack.put([lora(net, 0.7, is_fused, **options)])
            with torch.enable_grad():
                x = X.clone().requires_grad_()
                net(x).square().sum().backward()
            grads.append(x.grad)
            stack.put([])
        assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


# ---- fusing ---------------------------------------------------------------------------------------------------------

def test_nothing_is_fused_into_managed_weights(net):
    enable_vram_management(net, module_map_of(QwenImageDiT), vram_preset("low", torch.float32, "cpu"))
    with pytest.raises(LoraError, match="managed.*hotload=True"):
        LoraStack().put([lora(net, fused=True)])


def test_nothing_is_fused_into_fp8(net):
    net.to(torch.float8_e4m3fn)
    with pytest.raises(LoraError, match="first: torch.float8_e4m3fn.*hotload=True"):
        LoraStack().put([lora(net, fused=True)])


def test_a_fused_weight_keeps_its_dtype_and_the_original_its_bytes(net):
    net.bfloat16()
    original, stack = net.first.weight, LoraStack()
    stack.put([lora(net, fused=True)])
    assert net.first.weight.dtype == torch.bfloat16 and net.first.weight is not original
    stack.put([])
    assert net.first.weight is original


# ---- reach ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {"text_encoder": QwenImageTextEncoder(**sizes.TEXT_ENCODER), "dit": QwenImageDiT(**sizes.DIT),
            "blockwise_controlnet": QwenImageBlockWiseControlNet(num_layers=2, dim=128)}


@pytest.mark.parametrize("name", ["text_encoder", "dit", "blockwise_controlnet"])
@pytest.mark.parametrize("spelling", ["dots", "underscores", "published"])
@pytest.mark.parametrize("managed", [False, True])
def test_every_linear_layer_is_reached(models, name, spelling, managed):
    model = copy.deepcopy(models[name])
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tensors = content(model)
    if spelling == "published":
        tensors = published_text_encoder_keys(tensors)
    if spelling == "underscores":
        tensors = {f"{key.split('.lora_')[0].replace('.', '_')}.lora_{key.split('.lora_')[1]}": tensor
                   for key, tensor in tensors.items()}
    if managed:
        enable_vram_management(model, module_map_of(type(model)), vram_preset("low", torch.float32, "cpu"))
    others = [(other, models[other]) for other in models if other != name]
    layouts = {"text_encoder": published_text_encoder_keys}
    match = match_lora(parse_lora(tensors, "mine"), [*others, (name, model)], layouts)
    assert not match.unmatched and match.layers == {name: len(linears)}
    LoraStack().put([Lora(match, 1.0)])
    assert all(linear._additions for linear in linears)


WAN = {"dit": (WanModel, {**SIZES, "has_image_input": True, "in_dim": 36}, diffusers_keys),
       "vace": (VaceWanModel, VACE_SIZES, diffusers_keys),
       "text_encoder": (WanTextEncoder, TEXT_ENCODER, diffusers_text_encoder_keys)}


@pytest.mark.parametrize("name", WAN)
@pytest.mark.parametrize("underscores", [False, True])
def test_every_linear_layer_is_reached_by_its_name_in_diffusers(name, underscores):
    model_class, sizes_of, to_diffusers = WAN[name]
    model = model_class(**sizes_of)
    tensors = {}
    for layer, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            [key] = to_diffusers({f"{layer}.weight": None})
            stem = key.removesuffix(".weight")
            stem = stem.replace(".", "_") if underscores else stem
            tensors |= {f"{stem}.lora_A.weight": torch.ones(1, linear.in_features),
                        f"{stem}.lora_B.weight": torch.ones(linear.out_features, 1)}
    match = match_lora(parse_lora(tensors, "theirs"), [(name, model)], WanVideoPipeline.lora_layouts)
    assert not match.unmatched and match.layers == {name: len(tensors) // 2}
    assert {target.layer for target in match.targets} == set(LinearLayers(model))


def test_one_file_for_several_models(models):
    tensors = content(models["dit"], prefix="transformer.") | content(models["text_encoder"], prefix="text_encoder.")
    match = match_lora(parse_lora(tensors, "mine"), list(models.items()))
    assert not match.unmatched and set(match.layers) == {"dit", "text_encoder"}
    match = match_lora(parse_lora(tensors, "mine"), [("vae", nn.Linear(1, 1)), ("dit", models["dit"])])
    assert set(match.layers) == {"dit"} and all(key.startswith("text_encoder.") for key in match.unmatched)


def test_a_prefix_decides_between_models(models):
    tensors = {"transformer.img_in.lora_A.weight": torch.ones(1, 64), "transformer.img_in.lora_B.weight":
               torch.ones(128, 1)}
    match = match_lora(parse_lora(tensors, "mine"), [(name, models[name]) for name in ("blockwise_controlnet", "dit")])
    assert match.layers == {"dit": 1}


def test_two_models_of_one_name_need_a_choice(models):
    controlnet = models["blockwise_controlnet"]
    file = parse_lora(content(controlnet), "mine")
    with pytest.raises(LoraError, match="mine fits 2 models called blockwise_controlnet alike"):
        match_lora(file, [("blockwise_controlnet", controlnet), ("blockwise_controlnet", copy.deepcopy(controlnet))])


def test_layers_that_compute_something_else_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert list(LinearLayers(nn.ModuleDict({"a": Doubled(2, 2), "b": nn.Linear(2, 2)}))) == ["b"]


def test_a_model_in_use_is_not_changed(net):
    enable_vram_management(net, module_map_of(QwenImageDiT), vram_preset("low", torch.float32, "cpu"))
    change, stack = lora(net), LoraStack()
    onload_model(net)
    with pytest.raises(RuntimeError, match="offload it first"):
        stack.put([change])
    assert torch.isfinite(net(X)).all() and not stack.loras
