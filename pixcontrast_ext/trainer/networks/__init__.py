"""The networks of the registry in `trainer/models.py`, a file for each, and the backbones that they share."""
