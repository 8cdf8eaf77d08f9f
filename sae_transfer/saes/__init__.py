"""The dictionary side: SAEs on disk, the activation stream, training."""
