"""Tests of the loss inside other trainers, which need an environment of their own: make test-trainers."""
