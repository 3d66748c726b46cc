// out = x weight^T for 1 to 16 rows over packed 8 or 4 bit weights, and packed weights back to
// 16 bits for more rows.
//
//   int8: w = scale * q            groups of 32 columns; scale bfloat16
//   int4: w = row * s|s| * (q - 8) groups of 16 columns; s int8, row bfloat16
//
// Weights lie in blocks of 16 rows (the last may have fewer), columns padded to 32:
//   data    int8: [column / 4][row][4]; int4: [column / 32][4][row][4], byte [v][row][i] with
//   column
//           4v + i in its low half and column 16 + 4v + i in its high half
//   scales  int8: [group][row]; int4: [row] as bfloat16, then s as [group][row]
//
// Memory bounds it: 8.5 or 4.5 bits a weight. A block takes a block of weights, its warps every
// kWarps-th chunk of 32 columns, which is 512 or 256 bytes in one piece. The word of 4 columns that
// a lane loads is, widened to 16 bits, its operand of a tensor core as it is (which sums k in any
// order): columns 4v, 4v + 1 stand for k = 2t, 2t + 1 and 4v + 2, 4v + 3 for 2t + 8, 2t + 9. A
// group's sum is scaled in float32. About 3 instructions a weight against the 16 bits' 0.1.
//
// linear_quantized_kernel: at most 128 registers, 8192 bytes of shared memory.
// dequantize_kernel: at most 48 registers, 0 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlockRows = 16;
constexpr int kChunk = 32;  // columns

// What differs between the formats. A "word" is 4 bytes of data of one row.
struct Int8 {
  static constexpr int kWords = 2;  // of a row in a chunk that one lane has
  static constexpr int kWordsOfRow = 8;
  static constexpr int kGroups = 1;  // in a chunk
  static constexpr int kRowBytes = 0;
  GEMMA2_DEVICE static float scale(const void* scales, int64_t at) {
    return to_float(static_cast<const BFloat16*>(scales)[at]);
  }
};
struct Int4 {
  static constexpr int kWords = 1;
  static constexpr int kWordsOfRow = 4;
  static constexpr int kGroups = 2;
  static constexpr int kRowBytes = 2;  // of scales, before the groups'
  GEMMA2_DEVICE static float scale(const void* scales, int64_t at) {
    const float s = static_cast<const int8_t*>(scales)[at];
    return s * fabsf(s);
  }
};

// Where a block's parts are.
template <class Format>
struct PackedBlock {
  const uint32_t* words;  // [word of a row][row]
  const char* row_factors;
  const void* scales;  // [group][row]
  int rows;

  GEMMA2_DEVICE PackedBlock(const void* data, const void* all_scales, int64_t block,
                            int64_t out_features, int64_t chunks) {
    const int64_t first = block * kBlockRows;
    rows = int(out_features - first < kBlockRows ? out_features - first : kBlockRows);
    words = static_cast<const uint32_t*>(data) + first * chunks * Format::kWordsOfRow;
    const int64_t scale_bytes = Format::kRowBytes + chunks * Format::kGroups * kScaleBytes;
    row_factors = static_cast<const char*>(all_scales) + first * scale_bytes;
    scales = row_factors + rows * Format::kRowBytes;
  }
  // int4 scales of a block begin at an even byte: rows * kRowBytes and all before are even.
  GEMMA2_DEVICE float row_factor(int row) const {
    if constexpr (Format::kRowBytes == 0) return 1.0f;
    return to_float(reinterpret_cast<const BFloat16*>(row_factors)[row]);
  }
  static constexpr int kScaleBytes = Format::kRowBytes == 0 ? 2 : 1;
};

// Byte i of word, biased so that it is positive, less `bias`: 2^23 + byte as a float has the byte
// in its last bits.
GEMMA2_DEVICE float byte_to_float(uint32_t word, int i, float bias) {
  return bits_to_float(0x4b000000u | (word >> (8 * i) & 0xffu)) - (8388608.0f + bias);
}
// The 4 numbers of step s of a chunk, from the words that hold them.
GEMMA2_DEVICE void numbers(const uint32_t (&words)[2], int s, float (&q)[4]) {  // int8
  const uint32_t biased = words[s] ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = byte_to_float(biased, i, 128.0f);
}
GEMMA2_DEVICE void numbers(const uint32_t (&words)[1], int s, float (&q)[4]) {  // int4
  const uint32_t halves = words[0] >> (4 * s) & 0x0f0f0f0fu;
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = byte_to_float(halves, i, 8.0f);
}

