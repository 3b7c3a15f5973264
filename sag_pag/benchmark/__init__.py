"""What a guided step costs, counted and timed: ``python -m sag_pag.benchmark --help``."""
