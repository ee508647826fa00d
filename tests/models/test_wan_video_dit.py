"""Wan's denoiser against diffusers' `WanTransformer3DModel` with equal weights: text, pictures, clean frames."""
from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor

from diffsynth_backend.configs.model_configs import find_configs
from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.core.vram.timestep_table import Schedule, TimestepTable
from diffsynth_backend.models.wan_video_dit import WanModel, video_rotations
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import (
    WanVideoDiTFromDiffusers,
    WanVideoImageDiTFromDiffusers,
    diffusers_image_keys,
    diffusers_keys,
    prefixed_dit_keys,
)
from tests.helpers.wan_denoiser import FIRST_AND_LAST, IMAGE, SIZES, TI2V, TOLERANCE, make_pair

pytestmark = pytest.mark.usefixtures("one_thread")

TIMESTEP = torch.tensor([612.5])


@pytest.fixture
def pair(randomized):
    return make_pair(randomized)


def reference(model: WanTransformer3DModel, latents: Tensor, timestep: Tensor, context: Tensor,
              clip: Tensor | None = None) -> Tensor:
    return model(latents, timestep, context, clip).sample


# ---- text to video --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 4, 6), (3, 6, 4), (5, 2, 10)], ids=str)
def test_forward_equals_diffusers(pair, relative_error, shape):
    latents, context = torch.randn(1, 16, *shape), torch.randn(1, 7, 24)
    error = relative_error(pair[0](latents, TIMESTEP, context), reference(pair[1], latents, TIMESTEP, context))
    assert error <= TOLERANCE


@pytest.mark.parametrize("timestep", [1000.0, 766.709, 455.614, 20.0, 0.5, 0.0])
def test_timesteps_count_to_1000(pair, relative_error, timestep):
    latents, context, timestep = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 24), torch.tensor([timestep])
    error = relative_error(pair[0](latents, timestep, context), reference(pair[1], latents, timestep, context))
    assert error <= TOLERANCE


def test_a_batch_has_timesteps_and_prompts_of_its_own(pair, relative_error):
    latents, context, timestep = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 24), torch.tensor([900.0, 100.0])
    wanted = reference(pair[1], latents, timestep, context)
    assert relative_error(pair[0](latents, timestep, context), wanted) <= TOLERANCE
    assert relative_error(pair[0](latents, timestep, context[:1]), wanted) > 100 * TOLERANCE
    both = pair[0](latents, timestep, context[:1])
    assert relative_error(both, reference(pair[1], latents, timestep, context[:1].expand(2, -1, -1))) <= TOLERANCE


def test_a_patch_may_span_frames(randomized, relative_error):
    ours, theirs = make_pair(randomized, patch_size=(2, 2, 1))
    latents, context = torch.randn(1, 16, 4, 6, 3), torch.randn(1, 5, 24)
    error = relative_error(ours(latents, TIMESTEP, context), reference(theirs, latents, TIMESTEP, context))
    assert error <= TOLERANCE


@pytest.mark.parametrize("head_dim", [32, 40, 128])
def test_rotations_of_large_grids_equal_diffusers(head_dim):
    """Real sizes, where float32 angles would show a difference in how they are computed."""
    cos, sin = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=head_dim, num_layers=0, ffn_dim=8,
                                     text_dim=8).rope(torch.empty(1, 1, 21, 90, 160))
    ours = video_rotations((21, 45, 80), head_dim, torch.device("cpu"))
    assert ours.shape == (21 * 45 * 80, head_dim // 2, 2) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.stack([cos[0, :, 0, ::2], sin[0, :, 0, ::2]], dim=-1), rtol=0, atol=1e-6)


def test_rotations_made_in_inference_mode_still_allow_gradients(pair):
    with torch.inference_mode():
        pair[0](torch.randn(1, 16, 1, 2, 22), TIMESTEP, torch.randn(1, 3, 24))  # fills the cache for this size
    latents = torch.randn(1, 16, 1, 2, 22).requires_grad_()
    pair[0](latents, TIMESTEP, torch.randn(1, 3, 24)).sum().backward()
    assert latents.grad.abs().sum() > 0


# ---- pictures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, pictures", [(IMAGE, 1), (FIRST_AND_LAST, 2)], ids=["first", "first and last"])
def test_clip_features_equal_diffusers(randomized, relative_error, changes, pictures):
    """theirs take the pictures as a batch, and hold that the text has 512 tokens."""
    ours, theirs = make_pair(randomized, **changes)
    latents, y, context = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 20, 2, 4, 6), torch.randn(1, 512, 24)
    clip = torch.randn(pictures, 257, 1280)
    wanted = reference(theirs, torch.cat([latents, y], dim=1), TIMESTEP, context, clip)
    features = clip.flatten(0, 1)[None]
    assert relative_error(ours(latents, TIMESTEP, context, y=y, clip_features=features), wanted) <= TOLERANCE
    other = ours(latents, TIMESTEP, context, y=y, clip_features=features.flip(1))  # only positions tell these apart
    assert (relative_error(other, wanted) <= TOLERANCE) == (pictures == 1)


