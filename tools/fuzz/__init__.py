"""Hostile inputs by the million: mutations of good and bad files, against everything that reads files of strangers."""
