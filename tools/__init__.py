"""What the project is made and checked with; each package runs as ``python -m tools.NAME`` from the root."""
