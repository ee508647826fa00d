"""Attention goes through one door; a misspelt choice is an error, and so is a package that is missing or broken."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from diffsynth_backend.core import attention as door
from diffsynth_backend.core.attention import IMPLEMENTATIONS, AttentionUnavailable, attention, chosen, prefer, register
from diffsynth_backend.core.attention.kernels import KERNELS, Kernel, torch_attention
from diffsynth_backend.core.environment import EnvironmentValueError

VARIABLE = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1]**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


def tensors(head_dim: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, head_dim, generator=generator).to(dtype) for size in (7, 9, 9)]


class Package:
    """A stand-in for an optional package: computes the formula in its layout, and counts."""

    def __init__(self, heads_first: bool, returns_sums: bool) -> None:
        self.heads_first, self.returns_sums, self.calls = heads_first, returns_sums, 0

    def __call__(self, q, k, v, **options):
        self.calls += 1
        if self.heads_first:
            assert options == {"tensor_layout": "HND", "is_causal": False}
            return formula(q, k, v)
        assert not options and q.shape[1] == 7, "tokens first"
        out = formula(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)
        return (out, None) if self.returns_sums else out


@pytest.fixture
def package(monkeypatch):
    """Install a stand-in as the package of an implementation, which then works on a CPU too, and choose it."""
    def install(name: str) -> Package:
        kernel = KERNELS[name]
        stand_in = Package(name == "sage_attention", name == "flash_attention_3")
        module = ModuleType(kernel.module)
        setattr(module, kernel.function, stand_in)
        if "." in kernel.module:
            monkeypatch.setitem(sys.modules, kernel.module.partition(".")[0], ModuleType("parent"))
        monkeypatch.setitem(sys.modules, kernel.module, module)
        monkeypatch.setitem(IMPLEMENTATIONS, name, replace(kernel, devices=frozenset({"cpu"})))
        monkeypatch.setenv(VARIABLE, name)
        return stand_in
    return install


@pytest.mark.parametrize("name", ["torch", "auto"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_computes_the_formula(monkeypatch, name, masked):
    monkeypatch.setenv(VARIABLE, name)
    q, k, v = tensors()
    mask = (torch.arange(9) < 5).expand(2, 1, 1, 9) if masked else None
    torch.testing.assert_close(attention(q, k, v, mask=mask), formula(q, k, v, mask))


def test_a_misspelt_implementation_names_the_variable_and_the_choices(monkeypatch):
    monkeypatch.setenv(VARIABLE, "flesh")
    with pytest.raises(EnvironmentValueError, match=f"{VARIABLE}='flesh'.*torch.*flash_attention_2"):
        attention(*tensors())


# ---- optional packages ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_gets_its_layout_and_gives_ours(package, name):
    stand_in = package(name)
    q, k, v = tensors(dtype=torch.bfloat16)
    out = attention(q, k, v)
    assert stand_in.calls == 1 and out.shape == q.shape and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, formula(q, k, v))


@pytest.mark.parametrize("name, head_dim, dtype, masked, takes", [
    ("flash_attention_2", 128, torch.bfloat16, False, True),
    ("flash_attention_2", 128, torch.bfloat16, True, False),
    ("flash_attention_2", 384, torch.bfloat16, False, False),
    ("flash_attention_2", 12, torch.float16, False, False),
    ("flash_attention_2", 128, torch.float32, False, False),
    ("flash_attention_3", 256, torch.float16, False, True),
    ("flash_attention_3", 64, torch.float32, False, False),
    ("sage_attention", 128, torch.float16, False, True),
    ("sage_attention", 136, torch.float16, False, False),
    ("sage_attention", 64, torch.bfloat16, True, False),
    ("xformers", 128, torch.float32, False, True),
    ("xformers", 264, torch.float32, False, False),
    ("xformers", 64, torch.float64, False, False),
])
def test_what_a_kernel_does_not_take_goes_to_torch(package, name, head_dim, dtype, masked, takes):
    stand_in = package(name)
    q, k, v = tensors(head_dim, dtype)
    mask = (torch.arange(9) < 5).expand(2, 1, 1, 9) if masked else None
    out = attention(q, k, v, mask)
    assert stand_in.calls == takes
    assert takes or torch.equal(out, torch_attention(q, k, v, mask))


def test_kernels_are_for_cards(package):
    stand_in = package("flash_attention_2")
    IMPLEMENTATIONS["flash_attention_2"] = replace(KERNELS["flash_attention_2"])  # as published; the fixture undoes it
    attention(*tensors(dtype=torch.bfloat16))
    assert stand_in.calls == 0


@pytest.mark.parametrize("name", KERNELS)
def test_a_missing_package_names_the_pip_line(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, name)
    monkeypatch.setitem(sys.modules, KERNELS[name].module, None)
    with pytest.raises(AttentionUnavailable, match="is not installed.*pip install .*choose torch"):
        attention(*tensors())


@pytest.mark.parametrize("source, reason", [
    ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
    ("raise RuntimeError('built for CUDA 11')", "RuntimeError: built for CUDA 11"),
    ("import a_part_that_is_not_there", "a_part_that_is_not_there"),
    ("value = 1", "AttributeError: .*flash_attn_func"),
])
def test_a_broken_package_is_reported_when_it_is_asked_for(monkeypatch, tmp_path, source, reason):
    (tmp_path / "flash_attn.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setenv(VARIABLE, "flash_attention_2")
    try:
        with pytest.raises(AttentionUnavailable, match=f"{reason}.*pip install.*flash-attn"):
            attention(*tensors())
    finally:
        sys.modules.pop("flash_attn", None)
    monkeypatch.setenv(VARIABLE, "auto")
    attention(*tensors())


def test_importing_the_door_imports_no_package():
    script = ("import sys, diffsynth_backend.core.attention as door; "
              "sys.exit(any(kernel.module.split('.')[0] in sys.modules for kernel in door.KERNELS.values()))")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_kernel_that_fails_at_what_it_takes_is_an_error(monkeypatch, package):
    package("xformers")
    kernel = IMPLEMENTATIONS["xformers"]
    assert isinstance(kernel, Kernel)

    def fail(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(IMPLEMENTATIONS, "xformers", replace(kernel, call=fail))
    with pytest.raises(RuntimeError, match="no kernel image"):
        attention(*tensors())


# ---- the program around us ------------------------------------------------------------------------------------------

@pytest.fixture
def around(monkeypatch):
    """Undo what a test registers and prefers."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(door, "_preferred", "auto")
    monkeypatch.setattr(door, "IMPLEMENTATIONS", dict(IMPLEMENTATIONS))


def test_an_implementation_from_outside(around):
    register("theirs", lambda q, k, v, mask: torch.full_like(q, 2.0))
    prefer("theirs", "Their.Setting")
    assert chosen() == "theirs" and (attention(*tensors()) == 2).all()


def test_the_environment_comes_before_what_is_preferred(around, monkeypatch):
    prefer("torch", "Their.Setting")
    assert chosen() == "torch"
    monkeypatch.setenv(VARIABLE, "Auto")
    assert chosen() == "auto"


def test_an_unknown_preference_names_the_setting(around):
    with pytest.raises(EnvironmentValueError, match="Their.Setting='flesh'.*xformers"):
        prefer("flesh", "Their.Setting")
