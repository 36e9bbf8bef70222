"""What is in a file, as data: summaries, field maps, statistics, annotated dumps. Prints nothing.

Nothing here imports torch, except for the statistics of a dequantised weight.
"""

from uqff.inspection.hexdump import HexLine, hexdump
from uqff.inspection.layer import FieldRow, LayerReport, report_layer
from uqff.inspection.meta import LayerMeta, read_meta
from uqff.inspection.statistics import Statistics, statistics_of
from uqff.inspection.summary import FileSummary, LayerRow, summarize

__all__ = [
    "FieldRow",
    "FileSummary",
    "HexLine",
    "LayerMeta",
    "LayerReport",
    "LayerRow",
    "Statistics",
    "hexdump",
    "read_meta",
    "report_layer",
    "statistics_of",
    "summarize",
]
