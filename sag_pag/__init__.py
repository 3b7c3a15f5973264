"""Self-Attention Guidance and Perturbed-Attention Guidance for Stable Diffusion U-Nets."""

__version__ = "0.1.0"