// 4 elements of x, zeros behind the first n.
template <class T>
GEMMA2_DEVICE Vector8 load_4_elements(const T* p, int64_t n, bool aligned) {
  if (aligned && n >= 4) return load_8(p);
  Vector8 v{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < n) v.words[i / 2] |= uint32_t(p[i].bits) << (16 * (i % 2));
  }
  return v;
}

// kRowTiles: groups of 8 rows of x, 1 or 2.
template <class T, class Format, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 2)
    linear_quantized_kernel(const LinearParams p, bool aligned) {
  constexpr int kWords = Format::kWords;
  // Chunks whose loads are on the way together; with two tiles of x fewer registers are left.
  constexpr int kUnroll = kRowTiles == 1 ? 3 : 2;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  const int64_t blocks = (p.out_features + kBlockRows - 1) / kBlockRows;

  for (int64_t index = blockIdx.x; index < blocks; index += gridDim.x) {
    const PackedBlock<Format> block(p.weight, p.scales, index, p.out_features, chunks);
    // Beyond the last row it is read again, and its sums are not used.
    const int row[2] = {min(g, block.rows - 1), min(g + 8, block.rows - 1)};
    const T* x = static_cast<const T*>(p.x) + g * p.x_stride;
    float sums[kRowTiles][4] = {};

    // Words and scales of one chunk; chunks past the end are read as the last one.
    struct Chunk {
      uint32_t words[2][kWords];
      float scales[2][Format::kGroups];
    };
    const auto load = [&](int64_t chunk) {
      Chunk c;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int64_t word = chunk * Format::kWordsOfRow + t + 4 * w;
          c.words[r][w] = load_4_once(block.words + word * block.rows + row[r]);
        }
#pragma unroll
        for (int i = 0; i < Format::kGroups; ++i) {
          const int64_t group = chunk * Format::kGroups + i;
          c.scales[r][i] = Format::scale(block.scales, group * block.rows + row[r]);
        }
      }
      return c;
    };
    const auto multiply = [&](const Chunk& c, int64_t chunk) {
      float group[kRowTiles][4] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float q[2][4];
        numbers(c.words[0], s, q[0]);
        numbers(c.words[1], s, q[1]);
        const uint32_t a[4] = {pack<T>(q[0][0], q[0][1]), pack<T>(q[1][0], q[1][1]),
                               pack<T>(q[0][2], q[0][3]), pack<T>(q[1][2], q[1][3])};
        const int64_t k = chunk * kChunk + 16 * s + 4 * t, n = p.in_features - k;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          Vector8 v{};
          if (g + 8 * i < p.rows) v = load_4_elements(x + 8 * i * p.x_stride + k, n, aligned);
          mma_m16n8k16<T>(group[i], a, v.words[0], v.words[1]);
        }
        if (s + 1 < 2 && Format::kGroups == 1) continue;
        const int of = Format::kGroups == 1 ? 0 : s;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[i][j] += group[i][j] * c.scales[j / 2][of];
            group[i][j] = 0;
          }
        }
      }
    };
    int64_t chunk = warp;
    for (; chunk + (kUnroll - 1) * kWarps < chunks; chunk += kUnroll * kWarps) {
      Chunk c[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) c[u] = load(chunk + u * kWarps);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) multiply(c[u], chunk + u * kWarps);
    }
#pragma unroll 1
    for (; chunk < chunks; chunk += kWarps) multiply(load(chunk), chunk);

    // scratch[warp][row of x][row of weight]
    float* scratch = reinterpret_cast<float*>(shared_memory());
    constexpr int kSums = 8 * kRowTiles * kBlockRows;
    float* mine = scratch + warp * kSums;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mine[(8 * i + 2 * t + j % 2) * kBlockRows + g + 8 * (j / 2)] = sums[i][j];
    }
    __syncthreads();
    const int x_row = threadIdx.x / kBlockRows, column = threadIdx.x % kBlockRows;
    if (x_row < p.rows && column < block.rows) {
      float result = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) result += scratch[i * kSums + x_row * kBlockRows + column];
      result *= block.row_factor(column);
      if (p.softcap > 0) result = p.softcap * tanhf(result / p.softcap);
      const int64_t at = x_row * p.out_stride + index * kBlockRows + column;
      if (p.out_dtype == DType::kFloat32) {
        static_cast<float*>(p.out)[at] = result;
      } else {
        static_cast<T*>(p.out)[at] = from_float<T>(result);
      }
    }
    __syncthreads();  // scratch is written again for the next block
  }
}

