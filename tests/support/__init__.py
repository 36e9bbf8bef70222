"""What tests share: samples, strategies, models, children."""
