"""The test vectors of the spec: ``python -m tools.vectors`` writes ``spec/vectors/``, ``--check`` compares only.

============  ================================================================================================
module        what it does
============  ================================================================================================
wire          puts blobs together from named fields, by the spec's tables
oracle        reads blobs and computes every weight with scalar float32 arithmetic, by the spec's formulas
good          the valid blobs
describe      what a reader must find in one
client        blobs cut out of files that the engine's client wrote
bad           blobs that break one rule each
framing       files that break one rule of the container each
entries       puts 1.x files together, and reads them: layers as blobs, for the oracle
good_entries  the valid 1.x files, and what a reader must find in one
bad_entries   1.x files that break one rule each: ``bad_layers``, ``bad_files``, each case a ``broken`` model
encoder       quantises with scalar float32 arithmetic, by the spec's formulas
encodings     a matrix of weights, and the blob that each type makes of it
============  ================================================================================================

``wire``, ``oracle``, ``entries`` and ``encoder`` do not use uqff: they are a second implementation, and every vector is
checked against both.
"""
