"""What kernels on NVIDIA GPUs are written in, and whether they are used; :mod:`uqff.simd` is the same for CPUs.

Kernels are CUDA C++: a family's ``gpu.cu`` decodes its weights, what all share lies here.  They are compiled when first
needed, by NVRTC, which torch's CUDA wheels bring; nothing but torch is needed.  Where that library is missing, or the
GPU is older than compute capability 8.0, torch operations do the same.  Bits are those of the reference, NaN payloads
aside.  ``UQFF_KERNELS=reference`` turns kernels off here too.

===================  ==================================================================================================
``primitives.cu``    one function for each machine instruction that plain C++ does not have; tests have others
``numbers.cu``       numbers as they are stored
``dequantize.cu``    a weight as plain numbers
``product.cu``       ``x Wᵀ`` from the codes, for a few rows of ``x``
``ring.cu``          the same for one row and up to eight, on compute capability 9.0
``coded.cu``         codes for that
``tile.cu``          the same for more rows, on compute capability 9.0 and newer
``wide.cu``          the same for many rows, on compute capability 9.0
``spread.cu``        rows of ``x`` for that
``source``           what is compiled, put together
``compiling``        NVRTC
``tiling``           which of these makes a product
``driver``           modules and launches
``kernels``          what families call
===================  ==================================================================================================
"""
