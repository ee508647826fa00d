"""Download Models: who may make it download, what comes, and what is said; the hub is a server on this machine."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.helpers import http_hub
from tests.helpers.pack import submodule

NAME, MODEL = "qwen-image-eligen", "DiffSynth-Studio/Qwen-Image-EliGen"
WEIGHTS = save({"w": torch.arange(500, dtype=torch.float32)})
VARIABLES = ("DIFFSYNTH_DOWNLOAD_POLICY", "DIFFSYNTH_SKIP_DOWNLOAD", "DIFFSYNTH_DOWNLOAD_SOURCE",
             "DIFFSYNTH_MODEL_BASE_PATH")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("modelscope_hub")
    with http_hub.serve(MODEL, {"model.safetensors": WEIGHTS, "README.md": b"not asked for"}) as server:
        http_hub.use_as_both_hubs(server, monkeypatch, str(tmp_path / "home"))
        yield server


@pytest.fixture(autouse=True)
def fresh(host, pack, monkeypatch, tmp_path):
    """No settings, and an empty folder for downloads."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host, "models", tmp_path / "models")
    monkeypatch.setattr(host, "settings", {})
    monkeypatch.setattr(host, "confirmed", None)
    monkeypatch.setattr(host, "told", [])


def target(host) -> Path:
    return host.models / "diffsynth" / MODEL / "model.safetensors"


def refused(run, name: str = NAME) -> str:
    with pytest.raises(PermissionError) as caught:
        run("DownloadModels", whole=True, model=name)
    return str(caught.value)


def test_downloads_are_off_until_somebody_switches_them_on(run, hub, host):
    sentence = refused(run)
    for part in ("the setting DiffSynth.Downloads", "settings under DiffSynth, Downloads",
                 "DIFFSYNTH_DOWNLOAD_POLICY=known", f"model.safetensors of https://huggingface.co/{MODEL}"):
        assert part in sentence
    assert hub.lists == [] and not target(host).exists()


def test_known_models_come_when_the_setting_says_so(run, hub, host):
    host.settings["DiffSynth.Downloads"] = "known"
    output = run("DownloadModels", whole=True, model=NAME)
    assert target(host).read_bytes() == WEIGHTS and not (target(host).parent / "README.md").exists()
    assert output.ui.value == f"{NAME} is here, 2.1 KB: {NAME} came now"
    assert host.told[-1]["file"] == "model.safetensors"
    assert host.told[-1]["done_bytes"] == host.told[-1]["total_bytes"] == len(WEIGHTS)
    asked = len(hub.requests)
    assert "nothing was missing" in run("DownloadModels", whole=True, model=NAME).ui.value
    assert len(hub.requests) == asked


def test_ask_wants_the_users_word_for_this_very_name(run, hub, host):
    host.settings["DiffSynth.Downloads"] = "ask"
    for confirmed in (None, "qwen-image", True):
        host.confirmed = confirmed
        assert "press the Download button" in refused(run)
    assert hub.lists == []
    host.confirmed = NAME
    run("DownloadModels", whole=True, model=NAME)
    assert target(host).exists()


@pytest.mark.parametrize("setting, variable, skip, allowed", [
    ("known", "off", "", False), ("off", "known", "", True), ("ask", "known", "", True), ("known", "", "true", False),
    ("off", "known", "true", False), ("known", "", "", True)])
def test_the_environment_comes_before_the_setting(run, hub, host, monkeypatch, setting, variable, skip, allowed):
    host.settings["DiffSynth.Downloads"] = setting
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_POLICY", variable)
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", skip)
    if allowed:
        run("DownloadModels", whole=True, model=NAME)
    else:
        assert ("DIFFSYNTH_SKIP_DOWNLOAD" if skip else "DIFFSYNTH_DOWNLOAD_POLICY") in refused(run)
    assert target(host).exists() == allowed


