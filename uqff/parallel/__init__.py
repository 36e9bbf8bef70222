"""Parallel layers: which slice of a weight a rank holds, how ranks add up, and the layers made of both."""
