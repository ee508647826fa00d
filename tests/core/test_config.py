"""ModelConfig: local files, hub files through a hub of our own that copies from a folder, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffsynth_backend.core.environment import EnvironmentValueError
from diffsynth_backend.core.loader.config import VRAM_FIELDS, ModelConfig
from diffsynth_backend.core.loader.containment import PathRefused
from diffsynth_backend.core.loader.download import DownloadCancelled, Progress
from diffsynth_backend.core.loader.download_hubs import HUBS, RemoteFile
from diffsynth_backend.core.loader.file import CorruptFile, MissingShards, ModelFileError
from tests.helpers import http_hub

REPOSITORY = [
    "model_index.json",
    "tokenizer/vocab.json",
    "vae/diffusion_pytorch_model.safetensors",
    *(f"text_encoder/model-{i:05d}-of-00004.safetensors" for i in range(1, 5)),
]
WEIGHTS = save({"w": torch.ones(9)})


class FakeHub:
    """Lists the files of REPOSITORY that are not `broken`, as the server has them, and remembers what it was asked."""

    def __init__(self, server: http_hub.HubServer):
        self.server = server
        self.calls: list[str] = []
        self.broken: list[str] = []

    def __call__(self, model_id: str, revision: str | None) -> list[RemoteFile]:
        self.calls.append(model_id)
        facts = {path: self.server.facts(path) for path in REPOSITORY if path not in self.broken}
        address = f"{self.server.url}/{model_id}/resolve/{http_hub.COMMIT}"
        return [RemoteFile(path, fact["size"], f"sha256:{fact['sha256']}", f"{address}/{path}")
                for path, fact in facts.items()]

    def fetched(self) -> list[str]:
        """The files that were asked for, sorted."""
        return sorted(request.path for request in self.server.requests)


@pytest.fixture(scope="module")
def server() -> Iterator[http_hub.HubServer]:
    files = {path: WEIGHTS if path.endswith(".safetensors") else b"{}" for path in REPOSITORY}
    with http_hub.serve("Qwen/Qwen-Image", files) as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: http_hub.HubServer, no_settings: None) -> FakeHub:
    """The only hub, in an environment without settings, working in an empty folder."""
    monkeypatch.chdir(tmp_path)
    server.requests.clear()
    fake = FakeHub(server)
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
    assert hub.calls == ["Qwen/Qwen-Image"]
    assert hub.fetched() == ["vae/diffusion_pytorch_model.safetensors"]


def test_several_files_are_a_sorted_list(hub: FakeHub) -> None:
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model*.safetensors")
    assert [Path(p).name for p in path] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


def test_list_of_patterns_keeps_its_order_and_repeats_nothing(hub: FakeHub) -> None:
    patterns = ["vae/*.safetensors", "text_encoder/*.safetensors", "vae/diffusion*"]
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=patterns)
    assert [Path(p).parent.name for p in path] == ["vae"] + ["text_encoder"] * 4
    assert patterns == ["vae/*.safetensors", "text_encoder/*.safetensors", "vae/diffusion*"]
    assert len(hub.fetched()) == 5


def test_a_pattern_ending_in_a_slash_is_the_folder(hub: FakeHub) -> None:
    assert resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/") == str(
        Path("models/Qwen/Qwen-Image/tokenizer")
    )
    assert hub.fetched() == ["tokenizer/vocab.json"]


def test_a_folder_pattern_with_wildcards_gives_each_folder(hub: FakeHub) -> None:
    path = resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=["*e*/"])
    assert [Path(p).name for p in path] == ["text_encoder", "tokenizer", "vae"]


@pytest.mark.parametrize("pattern", [None, "", "./"])
def test_no_pattern_is_the_whole_repository(hub: FakeHub, pattern: str | None) -> None:
    assert resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=pattern) == str(Path("models/Qwen/Qwen-Image"))
    assert hub.fetched() == sorted(REPOSITORY)
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
    other = FakeHub(hub.server)
    monkeypatch.setitem(HUBS, "huggingface", other)
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    fields = {"model_id": "Qwen/Qwen-Image", "origin_file_pattern": "vae/*"}
    resolve(**fields)
    assert (len(hub.calls), len(other.calls)) == (0, 1)
    resolve(**fields, download_source="modelscope")
    assert (len(hub.calls), len(other.calls)) == (1, 1)


def test_another_source_is_asked_only_if_none_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FakeHub(hub.server)
    monkeypatch.setitem(HUBS, "huggingface", other)
    hub.broken = REPOSITORY
    fields = {"model_id": "Qwen/Qwen-Image", "origin_file_pattern": "vae/*"}
    assert resolve(**fields)
    assert (len(hub.calls), len(other.calls)) == (1, 1)
    with pytest.raises(ModelFileError, match="modelscope: no file of Qwen/Qwen-Image matches"):
        resolve(**fields, download_source="modelscope")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "modelscope")
    with pytest.raises(ModelFileError, match="modelscope: no file of Qwen/Qwen-Image matches"):
        resolve(**fields)
    assert len(other.calls) == 1


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


def test_nothing_matches_but_a_download_has_begun(hub: FakeHub) -> None:
    part = Path("models/Qwen/Qwen-Image/vae/.diffusion_pytorch_model.safetensors.0123456789abcdef.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 2000)
    with pytest.raises(FileNotFoundError, match=r"stopped in the middle of diffusion_pytorch.*safetensors \(2.0 KB"):
        resolve(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*.safetensors", skip_download=True)


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
    assert broken.read_bytes() == WEIGHTS
    assert "is not whole (0 of " in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "pattern", "message"),
    [
        ("vae/diffusion_pytorch_model.safetensors", b"", "vae/*", "empty .0 bytes.*delete it and download it again"),
        ("vae/diffusion_pytorch_model.safetensors", WEIGHTS[:-5], "vae/*", "download it again"),
        ("vae/diffusion_pytorch_model.safetensors", WEIGHTS[:5], "vae/", "download it again"),
        ("tokenizer/vocab.json", b"", "tokenizer/", "vocab.json is empty"),
        ("vae/old.pth", b"", "vae/old.pth", "old.pth is empty"),
    ],
)
def test_pieces_are_named_without_a_hub(hub: FakeHub, name: str, content: bytes, pattern: str, message: str) -> None:
    path = Path("models/Qwen/Qwen-Image", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=message) as error:
        resolve(model_id="Qwen/Qwen-Image", origin_file_pattern=pattern, skip_download=True)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_progress_and_cancel_reach_the_download(hub: FakeHub) -> None:
    states: list[Progress] = []
    ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*").download_if_necessary(progress=states.append)
    assert states[-1].done == states[-1].total == len(WEIGHTS)
    config = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/")
    with pytest.raises(DownloadCancelled):
        config.download_if_necessary(cancelled=lambda: True)
    assert config.path is None


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


@pytest.mark.parametrize("pattern", ["x" * 300, f"{'x' * 300}/y.safetensors", f"{'x' * 300}/"])
def test_a_name_that_no_file_can_have_matches_nothing(tmp_path, pattern):
    config = ModelConfig(model_id="a/b", origin_file_pattern=pattern, local_model_path=str(tmp_path),
                         skip_download=True)
    with pytest.raises(ModelFileError, match="no file in .* matches"):
        config.download_if_necessary()
