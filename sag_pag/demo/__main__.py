"""``python -m sag_pag.demo``."""

from sag_pag.demo.cli import main

main()
