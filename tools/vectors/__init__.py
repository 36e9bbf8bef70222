"""The test vectors of the spec: ``python -m tools.vectors`` writes ``spec/vectors/``, ``--check`` compares only.

========  ==============================================================================================
module    what it does
========  ==============================================================================================
wire      puts blobs together from named fields, by the spec's tables
oracle    reads blobs and computes every weight with scalar float32 arithmetic, by the spec's formulas
good      the valid vectors
client    blobs cut out of files that the engine's client wrote
bad       blobs that break one rule each
framing   files that break one rule of the container each
========  ==============================================================================================

``wire`` and ``oracle`` do not use uqff: they are a second implementation, and every vector is checked against both.
"""
