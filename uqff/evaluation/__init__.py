"""How good a model is: perplexity of a text, and how far its predictions are from those of a reference."""