// A thread unpacks the words of one row in one chunk.
template <class T, class Format>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  const int64_t index = blockIdx.x;
  const PackedBlock<Format> block(p.data, p.scales, index, p.out_features, chunks);
  const int row = threadIdx.x % kBlockRows;
  if (row >= block.rows) return;
  T* out = static_cast<T*>(p.out) + (index * kBlockRows + row) * p.in_features;
  const float factor = block.row_factor(row);
  for (int64_t chunk = blockIdx.y * (kThreads / kBlockRows) + threadIdx.x / kBlockRows;
       chunk < chunks; chunk += gridDim.y * (kThreads / kBlockRows)) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint32_t words[Format::kWords];
#pragma unroll
      for (int w = 0; w < Format::kWords; ++w)
        words[w] = block.words[(chunk * Format::kWordsOfRow + t + 4 * w) * block.rows + row];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int64_t group = chunk * Format::kGroups + (Format::kGroups == 1 ? 0 : s);
        const float scale = factor * Format::scale(block.scales, group * block.rows + row);
        float q[4];
        numbers(words, s, q);
        const int64_t k = chunk * kChunk + 16 * s + 4 * t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (k + i < p.in_features) out[k + i] = from_float<T>(q[i] * scale);
        }
      }
    }
  }
}

template <class T, class Format>
void launch_16_bit(const char* op, const LinearParams& p, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 8 == 0 && p.x_stride * sizeof(T) % 8 == 0;
  const bool few = p.rows <= 8;
  const auto kernel =
      few ? linear_quantized_kernel<T, Format, 1> : linear_quantized_kernel<T, Format, 2>;
  launch(op, kernel, row_grid(divide_up(p.out_features, kBlockRows)), kThreads,
         kWarps * kBlockRows * (few ? 8 : 16) * sizeof(float), stream, p, aligned);
}

template <class Format>
void launch_format(const char* op, const LinearParams& p, cudaStream_t stream) {
  if (reinterpret_cast<uintptr_t>(p.weight) % 4 || reinterpret_cast<uintptr_t>(p.scales) % 2)
    throw std::invalid_argument(std::string("gemma2_ext::") + op +
                                ": data must be aligned to 4 bytes, scales to 2");
  if (p.dtype == DType::kBFloat16) return launch_16_bit<BFloat16, Format>(op, p, stream);
  if (p.dtype == DType::kFloat16) return launch_16_bit<Half, Format>(op, p, stream);
  throw std::invalid_argument(std::string("gemma2_ext::") + op + ": the kernel takes 16-bit x");
}

template <class Format>
void launch_dequantize(const char* op, const DequantizeParams& p, cudaStream_t stream) {
  dim3 grid(unsigned(divide_up(p.out_features, kBlockRows)));
  grid.y = unsigned(divide_up(divide_up(p.in_features, kChunk), 8 * kThreads / kBlockRows));
  dispatch_dtype(op, p.dtype, [&](auto t) {
    launch(op, dequantize_kernel<decltype(t), Format>, grid, kThreads, 0, stream, p);
  });
}

}  // namespace
}  // namespace cuda

void launch_linear_int8(const LinearParams& p, cudaStream_t stream) {
  cuda::launch_format<cuda::Int8>("linear_int8", p, stream);
}
void launch_linear_int4(const LinearParams& p, cudaStream_t stream) {
  cuda::launch_format<cuda::Int4>("linear_int4", p, stream);
}
void launch_dequantize_int8(const DequantizeParams& p, cudaStream_t stream) {
  cuda::launch_dequantize<cuda::Int8>("linear_int8", p, stream);
}
void launch_dequantize_int4(const DequantizeParams& p, cudaStream_t stream) {
  cuda::launch_dequantize<cuda::Int4>("linear_int4", p, stream);
}

}  // namespace gemma2
