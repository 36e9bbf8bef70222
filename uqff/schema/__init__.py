"""Declared layouts: the construct bricks that every family is built from.

A layout is declared once, as a :class:`~uqff.schema.layout.Layout` of named fields.  The parser, the builder, the size
arithmetic, the inspector's byte map and the offset tables of the spec are all read off that declaration.
"""
