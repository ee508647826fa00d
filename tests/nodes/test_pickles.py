"""Pickles in workflows: those of known models load, others only if the user says so."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models_folder import DIT, TEXT_ENCODER, VAE
from tests.helpers.pack import submodule

UNKNOWN, KNOWN_VAE = "vae/unknown.pth", "vae/tiny_vae.pth"


@pytest.fixture(autouse=True)
def pickles(host, monkeypatch):
    """Two pickles in the folder of models: the known autoencoder, and what nobody knows."""
    monkeypatch.delenv("DIFFSYNTH_PICKLE_POLICY", raising=False)
    monkeypatch.setattr(host, "settings", {})
    torch.save(load_file(host.models / VAE), host.models / KNOWN_VAE)
    torch.save({"w": torch.ones(2)}, host.models / UNKNOWN)
    yield
    for name in (UNKNOWN, KNOWN_VAE):
        (host.models / name).unlink()


def refused(run, name: str = UNKNOWN) -> str:
    with pytest.raises(ValueError) as caught:
        run("ModelConfig", model=name)
    assert type(caught.value).__name__ == "PickleRefused"
    return str(caught.value)


def test_they_are_in_the_list(nodes):
    """What is chosen is not said by its name, so none is left out."""
    assert all(nodes["ModelConfig"].validate_inputs(model=name) is True for name in (UNKNOWN, KNOWN_VAE))


def test_a_known_model_loads_from_a_pickle(load, run):
    pipeline = load(TEXT_ENCODER, DIT, KNOWN_VAE, node_id="pickles")
    image = run("VaeDecode", pipeline=pipeline, samples={"samples": torch.zeros(1, 16, 8, 8)},
                tiling={"tiling": "off"})
    assert image.shape == (1, 64, 64, 3)


def test_an_unknown_one_is_refused_with_what_to_do(run):
    sentence = refused(run)
    for part in (UNKNOWN.split("/")[1], "python -m diffsynth_backend convert IN OUT.safetensors",
                 "settings under DiffSynth, Pickles, choose all", "DIFFSYNTH_PICKLE_POLICY=all"):
        assert part in sentence


def test_the_user_may_allow_all(run, host):
    host.settings["DiffSynth.Pickles"] = "all"
    assert run("ModelConfig", model=UNKNOWN).files == (str(host.models / UNKNOWN),)


def test_the_environment_comes_before_the_setting(run, host, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_PICKLE_POLICY", "all")
    assert run("ModelConfig", model=UNKNOWN)
    host.settings["DiffSynth.Pickles"] = "all"
    monkeypatch.setenv("DIFFSYNTH_PICKLE_POLICY", "known")
    refused(run)


def test_a_word_that_is_no_policy_is_an_error(run, host):
    host.settings["DiffSynth.Pickles"] = "some"
    with pytest.raises(ValueError, match=r"DiffSynth.Pickles='some' is not understood; use one of known, all"):
        run("ModelConfig", model=UNKNOWN)


def test_the_files_of_a_preset_are_looked_at_too(run, host, monkeypatch):
    """What lies where a known model is expected may be something else."""
    locate = submodule("nodes.loading")
    unknown = submodule("diffsynth_backend.pipelines.handle").ModelSource("demo/vae", (str(host.models / UNKNOWN),))
    monkeypatch.setattr(locate, "locate_preset", lambda name, bases: (unknown,))
    with pytest.raises(ValueError, match="is a pickle of no model"):
        run("ModelLoader", model={"model": "demo"}, dtype="automatic")
    answer = submodule("nodes.estimate").answer({"model": "demo"})
    assert answer == {"problem": "unreadable"}


def test_a_lora_is_no_pickle(nodes, host):
    path = Path(host.models / "loras/x.pth")
    torch.save({"w": torch.ones(1)}, path)
    try:
        assert nodes["LoraLoader"].validate_inputs(lora="loras/x.pth") is not True
    finally:
        path.unlink()
