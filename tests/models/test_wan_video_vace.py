"""VACE beside Wan's denoiser, against diffusers' `WanVACETransformer3DModel`, and both out of one file."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_backend.core import load_model
from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.core.platform import PositionedFile
from diffsynth_backend.models.wan_video_dit import VaceWanModel, WanModel
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import (
    VaceWanModelDictConverter,
    VaceWanModelFromDiffusers,
    WanVideoDiTStateDictConverter,
    WanVideoVaceDiTFromDiffusers,
)
from tests.helpers.wan_denoiser import SIZES, TOLERANCE, VACE_SIZES, make_vace_pair

pytestmark = pytest.mark.usefixtures("one_thread")

TIMESTEP = torch.tensor([612.5, 20.0])


@pytest.fixture
def models(randomized) -> tuple[WanModel, VaceWanModel, WanVACETransformer3DModel]:
    return make_vace_pair(randomized)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, prompts, condition."""
    return torch.randn(2, 16, 3, 4, 6), torch.randn(2, 7, 24), torch.randn(2, 96, 3, 4, 6)


def drawn(dit: WanModel, vace: VaceWanModel, inputs: tuple[Tensor, Tensor, Tensor], scale: float = 1.0) -> Tensor:
    latents, context, condition = inputs
    video = dit.embed(latents, TIMESTEP, context)
    return dit.output(dit.run_blocks(video, vace.corrections(vace(video, condition), scale)), video)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_hints_equal_diffusers(models, inputs, relative_error, scale):
    dit, vace, theirs = models
    latents, context, condition = inputs
    wanted = theirs(latents, TIMESTEP, context, control_hidden_states=condition,
                    control_hidden_states_scale=torch.full((2,), scale)).sample
    assert relative_error(drawn(dit, vace, inputs, scale), wanted) <= TOLERANCE
    assert relative_error(dit(latents, TIMESTEP, context), wanted) > 100 * TOLERANCE


def test_a_condition_of_fewer_frames_is_followed_by_zeros(models, inputs, relative_error):
    dit, vace, theirs = models
    latents, context, condition = inputs
    short = condition[:, :, :2]
    wanted = theirs(latents, TIMESTEP, context, control_hidden_states=short).sample
    assert relative_error(drawn(dit, vace, (latents, context, short)), wanted) <= TOLERANCE


def test_one_condition_serves_the_batch(models, inputs, relative_error):
    dit, vace, _ = models
    latents, context, condition = inputs
    wanted = drawn(dit, vace, (latents, context, condition[:1].expand(2, -1, -1, -1, -1)))
    assert relative_error(drawn(dit, vace, (latents, context, condition[:1])), wanted) <= TOLERANCE


def test_checkpointing_gives_the_same_gradients(models, inputs):
    dit, vace, _ = models
    vace.requires_grad_(True)

    def gradients(**options: bool) -> list[Tensor]:
        vace.zero_grad()
        hints = vace(dit.embed(inputs[0], TIMESTEP, inputs[1]), inputs[2], **options)
        sum(hint.square().sum() for hint in hints).backward()
        return [parameter.grad.clone() for parameter in vace.parameters()]

    for found, wanted in zip(gradients(use_gradient_checkpointing=True), gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(models, inputs):
    dit, vace, _ = models
    video = dit.embed(inputs[0], TIMESTEP, inputs[1])
    with pytest.raises(ValueError, match="has 32 channels; expected 96"):
        vace(video, torch.zeros(1, 32, 3, 4, 6))
    with pytest.raises(ValueError, match="is 24 tokens and the video 18"):
        vace(video, torch.zeros(1, 96, 4, 4, 6))
    with pytest.raises(ValueError, match="differ in has_image_input"):
        VaceWanModel(**VACE_SIZES, has_image_input=True)(video, inputs[2])
    with pytest.raises(ValueError, match="zip"):
        vace.corrections((inputs[0],))


# ---- files ----------------------------------------------------------------------------------------------------------

def test_default_layout_is_the_published_adapter():
    """The 1.3B file without its denoiser: 15 layers, the first with one linear more."""
    with torch.device("meta"):
        vace = VaceWanModel()
        theirs = WanVACETransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30,
                                           vace_layers=list(range(0, 30, 2)))
    assert len(vace.state_dict()) == 15 * 29 + 4
    assert hash_state_dict(VaceWanModelFromDiffusers(theirs.state_dict())) == hash_state_dict(vace.state_dict())


def counted(method: Callable[..., int], counts: list[int]) -> Callable[..., int]:
    """The method, with what it returns noted."""
    def noting(*arguments: object) -> int:
        counts.append(method(*arguments))
        return counts[-1]
    return noting


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_each_model_reads_its_own_tensors_of_one_file(models, inputs, tmp_path, monkeypatch, layout):
    dit, vace, theirs = models
    original = {**dit.state_dict(), **vace.state_dict()}
    save_file(original if layout == "original" else theirs.state_dict(), path := tmp_path / "model.safetensors")
    converters = {"original": (WanVideoDiTStateDictConverter, VaceWanModelDictConverter),
                  "diffusers": (WanVideoVaceDiTFromDiffusers, VaceWanModelFromDiffusers)}[layout]
    read = []
    monkeypatch.setattr(PositionedFile, "read_into", counted(PositionedFile.read_into, read))
    loaded = []
    for model, config, converter in zip((dit, vace), ({**SIZES, "num_layers": 4}, VACE_SIZES), converters):
        read.clear()
        loaded.append(load_model(type(model), str(path), config, torch_dtype=torch.float32, use_disk_map=True,
                                 state_dict_converter=converter))
        assert sum(read) == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert torch.equal(drawn(*loaded, inputs), drawn(dit, vace, inputs))
