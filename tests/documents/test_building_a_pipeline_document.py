"""A third party's pipeline, put together from the code of the document on building one, as written.

The file below lies in the package, as the document has it: its imports are relative. Models, the first unit and the
bodies that the document leaves open ("# Do something") are this test's; an independent loop says what it has to draw.
"""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from textwrap import indent
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth_backend.configs.model_configs import MODEL_CONFIGS
from diffsynth_backend.core import ModelConfig, hash_model_file
from diffsynth_backend.diffusion import FlowMatchScheduler

MODELS = '''
import torch

class XXX_Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 4)

    def forward(self, text):
        codes = torch.tensor([[1, *text.encode()]], device=self.embedding.weight.device)
        return self.embedding(codes)

class YYY_Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = torch.nn.Conv2d(16, 16, 1)
        self.prompt = torch.nn.Linear(4, 16)

    def forward(self, latents, prompt_emb, timestep):
        shift = self.prompt(prompt_emb).mean(dim=1)[:, :, None, None]
        return self.latents(latents) + shift * timestep / 1000

class ZZZ_Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pixels = torch.nn.ConvTranspose2d(16, 3, 8, stride=8)

    def decode(self, latents, device):
        return self.pixels(latents.to(device))
'''

INIT = '''
import torch
from PIL import Image
from typing import Union
from tqdm import tqdm
from ..diffusion import FlowMatchScheduler
from ..core import ModelConfig
from ..diffusion.base_pipeline import BasePipeline, PipelineUnit
from ..models.new_models import XXX_Model, YYY_Model, ZZZ_Model

class NewDiffSynthPipeline(BasePipeline):

    def __init__(self, device="cuda", torch_dtype=torch.bfloat16):
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.scheduler = FlowMatchScheduler()
        self.text_encoder: XXX_Model = None
        self.dit: YYY_Model = None
        self.vae: ZZZ_Model = None
        self.in_iteration_models = ("dit",)
        self.units = [
            NewDiffSynthPipelineUnit_xxx(),
            ...
        ]
        self.model_fn = model_fn_new
'''

OTHER_UNITS = '''\
            QwenImageUnit_NoiseInitializer(),
            QwenImageUnit_PromptEmbedder(),
            QwenImageUnit_EntityControl(),
'''

FROM_PRETRAINED = '''
@staticmethod
def from_pretrained(
    torch_dtype: torch.dtype = torch.bfloat16,
    device: Union[str, torch.device] = "cuda",
    model_configs: list[ModelConfig] = [],
    vram_limit: float = None,
):
    # Initialize pipeline
    pipe = NewDiffSynthPipeline(device=device, torch_dtype=torch_dtype)
    model_pool = pipe.download_and_load_models(model_configs, vram_limit)

    # Fetch models
    pipe.text_encoder = model_pool.fetch_model("xxx_text_encoder")
    pipe.dit = model_pool.fetch_model("yyy_dit")
    pipe.vae = model_pool.fetch_model("zzz_vae")
    # If necessary, load tokenizers here.

    # VRAM Management
    pipe.vram_management_enabled = pipe.check_vram_management_state()
    return pipe
'''

