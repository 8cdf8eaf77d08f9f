"""sae-transfer: does a sparse autoencoder trained on a base model work on its chat model, and the other way round?"""

from importlib.metadata import version

__version__ = version("sae-transfer")
