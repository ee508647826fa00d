"""Which pickles (.bin .pth .ckpt) a workflow may load.

Notable: a workflow is a file from a stranger, and so may be the pickle that it names; pickles can hold more than
weights. They are read so that nothing in them runs, and yet only those whose layout the registry knows are let in (Wan
is published so), unless DIFFSYNTH_PICKLE_POLICY, or else the user's setting DiffSynth.Pickles, says all.
"""
from __future__ import annotations

from ..diffsynth_backend.core import environment
from ..diffsynth_backend.core.loader.file import is_pickle
from ..diffsynth_backend.models.model_loader import check_workflow_files
from ..diffsynth_backend.pipelines.handle import ModelSource
from . import host

SETTING = "DiffSynth.Pickles"
KNOWN, ALL = POLICIES = ("known", "all")
SWITCH = ("in ComfyUI's settings under DiffSynth, Pickles, choose all; or start ComfyUI with "
          f"{environment.PICKLE_POLICY}=all")


def policy() -> str:
    """One of POLICIES. Raises EnvironmentValueError for a value that is none."""
    if environment.text(environment.PICKLE_POLICY, ""):
        return environment.choice(environment.PICKLE_POLICY, KNOWN, POLICIES)
    chosen = host.setting(SETTING, KNOWN)
    if chosen not in POLICIES:
        raise environment.EnvironmentValueError(SETTING, chosen, POLICIES)
    return chosen


def admitted(source: ModelSource) -> ModelSource:
    """The files of a model, if a workflow may load them.

    Raises PickleRefused, which names the setting; for pickles ModelFileError, too, if they cannot be used.
    """
    if any(map(is_pickle, source.files)):
        check_workflow_files(source.files, policy() == ALL, SWITCH)
    return source
