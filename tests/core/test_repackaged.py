"""Models that others packed again: prefixes and 8-bit scales are undone, whatever cannot be is refused."""
from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth_backend.core.loader.file import ModelFileError, hash_state_dict
from diffsynth_backend.core.loader.repackaged import Only, Unpack, part, prefixes_of, without_companions
from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
    DiskMap,
    Loop,
    Residency,
    enable_vram_management,
    tensor_reference,
)
from diffsynth_backend.core.vram.bus import Bus
from diffsynth_backend.models.model_loader import ModelPool, detect_models
from tests.helpers.fake_accelerator import FakeAccelerator
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.sparse import DIT, TEXT_ENCODER
from tests.helpers.vram_fields import cpu_fields

FLOAT8 = torch.float8_e4m3fn


def scaled(state_dict: dict[str, Tensor], layers: list[str], spelling: str = "scale_weight", rows: bool = False
           ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict with these layers in float8, and what their weights come to."""
    packed, expected = dict(state_dict), dict(state_dict)
    for layer in layers:
        weight = state_dict[f"{layer}.weight"].float()
        scale = (weight.abs().amax(dim=1) if rows else weight.abs().amax()) / 448
        by_row = scale.reshape(-1, 1) if rows else scale
        packed[f"{layer}.weight"] = (weight / by_row).to(FLOAT8)
        packed[f"{layer}.{spelling}"] = scale
        expected[f"{layer}.weight"] = (packed[f"{layer}.weight"].float() * by_row).bfloat16()
    return packed, expected


def linear_layers(state_dict: dict[str, Tensor]) -> list[str]:
    """Layers with a matrix, except embeddings and the head."""
    return [name.removesuffix(".weight") for name, tensor in state_dict.items()
            if name.endswith(".weight") and tensor.ndim == 2 and "embed" not in name and name != "lm_head.weight"]


@pytest.fixture
def text_encoder(tiny_files) -> dict[str, Tensor]:
    return load_file(tiny_files.file("text_encoder"))


class TestPublishedLayouts:
    """Comfy-Org/Qwen-Image_ComfyUI, split_files/."""

    def test_text_encoder_fp8_scaled(self) -> None:
        """qwen_2.5_vl_7b_fp8_scaled: loaders count 1446 keys in it, of which 358 are scales of weights."""
        layout = TEXT_ENCODER.layout()
        layers = linear_layers(layout)
        assert len(layers) == 358
        packed = {**layout, "scaled_fp8": torch.empty(2, dtype=FLOAT8, device="meta")}
        for layer in layers:
            packed[f"{layer}.weight"] = layout[f"{layer}.weight"].to(FLOAT8)
            packed |= {f"{layer}.{kind}": torch.empty((), device="meta") for kind in ("scale_weight", "scale_input")}
        assert len(packed) == 1446
        assert hash_state_dict(packed) != TEXT_ENCODER.model_hash
        found, = detect_models((), packed)
        assert found.name == "qwen_image_text_encoder" and "scales" in found.remark

    def test_denoiser_bf16_and_fp8(self) -> None:
        """qwen_image_bf16, _fp8_e4m3fn: the authors' names; the hash does not look at dtypes."""
        layout = {name: tensor.to(FLOAT8) for name, tensor in DIT.layout().items()}
        assert hash_state_dict(layout) == DIT.model_hash

    def test_denoiser_of_edit_2511(self) -> None:
        """ComfyUI knows that model by a tensor of this name beside the others; its fp8mixed has scales as well."""
        layout = {**DIT.layout(), "__index_timestep_zero__": torch.empty(0, device="meta")}
        layout["transformer_blocks.0.attn.to_q.weight_scale"] = torch.empty((), device="meta")
        layout["transformer_blocks.0.attn.to_q.comfy_quant"] = torch.empty(28, dtype=torch.uint8, device="meta")
        found, = detect_models((), layout)
        assert found.name == "qwen_image_dit"

    @pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
    def test_denoiser_under_a_prefix(self, prefix: str) -> None:
        found, = detect_models((), {f"{prefix}{name}": tensor for name, tensor in DIT.layout().items()})
        assert found.name == "qwen_image_dit" and prefix in found.remark


class TestScales:
    @pytest.mark.parametrize("rows", [False, True], ids=["one scale", "one for each row"])
    @pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
    def test_loads_as_what_the_scales_come_to(self, text_encoder, tmp_path: Path, spelling: str, rows: bool) -> None:
        packed, expected = scaled(text_encoder, linear_layers(text_encoder), spelling, rows)
        packed["scaled_fp8"] = torch.empty(2, dtype=FLOAT8)
        packed["model.layers.0.mlp.up_proj.scale_input"] = torch.ones(())
        models = []
        for name, content in (("packed", packed), ("plain", expected)):
            save_file(content, tmp_path / f"{name}.safetensors")
            pool = ModelPool()
            pool.auto_load_model(tmp_path / f"{name}.safetensors")
            models.append(pool.fetch_model("qwen_image_text_encoder").state_dict())
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())

    @pytest.mark.parametrize(("weight", "scale"), [
        (torch.zeros(4, 4, dtype=torch.int8), torch.ones(())),
        (torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4)),
        (torch.zeros(4, 4).to(FLOAT8), torch.ones(4, 2)),
    ], ids=["int8", "packed", "blocks"])
    def test_other_quantisation_is_refused(self, weight: Tensor, scale: Tensor) -> None:
        with pytest.raises(ModelFileError, match="only float8 with one scale.*get the model in bfloat16 or as"):
            Unpack()({"l.weight": weight, "l.weight_scale": scale})

    @pytest.mark.parametrize("rows", [False, True], ids=["one scale", "one for each row"])
    def test_scaled_weights_stay_on_disk(self, tmp_path: Path, rows: bool) -> None:
        packed, expected = scaled({"l.weight": torch.randn(40, 30), "l.bias": torch.randn(40)}, ["l"], rows=rows)
        save_file(packed, tmp_path / "m.safetensors")
        disk_map = DiskMap(tmp_path / "m.safetensors", state_dict_converter=Unpack())
        weight = expected["l.weight"]
        assert set(disk_map) == set(expected) and disk_map.dtype("l.weight") == weight.dtype
        assert not disk_map.is_stored("l.weight") and disk_map.is_stored("l.bias")
        assert torch.equal(disk_map["l.weight"], weight)
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(disk_map.load_into("l.weight", torch.empty(40, 30, dtype=dtype)), weight.to(dtype))
        part = torch.empty(1001, dtype=torch.uint8)
        disk_map.read_part("l.weight", 77, part)
        assert torch.equal(part, weight.reshape(-1).view(torch.uint8)[77:1078])

    @pytest.mark.parametrize("packing", [
        Unpack(), lambda stored: {"l.weight": torch.cat([Unpack()(stored)["l.weight"]] * 2)},
        lambda stored: {"l.weight": stored["l.scale_weight"].mul(stored["l.weight"].t().to(torch.float32))},
        lambda stored: {"l.weight": stored["l.weight"].to(torch.float32).mul(2.5).mul(torch.arange(40.).view(40, 1))},
    ], ids=["as it is", "twice", "turned", "with constants"])
    def test_blocks_of_rows_give_the_same_bits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               packing: Callable) -> None:
        packed, _ = scaled({"l.weight": torch.randn(40, 40)}, ["l"], rows=True)
        save_file(packed, tmp_path / "m.safetensors")
        expected = packing(packed)["l.weight"]
        for elements in (1, 130, 40 * 40 - 1, 1 << 20):
            monkeypatch.setattr(tensor_reference, "BLOCK_ELEMENTS", elements)
            disk_map = DiskMap(tmp_path / "m.safetensors", state_dict_converter=packing)
            assert torch.equal(disk_map["l.weight"], expected)
            out = torch.empty(expected.shape, dtype=expected.dtype)
            assert torch.equal(disk_map.read_into("l.weight", out), expected)
            assert torch.equal(disk_map.load_into("l.weight", torch.empty(expected.shape)), expected.float())

    def test_a_large_layer_takes_its_result_and_a_block(self, tmp_path: Path) -> None:
        """Neither it in float32 nor as it is stored is ever there as a whole."""
        rows, columns = 3000, 4000
        packed = {"l.weight": torch.zeros(rows, columns, dtype=FLOAT8), "l.scale_weight": torch.ones(rows)}
        save_file(packed, tmp_path / "m.safetensors")
        disk_map = DiskMap(tmp_path / "m.safetensors", state_dict_converter=Unpack())
        out, block = torch.empty(rows, columns, dtype=torch.bfloat16), 16 * tensor_reference.BLOCK_ELEMENTS
        for read in (disk_map.load_into, disk_map.read_into):
            with LiveBytes(out) as live:
                read("l.weight", out)
            assert live.peak <= block
        with LiveBytes() as live:
            disk_map["l.weight"]
        assert live.peak <= out.nbytes + block

    @pytest.mark.parametrize("bus", [None, FakeAccelerator(bandwidth=1e9)], ids=["direct", "staged"])
    def test_scaled_weights_are_streamed(self, tmp_path: Path, bus: Bus | None) -> None:
        """From disk for ever, by the engine's reader threads: the bits of the model loaded whole."""
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).requires_grad_(False).to(torch.bfloat16)
        packed, expected = scaled(net.state_dict(), [str(i) for i in range(5)])
        save_file(packed, tmp_path / "m.safetensors")
        disk_map = DiskMap(tmp_path / "m.safetensors", state_dict_converter=Unpack())
        fields = cpu_fields(None, None, None, torch.bfloat16)
        managed = enable_vram_management(copy.deepcopy(net), {nn.Linear: AutoWrappedLinear}, fields, 0, disk_map)
        x, residency = torch.randn(3, 16).bfloat16(), Residency([managed], bus)
        net.load_state_dict(expected)
        with torch.no_grad(), residency.loop(Loop(steps=3)):
            for _ in range(3):
                result, = residency.run([partial(managed, x)])
                assert torch.equal(result, net(x))
        assert residency.traffic.passes == 3

    def test_a_detected_model_computes_from_disk(self, text_encoder, tmp_path: Path) -> None:
        """Recognised by its layout and never loaded: the bits of the same weights in memory."""
        packed, expected = scaled(text_encoder, linear_layers(text_encoder))
        tokens, results = torch.tensor([[1, 2, 3, 5]]), []
        for name, content, fields in (("plain", expected, {}),
                                      ("packed", packed, cpu_fields(None, None, None, torch.bfloat16))):
            save_file(content, tmp_path / f"{name}.safetensors")
            pool = ModelPool()
            pool.auto_load_model(tmp_path / f"{name}.safetensors", fields)
            model = pool.fetch_model("qwen_image_text_encoder")
            assert any(parameter.is_meta for parameter in model.parameters()) == bool(fields)
            with torch.no_grad():
                results.append(model(tokens, torch.ones_like(tokens)))
        assert torch.equal(*results)


