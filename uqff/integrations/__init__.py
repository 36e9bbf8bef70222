"""What other libraries know of UQFF: each in a module of its own, which is imported by whoever has that library."""
