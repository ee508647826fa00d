"""Every spelling of a LoRA file against matrices merged by hand, and what a file must not contain."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.utils.lora.files import read_lora
from diffsynth_backend.utils.lora.formats import LayerName, LoraError, parse_lora, split_key
from diffsynth_backend.utils.lora.matching import match_lora
from diffsynth_backend.utils.lora.stack import Lora, LoraStack

IN, OUT, RANK = 12, 24, 3
NAME = "transformer_blocks.0.img_mlp.net.2"
STRENGTH = 0.7
ALPHA = 1.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_mlp = nn.Module()
        self.img_mlp.net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(IN, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return self.img_mlp.net(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_blocks[0](x)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
DOWN, UP = random(RANK, IN), random(OUT, RANK)
W1_A, W1_B, W2_A, W2_B = random(OUT, RANK), random(RANK, IN), random(OUT, 2), random(2, IN)
K1, K1_A, K1_B = random(4, 3), random(4, RANK), random(RANK, 3)
K2, K2_A, K2_B = random(6, 4), random(6, RANK), random(RANK, 4)
BY_OUTPUT, BY_INPUT = random(OUT, 1).abs() + 1, random(1, IN).abs() + 1


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net().eval().requires_grad_(False)


def decomposed(change: Tensor, magnitude: Tensor, axis: int) -> Callable[[Tensor], Tensor]:
    """DoRA: the direction of W + ΔW, at the magnitude."""
    def adapted(weight: Tensor) -> Tensor:
        rows = (weight + change).movedim(axis, 0)
        unit = torch.stack([row / row.square().sum().sqrt() for row in rows]).movedim(0, axis)
        return magnitude * unit
    return adapted


def added(change: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight + change


PAIRS = {"peft": (".lora_A.weight", ".lora_B.weight"), "named": (".lora_A.default.weight", ".lora_B.default.weight"),
         "other name": (".lora_A.mine.weight", ".lora_B.mine.weight"), "bare": (".lora_A", ".lora_B"),
         "kohya": (".lora_down.weight", ".lora_up.weight"), "diffusers": (".lora.down.weight", ".lora.up.weight"),
         "old diffusers": ("_lora.down.weight", "_lora.up.weight"),
         "transformers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")}
PREFIXES = ["", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.", "pipe.dit.",
            "base_model.model.transformer.", "module."]
UNDERSCORED = ["lora_unet_", "lora_transformer_", "lycoris_", ""]
HADAMARD = {".hada_w1_a": W1_A, ".hada_w1_b": W1_B, ".hada_w2_a": W2_A, ".hada_w2_b": W2_B}
BY_HAND = (W1_A @ W1_B) * (W2_A @ W2_B)
SCALE = ALPHA / RANK
# The tensors of a layer by what follows its name, and what they make of its weight.
KINDS = {
    "LoRA": ({".lora_A.weight": DOWN, ".lora_B.weight": UP}, added(UP @ DOWN)),
    "LoRA, alpha": ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".alpha": torch.tensor(ALPHA)},
                    added(SCALE * UP @ DOWN)),
    "LoRA, alpha of one axis": ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".alpha": torch.tensor([ALPHA])},
                                added(SCALE * UP @ DOWN)),
    "LoHa": ({**HADAMARD, ".alpha": torch.tensor(ALPHA)}, added(SCALE * BY_HAND)),
    "LoKr": ({".lokr_w1": K1, ".lokr_w2": K2, ".alpha": torch.tensor(ALPHA)}, added(torch.kron(K1, K2))),
    "LoKr, first in factors": ({".lokr_w1_a": K1_A, ".lokr_w1_b": K1_B, ".lokr_w2": K2, ".alpha": torch.tensor(ALPHA)},
                               added(SCALE * torch.kron(K1_A @ K1_B, K2))),
    "LoKr, second in factors": ({".lokr_w1": K1, ".lokr_w2_a": K2_A, ".lokr_w2_b": K2_B, ".alpha": torch.tensor(ALPHA)},
                                added(SCALE * torch.kron(K1, K2_A @ K2_B))),
    "LoKr, all in factors": ({".lokr_w1_a": K1_A, ".lokr_w1_b": K1_B, ".lokr_w2_a": K2_A, ".lokr_w2_b": K2_B},
                             added(torch.kron(K1_A @ K1_B, K2_A @ K2_B))),
    "DoRA of PEFT": ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".lora_magnitude_vector": BY_OUTPUT[:, 0]},
                     decomposed(UP @ DOWN, BY_OUTPUT, 0)),
    "DoRA of PEFT, named": ({".lora_A.a.weight": DOWN, ".lora_B.a.weight": UP,
                             ".lora_magnitude_vector.a.weight": BY_OUTPUT[:, 0]}, decomposed(UP @ DOWN, BY_OUTPUT, 0)),
    "DoRA by output": ({".lora_down.weight": DOWN, ".lora_up.weight": UP, ".dora_scale": BY_OUTPUT,
                        ".alpha": torch.tensor(ALPHA)}, decomposed(SCALE * UP @ DOWN, BY_OUTPUT, 0)),
    "DoRA by input": ({".lora_down.weight": DOWN, ".lora_up.weight": UP, ".dora_scale": BY_INPUT,
                       ".alpha": torch.tensor(ALPHA)}, decomposed(SCALE * UP @ DOWN, BY_INPUT, 1)),
    "DoRA on LoHa": ({**HADAMARD, ".dora_scale": BY_OUTPUT}, decomposed(BY_HAND, BY_OUTPUT, 0)),
    "DoRA on LoKr": ({".lokr_w1": K1, ".lokr_w2": K2, ".dora_scale": BY_INPUT},
                     decomposed(torch.kron(K1, K2), BY_INPUT, 1)),
}


def outputs(net: Net, path: str, adapted: Callable[[Tensor], Tensor], fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the net makes of an input: with the file, with the weight merged by hand, and without either."""
    x, merged, plain = random(2, 5, IN), copy.deepcopy(net), copy.deepcopy(net)
    weight = merged.get_submodule(NAME).weight
    weight.copy_(weight + STRENGTH * (adapted(weight) - weight))
    match = match_lora(read_lora(path), [("dit", net)])
    assert not match.unmatched and match.matched_count == match.file.key_count
    LoraStack().put([Lora(match, STRENGTH, fused)])
    return net(x), merged(x), plain(x)


