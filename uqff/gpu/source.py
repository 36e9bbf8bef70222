"""What is compiled: the files of a kernel one after the other, and an entry for one type and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from uqff.codes import DType
from uqff.gpu.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = [
    "PRIMITIVES",
    "Stored",
    "decoders_source",
    "dequantize_body",
    "dequantize_source",
    "launched_source",
    "peer_source",
    "product_source",
    "spread_body",
    "spread_source",
    "tile_source",
    "token_source",
    "wide_source",
]

PACKAGE = Path(__file__).parent.parent
PRIMITIVES = PACKAGE / "gpu" / "primitives.cu"
PRODUCT = ("gpu/product.cu", "gpu/coded.cu")
"""What the product kernels of families need."""


@dataclass(frozen=True)
class Stored:
    """A weight as kernels see it.

    Attributes:
        family: the folder whose ``gpu.cu`` decodes it.
        decoder: the C++ type in that file, with its parameters.
        parts: the stored tensors that it reads, at most four.
        numbers: that it needs beside the number of weights, at most five.
        alignment: bytes that all addresses must be multiples of.
        runs: how often a thread that dequantises writes 16 bytes: a multiple of the pieces that it decodes together.
        along: how many of the parts, the first ones, a product reads row by row along with ``x``; 0 if no kernel does.
        product: what multiplies instead of ``product.cu``: takes ``x`` and the number of outputs.
        numbers_into: what dequantises instead of ``dequantize.cu``: takes where the numbers go.
    """

    family: str
    decoder: str
    parts: tuple[torch.Tensor, ...]
    numbers: tuple[int, ...] = ()
    along: int = 0
    alignment: int = 4
    runs: int = 2
    product: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None
    numbers_into: Callable[[torch.Tensor], None] | None = None


def launched_source(family: str, given: str, body: str, threads: int) -> str:
    """The source of a kernel of a family's own, without the primitives.

    Args:
        family: see :class:`Stored`.
        given: what ``entry`` takes.
        body: what it does.
        threads: of a block.
    """
    entry = f"""
extern "C" __global__ void __launch_bounds__({threads}) entry({given}) {{
    {body}
}}
"""
    family_files = (f"families/{family}/gpu.cu", f"families/{family}/gpu_product.cu")
    return _read("gpu/numbers.cu", *PRODUCT, "gpu/dequantize.cu", *family_files) + entry


def dequantize_source(family: str, decoder: str, dtype: DType, runs: int) -> str:
    """The source of a kernel ``entry(Weight, out)``, without the primitives; see :class:`Stored`."""
    entry = f"""
extern "C" __global__ void __launch_bounds__(256) entry(Weight weight, u8* out) {{
    {dequantize_body(decoder, dtype, runs)}
}}
"""
    return _read("gpu/numbers.cu", f"families/{family}/gpu.cu", "gpu/dequantize.cu") + entry


def dequantize_body(decoder: str, dtype: DType, runs: int) -> str:
    """What a kernel of ``dequantize.cu`` does, in C++."""
    return f"dequantize<{decoder}, Write{dtype.name}, {runs}>(weight, out);"


def product_source(family: str, decoder: str, dtype: DType, columns: int) -> str:
    """The source of a kernel ``entry(Product)``, without the primitives.

    Args:
        family: see :class:`Stored`.
        decoder: likewise.
        dtype: of ``x`` and the result, F16 or BF16.
        columns: rows of ``x`` at most: 1, or a multiple of 8.

    The size of its array ``shared_bytes`` is that of the shared memory which a block needs.
    """
    entry = f"""
extern "C" __device__ u8 shared_bytes[SharedMemory<{decoder}, {columns}>::BYTES];
extern "C" __global__ void __launch_bounds__(32 * WARPS, {3 if columns == 1 else 1}) entry(Product product) {{
    multiply<{decoder}, Pairs{dtype.name}, {columns}>(product);
}}
"""
    family_files = (f"families/{family}/gpu.cu", f"families/{family}/gpu_product.cu")
    return _read("gpu/numbers.cu", *PRODUCT, *family_files) + entry


def token_source(
    name: str, given: str, threads: int, dtype: DType, how: Sequence[int] = (), files: Sequence[str] = ("gpu/token.cu",)
) -> str:
    """The source of a kernel ``uqff_name(given)`` of ``token.cu``, without the primitives.

    Args:
        name: of the function.
        given: the structure that it takes.
        threads: of a block.
        dtype: of the model.
        how: its other template parameters.
        files: where it stands.
    """
    parameters = ", ".join((dtype.name, *map(str, how)))
    entry = f"""
