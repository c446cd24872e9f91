"""Tests of the loss inside other trainers. They need an environment of their own: make test-trainers."""
