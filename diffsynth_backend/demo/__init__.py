"""The embedded demo models: Qwen-Image's architecture with small arguments, trained to draw coloured shapes, and Wan's,
trained to move one.

`scenes` is the first one's world (prompts and pictures), `train` made the weights beside this file; `moving` and
`train_video` are the second one's. Their sizes are in `configs`.
"""