extern "C" __global__ void __launch_bounds__({threads}) uqff_{name}({given} given) {{
    {name}<{parameters}>(given);
}}
"""
    return _read("gpu/numbers.cu", *files) + entry


def peer_source(name: str, given: str, threads: int, dtype: DType, how: Sequence[int] = ()) -> str:
    """As :func:`token_source`, of ``peer.cu``."""
    return token_source(name, given, threads, dtype, how, ("gpu/token.cu", "gpu/peer.cu"))


def decoders_source(families: Sequence[str]) -> str:
    """What kernels of families consist of, without the primitives and without an entry: tests call it."""
    decoders = (f"families/{family}/gpu.cu" for family in families)
    products = (name for family in families if (PACKAGE / (name := f"families/{family}/gpu_product.cu")).exists())
    return _read("gpu/numbers.cu", *PRODUCT, "gpu/dequantize.cu", *decoders, *products)


@cache
def _read(*names: str) -> str:
    return "".join((PACKAGE / name).read_text() for name in names)


def tile_source(family: str, decoder: str, dtype: DType, tiling: Tiling) -> str:
    """As :func:`product_source`, of ``tile.cu``."""
    columns, warps, splits, blocks = tiling[:4]
    cluster = f"__cluster_dims__({splits}, 1, 1) " if splits > 1 else ""
    entry = f"""
extern "C" __device__ u8 shared_bytes[TileMemory<{decoder}, {columns}, {warps}, {blocks}>::BYTES];
extern "C" __global__ void {cluster}__launch_bounds__({32 * warps}, {blocks}) entry(Product product) {{
    multiply_tile<{decoder}, Pairs{dtype.name}, {columns}, {warps}, {splits}, {blocks}>(product);
}}
"""
    family_files = (f"families/{family}/gpu.cu", f"families/{family}/gpu_product.cu")
    return _read("gpu/numbers.cu", *PRODUCT, "gpu/tile.cu", *family_files) + entry


def ring_source(family: str, decoder: str, dtype: DType, tiling: Tiling) -> str:
    """As :func:`product_source`, of ``ring.cu``; for compute capability 9.0 and newer."""
    how, threads = f"{tiling.columns}, {tiling.warps}, {tiling.blocks}", 32 * tiling.warps + 32
    given = "const __grid_constant__ Product product"
    entry = f"""
extern "C" __device__ u8 shared_bytes[RingMemory<{decoder}, {how}>::BYTES];
extern "C" __global__ void __launch_bounds__({threads}, {tiling.blocks}) entry({given}) {{
    Ring<{decoder}, {dtype.name}, Pairs{dtype.name}, {how}>::run(product);
}}
"""
    family_files = (f"families/{family}/gpu.cu", f"families/{family}/gpu_product.cu")
    return _read("gpu/numbers.cu", *PRODUCT, *family_files, "gpu/ring.cu") + entry


def spread_source(family: str, decoder: str, dtype: DType, columns: int) -> str:
    """The source of a kernel ``entry(Spread)`` of ``spread.cu``, without the primitives."""
    entry = f"""
extern "C" __global__ void entry(Spread from) {{
    {spread_body(decoder, f"Pairs{dtype.name}", columns, "from")}
}}
"""
    family_files = (f"families/{family}/gpu.cu", f"families/{family}/gpu_product.cu")
    return _read("gpu/numbers.cu", *PRODUCT, *family_files, "gpu/spread.cu") + entry


def spread_body(decoder: str, pairs: str, columns: int, given: str) -> str:
    """What a kernel of ``spread.cu`` does, in C++."""
    return f"spread<Fused<{decoder}>::Order, Fused<{decoder}>::direct<{pairs}>(), {columns}>({given});"


def wide_source(family: str, decoder: str, dtype: DType, tiling: Tiling) -> str:
    """As :func:`product_source`, of ``wide.cu``; for compute capability 9.0 only."""
    columns, warps, splits, blocks = tiling[:4]
    how = f"{columns}, {warps}, {splits}, {blocks}, {tiling.unit}, {tiling.beside}"
    size = splits * tiling.beside
    cluster = f"__cluster_dims__({size}, 1, 1) " if size > 1 else ""
    entry = f"""
extern "C" __device__ u8 shared_bytes[WideMemory<{decoder}, {columns}, {warps}, {blocks}, {tiling.unit}>::BYTES];
extern "C" __global__ void {cluster}__launch_bounds__({32 * warps}, {blocks}) entry(Product product) {{
    multiply_wide<{decoder}, Pairs{dtype.name}, {how}>(product);
}}
"""
    return _wide(family, dtype, columns) + entry


def _wide(family: str, dtype: DType, columns: int) -> str:
    """All but the entry; an instruction with so many operands is better written by a program."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype.name.lower()}.{dtype.name.lower()}"
    weights, matrix, yes = (f"%{count}, %{count + 1}, %{count + 2}, %{count + 3}", f"%{count + 4}", f"%{count + 5}")
    wide = f"""
struct Wide {{
    __device__ static void mma(float (&sums)[{count}], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrix) {{
        asm volatile(
            "{{\\n.reg .pred more;\\nsetp.ne.b32 more, {yes}, 0;\\n"
            "{instruction} {{{sums}}}, {{{weights}}}, {matrix}, more, 1, 1, 0;\\n}}"
            : {outputs}
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(matrix), "r"(1));
    }}
}};
"""
    files = ("gpu/numbers.cu", *PRODUCT, "gpu/tile.cu", f"families/{family}/gpu.cu")
    return _read(*files, f"families/{family}/gpu_product.cu") + wide + _read("gpu/wide.cu")
