"""One forward pass of the loop: what goes where in the sequence, what is refused, and the loop's table of timesteps."""
from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth_backend.models.qwen_image_dit import Entities, QwenImageDiT, Regions
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.qwen_image_control import ControlCondition
from diffsynth_backend.pipelines.qwen_image_model import activation_bytes, conditions_of, model_fn_qwen_image

SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 24,
         "axes_dims_rope": (8, 12, 12)}
TIMESTEP = torch.tensor([500.0])


@pytest.fixture(scope="module")
def dit() -> QwenImageDiT:
    torch.manual_seed(0)
    return QwenImageDiT(**SIZES).eval().requires_grad_(False)


def latents(batch: int = 1, height: int = 4, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


PROMPT = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))


def run(dit: QwenImageDiT, x: Tensor | None = None, **inputs: object) -> Tensor:
    return model_fn_qwen_image(dit=dit, latents=latents() if x is None else x, timestep=TIMESTEP,
                               **{"prompt_emb": PROMPT, **inputs})


# ---- the sequence ---------------------------------------------------------------------------------------------------

def test_every_input_is_named():
    kinds = {parameter.kind for parameter in inspect.signature(model_fn_qwen_image).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_context_edit_pictures_and_source_follow_in_this_order(dit):
    context, first, second, source = (latents(height=4, width=2 * i, seed=i) for i in range(1, 5))
    found = run(dit, context_latents=context, edit_latents=(first, second), layer_input_latents=source,
                zero_cond_t=True, edit_rope_interpolation=True)
    wanted = dit(latents(), TIMESTEP, PROMPT, conditions=[context, first, second, source], zero_cond_t=True,
                 interpolate_rope=True)
    assert torch.equal(found, wanted)
    assert conditions_of(edit_latents=first)[0] is first and conditions_of() == []


def test_one_of_each_serves_the_batch(dit):
    x, mask = latents(batch=2), torch.tensor([[1, 1, 1, 1, 0]])
    entities = {"entity_prompt_emb": (PROMPT[:, :3],), "entity_masks": torch.arange(24).view(1, 4, 6) < 9}
    cache = {"block_1": (torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3, 32))}
    inputs = {"edit_latents": latents(seed=1), "kv_cache": cache, "prompt_emb_mask": mask, **entities}
    both = run(dit, x, **inputs)
    for index in range(2):
        torch.testing.assert_close(both[index:index + 1], run(dit, x[index:index + 1], **inputs), rtol=1e-5, atol=1e-6)


def test_layers_are_one_sequence(dit):
    x = torch.stack([latents(seed=seed) for seed in range(3)], dim=2)
    found = run(dit, x, layer_num=2, layer_input_latents=latents(seed=9))
    assert found.shape == x.shape
    assert torch.equal(found, dit(x, TIMESTEP, PROMPT, conditions=[latents(seed=9)]))


def test_entities_and_cached_tokens_reach_the_denoiser(dit):
    masks = torch.arange(24).view(1, 4, 6) < 9
    cached = torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3, 32)
    found = run(dit, entity_prompt_emb=[PROMPT[:, :3]], entity_masks=masks, kv_cache={"block_1": cached})
    wanted = dit(latents(), TIMESTEP, PROMPT, entities=Entities((PROMPT[:, :3],), Regions(masks)),
                 kv_cache=[None, cached])
    assert torch.equal(found, wanted)


def test_corrections_of_a_controlnet_are_added_while_it_is_active(dit):
    torch.manual_seed(1)
    net = QwenImageBlockWiseControlNet(num_layers=2, dim=64).eval().requires_grad_(False)
    conditions = (ControlCondition(controlnet_id=0, scale=0.5, start=1.0, end=0.5, latents=latents(seed=1)),)
    edit = latents(height=2, seed=2)
    tokens = net.img_in(dit.patchify(latents(seed=1)))
    wanted = dit(latents(), TIMESTEP, PROMPT, conditions=[edit], after_block=lambda i, x: 0.5 * net(x, tokens, i))
    plain = dit(latents(), TIMESTEP, PROMPT, conditions=[edit])

    def at(step: int) -> Tensor:
        return run(dit, edit_latents=edit, blockwise_controlnet=torch.nn.ModuleList([net]),
                   blockwise_controlnet_conditioning=conditions, progress_id=step, num_inference_steps=5)

    assert not torch.allclose(wanted, plain)
    for step in range(5):  # progress 1, 0.75, 0.5, 0.25, 0
        torch.testing.assert_close(at(step), wanted if step < 3 else plain, rtol=1e-5, atol=1e-6)


def test_checkpointing_reaches_the_denoiser(dit, monkeypatch):
    called = []
    monkeypatch.setattr("diffsynth_backend.models.general_modules.checkpoint",
                        lambda block, *inputs, use_reentrant: (called.append(use_reentrant), block(*inputs))[1])
    run(dit, use_gradient_checkpointing=True)
    run(dit, use_gradient_checkpointing_offload=True)
    assert called == [False] * 4


# ---- what is refused ------------------------------------------------------------------------------------------------

