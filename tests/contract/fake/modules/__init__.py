"""A double of the WebUI: its names, its order of events, its habit of swallowing exceptions. None of its code."""
