"""GGUF files: declared layout, reader, writer."""