class TestNames:
    def test_parts(self) -> None:
        state_dict = {"vae.a": 1, "model.diffusion_model.b": 2, "c": 3, "text_encoders.d": 4, 5: 6}
        assert prefixes_of(state_dict) == ["vae.", "model.diffusion_model.", "", "text_encoders."]
        assert part(state_dict, "vae.") == {"a": 1}
        assert part(state_dict, "") == {"c": 3, 5: 6}

    def test_companions(self) -> None:
        kept = {"a.weight": 1, "scale": 2, "a.scale": 3}
        assert without_companions({**kept, "a.scale_weight": 4, "scaled_fp8": 5, "a.input_scale": 6}) == kept

    def test_only(self) -> None:
        assert Only(frozenset("ab"), lambda d: {**d, "b": 2})({"a": 1, "c": 3}) == {"a": 1, "b": 2}


def test_a_plain_fp8_cast_file_loads(tiny_files, tmp_path: Path) -> None:
    weights = load_file(tiny_files.file("transformer"))
    cast = {name: tensor.to(FLOAT8) for name, tensor in weights.items()}
    save_file(cast, tmp_path / "m.safetensors")
    pool = ModelPool()
    pool.auto_load_model(tmp_path / "m.safetensors")
    loaded = pool.fetch_model("qwen_image_dit").state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in cast.items())