CALL = '''
@torch.no_grad()
def __call__(
    self,
    prompt: str,
    negative_prompt: str = "",
    cfg_scale: float = 4.0,
    input_image: Image.Image = None,
    denoising_strength: float = 1.0,
    height: int = 1328,
    width: int = 1328,
    seed: int = None,
    rand_device: str = "cpu",
    num_inference_steps: int = 30,
    progress_bar_cmd = tqdm,
):
    # Scheduler
    self.scheduler.set_timesteps(
        num_inference_steps,
        denoising_strength=denoising_strength
    )

    # Parameters
    inputs_posi = {
        "prompt": prompt,
    }
    inputs_nega = {
        "negative_prompt": negative_prompt,
    }
    inputs_shared = {
        "cfg_scale": cfg_scale,
        "input_image": input_image,
        "denoising_strength": denoising_strength,
        "height": height,
        "width": width,
        "seed": seed,
        "rand_device": rand_device,
        "num_inference_steps": num_inference_steps,
    }
    for unit in self.units:
        inputs_shared, inputs_posi, inputs_nega = self.unit_runner(unit, self, inputs_shared, inputs_posi, inputs_nega)

    # Denoise
    self.load_models_to_device(self.in_iteration_models)
    models = {name: getattr(self, name) for name in self.in_iteration_models}
    for progress_id, timestep in enumerate(progress_bar_cmd(self.scheduler.timesteps)):
        timestep = timestep.unsqueeze(0).to(dtype=self.torch_dtype, device=self.device)

        # Inference
        noise_pred_posi = self.model_fn(**models, **inputs_shared, **inputs_posi, timestep=timestep, progress_id=progress_id)
        if cfg_scale != 1.0:
            noise_pred_nega = self.model_fn(**models, **inputs_shared, **inputs_nega, timestep=timestep, progress_id=progress_id)
            noise_pred = noise_pred_nega + cfg_scale * (noise_pred_posi - noise_pred_nega)
        else:
            noise_pred = noise_pred_posi

        # Scheduler
        inputs_shared["latents"] = self.step(self.scheduler, progress_id=progress_id, noise_pred=noise_pred, **inputs_shared)

    # Decode
    self.load_models_to_device(['vae'])
    image = self.vae.decode(inputs_shared["latents"], device=self.device)
    image = self.vae_output_to_image(image)
    self.load_models_to_device([])

    return image
'''  # noqa: E501 - as written

FIRST_UNIT = '''
from .qwen_image import QwenImagePipeline

class NewDiffSynthPipelineUnit_xxx(PipelineUnit):
    def __init__(self):
        super().__init__(input_params=("height", "width"), output_params=("height", "width"))

    def process(self, pipe, height, width):
        height, width = pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width}
'''

NOISE_UNIT = '''
class QwenImageUnit_NoiseInitializer(PipelineUnit):
    def __init__(self):
        super().__init__(
            input_params=("height", "width", "seed", "rand_device"),
            output_params=("noise",),
        )

    def process(self, pipe: QwenImagePipeline, height, width, seed, rand_device):
        noise = pipe.generate_noise((1, 16, height//8, width//8), seed=seed, rand_device=rand_device, rand_torch_dtype=pipe.torch_dtype)
        return {"noise": noise}
'''  # noqa: E501 - as written

PROMPT_UNIT = '''
class QwenImageUnit_PromptEmbedder(PipelineUnit):
    def __init__(self):
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            input_params=("edit_image",),
            output_params=("prompt_emb", "prompt_emb_mask"),
            onload_model_names=("text_encoder",)
        )

    def process(self, pipe: QwenImagePipeline, prompt, edit_image=None) -> dict:
        pipe.load_models_to_device(self.onload_model_names)
        # Do something
        return {"prompt_emb": prompt_embeds, "prompt_emb_mask": encoder_attention_mask}
'''

EMBED = '''\
        prompt_embeds = pipe.text_encoder(prompt)
        encoder_attention_mask = torch.ones(prompt_embeds.shape[:2])
'''

TAKE_OVER_UNIT = '''
class QwenImageUnit_EntityControl(PipelineUnit):
    def __init__(self):
        super().__init__(
            take_over=True,
            input_params=("eligen_entity_prompts", "width", "height", "eligen_enable_on_negative", "cfg_scale"),
            output_params=("entity_prompt_emb", "entity_masks", "entity_prompt_emb_mask"),
            onload_model_names=("text_encoder",)
        )

    def process(self, pipe: QwenImagePipeline, inputs_shared, inputs_posi, inputs_nega):
        # Do something
        return inputs_shared, inputs_posi, inputs_nega
'''

TAKE_OVER = '''\
        inputs_shared["latents"] = inputs_shared["noise"]
        inputs_posi["entity_masks"] = "reaches model_fn, which swallows it"
'''

MODEL_FN = '''
def model_fn_new(dit=None, latents=None, timestep=None, prompt_emb=None, **kwargs):
    return dit(latents, prompt_emb, timestep)
'''

DISK = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
        "preparing_dtype": torch.float32, "preparing_device": "cpu", "computation_dtype": torch.float32,
        "computation_device": "cpu"}