def test_one_picture_serves_the_batch(randomized, relative_error):
    ours, _ = make_pair(randomized, **IMAGE)
    latents, context = torch.randn(2, 16, 1, 4, 6), torch.randn(2, 5, 24)
    y, clip = torch.randn(1, 20, 1, 4, 6), torch.randn(1, 257, 1280)
    found = ours(latents, TIMESTEP.expand(2), context, y=y, clip_features=clip)
    wanted = ours(latents, TIMESTEP.expand(2), context, y=y.expand(2, -1, -1, -1, -1),
                  clip_features=clip.expand(2, -1, -1))
    assert relative_error(found, wanted) <= TOLERANCE


def test_a_reference_picture_is_a_frame_before_the_first(randomized, relative_error):
    """With the weights of the patch embedding for it, it is what that frame would be."""
    ours, theirs = make_pair(randomized, has_ref_conv=False)
    with_reference = WanModel(**SIZES, has_ref_conv=True).eval().requires_grad_(False)
    weights = {"ref_conv.weight": ours.patch_embedding.weight[:, :, 0], "ref_conv.bias": ours.patch_embedding.bias}
    with_reference.load_state_dict({**ours.state_dict(), **weights})
    latents, picture, context = torch.randn(2, 16, 3, 4, 6), torch.randn(1, 16, 4, 6), torch.randn(2, 5, 24)
    found = with_reference(latents, TIMESTEP.expand(2), context, reference_latents=picture)
    frames = torch.cat([picture[:, :, None].expand(2, -1, -1, -1, -1), latents], dim=2)
    wanted = reference(theirs, frames, TIMESTEP.expand(2), context)[:, :, 1:]
    assert relative_error(found, wanted) <= TOLERANCE


# ---- clean frames ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clean", [0, 1, 2, 3])
def test_clean_frames_equal_a_timestep_for_each_token(randomized, relative_error, clean):
    ours, theirs = make_pair(randomized, **TI2V)
    latents, context, timestep = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 7, 24), torch.tensor([612.5, 37.0])
    of_tokens = timestep[:, None, None].expand(2, 3, 6).clone()
    of_tokens[:, :clean] = 0
    wanted = reference(theirs, latents, of_tokens.flatten(1), context)
    assert relative_error(ours(latents, timestep, context, clean_frames=clean), wanted) <= TOLERANCE


# ---- what others put in ---------------------------------------------------------------------------------------------

def test_corrections_are_added_after_each_block(pair, relative_error):
    ours, theirs = pair
    latents, context, net = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 24), torch.randn(2, 64, 64) / 8
    seen = []

    def correction(i: int, tokens: Tensor) -> Tensor | None:
        seen.append((i, tokens.shape))
        return tokens @ net[i] if i == 1 else None

    found = ours(latents, TIMESTEP.expand(2), context, after_block=correction)
    assert seen == [(0, (2, 12, 64)), (1, (2, 12, 64))]
    theirs.blocks[1].register_forward_hook(lambda block, inputs, tokens: tokens + tokens @ net[1])
    assert relative_error(found, reference(theirs, latents, TIMESTEP.expand(2), context)) <= TOLERANCE


def test_motion_is_added_to_the_modulation_of_the_blocks(pair, relative_error):
    ours, theirs = pair
    latents, context, motion = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 24), torch.randn(1, 6 * 64)
    found = ours(latents, TIMESTEP.expand(2), context, motion=motion)
    theirs.condition_embedder.time_proj.register_forward_hook(lambda module, inputs, out: out + motion)
    assert relative_error(found, reference(theirs, latents, TIMESTEP.expand(2), context)) <= TOLERANCE


