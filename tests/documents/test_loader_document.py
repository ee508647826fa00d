"""The examples of the document on `core.loader`, run as written on the published checkpoints in full size."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth_backend.core.environment import model_base_path
from diffsynth_backend.core.loader.download_hubs import HUBS, RemoteFile
from diffsynth_backend.core.vram import iter_managed
from tests.helpers.documents import DEVICE, run
from tests.helpers.sparse import CANNY, CHECKPOINTS, TEXT_ENCODER, Checkpoint, memory_growth

CANNY_PATH = "models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors"
CANNY_HASH = "073bce9cf969e317e5662cd570c3e79c"
TEXT_ENCODER_HASH = "8004730443f55db63092006dd9f7110e"
MIB = 2**20

DOWNLOAD = """
from diffsynth.core import ModelConfig

config = ModelConfig(
    model_id="DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny",
    origin_file_pattern="model.safetensors",
)
# Download models
config.download_if_necessary()
print(config.path)
"""

LOCAL_PATH = """
from diffsynth.core import ModelConfig

config = ModelConfig(path="models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors")
"""

LOCAL_SHARDS = """
from diffsynth.core import ModelConfig

config = ModelConfig(path=[
    "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors"
])
"""

STATE_DICT = """
from diffsynth.core import load_state_dict

state_dict = load_state_dict("models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors")
"""

STATE_DICT_OF_SHARDS = """
from diffsynth.core import load_state_dict

state_dict = load_state_dict([
    "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors"
])
"""

HASH = """
from diffsynth.core import hash_model_file

print(hash_model_file("models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors"))
"""

HASH_OF_SHARDS = """
from diffsynth.core import hash_model_file

print(hash_model_file([
    "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
    "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors"
]))
"""

LOAD_MODEL = """
from diffsynth.core import load_model, enable_vram_management, AutoWrappedLinear, AutoWrappedModule
from diffsynth.models.qwen_image_dit import QwenImageDiT, RMSNorm
import torch

prefix = "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model"
model_path = [prefix + f"-0000{i}-of-00009.safetensors" for i in range(1, 10)]

model = load_model(
    QwenImageDiT,
    model_path,
    module_map={
        torch.nn.Linear: AutoWrappedLinear,
        RMSNorm: AutoWrappedModule,
    },
    vram_config={
        "offload_dtype": "disk",
        "offload_device": "disk",
        "onload_dtype": "disk",
        "onload_device": "disk",
        "preparing_dtype": torch.bfloat16,
        "preparing_device": "cuda",
        "computation_dtype": torch.bfloat16,
        "computation_device": "cuda",
    },
    vram_limit=0,
)
"""


# ---- ModelConfig ----------------------------------------------------------------------------------------------------

class FakeHub:
    """In place of the network: lists the published files, and has them in place already, as sparse ones."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, model_id: str, revision: str | None) -> list[RemoteFile]:
        self.asked.append(model_id)
        base = Path(model_base_path())
        written = [Path(file) for checkpoint in CHECKPOINTS if checkpoint.stem.startswith(f"{model_id}/")
                   for file in checkpoint.write(base.parent)]
        return [RemoteFile(file.relative_to(base / model_id).as_posix(), file.stat().st_size, None, "nowhere:")
                for file in written]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_settings: None, full_size_folder: Path) -> FakeHub:
    """The default hub, seen from an empty working directory."""
    monkeypatch.chdir(tmp_path)
    hub = FakeHub()
    monkeypatch.setitem(HUBS, "modelscope", hub)
    return hub


def test_download(hub, capsys):
    run(DOWNLOAD)
    assert capsys.readouterr().out.splitlines()[-1] == CANNY_PATH
    assert hub.asked == ["DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny"]
    assert Path(CANNY_PATH).is_file()


def test_download_to_another_base_path(hub, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "elsewhere" / "models"))
    run(DOWNLOAD)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "elsewhere" / CANNY_PATH)


def test_the_hub_is_asked_even_if_the_model_is_there(hub):
    run(DOWNLOAD)
    run(DOWNLOAD)
    assert len(hub.asked) == 2


def test_skip_download_disables_remote_requests(hub, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    CANNY.write(Path())
    assert run(DOWNLOAD)["config"].path == CANNY_PATH
    assert hub.asked == []


@pytest.mark.parametrize("code, path", [(LOCAL_PATH, CANNY_PATH), (LOCAL_SHARDS, TEXT_ENCODER.files)])
def test_local_path(full_size, code, path):
    config = run(code)["config"]
    config.download_if_necessary()
    assert config.path == path


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code, checkpoint, tensors", [(STATE_DICT, CANNY, 362),
                                                       (STATE_DICT_OF_SHARDS, TEXT_ENCODER, 729)])
def test_state_dict_is_mapped_and_takes_no_memory(full_size, code: str, checkpoint: Checkpoint, tensors: int):
    with memory_growth() as growth:
        state_dict = run(code)["state_dict"]
    assert len(state_dict) == tensors
    layout = checkpoint.layout()
    assert {name: tensor.shape for name, tensor in state_dict.items()} == {n: t.shape for n, t in layout.items()}
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.bfloat16}
    assert growth.peak is None or growth.peak < 300 * MIB  # of 2 and 17 GB


@pytest.mark.parametrize("code, model_hash", [(HASH, CANNY_HASH), (HASH_OF_SHARDS, TEXT_ENCODER_HASH)])
def test_hash(full_size, capsys, code, model_hash):
    run(code)
    assert capsys.readouterr().out == f"{model_hash}\n"


# ---- load_model -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dit(full_size_folder: Path):
    """The model of the document's example, and the memory that loading it took."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(full_size_folder)
        with memory_growth() as growth:
            model = run(LOAD_MODEL)["model"]
    return model, growth


def test_load_model_leaves_everything_on_disk(dit):
    model, growth = dit
    assert not model.training and len(list(iter_managed(model))) > 846
    assert all(parameter.is_meta for parameter in model.parameters())
    assert growth.peak is None or growth.peak < 300 * MIB  # of 41 GB


def test_layer_on_disk_reads_its_weights_when_it_computes(dit):
    model, _ = dit
    with torch.no_grad():
        tokens = model.img_in(torch.ones(1, 64, dtype=torch.bfloat16, device=DEVICE))
    expected = torch.arange(3072) % 256  # the weight is zero, the bias the one that the file was given
    assert torch.equal(tokens[0].cpu(), expected.bfloat16())
    assert model.img_in.weight.is_meta


def test_layer_is_found_wherever_it_lies_in_the_shards(dit):
    model, _ = dit
    with torch.no_grad():
        tokens = model.proj_out(torch.ones(1, 3072, dtype=torch.bfloat16, device=DEVICE))
    assert tokens.shape == (1, 64) and not tokens.any()
