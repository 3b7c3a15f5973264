"""Beside the extension, which needs none of it: training, evaluation and benchmark of the demo model."""
