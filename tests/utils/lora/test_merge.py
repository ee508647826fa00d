"""Merged LoRAs add what their parts add, layer by layer; what makes no LoRA is refused."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth_backend.utils.lora import merge_lora
from diffsynth_backend.utils.lora.merge import check_mergeable


def lora(rank: int, layers: tuple[str, ...] = ("to_q", "to_k"), lora_in: int = 5, lora_out: int = 3) -> dict:
    return {f"{layer}.lora_{matrix}.default.weight": torch.randn(shape) for layer in layers
            for matrix, shape in (("A", (rank, lora_in)), ("B", (lora_out, rank)))}


def update(lora: dict[str, Tensor], layer: str) -> Tensor:
    return lora[f"{layer}.lora_B.default.weight"] @ lora[f"{layer}.lora_A.default.weight"]


def test_merged_loras_add_the_sum():
    loras = [lora(2), lora(4), lora(1)]
    merged = merge_lora(loras, alpha=0.25)
    assert merged.keys() == loras[0].keys()
    for layer in ("to_q", "to_k"):
        torch.testing.assert_close(update(merged, layer), 0.25 * sum(update(one, layer) for one in loras))


def test_a_layer_that_only_some_have_is_kept():
    first, second = lora(2), lora(1, ("to_k", "to_v"))
    merged = merge_lora([first, second])
    torch.testing.assert_close(update(merged, "to_q"), update(first, "to_q"))
    torch.testing.assert_close(update(merged, "to_v"), update(second, "to_v"))
    torch.testing.assert_close(update(merged, "to_k"), update(first, "to_k") + update(second, "to_k"))


def test_merging_leaves_the_parts_alone():
    one = lora(2)
    for tensor in merge_lora([one]).values():
        tensor.zero_()
    assert all(tensor.any() for tensor in one.values())


BROKEN = {
    "another name": ({"to_q.alpha": torch.ones(())}, "to_q.alpha is no matrix of a LoRA"),
    "half": ({"to_q.lora_B.default.weight": torch.ones(3, 2)}, "to_q.lora_A.default.weight is not"),
    "ranks": ({"q.lora_A.x": torch.ones(2, 5), "q.lora_B.x": torch.ones(3, 4)}, r"expected \(rank, in\)"),
}


@pytest.mark.parametrize("broken, message", BROKEN.values(), ids=BROKEN)
def test_what_is_no_lora_raises(broken, message):
    with pytest.raises(ValueError, match=message):
        check_mergeable(broken)
    with pytest.raises(ValueError, match=message):
        merge_lora([lora(1), broken])


@pytest.mark.parametrize("loras, message", [
    ([], "no LoRAs to merge"),
    ([lora(2), lora(2, lora_in=6)], "to_q.lora_A.default.weight: the LoRAs are for layers of different sizes"),
], ids=["none", "of another model"])
def test_loras_that_do_not_fit_one_another_raise(loras, message):
    with pytest.raises(ValueError, match=message):
        merge_lora(loras)
