"""The examples and the guide's pages, run. They need an environment of their own: make test-examples."""
