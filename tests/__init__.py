"""Tests of the package and of its tools; what they share is in `support`."""
