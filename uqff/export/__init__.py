"""What others read: plain checkpoints of UQFF models."""
