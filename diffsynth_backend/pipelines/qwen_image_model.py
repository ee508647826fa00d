"""One forward pass of the Qwen-Image loop: everything that units prepared, as the denoiser takes it.

Notable: every latent here is normalised. The sequence is noise (all layers), context, edit pictures, layer source, and
the result is the noise's part.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..models.qwen_image_dit import Entities, KeysValues, QwenImageDiT, Regions
from .qwen_image_control import ControlCondition, corrections, progress_at

LATENT_CHANNELS = 16


def model_fn_qwen_image(dit: QwenImageDiT, latents: Tensor, timestep: Tensor, prompt_emb: Tensor,
                        prompt_emb_mask: Tensor | None = None, blockwise_controlnet: nn.ModuleList | None = None,
                        blockwise_controlnet_conditioning: Sequence[ControlCondition] | None = None,
                        progress_id: int = 0, num_inference_steps: int = 1,
                        entity_prompt_emb: Sequence[Tensor] | None = None, entity_masks: Tensor | Regions | None = None,
                        edit_latents: Tensor | Sequence[Tensor] | None = None, edit_rope_interpolation: bool = False,
                        zero_cond_t: bool = False, layer_input_latents: Tensor | None = None,
                        layer_num: int | None = None, context_latents: Tensor | None = None,
                        kv_cache: Mapping[str, KeysValues] | None = None, use_gradient_checkpointing: bool = False,
                        use_gradient_checkpointing_offload: bool = False) -> Tensor:
    """Predicted velocity, shaped as the latents. What there is one of serves the whole batch.

    latents               (B, 16, h, w), h and w even; with layer_num (B, 16, layer_num + 1, h, w), the first of them
                          being the whole picture
    timestep              (1,) or (B,), 0…1000
    prompt_emb, …_mask    (1 or B, T, D) and (1 or B, T)
    blockwise_controlnet, …_conditioning, progress_id, num_inference_steps   see `corrections`
    entity_prompt_emb, entity_masks   prompts (1 or B, T_i, D) for regions, bool (number, h, w) or `Regions` of them
    context_latents, edit_latents, layer_input_latents   clean latents (1 or B, 16, h_i, w_i) to draw by
    edit_rope_interpolation, zero_cond_t   see `QwenImageDiT.forward`
    kv_cache              "block_<number>" → keys and values (1 or B, heads, tokens, head_dim), which all see
    use_gradient_checkpointing, …_offload   for training

    Raises ValueError for what does not fit the latents or the denoiser.
    """
    check_latents(latents, layer_num, dit.patch_size)
    batch = len(latents)
    conditions = conditions_of(context_latents, edit_latents, layer_input_latents)
    for condition in conditions:
        check_shape("a condition's latent", condition, LATENT_CHANNELS, dit.patch_size)
        _check_batch("a condition's latent", condition, batch)
    correction = None
    if blockwise_controlnet_conditioning:
        correction = corrections(blockwise_controlnet, blockwise_controlnet_conditioning, dit, latents.shape,
                                 progress_at(progress_id, num_inference_steps))
    return dit(latents, timestep.expand(batch), _for_batch("prompt_emb", prompt_emb, batch),
               None if prompt_emb_mask is None else _for_batch("prompt_emb_mask", prompt_emb_mask, batch),
               conditions=conditions, zero_cond_t=zero_cond_t, interpolate_rope=edit_rope_interpolation,
               entities=_entities(entity_prompt_emb, entity_masks, latents), after_block=correction,
               kv_cache=_by_block(kv_cache, dit, batch), use_gradient_checkpointing=use_gradient_checkpointing,
               use_gradient_checkpointing_offload=use_gradient_checkpointing_offload)


def conditions_of(context_latents: Tensor | None = None, edit_latents: Tensor | Sequence[Tensor] | None = None,
                  layer_input_latents: Tensor | None = None) -> list[Tensor]:
    """The clean latents that follow the noise, in the order of the sequence."""
    edits = [edit_latents] if isinstance(edit_latents, Tensor) else edit_latents or ()
    return [latents for latents in (context_latents, *edits, layer_input_latents) if latents is not None]


def activation_bytes(dit: QwenImageDiT, latents: Tensor, prompt_tokens: int, conditions: Sequence[Tensor] = ()) -> int:
    """`QwenImageDiT.activation_bytes` of a pass over these latents, with prompts of so many tokens together.

    Raises ValueError for latents of another shape than (B, 16, h, w) or (B, 16, layers, h, w).
    """
    layers = 1 if latents.ndim == 4 else latents.shape[2]
    check_latents(latents, None if latents.ndim == 4 else layers - 1, dit.patch_size)
    return dit.activation_bytes(len(latents), *latents.shape[-2:], prompt_tokens, latents.dtype, layers=layers,
                                condition_tokens=sum(map(dit.token_count, conditions)))


def check_shape(what: str, tensor: Tensor, channels: int, multiple: int = 1) -> None:
    """Raises ValueError unless `tensor` is (B, channels, H, W) with H and W multiples of `multiple`, and not empty."""
    fits = tensor.ndim == 4 and tensor.shape[1] == channels and not any(side % multiple for side in tensor.shape[2:])
    if not fits or tensor.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; expected (batch, {channels}, height, width) with "
                         f"sides above 0 that are multiples of {multiple}")


def check_latents(latents: Tensor, layer_num: int | None, multiple: int) -> None:
    """Raises ValueError unless the latents are one picture, or with `layer_num` the whole picture and its layers."""
    if layer_num is None:
        check_shape("the latent", latents, LATENT_CHANNELS, multiple)
    elif latents.ndim != 5 or latents.shape[2] != layer_num + 1:
        raise ValueError(f"the latent has shape {tuple(latents.shape)}; with layer_num {layer_num} expected (batch, "
                         f"{LATENT_CHANNELS}, {layer_num + 1}, height, width): the whole picture, then its layers")
    else:
        check_shape("each layer of the latent", latents.select(2, 0), LATENT_CHANNELS, multiple)


def _check_batch(what: str, tensor: Tensor, batch: int) -> None:
    if len(tensor) not in (1, batch):
        raise ValueError(f"{what} is for {len(tensor)} pictures and {batch} are drawn: give {_one_or(batch)}")


def _one_or(batch: int) -> str:
    return "1" if batch == 1 else f"1 or {batch}"


def _for_batch(what: str, tensor: Tensor, batch: int) -> Tensor:
    _check_batch(what, tensor, batch)
    return tensor.expand(batch, *tensor.shape[1:])


def _entities(prompt_embs: Sequence[Tensor] | None, masks: Tensor | Regions | None,
              latents: Tensor) -> Entities | None:
    if prompt_embs is None and masks is None:
        return None
    wanted = (len(prompt_embs or ()), *latents.shape[-2:])
    regions = Regions(masks.to(latents.device)) if isinstance(masks, Tensor) else masks
    found = None if regions is None else tuple(regions.masks.shape)
    if not prompt_embs or found != wanted:
        raise ValueError(f"entity_masks have shape {found}; expected {wanted}: one on the latent grid for each of "
                         "entity_prompt_emb, and at least one")
    for number, embedding in enumerate(prompt_embs):
        _check_batch(f"entity_prompt_emb[{number}]", embedding, len(latents))
    return Entities(tuple(prompt_embs), regions)


def _by_block(kv_cache: Mapping[str, KeysValues] | None, dit: QwenImageDiT,
              batch: int) -> list[KeysValues | None] | None:
    """For each block what is cached for it. Raises ValueError for blocks and shapes that the denoiser does not have."""
    if kv_cache is None:
        return None
    names = [f"block_{number}" for number in range(len(dit.transformer_blocks))]
    if unknown := sorted(kv_cache.keys() - set(names)):
        raise ValueError(f"kv_cache has {', '.join(unknown)}; the denoiser's blocks are {names[0]} … {names[-1]}")
    heads, head_dim = dit.transformer_blocks[0].attn.num_heads, sum(dit.axes_dims_rope)
    for name, (keys, values) in kv_cache.items():
        fits = keys.ndim == 4 and keys.shape == values.shape and (keys.shape[1], keys.shape[3]) == (heads, head_dim)
        if not fits or len(keys) not in (1, batch):
            raise ValueError(f"kv_cache's {name} has keys and values of shapes {tuple(keys.shape)} and "
                             f"{tuple(values.shape)}; expected both as ({_one_or(batch)}, {heads}, tokens, {head_dim})")
    return [kv_cache.get(name) for name in names]
