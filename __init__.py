"""DiffSynth Backend for ComfyUI: what ComfyUI loads when this folder lies in `custom_nodes`.

Notable: test runners import this file as a plain module, without a package around it; there is nothing to do then.
"""
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY"]

if __package__:
    from .nodes import comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
