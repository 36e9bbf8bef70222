"""The GGUF family, ggml's block types: :mod:`~uqff.families.gguf.tensor` has the record, ``blocks`` the layouts."""
