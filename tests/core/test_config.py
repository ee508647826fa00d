"""ModelConfig: local files, hub files through a hub of our own that copies from a folder, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffsynth_backend.core.environment import EnvironmentValueError
from diffsynth_backend.core.loader import download as download_module
from diffsynth_backend.core.loader.config import VRAM_FIELDS, ModelConfig
from diffsynth_backend.core.loader.containment import PathRefused
from diffsynth_backend.core.loader.download import HUBS, DownloadFailed, download
from diffsynth_backend.core.loader.file import MissingShards, ModelFileError

REPOSITORY = {
    "Qwen/Qwen-Image": [
        "model_index.json",
        "tokenizer/vocab.json",
        "vae/diffusion_pytorch_model.safetensors",
        *(f"text_encoder/model-{i:05d}-of-00004.safetensors" for i in range(1, 5)),
    ]
}


class FakeHub:
    """Delivers small files by the names in REPOSITORY, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str] | None]] = []
        self.broken: list[str] = []

    def __call__(self, model_id: str, patterns: list[str] | None, local_dir: str) -> None:
        self.calls.append((model_id, patterns))
        for name in REPOSITORY[model_id]:
            if name not in self.broken and (patterns is None or any(fnmatch.fnmatch(name, p) for p in patterns)):
                target = Path(local_dir) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.write_text(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """The only hub, in an environment without settings, working in an empty folder."""
    for name in ("BASE_PATH", "SKIP_DOWNLOAD", "DOWNLOAD_SOURCE"):
        monkeypatch.delenv(f"DIFFSYNTH_{name}".replace("BASE", "MODEL_BASE"), raising=False)
    monkeypatch.chdir(tmp_path)
    fake = FakeHub()
    for name in list(HUBS):
        monkeypatch.setitem(HUBS, name, _refuse_contact)
    monkeypatch.setitem(HUBS, "modelscope", fake)
    return fake


def _refuse_contact(*_: object) -> None:
    raise AssertionError("this hub must not be contacted")


def resolve(**fields: object) -> str | list[str] | None:
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    config.download_if_necessary()
    return config.path


def test_one_file(hub: FakeHub) -> None:
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/diffusion_pytorch_model.safetensors")
    assert path == str(Path("models/Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors"))
    assert hub.calls == [("Qwen/Qwen-Image", ["vae/diffusion_pytorch_model.safetensors"])]


def test_several_files_are_a_sorted_list(hub: FakeHub) -> None:
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model*.safetensors")
    assert [Path(p).name for p in path] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


def test_list_of_patterns_keeps_its_order_and_repeats_nothing(hub: FakeHub) -> None:
    patterns = ["vae/*.safetensors", "text_encoder/*.safetensors", "vae/diffusion*"]
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=patterns)
    assert [Path(p).parent.name for p in path] == ["vae"] + ["text_encoder"] * 4
    assert hub.calls[0][1] == patterns == ["vae/*.safetensors", "text_encoder/*.safetensors", "vae/diffusion*"]


def test_a_pattern_ending_in_a_slash_is_the_folder(hub: FakeHub) -> None:
    assert resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/") == str(
        Path("models/Qwen/Qwen-Image/tokenizer")
    )
    assert hub.calls == [("Qwen/Qwen-Image", ["tokenizer/*"])]


def test_a_folder_pattern_with_wildcards_gives_each_folder(hub: FakeHub) -> None:
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=["*e*/"])
    assert [Path(p).name for p in path] == ["text_encoder", "tokenizer", "vae"]


@pytest.mark.parametrize("pattern", [None, "", "./"])
def test_no_pattern_is_the_whole_repository(hub: FakeHub, pattern: str | None) -> None:
    assert resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=pattern) == str(Path("models/Qwen/Qwen-Image"))
    assert hub.calls == [("Qwen/Qwen-Image", None)]
    assert Path("models/Qwen/Qwen-Image/tokenizer/vocab.json").exists()


