# Generated from the declared layouts by `python -m tools.schemas`; not to be edited.
meta:
  id: uqff
  title: Universal Quantized File Format of mistral.rs
  file-extension: uqff
  license: MIT
  ks-version: '0.11'
  encoding: UTF-8
  endian: le
doc: |
  UQFF, the Universal Quantized File Format of mistral.rs. A file is a safetensors file: the length of a header, the
  header, which is JSON, and data. Kaitai Struct reads no JSON, so a program takes the place of each tensor out of the
  header and reads its bytes with one of the types here: `blob` before 1.0; of 1.x the type that entries.json names for
  the entry. Tensors fill the data without a gap, so `data.blobs` are all layers of a file of before 1.0. Floats of 8 and
  16 bits are given as their bits. These types have the layout; rules that need more than one field are in the pages.
seq:
- id: len_header
  type: u8
  doc: bytes of the header
  valid:
    max: 100000000
- id: header
  type: str
  size: len_header
  doc: JSON; see container.md, framing
- id: data
  type: data
  size-eos: true
types:
  data:
    doc: the bytes of all tensors
    instances:
      blobs:
        pos: 0
        type: blob
        repeat: eos
        doc: all layers, of a file of before 1.0 only
  blob:
    doc: 'a layer before 1.0: one tensor of a file, whole'
    seq:
    - id: version
      doc: 'format version: the bytes are patch, minor, major, 0'
      type: u4
      valid:
        any-of:
        - 256
        - 257
        - 258
        - 259
        - 512
    - id: quant_type
      doc: family of the blob, always at offset 4
      type: u1
      enum: family
      valid:
        in-enum: true
    - id: body
      type:
        switch-on: quant_type
        cases:
          family::gguf: gguf_body
          family::unquant: unquant_body
          family::hqq: hqq_body
          family::fp8: fp8_body
          family::afq: afq_body
          family::f8q8: f8q8_body
          family::mxfp4: mxfp4_body
    instances:
      major:
        value: version >> 16
      minor:
        value: version >> 8 & 255
      patch:
        value: version & 255
  gguf_body:
    doc: GGUF before 1.0, behind the header
    seq:
    - id: data_length
      doc: bytes of `data`
      type: u4
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0; after the length in this family only
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: ggml_dtype
      doc: ggml type code
      type: u4
      enum: ggml_type
      valid:
        in-enum: true
    - id: ndim
      doc: number of dimensions
      type: u4
      valid:
        max: 8
    - id: shape
      doc: dimensions in elements, outermost first
      type: u4
      repeat: expr
      repeat-expr: ndim
      valid:
        min: 1
    - id: data
      doc: the blocks, row after row
      size: data_length
      type: ggml_blocks(ggml_dtype)
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  unquant_body:
    doc: Unquant before 1.0, behind the header
    seq:
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: weight
      doc: the weight, `[..., out, in]`
      type: tensor
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  hqq_body:
    doc: HQQ before 1.0, behind the header
    seq:
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: w_q
      doc: the packed codes, U8, for 3 bits I32
      type: tensor
    - id: scales
      doc: scale of each group, `[1, N]` (axis 0) or `[N, 1]` (axis 1)
      type: tensor
    - id: zeros
      doc: zero point of each group, like `scales`
      type: tensor
    - id: ndim
      doc: number of dimensions of the weight
      type: u4
      valid:
        max: 8
    - id: shape
      doc: logical dimensions in elements, outermost first
      type: u4
      repeat: expr
      repeat-expr: ndim
      valid:
        min: 1
    - id: bits
      doc: 'bits per code: 1, 2, 3, 4 or 8'
      type: u1
      valid:
        any-of:
        - 1
        - 2
        - 3
        - 4
        - 8
    - id: group_size
      doc: weights per group
      type: u4
      valid:
        min: 1
    - id: axis
      doc: '0: groups are columns of M; 1: rows'
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: optimization_steps
      doc: steps of the solver; 0 stands for none stated
      type: u4
    - id: round_zeros
      doc: 1 if the zeros were rounded
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: channel_wise
      doc: 1 if quantised in groups
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  fp8_body:
    doc: FP8 before 1.0, behind the header
    seq:
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: weight
      doc: the codes, F8E4M3 `[..., out, in]`
      type: tensor
    - id: dequant_w_scale
      doc: multiplies the codes on dequantising
      type: f4
    - id: dequant_x_scale
      doc: meant for activations; the writer repeats `dequant_w_scale`
      type: f4
    - id: quant_scale
      doc: what the weights were multiplied by on quantising
      type: f4
    - id: dtype
      doc: dtype code of the quantised numbers, always 9 (F8E4M3)
      type: u4
      valid:
        any-of:
        - 9
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  afq_body:
    doc: AFQ before 1.0, behind the header
    seq:
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: w_q
      doc: the packed codes, U32 `[..., out, in·bits/32]`
      type: tensor
    - id: scales
      doc: scale of each group, F32, F16 or BF16 `[..., out, in/group_size]`
      type: tensor
    - id: biases
      doc: value of code 0 of each group, like `scales`
      type: tensor
    - id: bits
      doc: 'bits per code: 2, 3, 4, 6 or 8'
      type: u1
      valid:
        any-of:
        - 2
        - 3
        - 4
        - 6
        - 8
    - id: group_size
      doc: 'inputs per group: 32, 64 or 128'
      type: u1
      valid:
        any-of:
        - 32
        - 64
        - 128
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  f8q8_body:
    doc: F8Q8 before 1.0, behind the header
    seq:
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: num_blocks
      doc: number of blocks, ⌈∏`shape` / 32⌉
      type: u4
    - id: ndim
      doc: number of dimensions
      type: u4
      valid:
        max: 8
    - id: shape
      doc: logical dimensions in elements, outermost first
      type: u4
      repeat: expr
      repeat-expr: ndim
      valid:
        min: 1
    - id: data
      doc: the blocks
      size: 33 * num_blocks
      type: f8q8_blocks
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  mxfp4_body:
    doc: MXFP4 before 1.0, behind the header
    seq:
    - id: bias_flag
      doc: 1 if a bias follows at the end, else 0
      type: u1
      valid:
        any-of:
        - 0
        - 1
    - id: blocks
      doc: the nibbles, U8 `[..., out, in/2]`, the lower nibble first
      type: tensor
    - id: scales
      doc: the block exponents, U8 `[..., out, in/32]`, bias 127
      type: tensor
    - id: bias
      doc: bias of the layer, present if `bias_flag` is 1
      type: tensor
      if: bias_flag == 1
  tensor:
    doc: a tensor record R
    seq:
    - id: length
      doc: 'bytes of `data`: ∏`shape` × itemsize(`dtype`)'
      type: u4
    - id: dtype
      doc: dtype code
      type: u4
      enum: dtype
      valid:
        in-enum: true
    - id: ndim
      doc: number of dimensions
      type: u4
      valid:
        max: 8
    - id: shape
      doc: dimensions in elements, outermost first
      type: u4
      repeat: expr
      repeat-expr: ndim
      valid:
        min: 1
    - id: data
      doc: elements, row major, little endian
      size: length
      type: numbers(dtype)
  numbers:
    doc: numbers of one dtype; F16, BF16 and F8E4M3 as their bits
    params:
    - id: code
      type: u4
      enum: dtype
    instances:
      values:
        pos: 0
        type:
          switch-on: code
          cases:
            dtype::u8: u1
            dtype::u32: u4
            dtype::i32: s4
            dtype::i64: s8
            dtype::f16: u2
            dtype::bf16: u2
            dtype::f32: f4
            dtype::f64: f8
            dtype::i16: s2
            dtype::f8e4m3: u1
        repeat: eos
  ggml_blocks:
    doc: blocks of a ggml type
    params:
    - id: code
      type: u4
      enum: ggml_type
    instances:
      values:
        pos: 0
        type:
          switch-on: code
          cases:
            ggml_type::f32: block_f32
            ggml_type::f16: block_f16
            ggml_type::q4_0: block_q4_0
            ggml_type::q4_1: block_q4_1
            ggml_type::q5_0: block_q5_0
            ggml_type::q5_1: block_q5_1
            ggml_type::q8_0: block_q8_0
            ggml_type::q8_1: block_q8_1
            ggml_type::q2k: block_q2k
            ggml_type::q3k: block_q3k
            ggml_type::q4k: block_q4k
            ggml_type::q5k: block_q5k
            ggml_type::q6k: block_q6k
            ggml_type::q8k: block_q8k
            ggml_type::bf16: block_bf16
        repeat: eos
  f8q8_blocks:
    doc: blocks of F8Q8
    instances:
      values:
        pos: 0
        type: block_f8q8
        repeat: eos
  block_f32:
    seq:
    - id: x
      doc: the weight
      type: f4
  block_f16:
    seq:
    - id: x
      doc: the weight
      type: u2
  block_q4_0:
    seq:
    - id: d
      doc: scale
      type: u2
    - id: qs
      doc: 'codes + 8: byte j holds element j (low nibble) and j + 16 (high nibble)'
      type: u1
      repeat: expr
      repeat-expr: 16
  block_q4_1:
    seq:
    - id: d
      doc: scale
      type: u2
    - id: m
      doc: 'minimum: the value of code 0'
      type: u2
    - id: qs
      doc: 'codes: byte j holds element j (low nibble) and j + 16 (high nibble)'
      type: u1
      repeat: expr
      repeat-expr: 16
  block_q5_0:
    seq:
    - id: d
      doc: scale
      type: u2
    - id: qh
      doc: 'fifth bits of codes + 16: bit j belongs to element j'
      type: u4
    - id: qs
      doc: 'low four bits: byte j holds element j (low nibble) and j + 16 (high nibble)'
      type: u1
      repeat: expr
      repeat-expr: 16
  block_q5_1:
    seq:
    - id: d
      doc: scale
      type: u2
    - id: m
      doc: 'minimum: the value of code 0'
      type: u2
    - id: qh
      doc: 'fifth bits of the codes: bit j belongs to element j'
      type: u4
    - id: qs
      doc: 'low four bits: byte j holds element j (low nibble) and j + 16 (high nibble)'
      type: u1
      repeat: expr
      repeat-expr: 16
  block_q8_0:
    seq:
    - id: d
      doc: scale
      type: u2
    - id: qs
      doc: codes, in element order
      type: s1
      repeat: expr
      repeat-expr: 32
  block_q8_1:
    seq:
    - id: d
      doc: scale
      type: u2
    - id: s
      doc: d times the sum of the codes; for dot products, not used to dequantise
      type: u2
    - id: qs
      doc: codes, in element order
      type: s1
      repeat: expr
      repeat-expr: 32
  block_q2k:
    seq:
    - id: scales
      doc: 'per 16 weights: 4-bit scale (low nibble) and 4-bit minimum (high nibble)'
      type: u1
      repeat: expr
      repeat-expr: 16
    - id: qs
      doc: '2-bit codes: byte 32h + l holds elements 128h + l, + 32, + 64, + 96, lowest bits first'
      type: u1
      repeat: expr
      repeat-expr: 64
    - id: d
      doc: scale of the scales
      type: u2
    - id: dmin
      doc: scale of the minimums
      type: u2
  block_q3k:
    seq:
    - id: hmask
      doc: 'third bits: bit b of byte l belongs to element 32b + l; 0 means code - 4'
      type: u1
      repeat: expr
      repeat-expr: 32
    - id: qs
      doc: low two bits, arranged as in Q2K
      type: u1
      repeat: expr
      repeat-expr: 64
    - id: scales
      doc: 16 scales of 6 bits, + 32 (see the packing drawing)
      type: u1
      repeat: expr
      repeat-expr: 12
    - id: d
      doc: scale of the scales
      type: u2
  block_q4k:
    seq:
    - id: d
      doc: scale of the scales
      type: u2
    - id: dmin
      doc: scale of the minimums
      type: u2
    - id: scales
      doc: 8 scales and 8 minimums of 6 bits (see the packing drawing)
      type: u1
      repeat: expr
      repeat-expr: 12
    - id: qs
      doc: '4-bit codes: byte 32c + l holds elements 64c + l (low nibble) and 64c + 32 + l (high nibble)'
      type: u1
      repeat: expr
      repeat-expr: 128
  block_q5k:
    seq:
    - id: d
      doc: scale of the scales
      type: u2
    - id: dmin
      doc: scale of the minimums
      type: u2
    - id: scales
      doc: 8 scales and 8 minimums of 6 bits, as in Q4K
      type: u1
      repeat: expr
      repeat-expr: 12
    - id: qh
      doc: 'fifth bits: bit b of byte l belongs to element 32b + l'
      type: u1
      repeat: expr
      repeat-expr: 32
    - id: qs
      doc: low four bits, arranged as in Q4K
      type: u1
      repeat: expr
      repeat-expr: 128
  block_q6k:
    seq:
    - id: ql
      doc: 'low four bits: byte 64h + l holds elements 128h + l and 128h + 64 + l'
      type: u1
      repeat: expr
      repeat-expr: 128
    - id: qh
      doc: high two bits of codes + 32, arranged as the codes of Q2K
      type: u1
      repeat: expr
      repeat-expr: 64
    - id: scales
      doc: scale per 16 weights
      type: s1
      repeat: expr
      repeat-expr: 16
    - id: d
      doc: scale of the scales
      type: u2
  block_q8k:
    seq:
    - id: d
      doc: scale
      type: f4
    - id: qs
      doc: codes, in element order
      type: s1
      repeat: expr
      repeat-expr: 256
    - id: bsums
      doc: sums of 16 codes; for dot products, not used to dequantise
      type: s2
      repeat: expr
      repeat-expr: 16
  block_bf16:
    seq:
    - id: x
      doc: the weight
      type: u2
  block_f8q8:
    seq:
    - id: d
      doc: scale of the block times 416, as an e4m3 code
      type: u1
    - id: qs
      doc: the codes, in element order
      type: s1
      repeat: expr
      repeat-expr: 32
  dimensions:
    doc: 'entry `weight.shape`: dimensions in elements, outermost first'
    seq:
    - id: values
      type: u4
      repeat: eos
      valid:
        min: 1
  weight_format:
    doc: entry `weight.format`
    seq:
    - id: value
      type: u1
      enum: family
      valid:
        in-enum: true
  version_number:
    doc: entries `uqff.version.major`, `.minor`, `.patch`
    seq:
    - id: value
      type: u4
  gguf_weight_dtype:
    doc: entry `weight.dtype` of GGUF
    seq:
    - id: value
      doc: ggml type code
      type: u4
      enum: ggml_type
      valid:
        in-enum: true
  hqq_weight_bits:
    doc: entry `weight.bits` of HQQ
    seq:
    - id: value
      doc: 'bits per code: 1, 2, 3, 4 or 8'
      type: u1
      valid:
        any-of:
        - 1
        - 2
        - 3
        - 4
        - 8
  hqq_weight_group_size:
    doc: entry `weight.group_size` of HQQ
    seq:
    - id: value
      doc: weights per group
      type: u4
      valid:
        min: 1
  hqq_weight_axis:
    doc: entry `weight.axis` of HQQ
    seq:
    - id: value
      doc: '0: groups are columns of M; 1: rows'
      type: u1
      valid:
        any-of:
        - 0
        - 1
  hqq_weight_optimization_steps:
    doc: entry `weight.optimization_steps` of HQQ
    seq:
    - id: value
      doc: steps of the solver; 0 stands for none stated
      type: u4
  hqq_weight_round_zeros:
    doc: entry `weight.round_zeros` of HQQ
    seq:
    - id: value
      doc: 1 if the zeros were rounded
      type: u1
      valid:
        any-of:
        - 0
        - 1
  hqq_weight_channel_wise:
    doc: entry `weight.channel_wise` of HQQ
    seq:
    - id: value
      doc: 1 if quantised in groups
      type: u1
      valid:
        any-of:
        - 0
        - 1
  fp8_weight_dequant_w_scale:
    doc: entry `weight.dequant_w_scale` of FP8
    seq:
    - id: value
      doc: multiplies the codes on dequantising
      type: f4
  fp8_weight_dequant_x_scale:
    doc: entry `weight.dequant_x_scale` of FP8
    seq:
    - id: value
      doc: meant for activations; the writer repeats `dequant_w_scale`
      type: f4
  fp8_weight_quant_scale:
    doc: entry `weight.quant_scale` of FP8
    seq:
    - id: value
      doc: what the weights were multiplied by on quantising
      type: f4
  fp8_weight_dtype:
    doc: entry `weight.dtype` of FP8
    seq:
    - id: value
      doc: dtype code of the quantised numbers, always 9 (F8E4M3)
      type: u4
      valid:
        any-of:
        - 9
  afq_weight_bits:
    doc: entry `weight.bits` of AFQ
    seq:
    - id: value
      doc: 'bits per code: 2, 3, 4, 6 or 8'
      type: u1
      valid:
        any-of:
        - 2
        - 3
        - 4
        - 6
        - 8
  afq_weight_group_size:
    doc: entry `weight.group_size` of AFQ
    seq:
    - id: value
      doc: 'inputs per group: 32, 64 or 128'
      type: u1
      valid:
        any-of:
        - 32
        - 64
        - 128
  f8q8_weight_num_blocks:
    doc: entry `weight.num_blocks` of F8Q8
    seq:
    - id: value
      doc: number of blocks, ⌈∏`shape` / 32⌉
      type: u4
enums:
  family:
    0: gguf
    1: unquant
    2: hqq
    3: fp8
    4: afq
    5: f8q8
    6: mxfp4
  dtype:
    0: u8
    1: u32
    2: i32
    3: i64
    4: f16
    5: bf16
    6: f32
    7: f64
    8: i16
    9: f8e4m3
  ggml_type:
    0: f32
    1: f16
    2: q4_0
    3: q4_1
    6: q5_0
    7: q5_1
    8: q8_0
    9: q8_1
    10: q2k
    11: q3k
    12: q4k
    13: q5k
    14: q6k
    15: q8k
    30: bf16
