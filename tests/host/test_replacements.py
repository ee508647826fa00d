"""On a real ComfyUI: a node that was renamed goes on working under the name that workflows know."""
from __future__ import annotations

import pytest

from tests.host.comfy_client import PromptRejected
from tests.host.graphs import text_to_image

OLD = {"class_type": "DiffSynthBackend_OldLatent", "inputs": {"side": 64}, "_meta": {"title": "Old Latent"}}


def test_nothing_was_renamed_yet(client):
    """The table is the one that the server has, and each of its entries leads to a node that there is."""
    ours = {old: entries for old, entries in client.get("/node_replacements").items()
            if old.startswith("DiffSynthBackend_")}
    assert {entry["new_node_id"] for entries in ours.values() for entry in entries} <= client.object_info().keys()
    assert ours.keys() <= {"DiffSynthBackend_OldLatent"}  # which only the next test knows


def test_a_rename_goes_through_the_table(client, probe):
    graph = {**text_to_image(schedule__steps=1), "empty": OLD}
    with pytest.raises(PromptRejected, match="DiffSynthBackend_OldLatent"):
        client.run(graph)
    assert probe("ProbeRename") == "registered"
    run = client.run(graph)
    assert run.status == "success", run.error
    assert len(run.files("show")) == 2
    [entry] = client.get("/node_replacements")["DiffSynthBackend_OldLatent"]
    assert (entry["new_node_id"], entry["old_widget_ids"]) == ("DiffSynthBackend_EmptyLatent", ["side"])