def test_a_camera_is_added_to_the_embedded_patches(randomized, relative_error):
    ours, theirs = make_pair(randomized)
    ours.control_adapter = torch.nn.Identity()  # the model has one; what it does is another test
    latents, context, camera = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 24), torch.randn(1, 64, 2, 2, 3)
    found = ours(latents, TIMESTEP.expand(2), context, camera=camera)
    theirs.patch_embedding.register_forward_hook(lambda module, inputs, out: out + camera)
    assert relative_error(found, reference(theirs, latents, TIMESTEP.expand(2), context)) <= TOLERANCE


def test_the_three_steps_are_the_forward_pass(pair):
    latents, context = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, 24)
    video = pair[0].embed(latents, TIMESTEP, context)
    assert video.grid == (2, 2, 3) and video.reference_tokens == video.clean_tokens == 0
    found = pair[0].output(pair[0].run_blocks(video), video)
    assert torch.equal(found, pair[0](latents, TIMESTEP, context))


@pytest.mark.parametrize("switch", ["use_gradient_checkpointing", "use_gradient_checkpointing_offload"])
def test_checkpointing_gives_the_same_gradients_and_computes_blocks_again(randomized, switch):
    ours, _ = make_pair(randomized, **TI2V)
    ours.requires_grad_(True)
    latents, context = torch.randn(1, 48, 2, 4, 4), torch.randn(1, 5, 24)
    runs = []
    ours.blocks[0].register_forward_pre_hook(lambda block, inputs: runs.append(0))

    def gradients(**options: bool) -> dict[str, Tensor]:
        ours.zero_grad()
        ours(latents, TIMESTEP, context, clean_frames=1, **options).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}

    wanted, found = gradients(), gradients(**{switch: True})
    assert len(runs) == 3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_modulation_comes_from_a_table_where_there_is_one(randomized, monkeypatch):
    """Both of the clean frames and of the others."""
    ours, _ = make_pair(randomized, **TI2V)
    latents, context, timestep = torch.randn(2, 48, 2, 4, 4), torch.randn(2, 5, 24), torch.tensor([500.0, 500.0])
    wanted = ours(latents, timestep, context, clean_frames=1)
    table = TimestepTable(ours)
    for fill in table.calls(Schedule((torch.tensor(500.0), torch.tensor(0.0)), 2, torch.float32), torch.device("cpu")):
        fill()
    monkeypatch.setattr(ours.time_embedding, "forward", None)  # whoever calls it fails
    with table.installed():
        assert torch.equal(ours(latents, timestep, context, clean_frames=1), wanted)
    with pytest.raises(TypeError):
        ours(latents, timestep, context, clean_frames=1)


def test_activations_grow_with_tokens_and_dtype(pair):
    at = pair[0].activation_bytes(1, 3, 8, 8, torch.bfloat16)
    assert at == 13 * 3 * 16 * 64 * 2
    assert pair[0].activation_bytes(2, 3, 8, 8, torch.float32) == 4 * at
    assert pair[0].activation_bytes(1, 3, 8, 8, torch.bfloat16, reference=True) * 3 == 4 * at


# ---- what does not fit ----------------------------------------------------------------------------------------------

LATENTS, CONTEXT = torch.zeros(1, 16, 2, 4, 6), torch.zeros(1, 5, 24)