def test_base_folder_argument_beats_environment_beats_default(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "from_environment"))
    fields = {"model_id": "Qwen/Qwen-Image", "origin_file_pattern": "vae/*"}
    expected = Path("Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors")
    assert resolve(**fields) == str(tmp_path / "from_environment" / expected)
    assert resolve(**fields, local_model_path=str(tmp_path / "mine")) == str(tmp_path / "mine" / expected)


def test_source_argument_beats_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FakeHub()
    monkeypatch.setitem(HUBS, "huggingface", other)
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    fields = {"model_id": "Qwen/Qwen-Image", "origin_file_pattern": "vae/*"}
    resolve(**fields)
    assert (len(hub.calls), len(other.calls)) == (0, 1)
    resolve(**fields, download_source="modelscope")
    assert (len(hub.calls), len(other.calls)) == (1, 1)


@pytest.mark.parametrize("explicit", [True, None])
def test_skip_download_contacts_nobody(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, explicit: bool | None) -> None:
    fields = {"model_id": "Qwen/Qwen-Image", "origin_file_pattern": "vae/*"}
    resolve(**fields)
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "no" if explicit else "1")
    assert resolve(**fields, skip_download=explicit)
    assert len(hub.calls) == 1


def test_explicit_false_beats_skip_in_the_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*", skip_download=False)
    assert len(hub.calls) == 1


def test_misspelt_settings_are_errors(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(model_id="Qwen/Qwen-Image")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "ture")
    with pytest.raises(EnvironmentValueError, match="DIFFSYNTH_SKIP_DOWNLOAD='ture'"):
        config.download_if_necessary()
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")
    with pytest.raises(EnvironmentValueError, match="download_source='hugging'.*modelscope, huggingface"):
        dataclasses.replace(config, download_source="hugging").download_if_necessary()
    assert hub.calls == []
    assert config.path is None


@pytest.mark.parametrize("pattern", ["vae/absent*.safetensors", "absent/", None])
def test_nothing_matches(hub: FakeHub, pattern: str | None) -> None:
    config = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern=pattern, skip_download=True)
    with pytest.raises(FileNotFoundError) as error:
        config.download_if_necessary()
    assert isinstance(error.value, ModelFileError)
    for part in ("no file in", str(Path("models/Qwen/Qwen-Image")), pattern or "*", "DIFFSYNTH_MODEL_BASE_PATH"):
        assert part in str(error.value)
    assert "download it" in str(error.value)


@pytest.mark.parametrize("pattern", ["text_encoder/*.safetensors", "text_encoder/"])
def test_partial_shard_set(hub: FakeHub, pattern: str) -> None:
    hub.broken = [f"text_encoder/model-0000{i}-of-00004.safetensors" for i in (2, 4)]
    with pytest.raises(MissingShards) as error:
        resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=pattern)
    assert "4 of 4 shards expected, 2 missing: model-00002-of-00004.safetensors, model-00004" in str(error.value)


def test_one_shard_of_a_set_says_that_the_others_are_there(hub: FakeHub) -> None:
    resolve(model_id="Qwen/Qwen-Image")
    with pytest.raises(MissingShards, match="3 missing.*pass the whole set.*model-00004-of-00004"):
        resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model-00001-of-00004.safetensors")


def test_resolving_twice_asks_the_hub_once(hub: FakeHub) -> None:
    config = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*")
    config.download_if_necessary()
    path = config.path
    config.download_if_necessary()
    assert config.path == path
    for twin in (copy.deepcopy(config), dataclasses.replace(config), pickle.loads(pickle.dumps(config))):
        twin.download_if_necessary()
        assert twin.path == path
    assert len(hub.calls) == 1


def test_resolved_leaves_a_shared_config_alone(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*")
    first = shared.resolved().path
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "other"))
    assert shared.path is None
    assert shared.resolved().path != first


