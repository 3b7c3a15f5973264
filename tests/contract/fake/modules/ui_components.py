"""The host's own components."""

from __future__ import annotations

import gradio as gr


class InputAccordion(gr.Checkbox):
    """A checkbox that is also a container."""
