"""Model ids, patterns and links from strangers: nothing outside the model folder can be named or reached."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffsynth_backend.core.loader.containment import (
    PathRefused,
    check_inside,
    check_model_id,
    check_pattern,
    resolve_matches,
)


@pytest.mark.parametrize("model_id", ["Qwen/Qwen-Image", "Wan-AI/Wan2.1-T2V-14B", "a/b_c.d"])
def test_good_model_ids(model_id: str) -> None:
    assert check_model_id(model_id) == model_id


@pytest.mark.parametrize(
    "model_id",
    ["", "Qwen", "a/b/c", "../b", "a/..", "./b", "/etc/passwd", "/etc", "a//b", "a/", "C:/b", "a\\b/c"]
    + ["a/b\0", "a/b\n", "https://x/y", "a/b?x", "a/b%2e", "a /b", ".a/b", "a/b.git", None, 3],
)
def test_bad_model_ids(model_id: str) -> None:
    with pytest.raises(PathRefused, match="refused.*owner/name"):
        check_model_id(model_id)


@pytest.mark.parametrize("model_id", ["a/b\n", "a/b\0", "a\u202e/b"])
def test_invisible_characters_whatever_the_hubs_library_lets_pass(
    model_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils.validate_repo_id", lambda _: None)
    with pytest.raises(PathRefused, match="refused.*owner/name"):
        check_model_id(model_id)


@pytest.mark.parametrize("pattern", ["model.safetensors", "a/b*.bin", "tokenizer/", "a..b/c", "[ab]/?.bin", "…/ü"])
def test_good_patterns(pattern: str) -> None:
    assert check_pattern(pattern) == pattern


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("../x", "'..'"), ("a/../b", "'..'"), ("a/..", "'..'"), ("..", "'..'"), (".. /x", "'..'"), ("a/... /b", "'..'"),
        ("a/./b", "'.' and"), ("/etc/passwd", "absolute"), ("//host/share", "absolute"),
        ("C:/x", "drive"), ("c:x", "drive"), ("a/b:stream", "stream"), ("\\\\host\\share", "backslash"),
        ("a\\..\\b", "backslash"), ("a\0b", "control"), ("a\nb", "control"), ("a\x85b", "control"),
        ("%2e%2e/x", "percent"), ("a%2Fb", "percent"), ("", "expected"), (None, "expected"), (Path("a"), "expected"),
    ],
)  # fmt: skip
def test_bad_patterns(pattern: str, reason: str) -> None:
    with pytest.raises(PathRefused) as error:
        check_pattern(pattern)
    assert reason in str(error.value)
    assert repr(pattern) in str(error.value)


def test_matches_are_sorted_and_start_with_the_base(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "c.txt"):
        (tmp_path / name).touch()
    assert resolve_matches(str(tmp_path), "*.safetensors") == [str(tmp_path / f"{x}.safetensors") for x in "ab"]
    assert resolve_matches(str(tmp_path), "nothing*") == []
    assert resolve_matches(str(tmp_path / "absent"), "*") == []


def test_special_characters_of_the_base_are_no_wildcards(tmp_path: Path) -> None:
    base = tmp_path / "models [1]"
    base.mkdir()
    (base / "x.bin").touch()
    assert resolve_matches(str(base), "*.bin") == [str(base / "x.bin")]


def symlink(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system does not let us make links")


def test_links_that_leave_the_base_are_refused(tmp_path: Path) -> None:
    base, outside = tmp_path / "models", tmp_path / "models-secret"
    base.mkdir()
    outside.mkdir()
    (outside / "x.bin").touch()
    symlink(base / "file.bin", outside / "x.bin")
    symlink(base / "folder", outside)
    for pattern in ("*.bin", "folder/*", "fol*/x.bin", "folder/"):
        with pytest.raises(PathRefused, match="models-secret.*outside of"):
            resolve_matches(str(base), pattern)


def test_links_within_the_base_and_a_linked_base_are_fine(tmp_path: Path) -> None:
    base = tmp_path / "real"
    base.mkdir()
    (base / "x.bin").touch()
    symlink(base / "y.bin", base / "x.bin")
    symlink(tmp_path / "linked", base)
    assert len(resolve_matches(str(tmp_path / "linked"), "*.bin")) == 2


def test_check_inside(tmp_path: Path) -> None:
    assert check_inside(str(tmp_path), str(tmp_path / "a" / "b")) == str(tmp_path / "a" / "b")
    with pytest.raises(PathRefused, match="outside of"):
        check_inside(str(tmp_path), os.path.join(str(tmp_path), "..", "x"))
