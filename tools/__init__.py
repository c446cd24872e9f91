"""Programs about the kernels, started from the repository's root as `python -m tools.NAME`."""
