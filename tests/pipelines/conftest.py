"""A tiny Qwen-Image twice, with equal random weights: ours, and diffusers' own pipeline as the oracle."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline as DiffusersPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.qwen_image_prompts import TextPrompts
from tests.helpers.qwen_image_seeing import SEEING_TEXT_ENCODER, VISION_TOKENS, seeing_text_encoder

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = ["Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships",
          "of the objects and background: system user assistant a red circle on a blue square"]
# scheduler/scheduler_config.json of Qwen/Qwen-Image.
SCHEDULER = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9,
             "shift_terminal": 0.02, "time_shift_type": "exponential", "use_dynamic_shifting": True}

DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 64,
       "axes_dims_rope": (8, 12, 12)}
TEXT_ENCODER = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48,
                "vocab_size": 304, "vision_hidden_size": 16, "vision_depth": 1, "vision_num_heads": 1,
                "vision_intermediate_size": 20}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """‖ours − theirs‖ / ‖theirs‖; shapes must be equal, so that nothing is broadcast."""
    def measure(ours: Tensor, theirs: Tensor) -> float:
        assert ours.shape == theirs.shape
        return float((ours - theirs).norm() / theirs.norm())
    return measure


def randomized(model: nn.Module) -> nn.Module:
    """Every weight moved away from its initial value: norms that start at one would hide a swapped pair."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def write_tokenizer(folder: Path, **config) -> Path:
    """A byte-level BPE vocabulary in Qwen2's files; `config` is added to tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = TEXT_ENCODER["vocab_size"] - len(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    added = {str(size + i): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                             "single_word": False} for i, token in enumerate(SPECIAL_TOKENS)}
    full = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "unk_token": None, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(full), encoding="utf-8")
    return folder


@pytest.fixture
def make_tokenizer(tmp_path) -> Callable[..., Path]:
    """Writes a tokenizer folder with given additions to its configuration."""
    return lambda **config: write_tokenizer(tmp_path / "tokenizer", **config)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def prompts(tokenizer_folder) -> TextPrompts:
    return TextPrompts.load(tokenizer_folder)


# ---- theirs ---------------------------------------------------------------------------------------------------------

def their_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 48, "vocab_size": 304, "max_window_layers": 2, "bos_token_id": None,
            "eos_token_id": None, "rms_norm_eps": 1e-6}
    vision = {"hidden_size": 16, "depth": 1, "num_heads": 1, "intermediate_size": 20, "out_hidden_size": 64,
              "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        **text, vision_config=vision, rope_theta=1000000.0, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        tie_word_embeddings=False))


@pytest.fixture(scope="session")
def theirs(tokenizer_folder) -> DiffusersPipeline:
    """diffusers' pipeline with tiny models; its template head is as long as in this tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    pipe = DiffusersPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=randomized(AutoencoderKLQwenImage(base_dim=8)),
        text_encoder=randomized(their_text_encoder()), tokenizer=tokenizer,
        transformer=randomized(QwenImageTransformer2DModel(in_channels=64, out_channels=16, **DIT)))
    with torch.no_grad():  # pictures mostly within −1…1, so that little is clipped
        pipe.vae.decoder.conv_out.weight.mul_(0.3)
        pipe.vae.decoder.conv_out.bias.mul_(0.3)
    head, _, _ = pipe.prompt_template_encode.partition("{}")
    pipe.prompt_template_encode_start_idx = len(tokenizer(head).input_ids)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- ours -----------------------------------------------------------------------------------------------------------

def with_weights(model: nn.Module, theirs: nn.Module) -> nn.Module:
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def our_models(theirs) -> dict[str, nn.Module]:
    return {"text_encoder": with_weights(QwenImageTextEncoder(**TEXT_ENCODER), theirs.text_encoder),
            "dit": with_weights(QwenImageDiT(**DIT), theirs.transformer),
            "vae": with_weights(QwenImageVAE(base_dim=8), theirs.vae)}


@pytest.fixture
def make_pipe(our_models, prompts) -> Callable[..., QwenImagePipeline]:
    """A float32 pipeline of the given class around the tiny models."""
    def make(cls: type[QwenImagePipeline] = QwenImagePipeline) -> QwenImagePipeline:
        pipe = cls(device="cpu", torch_dtype=torch.float32)
        for name, model in our_models.items():
            setattr(pipe, name, model)
        pipe.prompts = prompts
        return pipe
    return make


@pytest.fixture
def pipe(make_pipe) -> QwenImagePipeline:
    return make_pipe()


# ---- with pictures in prompts ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def seeing_tokenizer(prompts) -> PreTrainedTokenizerBase:
    """With the tokens that stand for pictures."""
    extended = copy.deepcopy(prompts.tokenizer)
    extended.add_tokens(VISION_TOKENS, special_tokens=True)
    return extended


@pytest.fixture(scope="session")
def seeing() -> Qwen2_5_VLForConditionalGeneration:
    """Their text encoder with a vision tower."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return seeing_text_encoder()


@pytest.fixture
def seeing_pipe(make_pipe, seeing, seeing_tokenizer) -> QwenImagePipeline:
    """The tiny pipeline with that text encoder."""
    pipe = make_pipe()
    pipe.prompts = TextPrompts(seeing_tokenizer)
    pipe.text_encoder = with_weights(QwenImageTextEncoder(**SEEING_TEXT_ENCODER), seeing)
    return pipe


@pytest.fixture
def draw() -> Callable[..., dict]:
    """Runs a pipeline and returns the picture, the finished latents and every `Step`."""
    def run(pipe: QwenImagePipeline, prompt: str = "a red circle", **options) -> dict:
        steps: list = []
        settings = {"height": 64, "width": 96, "num_inference_steps": 4, "seed": 5, "cfg_scale": 1.0,
                    "progress_bar_cmd": iter, **options}
        image = pipe(prompt, step_callback=steps.append, **settings)
        return {"image": image, "latents": steps[-1].latents, "steps": steps}
    return run
