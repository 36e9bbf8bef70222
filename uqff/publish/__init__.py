"""Model directories to the Hugging Face hub: what is uploaded, the model card, the upload."""
