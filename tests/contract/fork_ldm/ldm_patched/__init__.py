"""Of reForge and Forge Classic."""
