"""Of Forge and Forge Neo."""
