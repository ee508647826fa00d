"""The steps of the document on integrating a model, with its code as written: classes, converter, loading, messages."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth_backend.configs.model_configs import MODEL_CONFIGS
from diffsynth_backend.core import hash_model_file
from diffsynth_backend.models.model_loader import ModelPool
from diffsynth_backend.utils.state_dict_converters.qwen_image_text_encoder import QwenImageTextEncoderStateDictConverter
from tests.helpers.documents import as_here, run
from tests.helpers.sparse import TEXT_ENCODER, memory_growth

ROOT = Path(__file__).parents[2]
MIB = 2**20

MODEL = """
import torch

class NewDiffSynthModel(torch.nn.Module):
    def __init__(self, dim=1024):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)
        self.activation = torch.nn.Sigmoid()

    def forward(self, x):
        x = self.linear(x)
        x = self.activation(x)
        return x
"""

LIBRARY_MODEL = """
import torch

class DiffSynth_XXX_Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import XXX_Config, XXX_Model
        config = XXX_Config(**{
            "architectures": ["XXX_Model"],
            "other_configs": "Please copy and paste the other configs here.",
        })
        self.model = XXX_Model(config)

    def forward(self, x):
        outputs = self.model(x)
        return outputs
"""

OTHER_CONFIGS = """
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "vocab_size": 10,
"""

CONVERTER = """
def QwenImageTextEncoderStateDictConverter(state_dict):
    state_dict_ = {}
    for k in state_dict:
        v = state_dict[k]
        if k.startswith("visual."):
            k = "model." + k
        elif k.startswith("model."):
            k = k.replace("model.", "model.language_model.")
        state_dict_[k] = v
    return state_dict_
"""

LOADING = """
from diffsynth.core import hash_model_file, load_state_dict, skip_model_initialization
from diffsynth.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth.utils.state_dict_converters.qwen_image_text_encoder import QwenImageTextEncoderStateDictConverter
import torch

model_hash = "8004730443f55db63092006dd9f7110e"
model_name = "qwen_image_text_encoder"
model_class = QwenImageTextEncoder
state_dict_converter = QwenImageTextEncoderStateDictConverter
extra_kwargs = {}
model_path = [
    "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors",
]
if hash_model_file(model_path) == model_hash:
    with skip_model_initialization():
        model = model_class(**extra_kwargs)
    state_dict = load_state_dict(model_path, torch_dtype=torch.bfloat16, device="cuda")
    state_dict = state_dict_converter(state_dict)
    model.load_state_dict(state_dict, assign=True)
    print("Done!")
"""

VERIFYING = """
from diffsynth.models.model_loader import ModelPool

model_pool = ModelPool()
model_pool.auto_load_model(
    [
        "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
        "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
        "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
        "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors",
    ],
)
"""

MESSAGES = """\
Loading models from: [
    "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors"
]
Loaded model: {
    "model_name": "qwen_image_text_encoder",
    "model_class": "diffsynth.models.qwen_image_text_encoder.QwenImageTextEncoder",
    "extra_kwargs": null
}
"""


@pytest.fixture
def register(tmp_path: Path):
    """Save a model's weights (under the names that `export` gives them), register it, and load it from its file."""
    added = len(MODEL_CONFIGS)

    def load(model: nn.Module, name: str, export: Callable[[dict], dict] = dict, **row) -> ModelPool:
        path = str(tmp_path / f"{name}.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in export(model.state_dict()).items()}, path)
        MODEL_CONFIGS.append({"model_hash": hash_model_file(path), "model_name": name, **row})
        pool = ModelPool()
        pool.auto_load_model(path, vram_config={"computation_dtype": torch.float32, "computation_device": "cpu"})
        return pool

    yield load
    del MODEL_CONFIGS[added:]


# ---- step 1 ---------------------------------------------------------------------------------------------------------

def test_own_model_is_recognised_and_loaded(register):
    model_class = run(MODEL)["NewDiffSynthModel"]
    model = model_class(dim=8)
    loaded = register(model, "new", model_class=model_class, extra_kwargs={"dim": 8}).fetch_model("new")
    x = torch.randn(2, 8)
    assert type(loaded) is model_class and not loaded.training
    assert torch.equal(loaded(x), model(x))


def test_model_of_a_library_is_recognised_and_loaded(register):
    code = LIBRARY_MODEL.replace("XXX_", "Qwen2").replace(
        '            "other_configs": "Please copy and paste the other configs here.",\n', OTHER_CONFIGS)
    model_class = run(code)["DiffSynth_Qwen2Model"]
    model = model_class().eval()
    loaded = register(model, "library", model_class=model_class).fetch_model("library")
    ids = torch.tensor([[1, 5, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


# ---- step 2 ---------------------------------------------------------------------------------------------------------

def test_the_documents_converter_is_ours(full_size):
    theirs = run(CONVERTER)["QwenImageTextEncoderStateDictConverter"]
    layout = TEXT_ENCODER.layout()
    assert theirs(layout) == QwenImageTextEncoderStateDictConverter(layout)


def test_a_converter_of_that_form_is_used(register):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"language_model": nn.Linear(2, 3), "visual": nn.Linear(3, 1)})

    def published(state_dict: dict) -> dict:
        return {key.replace("model.visual.", "visual.").replace("language_model.", ""): value
                for key, value in state_dict.items()}

    model = Model()
    pool = register(model, "converted", published, model_class=Model,
                    state_dict_converter=run(CONVERTER)["QwenImageTextEncoderStateDictConverter"])
    loaded = pool.fetch_model("converted").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


# ---- steps 3 and 4 --------------------------------------------------------------------------------------------------

def test_how_models_are_loaded(full_size, capsys):
    with memory_growth() as growth:
        model = run(LOADING)["model"]
    assert capsys.readouterr().out == "Done!\n"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert next(model.parameters()).device.type != "cpu" or growth.peak is None or growth.peak < 300 * MIB  # of 17 GB


def test_verifying_prints_the_documented_messages(full_size):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{as_here(VERIFYING)}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == MESSAGES.replace("diffsynth.", "diffsynth_backend.")