@pytest.mark.parametrize("place", ["setting", "environment"])
def test_a_policy_that_is_none_is_an_error(run, host, monkeypatch, place):
    if place == "setting":
        host.settings["DiffSynth.Downloads"] = "any"
    else:
        monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_POLICY", "any")
    with pytest.raises(ValueError, match="any.*off, ask, known"):
        run("DownloadModels", whole=True, model=NAME)


def test_what_is_here_needs_nobodys_word(run, host):
    target(host).parent.mkdir(parents=True)
    target(host).write_bytes(WEIGHTS)
    assert "nothing was missing" in run("DownloadModels", whole=True, model=NAME).ui.value


def test_a_broken_file_counts_as_missing(run, hub, host):
    host.settings["DiffSynth.Downloads"] = "known"
    target(host).parent.mkdir(parents=True)
    target(host).write_bytes(WEIGHTS[:100])
    assert "came now" in run("DownloadModels", whole=True, model=NAME).ui.value
    assert target(host).read_bytes() == WEIGHTS


def test_deleted_files_make_the_node_run_again(nodes, host):
    before, again = (nodes["DownloadModels"].fingerprint_inputs(NAME) for _ in range(2))
    assert before != again, "as long as files are missing no result is kept"
    target(host).parent.mkdir(parents=True)
    target(host).write_bytes(WEIGHTS)
    assert nodes["DownloadModels"].fingerprint_inputs(NAME) == nodes["DownloadModels"].fingerprint_inputs(NAME)


def test_everything_offered_is_known_and_none_is_the_demo(nodes):
    offered = nodes["DownloadModels"].define_schema().inputs[0].options["options"]
    files = submodule("diffsynth_backend.pipelines.known_files")
    assert {"qwen-image", "qwen-image/vae", "qwen-image/controlnet-canny", "qwen-image-i2l/bias", NAME} <= set(offered)
    assert not [name for name in offered if name.startswith("demo")] and len(set(offered)) == len(offered)
    pairs = files.known_pairs()
    assert all(known.pair in pairs for name in offered for known in files.files_of(name, []))


def test_a_model_comes_with_its_tokenizer_and_what_its_features_need():
    files = submodule("diffsynth_backend.pipelines.known_files").files_of
    assert [known.title for known in files("qwen-image", [])] == ["text_encoder", "transformer", "vae", "tokenizer"]
    assert "tokenizer" not in [known.title for known in files("qwen-image", [], has_tokenizer=True)]
    assert "bias" in [known.title for known in files("qwen-image-i2l", [])]


def test_the_page_is_told_sizes_and_no_paths(host):
    state = submodule("nodes.downloading").state
    host.settings["DiffSynth.Downloads"] = "ask"
    part = host.models / "diffsynth/Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS)
    told = state({"name": "qwen-image"})
    assert told["policy"] == "ask" and told["bytes"] == 57_700_000_000 and told["licences"] == ["Apache-2.0"]
    assert {entry["title"]: entry["bytes"] for entry in told["parts"]} == {
        "text_encoder": None, "transformer": None, "vae": len(WEIGHTS), "tokenizer": None}
    assert str(host.models) not in str(told)
    assert state({"name": NAME})["licences"] == [f"huggingface.co/{MODEL}"]
    assert state({"name": "demo"}) is None and state({"name": "../../etc"}) is None and state({}) is None


@pytest.mark.parametrize("kind, inputs", [
    ("ModelLoader", {"dtype": "automatic", "model": {"model": "qwen-image"}}),
    ("ModelConfig", {"model": "qwen-image/controlnet-canny"}),
    ("LoraLoader", {"lora": NAME, "strength": 1.0}),
])
def test_who_misses_files_is_told_of_the_node(run, host, kind, inputs):
    more = {"pipeline": None} if kind == "LoraLoader" else {}
    with pytest.raises(Exception, match=r"missing: (.|\n)*Download Models \(DiffSynth\)"):
        run(kind, whole=True, **inputs, **more)
