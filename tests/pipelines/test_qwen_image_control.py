"""Blockwise ControlNets: corrections against residuals added to diffusers' blocks, conditions against Pillow."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.vram import onload_model
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth_backend.pipelines.qwen_image_control import (
    ControlCondition,
    ControlNetInput,
    QwenImageUnit_BlockwiseControlNet,
    QwenImageUnit_ControlChecker,
    corrections,
    progress_at,
)
from diffsynth_backend.pipelines.qwen_image_model import model_fn_qwen_image

HEIGHT, WIDTH = 64, 96
ROWS, COLUMNS = HEIGHT // 8, WIDTH // 8
DIM, BLOCKS = 64, 2  # of the tiny denoiser
NO_TILES = {"tiled": False, "tile_size": None, "tile_stride": None}


@torch.no_grad()
def controlnet(seed: int = 0, additional_in_dim: int = 0, **sizes) -> QwenImageBlockWiseControlNet:
    generator = torch.Generator().manual_seed(seed)
    net = QwenImageBlockWiseControlNet(additional_in_dim=additional_in_dim,
                                       **{"num_layers": BLOCKS, "dim": DIM, **sizes})
    for parameter in net.parameters():
        parameter.copy_(parameter * 0.5 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return net.eval().requires_grad_(False)


@pytest.fixture
def nets() -> nn.ModuleList:
    """Two plain ones and one for inpainting."""
    return nn.ModuleList([controlnet(0), controlnet(1), controlnet(2, additional_in_dim=4)])


def condition(number: int = 0, scale: float = 1.0, start: float = 1.0, end: float = 0.0, seed: int = 0,
              channels: int = 16, rows: int = ROWS, columns: int = COLUMNS) -> ControlCondition:
    latents = torch.randn(1, channels, rows, columns, generator=torch.Generator().manual_seed(seed))
    return ControlCondition(number, scale, start, end, latents)


# ---- corrections ----------------------------------------------------------------------------------------------------

def patches(latents: Tensor) -> Tensor:
    """2×2 patches in reading order; within one by channel, then row, then column."""
    cells = [latents[0, :, row:row + 2, column:column + 2].flatten()
             for row in range(0, latents.shape[2], 2) for column in range(0, latents.shape[3], 2)]
    return torch.stack(cells)[None]


def residual(net: QwenImageBlockWiseControlNet, image: Tensor, latents: Tensor, block: int) -> Tensor:
    """output(GELU(input(rms(image) + rms(condition)))), from the weights alone."""
    weights = net.state_dict()
    w = {key.removeprefix(f"controlnet_blocks.{block}."): value for key, value in weights.items()}
    y = patches(latents) @ weights["img_in.weight"].T + weights["img_in.bias"]
    x, y = (t * (t.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}_rms.weight"]
            for name, t in (("x", image), ("y", y)))
    inside = (x + y) @ w["input_proj.weight"].T + w["input_proj.bias"]
    return (inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))) @ w["output_proj.weight"].T + w["output_proj.bias"]


CASES = {"one": [condition(0)], "scaled": [condition(0, -0.7)], "inpainting": [condition(2, channels=17)],
         "several": [condition(0, 0.8), condition(1, 0.5, seed=1), condition(2, 1.2, seed=2, channels=17)],
         "one net twice": [condition(1, 0.8), condition(1, 0.3, seed=3)]}


@pytest.mark.parametrize("conditions", CASES.values(), ids=CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_denoiser_with_control_is_diffusers_with_residuals_added(pipe, theirs, nets, relative_error, conditions,
                                                                     batch):
    latents, text = torch.randn(batch, 16, ROWS, COLUMNS), torch.randn(batch, 5, 64)

    def add_residuals(block: int):
        def hook(module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            prompt, image = output
            return prompt, image + sum(one.scale * residual(nets[one.controlnet_id], image, one.latents, block)
                                       for one in conditions)
        return hook

    handles = [block.register_forward_hook(add_residuals(index))
               for index, block in enumerate(theirs.transformer.transformer_blocks)]
    try:
        tokens = theirs.transformer(
            hidden_states=pipe.dit.patchify(latents), timestep=torch.full((batch,), 0.6), encoder_hidden_states=text,
            img_shapes=[[(1, ROWS // 2, COLUMNS // 2)]] * batch).sample
    finally:
        for handle in handles:
            handle.remove()
    inputs = {"dit": pipe.dit, "latents": latents, "timestep": torch.tensor([600.0]), "prompt_emb": text}
    controlled = model_fn_qwen_image(**inputs, blockwise_controlnet=nets, blockwise_controlnet_conditioning=conditions)
    assert relative_error(controlled, pipe.dit.unpatchify(tokens, ROWS, COLUMNS)) <= 1e-5
    assert relative_error(controlled, model_fn_qwen_image(**inputs)) > 1e-2  # the nets do something


def test_a_condition_leaves_the_tokens_of_edited_pictures_alone(pipe, nets):
    """The correction is as long as the picture's own tokens, whatever follows them."""
    seen = []
    handle = nets[0].controlnet_blocks[0].register_forward_hook(lambda net, inputs, out: seen.append(inputs[0].shape))
    inputs = {"dit": pipe.dit, "latents": torch.randn(1, 16, ROWS, COLUMNS), "timestep": torch.tensor([600.0]),
              "prompt_emb": torch.randn(1, 5, 64), "edit_latents": torch.randn(1, 16, 4, 4)}
    model_fn_qwen_image(**inputs, blockwise_controlnet=nets, blockwise_controlnet_conditioning=[condition(0)])
    handle.remove()
    assert seen == [(1, ROWS * COLUMNS // 4, DIM)]


def test_progress_runs_from_one_to_nought():
    assert [progress_at(step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert progress_at(0, 1) == 0


@pytest.mark.parametrize("step, steps", [(5, 5), (-1, 5), (1, 1), (0, 0)])
def test_a_step_that_the_loop_does_not_have_raises(step, steps):
    with pytest.raises(ValueError, match=f"step {step} of {steps}: num_inference_steps must be the loop's number"):
        progress_at(step, steps)


@pytest.mark.parametrize("start, end, active", [
    (1.0, 0.0, "11111"), (1.0, 0.5, "11100"), (0.5, 0.0, "00111"), (0.75, 0.25, "01110"), (1.0, 1.0, "10000"),
    (0.0, 0.0, "00001"), (0.6, 0.55, "00000"), (0.74995, 0.25005, "01110")])
def test_a_condition_works_between_start_and_end_with_both_borders(pipe, nets, start, end, active):
    conditions, shape = [condition(0, start=start, end=end)], (1, 16, ROWS, COLUMNS)
    found = "".join(str(int(corrections(nets, conditions, pipe.dit, shape, progress_at(step, 5)) is not None))
                    for step in range(5))
    assert found == active


@pytest.mark.parametrize("conditions", [None, (), [condition(0, scale=0.0)]])
def test_nothing_is_computed_without_an_effect(pipe, nets, monkeypatch, conditions):
    monkeypatch.setattr(QwenImageBlockWiseControlNet, "process_controlnet_conditioning", None)
    assert corrections(nets, conditions, pipe.dit, (1, 16, ROWS, COLUMNS), 0.5) is None


@pytest.mark.parametrize("models, one, shape, message", [
    (None, condition(), (1, 16, ROWS, COLUMNS), "needs a blockwise ControlNet, and none is loaded"),
    (nn.ModuleList(), condition(), (1, 16, ROWS, COLUMNS), "needs a blockwise ControlNet, and none is loaded"),
    (nn.ModuleList([controlnet()]), condition(1), (1, 16, ROWS, COLUMNS),
     r"controlnet_id 1, and 1 ControlNet\(s\) are loaded, number 0: choose"),
    (nn.ModuleList([controlnet(num_layers=3)]), condition(), (1, 16, ROWS, COLUMNS),
     "ControlNet 0 has 3 blocks of width 64 and the denoiser 2 of width 64: they are of different models"),
    (nn.ModuleList([controlnet(dim=32)]), condition(), (1, 16, ROWS, COLUMNS), "ControlNet 0 has 2 blocks of width 32"),
    (nn.ModuleList([controlnet()]), condition(), (1, 16, 8, 8),
     r"condition is 12×8 latents and the picture 8×8 \(width × height\)"),
    (nn.ModuleList([controlnet()]), condition(), (1, 16, 3, ROWS, COLUMNS), "controls one picture and not layers"),
])
def test_conditions_that_do_not_fit_raise(pipe, models, one, shape, message):
    with pytest.raises(ValueError, match=message):
        corrections(models, [one], pipe.dit, shape, 0.5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("vram_limit", [0, None])
@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_managed_nets_give_the_same_bits(pipe, nets, tmp_path, storage, vram_limit):
    """Their layers are wrapped one by one; a net that is used twice is visited twice."""
    dtype = "disk" if storage == "disk" else torch.float32
    config = {"offload_dtype": dtype, "offload_device": storage, "onload_dtype": dtype, "onload_device": storage,
              "preparing_dtype": torch.float32, "preparing_device": "cpu", "computation_dtype": torch.float32,
              "computation_device": "cpu"}
    managed = []
    for index, net in enumerate(nets):
        path = tmp_path / f"{index}.safetensors"
        save_file(net.state_dict(), path)
        managed.append(load_model(QwenImageBlockWiseControlNet, str(path),
                                  {"num_layers": BLOCKS, "dim": DIM, "additional_in_dim": net.additional_in_dim},
                                  module_map=module_map_of(QwenImageBlockWiseControlNet), vram_config=config,
                                  vram_limit=vram_limit))
        onload_model(managed[-1])
    image, conditions = torch.randn(1, ROWS * COLUMNS // 4, DIM), CASES["several"] + CASES["one net twice"]
    expected, found = (corrections(models, conditions, pipe.dit, (1, 16, ROWS, COLUMNS), 1.0)
                       for models in (nets, nn.ModuleList(managed)))
    for block in range(BLOCKS):
        assert torch.equal(found(block, image), expected(block, image))


# ---- the unit -------------------------------------------------------------------------------------------------------

def picture(seed: int = 0, mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    channels = () if mode == "L" else (len(mode),)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


@pytest.fixture
def controlled(pipe, nets):
    pipe.blockwise_controlnet = nets
    return pipe


def conditions_of(pipe, inputs, **options) -> tuple[ControlCondition, ...]:
    settings = {"height": HEIGHT, "width": WIDTH, **NO_TILES, **options}
    units = [QwenImageUnit_ControlChecker(), QwenImageUnit_BlockwiseControlNet()]
    shared, _, _ = pipe.run_units({"blockwise_controlnet_inputs": inputs, **settings}, {}, {}, units)
    return shared["blockwise_controlnet_conditioning"]


def encoded(pipe, image: Image.Image) -> Tensor:
    return pipe.encode_image(torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 127.5 - 1)
                             .permute(2, 0, 1)[None])


def test_a_control_picture_becomes_latents(controlled, relative_error):
    one, other = conditions_of(controlled, [ControlNetInput(image=picture()),
                                            ControlNetInput(1, 0.5, 0.8, 0.2, image=picture(1, "L"))])
    assert (one.controlnet_id, one.scale, one.start, one.end) == (0, 1.0, 1.0, 0.0)
    assert (other.controlnet_id, other.scale, other.start, other.end) == (1, 0.5, 0.8, 0.2)
    assert relative_error(one.latents, encoded(controlled, picture())) <= 1e-5
    assert relative_error(other.latents, encoded(controlled, picture(1, "L"))) <= 1e-5


def test_a_control_picture_is_resized_to_the_picture_that_is_drawn(controlled, relative_error):
    small = picture(height=40, width=56)
    found = conditions_of(controlled, [ControlNetInput(image=small)])[0].latents
    assert relative_error(found, encoded(controlled, small.resize((WIDTH, HEIGHT)))) <= 1e-5


def test_a_tensor_is_the_picture_it_holds(controlled, relative_error):
    plain, tensor = (conditions_of(controlled, [ControlNetInput(2, image=kind(picture()),
                                                                inpaint_mask=kind(picture(1, "L")))])[0].latents
                     for kind in (lambda image: image, as_tensor))
    assert relative_error(tensor, plain) <= 1e-5


@pytest.mark.parametrize("mask", [picture(1, "L"), picture(2), picture(3, "L", 32, 48)], ids=["L", "RGB", "small"])
def test_an_inpainting_condition_is_the_published_one(controlled, relative_error, mask):
    """Pixels above half a mask are black; the 17th channel is what to keep, the first pixel of each latent's eight."""
    found = conditions_of(controlled, [ControlNetInput(2, image=picture(), inpaint_mask=mask)])[0].latents
    grey = np.asarray(mask.convert("RGB").resize((WIDTH, HEIGHT)), dtype=np.float32).mean(axis=-1) / 255
    blanked = np.array(picture())
    blanked[grey > 0.5] = 0
    assert found.shape == (1, 17, ROWS, COLUMNS)
    assert relative_error(found[:, :16], encoded(controlled, Image.fromarray(blanked))) <= 1e-5
    torch.testing.assert_close(found[0, 16], torch.from_numpy(1 - grey[::8, ::8]), rtol=0, atol=1e-6)


def test_a_condition_is_encoded_tile_by_tile(controlled, relative_error):
    whole, tiled = (conditions_of(controlled, [ControlNetInput(image=picture())], **tiles)[0].latents
                    for tiles in (NO_TILES, {"tiled": True, "tile_size": 8, "tile_stride": 4}))
    expected = controlled.encode_image(controlled.preprocess_image(picture()), True, tile_size=8, tile_stride=4)
    assert torch.equal(tiled, expected)
    assert relative_error(tiled, whole) > 1e-6


def test_a_condition_without_scale_is_not_encoded(controlled, monkeypatch):
    monkeypatch.setattr(type(controlled), "encode_image", lambda *_: pytest.fail("encoded"))
    assert conditions_of(controlled, [ControlNetInput(image=picture(), scale=0.0)]) == ()


def test_without_inputs_there_is_nothing(controlled):
    assert QwenImageUnit_BlockwiseControlNet().process(controlled, None, HEIGHT, WIDTH, **NO_TILES) == {}


def test_conditions_have_the_pipelines_dtype(controlled):
    controlled.torch_dtype = torch.bfloat16
    encode = type(controlled).encode_image
    controlled.encode_image = lambda image, *args: encode(controlled, image.float(), *args).to(image.dtype)
    found = conditions_of(controlled, [ControlNetInput(2, image=picture(), inpaint_mask=picture(1, "L"))])
    assert found[0].latents.dtype == torch.bfloat16 and found[0].latents.shape[1] == 17


def test_a_condition_from_the_unit_controls(controlled, relative_error):
    conditions = conditions_of(controlled, [ControlNetInput(2, image=picture(), inpaint_mask=picture(1, "L"))])
    inputs = {"dit": controlled.dit, "latents": torch.randn(2, 16, ROWS, COLUMNS), "timestep": torch.tensor([600.0]),
              "prompt_emb": torch.randn(1, 5, 64), "blockwise_controlnet": controlled.blockwise_controlnet}
    drawn = [model_fn_qwen_image(**inputs, blockwise_controlnet_conditioning=conditions, progress_id=step,
                                 num_inference_steps=4) for step in (0, 3)]
    assert torch.equal(*drawn)  # active at both ends
    assert relative_error(drawn[0], model_fn_qwen_image(**inputs)) > 1e-3


def test_a_mask_hides_what_lies_below_it(controlled):
    """Two pictures that differ only where the mask is white give the same condition."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (16, 16, 64, 48))
    changed = picture()
    changed.paste((7, 8, 9), (16, 16, 64, 48))
    one, other = (conditions_of(controlled, [ControlNetInput(2, image=image, inpaint_mask=mask)])[0].latents
                  for image in (picture(), changed))
    assert torch.equal(one, other)
    assert torch.equal(one[:, 16:], 1 - F.interpolate(as_tensor(mask)[None, None], (ROWS, COLUMNS)))


@pytest.mark.parametrize("inputs, error, message", [
    (ControlNetInput(image=picture()), TypeError, "must be a list of ControlNetInput, got ControlNetInput"),
    ([picture()], TypeError, r"blockwise_controlnet_inputs\[0\] must be a ControlNetInput, got Image"),
    ([ControlNetInput(image=picture())] * 33, ValueError, "has 33 entries, at most 32 are taken"),
    ([ControlNetInput(3, image=picture())], ValueError,
     r"inputs\[0\] has controlnet_id 3, and 3 ControlNet\(s\) are loaded, numbers 0…2"),
    ([ControlNetInput(-1, image=picture())], ValueError, "controlnet_id -1"),
    ([ControlNetInput("0", image=picture())], ValueError, "controlnet_id '0'"),
    ([ControlNetInput()], ValueError, r"inputs\[0\] has no image: it is what controls"),
    ([ControlNetInput(image="edges.png")], TypeError, r"inputs\[0\].image must be a PIL image or a tensor"),
    ([ControlNetInput(image=picture(), inpaint_image=picture())], ValueError, "has an inpaint_image, which Qwen-Image"),
    ([ControlNetInput(image=picture(), processor_id="canny")], ValueError, "has processor_id 'canny', which chooses"),
    ([ControlNetInput(image=picture()), ControlNetInput(2, image=picture())], ValueError,
     r"inputs\[1\]: ControlNet 2 is for inpainting and needs image and inpaint_mask, and the inpaint_mask is missing"),
    ([ControlNetInput(1, image=picture(), inpaint_mask=picture())], ValueError,
     "ControlNet 1 is not for inpainting and takes an image alone: leave inpaint_mask out"),
    ([ControlNetInput(2, image=picture(), inpaint_mask=np.zeros((8, 8)))], TypeError,
     r"inputs\[0\].inpaint_mask must be a PIL image or a tensor"),
    ([ControlNetInput(scale=0.0)], ValueError, "has no image"),
])
def test_inputs_that_cannot_be_honoured_raise_before_anything_is_encoded(controlled, monkeypatch, inputs, error,
                                                                         message):
    monkeypatch.setattr(type(controlled), "encode_image", lambda *_: pytest.fail("encoded"))
    with pytest.raises(error, match=message):
        conditions_of(controlled, inputs)


@pytest.mark.parametrize("missing", [None, nn.ModuleList()])
def test_a_missing_net_is_named(pipe, missing):
    pipe.blockwise_controlnet = missing
    with pytest.raises(ValueError, match=r"inputs\[0\] needs a blockwise ControlNet, and none is loaded: add the file "
                                         "of DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny, -Depth or"):
        conditions_of(pipe, [ControlNetInput(image=picture())])


@pytest.mark.parametrize("fields, message", [
    ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    ({"start": 0.2, "end": 0.8}, "active from start down to end, 1 ≥ start ≥ end ≥ 0, got start 0.2 and end 0.8"),
    ({"start": 1.5}, "got start 1.5 and end 0.0"), ({"end": -0.1}, "got start 1.0 and end -0.1"),
    ({"start": float("nan")}, "got start nan"),
])
def test_borders_and_scales_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        ControlNetInput(**fields)
