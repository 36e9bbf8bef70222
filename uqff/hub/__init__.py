"""The Hugging Face hub: what repositories are called, reading their files by ranges, fetching them."""