def check(net: Net, path: str, adapted: Callable[[Tensor], Tensor], fused: bool) -> None:
    ours, theirs, plain = outputs(net, path, adapted, fused)
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5
    assert (ours - plain).norm() / plain.norm() > 0.1


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("pair", PAIRS)
def test_spellings_with_dots(net, tmp_path, pair, prefix):
    down, up = (f"{prefix}{NAME}{ending}" for ending in PAIRS[pair])
    save_file({down: DOWN, up: UP, f"{prefix}{NAME}.alpha": torch.tensor(ALPHA)}, tmp_path / "a.safetensors")
    check(net, tmp_path / "a.safetensors", added(SCALE * UP @ DOWN), fused=False)


@pytest.mark.parametrize("prefix", UNDERSCORED)
@pytest.mark.parametrize("kind", ["LoRA, alpha", "LoHa", "LoKr"])
def test_spellings_with_underscores(net, tmp_path, kind, prefix):
    tensors, adapted = KINDS[kind]
    name = prefix + NAME.replace(".", "_")
    save_file({name + ending: tensor for ending, tensor in tensors.items()}, tmp_path / "a.safetensors")
    check(net, tmp_path / "a.safetensors", adapted, fused=False)


@pytest.mark.parametrize("fused", [False, True], ids=["hot", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(net, tmp_path, kind, fused):
    tensors, adapted = KINDS[kind]
    save_file({NAME + ending: tensor for ending, tensor in tensors.items()}, tmp_path / "a.safetensors")
    check(net, tmp_path / "a.safetensors", adapted, fused)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_floating_point_dtype(net, tmp_path, dtype):
    down, up = DOWN.to(dtype), UP.to(dtype)
    save_file({f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up}, tmp_path / "a.safetensors")
    check(net, tmp_path / "a.safetensors", added(up.float() @ down.float()), fused=False)


@pytest.mark.parametrize("recorded, scale", [
    ({"transformer.lora_alpha": 6}, 6 / RANK), ({"lora_alpha": 6}, 6 / RANK), ({"text_encoder.lora_alpha": 6}, 1.0),
    ({"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"net.2": 9}}, 9 / RANK),
    ({"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"et.2": 9}}, 6 / RANK),
    ({"transformer.lora_alpha": 6, "transformer.use_rslora": True}, 6 / RANK**0.5)])
def test_the_alpha_that_diffusers_records(net, tmp_path, recorded, scale):
    save_file({f"transformer.{NAME}.lora_A.weight": DOWN, f"transformer.{NAME}.lora_B.weight": UP},
              tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(recorded)})
    check(net, tmp_path / "a.safetensors", added(scale * UP @ DOWN), fused=False)


def test_metadata_of_a_stranger(tmp_path):
    for index, text in enumerate(["[" * 100_000, "null", "[1]", '{"lora_alpha": "x"}', '{"lora_alpha": 1e999}']):
        path = tmp_path / f"{index}.safetensors"
        save_file({"a.lora_A.weight": DOWN, "a.lora_B.weight": UP}, path, {"lora_adapter_metadata": text})
        if "lora_alpha" in text:
            with pytest.raises(LoraError, match="a.lora_A.weight.*alpha"):
                read_lora(path)
        else:
            assert read_lora(path).adapters[LayerName(None, "a")].scale == 1


@pytest.mark.parametrize("key, found", [
    ("a.b.lora_A.weight", (LayerName(None, "a.b"), "down")),
    ("text_encoder.a.lora_B.default.weight", (LayerName("text_encoder", "a"), "up")),
    ("text_encoders.qwen25_7b.transformer.a.lora_up.weight", (LayerName("text_encoder", "a"), "up")),
    ("lora_te1_a_b.lora_up.weight", (LayerName("text_encoder", "a_b"), "up")),
    ("blockwise_controlnet.a.lora_A", (LayerName("blockwise_controlnet", "a"), "down")),
    ("a.lora_B.bias", None), ("a.diff", None), ("a.diff_b", None), ("a.weight", None), ("lora_A.weight", None),
    (".lora_A.weight", None), ("a.alpha.default", None), ("", None)])
def test_keys(key, found):
    assert split_key(key) == found


@pytest.mark.parametrize("parts, message", [
    ({".lora_A.weight": DOWN}, "no up"), ({".lora_up.weight": UP}, "no down"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".lora_down.weight": DOWN}, "both the down"),
    ({".lora_A.a.weight": DOWN, ".lora_A.b.weight": DOWN, ".lora_B.a.weight": UP}, "both the down"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP[:, :2]}, "multiplied"),
    ({".lora_A.weight": DOWN[:0], ".lora_B.weight": UP[:, :0]}, "0×12"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".alpha": torch.tensor(float("nan"))}, "alpha"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".alpha": torch.tensor(float("inf"))}, "alpha"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".alpha": torch.ones(2)}, "alpha"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP * float("nan")}, "not finite"),
    ({".lora_A.weight": DOWN.int(), ".lora_B.weight": UP}, "int32"),
    ({".lora_A.weight": DOWN[0], ".lora_B.weight": UP}, "a matrix"),
    ({".dora_scale": BY_OUTPUT}, "no factors"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".dora_scale": BY_OUTPUT[:5]}, "magnitude of 5×1"),
    ({".lora_A.weight": DOWN, ".lora_B.weight": UP, ".hada_w1_a": W1_A}, "a LoRA and of a LoHa"),
    ({".hada_w1_a": W1_A, ".hada_w1_b": W1_B, ".hada_w2_a": W2_A}, "no hada_w2_b"),
    ({**HADAMARD, ".hada_w2_b": W2_B[:, :5]}, "of one shape"),
    ({".lokr_w1": K1}, "no lokr_w2"), ({".lokr_w1": K1, ".lokr_w1_a": K1_A, ".lokr_w2": K2}, "and in factors"),
])
def test_contradictions(parts, message):
    with pytest.raises(LoraError, match=message) as error:
        parse_lora({f"some.layer{ending}": tensor for ending, tensor in parts.items()}, "mine.safetensors")
    assert "mine.safetensors" in str(error.value) and "some.layer" in str(error.value)


