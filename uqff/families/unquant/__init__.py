"""Unquant: plain numbers."""
