"""What a guided step costs, counted and timed."""