def test_what_is_of_no_use_is_listed(net):
    of_no_use = {"a.diff": UP, "a.alpha": torch.tensor(1.0), "b.diff_b": UP[:, 0], f"{NAME}.lora_B.bias": UP[:, 0],
                 "c.lora_down.weight": random(3, 4, 3, 3), "c.lora_up.weight": random(5, 3, 1, 1),
                 "d.lora_down.weight": DOWN, "d.lora_up.weight": UP, "d.lora_mid.weight": random(3, 3, 1, 1),
                 "e.lora_A.weight": DOWN, "e.lora_B.weight": UP, "x" * 5000 + ".lora_A.weight": DOWN}
    file = parse_lora({f"{NAME}.lora_A.weight": DOWN, f"{NAME}.lora_B.weight": UP, **of_no_use}, "mine")
    match = match_lora(file, [("dit", net)])
    assert (match.matched_count, len(match.unmatched), file.key_count) == (2, 12, 14)
    assert set(match.unmatched) == {key[:1000] for key in of_no_use}
    assert match.describe().startswith("mine: 2 of 14 keys used, on 1 layers of dit; 12 not used: a.alpha, a.diff, b")


def test_a_file_for_another_model(net):
    file = parse_lora({"double_blocks.0.lora_A.weight": DOWN, "double_blocks.0.lora_B.weight": UP}, "flux.safetensors")
    with pytest.raises(LoraError, match=r"none of its 2 keys .* dit \(Net\).* double_blocks.0.lora_A.weight, double"):
        match_lora(file, [("dit", net)])


