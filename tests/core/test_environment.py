"""DIFFSYNTH_* variables: what they accept, that an explicit argument wins, and that a misspelt value is an error."""

from __future__ import annotations

import pytest

from diffsynth_backend.core import environment
from diffsynth_backend.core.environment import EnvironmentValueError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        environment.BASE_PATH, environment.SKIP_DOWNLOAD, environment.DOWNLOAD_SOURCE, environment.ATTENTION
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("true", True), ("True", True), ("YES", True), (" on ", True)]
    + [("0", False), ("false", False), ("No", False), ("OFF", False), ("", False)],
)
def test_switch(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    assert environment.skip_download() is expected


@pytest.mark.parametrize("value", ["ture", "2", "enabled", "None"])
def test_misspelt_switch_names_variable_value_and_choices(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", value)
    with pytest.raises(EnvironmentValueError) as error:
        environment.skip_download()
    for part in ("DIFFSYNTH_SKIP_DOWNLOAD", repr(value), "true", "off"):
        assert part in str(error.value)


def test_defaults() -> None:
    assert environment.model_base_path() == "./models"
    assert environment.skip_download() is False
    assert environment.download_sources(None, ("modelscope", "huggingface")) == ("modelscope", "huggingface")


def test_values_are_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "/somewhere")
    assert environment.model_base_path() == "/somewhere"
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "HuggingFace")
    assert environment.download_sources(None, ("modelscope", "huggingface")) == ("huggingface",)


def test_explicit_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "/somewhere")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "nonsense")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "nonsense")
    assert environment.model_base_path("/elsewhere") == "/elsewhere"
    assert environment.skip_download(True) is True
    assert environment.download_sources("huggingface", ("modelscope", "huggingface")) == ("huggingface",)


def test_unknown_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "modelscop")
    with pytest.raises(EnvironmentValueError, match="DIFFSYNTH_DOWNLOAD_SOURCE='modelscop'.*modelscope, huggingface"):
        environment.download_sources(None, ("modelscope", "huggingface"))
    with pytest.raises(EnvironmentValueError, match="download_source='hf'.*modelscope, huggingface"):
        environment.download_sources("hf", ("modelscope", "huggingface"))
    with pytest.raises(EnvironmentValueError, match="skip_download='true'.*True, False"):
        environment.skip_download("true")  # type: ignore[arg-type]
