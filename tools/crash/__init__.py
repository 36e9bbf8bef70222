"""Kills at every call that changes a file system, and full disks at every write, of everything that writes."""