@pytest.mark.parametrize("changes, given, message", [
    ({}, {"latents": torch.zeros(1, 4, 2, 4, 6)}, "takes 16 channels and got 4: 4 of the latents and 0 of y"),
    ({}, {"y": torch.zeros(1, 20, 2, 4, 6)}, "takes 16 channels and got 36: 16 of the latents and 20 of y"),
    ({}, {"latents": torch.zeros(1, 16, 2, 4, 5)}, r"\(2, 4, 5\) .* multiples of \(1, 2, 2\)"),
    ({}, {"clip_features": torch.zeros(1, 257, 1280)}, "no weights for CLIP features"),
    ({"has_image_input": True}, {}, "give clip_features, zeros where there is none"),
    ({"has_image_input": True}, {"clip_features": torch.zeros(1, 514, 1280)}, r"expected \(batch, \*\(257, 1280\)\)"),
    ({"has_image_input": True, "has_image_pos_emb": True}, {"clip_features": torch.zeros(1, 257, 1280)}, "514"),
    ({}, {"reference_latents": torch.zeros(1, 16, 4, 6)}, "no weights for reference_latents"),
    ({"has_ref_conv": True}, {"reference_latents": torch.zeros(1, 16, 1, 4, 6)}, r"expected \(batch, \*\(16, 4, 6\)"),
    ({}, {"camera": torch.zeros(1, 64, 2, 2, 3)}, "no weights for camera"),
    ({"add_control_adapter": True}, {"camera": torch.zeros(1, 64, 2, 4, 6)}, r"expected \(batch, \*\(64, 2, 2, 3\)"),
    ({}, {"clean_frames": 1}, "seperated_timestep"),
    ({"seperated_timestep": True}, {"clean_frames": 3}, r"expected 0…2"),
    ({"seperated_timestep": True}, {"clean_frames": -1}, r"expected 0…2"),
])
def test_what_does_not_fit_is_refused(changes, given, message):
    model = WanModel(**{**SIZES, "num_layers": 0, **changes})
    with pytest.raises(ValueError, match=message):
        model(**{"latents": LATENTS, "timestep": TIMESTEP, "context": CONTEXT, **given})


# ---- layouts --------------------------------------------------------------------------------------------------------

def test_the_published_layout_has_a_norm_that_the_class_of_diffusers_has_lost():
    with torch.device("meta"):
        names = WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=5120).state_dict()
    published = {**names, **{f"blocks.{i}.attn2.norm_added_q.weight": torch.empty(5120, device="meta")
                             for i in range(40)}}
    assert hash_state_dict(published) == "7cf3a086b49216bded0728ce78d59687"
    assert WanVideoImageDiTFromDiffusers(published).keys() == WanVideoDiTFromDiffusers(names).keys()
    assert diffusers_image_keys(WanVideoImageDiTFromDiffusers(published)).keys() == published.keys()


SMALL, LARGE = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, {}
FIRST = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
# What the config.json of each repository says where it differs from the class's own arguments.
IN_DIFFUSERS = {
    "b0a133b5687c7d054175e5bfa66ef5fd": (WanTransformer3DModel, SMALL),
    "cb104773c6c2cb6df4f9529ad5c60d0b": (WanTransformer3DModel, LARGE),
    "8b85650bb749144f6b934ba7d76a8a0c": (WanTransformer3DModel, {"in_channels": 36}),
    "ae5d9e8609a122565c5604f34731e117": (WanTransformer3DModel, {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}),
    "e0e8b7e0ab5bbf15b88be20fdf9dfcbd": (WanTransformer3DModel, FIRST),
    "9036a1876a232cff9b831ee3aad49d3e": (WanTransformer3DModel, {**FIRST, "pos_embed_seq_len": 514}),
    "8bf23cb53e769c6c0def5787ebf4cbcb": (WanVACETransformer3DModel, {**SMALL, "vace_layers": list(range(0, 30, 2))}),
    "344c305221c4c63a9e3bf636d7495475": (WanVACETransformer3DModel, {**LARGE, "vace_layers": list(range(0, 40, 5))}),
}


@pytest.mark.parametrize("model_hash", IN_DIFFUSERS)
def test_the_registered_layout_of_diffusers_is_that_of_its_class(model_hash):
    model_class, arguments = IN_DIFFUSERS[model_hash]
    with torch.device("meta"):
        assert hash_state_dict(model_class(**arguments).state_dict()) == model_hash
    assert find_configs(model_hash)


def test_converters_keep_the_tensors_and_their_inverses_the_names(randomized):
    theirs = make_pair(randomized, **FIRST_AND_LAST)[1].state_dict()
    back = diffusers_keys(WanVideoDiTFromDiffusers(theirs))
    assert back.keys() == theirs.keys() and all(back[key] is theirs[key] for key in theirs)
    assert set(prefixed_dit_keys({"head.head.bias": 0})) == {"model.head.head.bias"}


@pytest.mark.parametrize("key", ["blocks.0.attn3.to_q.weight", "blocks.0.attn2.norm_added_q.weight", "rope.freqs"])
def test_a_name_that_diffusers_does_not_have_stays(key):
    """Whoever loads the result says by that name what the model does not have."""
    assert set(WanVideoDiTFromDiffusers({key: torch.zeros(1)})) == {key}