def test_a_file_for_another_size(net):
    file = parse_lora({f"{NAME}.lora_A.weight": DOWN[:, :5], f"{NAME}.lora_B.weight": UP}, "large.safetensors")
    with pytest.raises(LoraError, match=f"large.safetensors: .{NAME}.lora_A.weight. .* 24×5, .* of dit has 24×12"):
        match_lora(file, [("dit", net)])


def test_two_adapters_for_one_layer(net):
    tensors = {".lora_A.weight": DOWN, ".lora_B.weight": UP}
    names = (NAME, "lora_unet_" + NAME.replace(".", "_"))
    file = parse_lora({name + ending: tensor for name in names for ending, tensor in tensors.items()}, "mine")
    with pytest.raises(LoraError, match=f"both for the layer {NAME}"):
        match_lora(file, [("dit", net)])


def test_the_digest_is_of_the_content(tmp_path):
    tensors = {"a.lora_A.weight": DOWN, "a.lora_B.weight": UP}
    digest = parse_lora(tensors, "mine").digest
    spelled = {"transformer.a.lora_up.weight": UP.clone(), "transformer.a.lora_down.weight": DOWN}
    assert parse_lora(spelled, "other").digest == digest
    for change in ({"a.lora_A.weight": DOWN + 1}, {"a.alpha": torch.tensor(1.0)}, {"b.lora_A.weight": DOWN,
                                                                                  "b.lora_B.weight": UP}):
        assert parse_lora({**tensors, **change}, "mine").digest != digest


def test_a_file_is_read_once_while_it_is_used(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a.lora_A.weight": DOWN, "a.lora_B.weight": UP}, path)
    first = read_lora(path)
    assert read_lora([path]) is first
    save_file({"a.lora_A.weight": DOWN, "a.lora_B.weight": 2 * UP, "a.alpha": torch.tensor(2.0)}, path)
    assert read_lora(path).digest != first.digest


def test_pickles(tmp_path, caplog):
    path = tmp_path / "a.pth"
    torch.save({"a.lora_A.weight": DOWN, "a.lora_B.weight": UP, "a.alpha": 2}, path)
    assert read_lora(path).adapters[LayerName(None, "a")].scale == 2 / RANK
    assert "is a pickle" in caplog.text
    with pytest.raises(LoraError, match="safetensors"):
        read_lora(path, safetensors_only=True)
