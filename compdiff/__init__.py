"""CompDiff companion: small, reproducible code for three papers on fair medical image generation."""

__version__ = "0.1.0"
