"""The workshop beside the extension: training, evaluation and benchmark of the demo model. Nothing ships with it."""