def pipeline_file() -> str:
    """The parts of the document in their places."""
    filled = {"            ...\n": OTHER_UNITS, "        # Do something\n        return {": f"{EMBED}        return {{",
              "        # Do something\n        return inputs": f"{TAKE_OVER}        return inputs"}
    code = "".join([INIT, indent(FROM_PRETRAINED, "    "), indent(CALL, "    "), FIRST_UNIT, NOISE_UNIT, PROMPT_UNIT,
                    TAKE_OVER_UNIT, MODEL_FN])
    for open_end, text in filled.items():
        assert code.count(open_end) == 1
        code = code.replace(open_end, text)
    return code


def put_into_package(name: str, code: str, folder: Path) -> ModuleType:
    """A module of the package whose file lies elsewhere."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory):
    """The pipeline's module, the registered models with their weights, and the configs of their saved files."""
    folder, registered = tmp_path_factory.mktemp("third_party"), len(MODEL_CONFIGS)
    models = put_into_package("diffsynth_backend.models.new_models", MODELS, folder)
    pipeline = put_into_package("diffsynth_backend.pipelines.new_pipeline", pipeline_file(), folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        instances = {"xxx_text_encoder": models.XXX_Model(), "yyy_dit": models.YYY_Model(),
                     "zzz_vae": models.ZZZ_Model()}
    for name, model in instances.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        MODEL_CONFIGS.append({"model_hash": hash_model_file(folder / f"{name}.safetensors"), "model_name": name,
                              "model_class": f"models.new_models.{type(model).__name__}"})

    def load(vram_limit: float | None = None, **fields):
        configs = [ModelConfig(path=str(folder / f"{name}.safetensors"), **fields) for name in instances]
        return pipeline.NewDiffSynthPipeline.from_pretrained(torch.float32, "cpu", configs, vram_limit)

    yield load, instances
    del MODEL_CONFIGS[registered:]
    for module in (models, pipeline):
        del sys.modules[module.__name__]


@torch.no_grad()
def drawn_by_hand(models: dict[str, torch.nn.Module], cfg_scale: float, prompt: str, negative: str) -> np.ndarray:
    """What the pipeline has to draw at 40 × 32 (rounded up to 48 × 32), seed 3, in 2 steps."""
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(2)
    x = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(3))
    for sigma, following in zip(scheduler.sigmas, [*scheduler.sigmas[1:], 0]):
        nega, posi = (models["yyy_dit"](x, models["xxx_text_encoder"](text), 1000 * sigma)
                      for text in (negative, prompt))
        x = x + (nega + cfg_scale * (posi - nega)) * (following - sigma)
    picture = models["zzz_vae"].decode(x, "cpu")[0].permute(1, 2, 0)
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().numpy()


@pytest.mark.parametrize("fields", [{}, DISK], ids=["unmanaged", "disk offload"])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_the_documents_pipeline_draws(third_party, fields, cfg_scale):
    load, models = third_party
    pipe = load(**fields)
    assert pipe.vram_management_enabled == bool(fields)
    picture = pipe("a red circle", "blue", cfg_scale=cfg_scale, height=40, width=32, seed=3, num_inference_steps=2,
                   progress_bar_cmd=iter)
    assert isinstance(picture, Image.Image) and picture.size == (32, 48)
    expected = drawn_by_hand(models, cfg_scale, "a red circle", "blue")
    assert np.abs(np.asarray(picture) - expected).max() <= 1  # rounded to 8 bits
    assert expected.std() > 1


def test_everything_is_back_on_disk_afterwards(third_party):
    load, _ = third_party
    pipe = load(vram_limit=0, **DISK)
    pipe("a", height=16, width=16, num_inference_steps=1, progress_bar_cmd=iter)
    assert all(parameter.is_meta for parameter in pipe.parameters())


def test_defaults_of_the_template_are_used(third_party, capfd):
    load, _ = third_party
    picture = load()("a red circle", num_inference_steps=1)
    assert picture.size == (1328, 1328)
    assert "1/1" in capfd.readouterr().err  # tqdm's progress
