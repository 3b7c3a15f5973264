"""The glue to the WebUI: the only place that imports its ``modules`` or gradio."""