def test_zero_byte_weights_are_fetched_again(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    broken = Path("models/Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors")
    broken.parent.mkdir(parents=True)
    broken.touch()
    resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*.safetensors")
    assert broken.stat().st_size > 0
    assert "is empty (0 bytes)" in caplog.text


def test_local_paths_stay_as_given(hub: FakeHub) -> None:
    for path in ("a.safetensors", ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]):
        assert resolve(path=path) == path
    assert hub.calls == []


def test_a_loaded_state_dict_needs_no_path(hub: FakeHub) -> None:
    config = ModelConfig(state_dict={"w": torch.ones(1)})
    config.download_if_necessary()
    assert config.path is None
    assert "tensor" not in repr(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "unset path.*ModelConfig.path=.*model_id="),
        ({"path": []}, "unset path"),
        ({"path": "a", "model_id": "b/c"}, "both path='a' and model_id='b/c'"),
        ({"path": "a", "origin_file_pattern": "x"}, "origin_file_pattern='x' with model_id=None"),
        ({"model_id": "a/b", "origin_file_pattern": []}, "at least one pattern"),
    ],
)
def test_unusable_fields(hub: FakeHub, fields: dict[str, object], message: str) -> None:
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    for check in (config.check_input, config.download_if_necessary):
        with pytest.raises(ModelFileError, match=message):
            check()


@pytest.mark.parametrize(
    "fields",
    [
        {"model_id": "../x"},
        {"model_id": "a/b", "origin_file_pattern": "../*.bin"},
        {"model_id": "a/b", "origin_file_pattern": ["ok", "/etc/*"]},
    ],
)
def test_hostile_fields_reach_no_hub(hub: FakeHub, fields: dict[str, str]) -> None:
    with pytest.raises(PathRefused):
        resolve(**fields)
    assert hub.calls == []


def test_a_model_folder_that_links_elsewhere_is_not_written_to(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Path("models/Qwen").mkdir(parents=True)
    try:
        Path("models/Qwen/Qwen-Image").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make links")
    with pytest.raises(PathRefused, match="outside of"):
        resolve(model_id="Qwen/Qwen-Image")
    assert hub.calls == []


def test_vram_config() -> None:
    states = ("disk", "disk", torch.bfloat16, "cpu", torch.bfloat16, "cuda", torch.float32, "cuda")
    values = dict(zip(VRAM_FIELDS, states, strict=True))
    assert ModelConfig("a", **values).vram_config() == values
    assert set(ModelConfig("a").vram_config().values()) == {None}


def failing(error: Exception) -> Callable[..., None]:
    def hub(*_: object) -> None:
        raise error

    return hub


def test_failed_downloads_say_what_to_try(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(HUBS, "modelscope", failing(ConnectionError("no route")))
    with pytest.raises(DownloadFailed) as error:
        download("Qwen/Qwen-Image", ["vae/*"], str(tmp_path), "modelscope")
    for part in ("vae/*", "Qwen/Qwen-Image", "modelscope failed: no route", "huggingface", "DIFFSYNTH_SKIP_DOWNLOAD"):
        assert part in str(error.value)
    monkeypatch.setitem(HUBS, "modelscope", failing(ImportError("gone", name="modelscope")))
    with pytest.raises(DownloadFailed, match="pip install modelscope"):
        download("Qwen/Qwen-Image", None, str(tmp_path), "modelscope")


def test_the_real_hubs_are_called_with_arguments_they_know() -> None:
    """The signatures of the installed libraries take what we pass; nothing is contacted."""
    import inspect

    for library, keywords in (
        ("huggingface_hub", {"allow_patterns": ["a"], "local_dir": "x"}),
        ("modelscope", {"allow_file_pattern": ["a"], "local_dir": "x"}),
    ):
        snapshot_download = pytest.importorskip(library).snapshot_download
        inspect.signature(snapshot_download).bind("a/b", **keywords)
    assert set(download_module.HUBS) == {"modelscope", "huggingface"}
