"""Schemas of the format for other programs, generated from the declared layouts into ``spec/schemas``.

===============  ==================================================================================
module           what
===============  ==================================================================================
``fields``       the layouts as plain fields, which all generators write down
``kaitai``       ``uqff.ksy``: Kaitai Struct
``imhex``        ``uqff.hexpat``: ImHex
``lists``        ``dtypes.json``, ``ggml-types.json``, ``entries.json``
``compiled``     ``uqff.ksy`` compiled by its own compiler, and run on all valid vectors
===============  ==================================================================================
"""
