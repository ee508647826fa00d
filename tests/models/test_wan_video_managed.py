"""Wan's denoisers, VACE and the motion controller under management: the bits of the unmanaged model, also from fp8."""
from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.vram import iter_managed, offload_model, onload_model
from diffsynth_backend.models.wan_video_dit import TimeModulation, VaceWanModel, VideoTokens, WanModel, video_rotations
from diffsynth_backend.models.wan_video_motion_controller import WanMotionControllerModel
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import WanVideoDiTFromDiffusers, diffusers_keys
from tests.helpers.wan_denoiser import FIRST_AND_LAST, SIZES, TI2V, VACE_SIZES

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TIMESTEP = torch.tensor([500.0])

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(BF16)


def with_everything(model: WanModel) -> Tensor:
    """Pictures, a reference and a camera's path."""
    camera = model.control_adapter(random(1, 2, 2, 32, 48))
    return model(random(1, 16, 2, 4, 6), TIMESTEP, random(1, 5, 24), y=random(1, 20, 2, 4, 6), camera=camera,
                 clip_features=random(1, 514, 1280), reference_latents=random(1, 16, 4, 6))


def hints(model: VaceWanModel) -> Tensor:
    modulation = TimeModulation(random(1, 64), random(1, 6, 64))
    rotations = video_rotations((2, 2, 3), 32, torch.device("cpu"))
    video = VideoTokens(random(1, 12, 64), random(1, 5, 64), None, (modulation,), 0, rotations, (2, 2, 3))
    return torch.stack(model(video, random(1, 96, 2, 4, 6)))


CASES: dict[str, tuple[type[nn.Module], dict, Callable[[nn.Module], Tensor]]] = {
    "text": (WanModel, SIZES, lambda m: m(random(1, 16, 2, 4, 6), TIMESTEP, random(1, 5, 24))),
    "everything": (WanModel, {**SIZES, **FIRST_AND_LAST, "has_ref_conv": True, "add_control_adapter": True,
                              "in_dim_control_adapter": 2}, with_everything),
    "clean frame": (WanModel, {**SIZES, **TI2V}, lambda m: m(random(1, 48, 2, 4, 6), TIMESTEP, random(1, 5, 24),
                                                             clean_frames=1)),
    "vace": (VaceWanModel, VACE_SIZES, hints),
    "motion": (WanMotionControllerModel, {"freq_dim": 16, "dim": 32}, lambda m: m(torch.tensor([7.0]), BF16)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_same_bits_as_unmanaged(case, tmp_path):
    model_class, config, run = case
    torch.manual_seed(0)
    model = model_class(**config)
    for parameter in model.parameters():
        parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.1)
    weights = {name: tensor.to(BF16) for name, tensor in model.state_dict().items()}
    save_file(weights, path := str(tmp_path / "model.safetensors"))
    expected = {storage: run(load_model(model_class, None, config, state_dict={
        name: tensor.to(storage).to(BF16) for name, tensor in weights.items()})) for storage in (BF16, FP8)}
    assert expected[BF16].isfinite().all() and not torch.equal(expected[BF16], expected[FP8])
    for (offload, onload), vram_limit in itertools.product(((FP8, FP8), (None, FP8), (None, None)), (0, None)):
        vram_config = {"computation_dtype": BF16, "computation_device": "cpu",
                       "offload_dtype": offload or "disk", "offload_device": "cpu" if offload else "disk",
                       "onload_dtype": onload or "disk", "preparing_dtype": onload or BF16}
        managed = load_model(model_class, path, config, module_map=module_map_of(model_class),
                             vram_config=vram_config, vram_limit=vram_limit)
        for change in (onload_model, offload_model):
            change(managed)
            storage = onload if change is onload_model else offload
            assert torch.equal(run(managed), expected[storage or BF16])


@torch.inference_mode()
def test_diffusers_layout_computes_from_disk(tmp_path):
    """No weight is read before it is needed, and the bits are those of the original layout."""
    torch.manual_seed(0)
    weights = {name: tensor.detach().to(BF16) for name, tensor in WanModel(**SIZES).state_dict().items()}
    save_file(diffusers_keys(weights), path := str(tmp_path / "model.safetensors"))
    vram_config = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
                   "preparing_dtype": BF16, "preparing_device": "cpu", "computation_dtype": BF16,
                   "computation_device": "cpu"}
    managed = load_model(WanModel, path, SIZES, state_dict_converter=WanVideoDiTFromDiffusers, vram_limit=0,
                         vram_config=vram_config, module_map=module_map_of(WanModel))
    onload_model(managed)
    assert len(list(iter_managed(managed))) > 20 and all(parameter.is_meta for parameter in managed.parameters())
    run = CASES["text"][2]
    assert torch.equal(run(managed), run(load_model(WanModel, None, SIZES, state_dict=weights)))
