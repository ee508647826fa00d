"""The embedded demo model: Qwen-Image's architecture with small arguments, trained to draw coloured shapes.

`scenes` is its world (prompts and pictures), `train` made the weights beside this file; its sizes are in `configs`.
"""
