"""Hands the always-on script to the WebUI."""

from sag_pag.webui.script import GuidanceScript, register  # noqa: F401 - the WebUI finds the class here

register()