WRONG = {
    "layers without layer_num": ({"x": torch.zeros(1, 16, 2, 4, 6)}, "the latent has shape"),
    "another number of layers": ({"x": torch.zeros(1, 16, 2, 4, 6), "layer_num": 2},
                                 r"layer_num 2 expected \(batch, 16, 3, height, width\)"),
    "layer_num without layers": ({"layer_num": 0}, r"layer_num 0 expected \(batch, 16, 1, height, width\)"),
    "odd latents": ({"x": torch.zeros(1, 16, 4, 5)}, "multiples of 2"),
    "odd layers": ({"x": torch.zeros(1, 16, 1, 4, 5), "layer_num": 0}, "each layer of the latent has shape"),
    "an odd condition": ({"edit_latents": torch.zeros(1, 16, 3, 4)}, "a condition's latent has shape"),
    "a condition of another VAE": ({"context_latents": torch.zeros(1, 4, 4, 4)}, "a condition's latent has shape"),
    "conditions for more pictures": ({"edit_latents": [torch.zeros(2, 16, 4, 4)]}, "for 2 pictures and 1 are drawn"),
    "prompts for more pictures": ({"prompt_emb": torch.zeros(2, 5, 24)}, "prompt_emb is for 2 pictures"),
    "entities without masks": ({"entity_prompt_emb": [PROMPT]}, "entity_masks have shape None"),
    "masks without entities": ({"entity_masks": torch.zeros(1, 4, 6).bool()}, r"expected \(0, 4, 6\)"),
    "fewer masks than entities": ({"entity_prompt_emb": [PROMPT] * 2, "entity_masks": torch.zeros(1, 4, 6).bool()},
                                  r"shape \(1, 4, 6\); expected \(2, 4, 6\)"),
    "masks of another size": ({"entity_prompt_emb": [PROMPT], "entity_masks": torch.zeros(1, 2, 3).bool()},
                              r"shape \(1, 2, 3\); expected \(1, 4, 6\)"),
    "a cache for no block": ({"kv_cache": {"block_2": (PROMPT, PROMPT), "blocks_1": (PROMPT, PROMPT)}},
                             "kv_cache has block_2, blocks_1; the denoiser's blocks are block_0 … block_1"),
    "a cache with the axes exchanged": ({"kv_cache": {"block_0": (torch.zeros(1, 3, 2, 32),) * 2}},
                                        r"block_0 .* expected both as \(1, 2, tokens, 32\)"),
    "a control without its net": (
        {"blockwise_controlnet_conditioning": (ControlCondition(0, 1.0, 1.0, 0.0, latents()),)}, "none is loaded"),
}


@pytest.mark.parametrize("inputs, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_honoured_is_refused(dit, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(dit, **inputs)


# ---- estimates ------------------------------------------------------------------------------------------------------

def test_the_estimate_counts_layers_conditions_and_prompts(dit):
    x = torch.empty(1, 16, 3, 4, 6)
    conditions = [latents(height=8, width=8), latents()]
    assert activation_bytes(dit, x, 30, conditions) == 24 * (3 * 6 + 16 + 6 + 30) * 64 * 4
    assert activation_bytes(dit, x[:, :, 0], 30) == dit.activation_bytes(1, 4, 6, 30, torch.float32)


# ---- the table of timesteps -----------------------------------------------------------------------------------------

STEPS = 4


def load(tiny_files, **fields: object) -> QwenImagePipeline:
    pipe = tiny_files.load(models=("transformer",), **fields)
    pipe.model_fn = model_fn_qwen_image
    return pipe


def draw(pipe: QwenImagePipeline) -> Tensor:
    """With a picture to edit and guidance, four steps."""
    prompts = torch.randn(2, 1, 7, 128, generator=torch.Generator().manual_seed(3))
    pipe.set_schedule(64, 48, STEPS)
    shared = {"latents": latents(height=8), "edit_latents": (latents(height=4, seed=1),), "zero_cond_t": True}
    posi, nega = ({"prompt_emb": prompt} for prompt in prompts)
    return pipe.denoise(shared, posi, nega, cfg_scale=4.0)["latents"]


def with_zero(pipe: QwenImagePipeline) -> QwenImagePipeline:
    timesteps = pipe.model_timesteps
    pipe.model_timesteps = lambda shared: (*timesteps(shared), torch.tensor(0.0))
    return pipe


def on_disk(tiny_files) -> QwenImagePipeline:
    fields = vram_preset("disk", torch.float32, "cpu")
    fields.pop("computation_dtype"), fields.pop("computation_device")
    return load(tiny_files, vram_limit=0, **fields)


def test_zero_cond_t_streams_no_modulation_again(tiny_files):
    """Its second timestep is in the table: a step reads what it reads without it, and the latents are the same."""
    pipe = with_zero(on_disk(tiny_files))
    assert torch.equal(draw(pipe), draw(load(tiny_files)))
    modulation = sum(p.numel() * 2 for name, p in pipe.dit.named_parameters()
                     if "_mod." in name or name.startswith(("time_text_embed", "norm_out")))
    total = sum(p.numel() * 2 for p in pipe.dit.parameters())
    assert pipe.last_loop.traffic.read_bytes == modulation + STEPS * (total - modulation)


def test_a_timestep_that_nobody_named_is_computed(tiny_files, monkeypatch):
    """Slower, and no less right."""
    pipe = on_disk(tiny_files)
    monkeypatch.setattr(pipe, "model_timesteps", lambda shared: tuple(pipe.scheduler.timesteps))
    assert torch.equal(draw(pipe), draw(load(tiny_files)))


def test_the_schedule_is_the_schedulers_unless_a_pipeline_says_more(tiny_files):
    pipe = tiny_files.load(models=("transformer",))
    pipe.set_schedule(64, 48, STEPS)
    assert pipe.model_timesteps({}) == tuple(pipe.scheduler.timesteps)
