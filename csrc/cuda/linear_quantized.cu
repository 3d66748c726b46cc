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


// ---- operands of the tensor cores
//
// Of the 4 columns of a word the tensor core gets (0, 2) in one register and (1, 3) in the next: so
// lie the bytes after one mask. x is put in that order where it is copied to shared memory.

// Columns 4v + (0, 2) and 4v + (1, 3) of the low and of the high half of an int4 word, less 8. An
// exponent put above the number makes a float of it: BFloat16 128 + q, Half 1024 + q or 1024 + 16 q.
template <bool kBiasMma>
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&low)[2], uint32_t (&high)[2], BFloat16) {
  constexpr uint32_t kMask = 0x000f000fu, kExponent = 0x43004300u;
  constexpr uint32_t kOne = 0x3f803f80u, kBias = 0xc308c308u;  // 1, -136
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    low[i] = (word >> (8 * i) & kMask) | kExponent;
    high[i] = (word >> (8 * i + 4) & kMask) | kExponent;
    if (!kBiasMma) low[i] = multiply_add_2<BFloat16>(low[i], kOne, kBias);
    if (!kBiasMma) high[i] = multiply_add_2<BFloat16>(high[i], kOne, kBias);
  }
}
template <bool kBiasMma>
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&low)[2], uint32_t (&high)[2], Half) {
  constexpr uint32_t kExponent = 0x64006400u, kOne = 0x3c003c00u, kSixteenth = 0x2c002c00u;
  constexpr uint32_t kLowBias = 0xe408e408u, kHighBias = 0xd480d480u;  // -1032, -72
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t part = word >> (8 * i);
    low[i] = multiply_add_2<Half>((part & 0x000f000fu) | kExponent, kOne, kLowBias);
    high[i] = multiply_add_2<Half>((part & 0x00f000f0u) | kExponent, kSixteenth, kHighBias);
  }
}
// The same of an int8 word. BFloat16 has no room for 8 bits above one exponent: 128 + (the last 7
// bits) less 128 or, of negative numbers, 256. Half: 1024 + (q + 128).
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&q)[2], BFloat16) {
  constexpr uint32_t kExponent = 0x43004300u, kMinusOne = 0xbf80bf80u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t part = word >> (8 * i);
    const uint32_t magnitude = (part & 0x007f007fu) | kExponent;
    q[i] = multiply_add_2<BFloat16>((part & 0x00800080u) | kExponent, kMinusOne, magnitude);
  }
}
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&q)[2], Half) {
  constexpr uint32_t kOne = 0x3c003c00u, kBias = 0xe480e480u;  // 1, -1152
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t biased = (word >> (8 * i) & 0x00ff00ffu) ^ 0x64806480u;
    q[i] = multiply_add_2<Half>(biased, kOne, kBias);
  }
}

// What differs between the formats. A "word" is 4 bytes of data of one row.
struct Int8 {
  static constexpr int kWords = 2;  // of a row in a chunk that one lane has
  static constexpr int kWordsOfRow = 8;
  static constexpr int kGroups = 1;  // in a chunk
  static constexpr int kRowBytes = 0;
  static constexpr int kScaleBytes = 2;
  GEMMA2_DEVICE static float scale(const void* scales, int64_t at) {
    return to_float(static_cast<const BFloat16*>(scales)[at]);
  }
  GEMMA2_DEVICE static uint32_t load_scales(const void* p) { return load_4(p); }
  GEMMA2_DEVICE static uint32_t join_scales(const void* scales, int64_t first, int64_t second) {
    const auto* all = static_cast<const BFloat16*>(scales);
    return all[first].bits | uint32_t(all[second].bits) << 16;
  }
  GEMMA2_DEVICE static void unpack_scales(uint32_t bits, float (&scale)[2]) {
    scale[0] = bits_to_float(bits << 16);
    scale[1] = bits_to_float(bits & 0xffff0000u);
  }
  template <class T, bool kBiasMma>
  GEMMA2_DEVICE static void operands(const Vector8 (&words)[2], uint32_t (&a)[1][2][4]) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t q[2];
        widen(words[w].words[r], q, T{});
        a[0][w][r] = q[0];
        a[0][w][r + 2] = q[1];
      }
    }
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
  static constexpr int kScaleBytes = 1;
  GEMMA2_DEVICE static uint32_t load_scales(const void* p) {
    return *static_cast<const uint16_t*>(p);
  }
  GEMMA2_DEVICE static uint32_t join_scales(const void* scales, int64_t first, int64_t second) {
    const auto* all = static_cast<const uint8_t*>(scales);
    return all[first] | uint32_t(all[second]) << 8;
  }
  GEMMA2_DEVICE static void unpack_scales(uint32_t bits, float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float s = int8_t(bits >> (8 * i));
      scale[i] = s * fabsf(s);
    }
  }
  template <class T, bool kBiasMma>
  GEMMA2_DEVICE static void operands(const Vector8 (&words)[1], uint32_t (&a)[2][1][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t low[2], high[2];
      widen<kBiasMma>(words[0].words[r], low, high, T{});
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[0][0][r + 2 * i] = low[i];
        a[1][0][r + 2 * i] = high[i];
      }
    }
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
    const int64_t scale_bytes = Format::kRowBytes + chunks * Format::kGroups * Format::kScaleBytes;
    row_factors = static_cast<const char*>(all_scales) + first * scale_bytes;
    scales = row_factors + rows * Format::kRowBytes;
  }
  // int4 scales of a block begin at an even byte: rows * kRowBytes and all before are even.
  GEMMA2_DEVICE float row_factor(int row) const {
    if constexpr (Format::kRowBytes == 0) return 1.0f;
    return to_float(reinterpret_cast<const BFloat16*>(row_factors)[row]);
  }
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


// ---- the product

constexpr int kMaxWarps = 12;
constexpr int kStepChunks = 4;  // that a warp takes at once
constexpr int kStepColumns = kStepChunks * kChunk;

// How a launch divides its work; the sums' order hangs on it, so it comes from the weights' shape
// alone, but for phase_steps.
struct Plan {
  int warps;        // of a block; a step in turn each
  int steps;        // of a warp, for 16 rows of weight
  int phase_steps;  // of a warp, whose part of x is in shared memory at once
  bool x_aligned;   // to 16 bytes
  bool weight_aligned;
};

// kRows: the most rows of x: 2, 4, 8 or 16.
template <class T, class Format, int kRows, int kDepth, bool kBiasMma, int kMinBlocks>
__global__ void __launch_bounds__(kMaxWarps * kWarpSize, kMinBlocks)
    linear_quantized_kernel(const LinearParams p, const Plan plan) {
  constexpr int kWords = Format::kWords, kGroups = Format::kGroups;
  constexpr int kTiles = kRows > 8 ? 2 : 1, kTileRows = kRows > 8 ? 8 : kRows;
  constexpr int kAtOnce = 8 / kTileRows;  // groups in the columns of one product
  constexpr int kStepGroups = kStepChunks * kGroups, kPasses = kStepGroups / kAtOnce;
  constexpr int kGroupBytes = kChunk / kGroups * 2;  // of x
  constexpr int kStepBytes = kStepColumns * 2;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  const int64_t whole_steps = chunks / kStepChunks;
  const int64_t all_steps = (chunks + kStepChunks - 1) / kStepChunks;
  const int64_t blocks = (p.out_features + kBlockRows - 1) / kBlockRows;
  const int phase_columns = plan.phase_steps * plan.warps * kStepColumns;
  const int x_row_bytes = 2 * phase_columns + (kAtOnce == 4 ? 64 : 32);  // rows start 8 banks apart
  unsigned char* const x_shared = shared_memory();
  float* const scratch = reinterpret_cast<float*>(x_shared + p.rows * x_row_bytes);

  // A step's words and scales. A lane has rows 2g and 2g + 1.
  struct Step {
    Vector8 words[kStepChunks][kWords];
    uint32_t scales[kPasses];
  };
  struct Place {
    int64_t block;
    int step;
  };
  const auto go_on = [&](Place& at) {
    if (++at.step < plan.steps) return;
    at.step = 0;
    at.block += gridDim.x;
  };
  const auto load = [&](Step& s, const Place& at) {
    const int64_t step = int64_t(at.step) * plan.warps + warp;
    if (at.block >= blocks || step >= all_steps) return;
    const PackedBlock<Format> block(p.weight, p.scales, at.block, p.out_features, chunks);
    const int64_t first_group = step * kStepGroups + 2 * t / kTileRows;
    if (plan.weight_aligned && block.rows == kBlockRows && step < whole_steps) {
      const uint32_t* words = block.words + step * (kStepChunks * kWords * 64) + 16 * t + 2 * g;
#pragma unroll
      for (int c = 0; c < kStepChunks; ++c) {
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          s.words[c][w] = load_8_once(words + (c * kWords + w) * 64);
      }
      const char* scales = static_cast<const char*>(block.scales) +
                           (first_group * kBlockRows + 2 * g) * Format::kScaleBytes;
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        s.scales[i] = Format::load_scales(scales + i * kAtOnce * kBlockRows * Format::kScaleBytes);
      return;
    }
    // Behind the last row or chunk the last one is read again; its sums are not used, or times 0.
    const int rows[2] = {min(2 * g, block.rows - 1), min(2 * g + 1, block.rows - 1)};
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kStepChunks; ++c) {
        const int64_t chunk = min(step * kStepChunks + c, chunks - 1);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int64_t word = chunk * Format::kWordsOfRow + t + 4 * w;
          const uint32_t bits = load_4_once(block.words + word * block.rows + rows[r]);
          s.words[c][w].words[r] = bits;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int64_t group = min(first_group + i * kAtOnce, chunks * kGroups - 1) * block.rows;
      s.scales[i] = Format::join_scales(block.scales, group + rows[0], group + rows[1]);
    }
  };

  // Columns of x from the phase's first on, zeros behind the last.
  const auto copy_x = [&](int phase) {
    const int64_t first = int64_t(phase) * phase_columns;
    const int64_t left = all_steps * kStepColumns - first;
    const int vectors = int(left < phase_columns ? left : phase_columns) / 8;
    for (int i = threadIdx.x; i < int(p.rows) * vectors; i += blockDim.x) {
      const int row = i / vectors, column = i % vectors * 8;
      const T* from = static_cast<const T*>(p.x) + row * p.x_stride + first + column;
      const int64_t n = p.in_features - first - column;
      const Vector16 v = plan.x_aligned ? load_vector<true>(from, n) : load_vector<false>(from, n);
      Vector16 mixed;
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        mixed.words[j] = (v.words[j] & 0xffff) | v.words[j + 1] << 16;
        mixed.words[j + 1] = v.words[j] >> 16 | (v.words[j + 1] & 0xffff0000u);
      }
      store_16(x_shared + row * x_row_bytes + 2 * column, mixed);
    }
  };

  // Columns of a product stand for kAtOnce groups of kTileRows rows of x: column n for row
  // n % kTileRows in group n / kTileRows. x is zero there but in the column's own group, so the sums
  // of kAtOnce groups come out side by side, each to be scaled once.
  const unsigned char* const x_lane = x_shared + g / kTileRows * kGroupBytes + 8 * t;
  const unsigned char* x_of[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    x_of[i] = x_lane + min(g % kTileRows + 8 * i, int(p.rows) - 1) * x_row_bytes;
  uint32_t is_own[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) is_own[i] = g / kTileRows == i;

  float sums[kPasses][kTiles][4] = {};
  const auto multiply = [&](const Step& s, int x_offset) {
    float products[kTiles][4];
    Vector8 v[kTiles][kWords];
#pragma unroll
    for (int c = 0; c < kStepChunks; ++c) {
      uint32_t a[kGroups][kWords][4];
      Format::template operands<T, kBiasMma>(s.words[c], a);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int pass = (c * kGroups + i) / kAtOnce, own = (c * kGroups + i) % kAtOnce;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            if (own == 0) {
              if (w == 0) {
#pragma unroll
                for (int j = 0; j < 4; ++j) products[tile][j] = 0;
              }
              v[tile][w] = load_8(x_of[tile] + x_offset + pass * kAtOnce * kGroupBytes + 32 * w);
            }
            uint32_t b[2] = {v[tile][w].words[0], v[tile][w].words[1]};
            if (kAtOnce > 1) {  // a product, as bits are cheaper to multiply than to choose
              b[0] *= is_own[own];
              b[1] *= is_own[own];
            }
            if (kBiasMma) {
              const uint32_t bias[4] = {0xc308c308u, 0xc308c308u, 0xc308c308u, 0xc308c308u};
              mma_m16n8k16<T>(products[tile], bias, b[0], b[1]);
            }
            mma_m16n8k16<T>(products[tile], a[i][w], b[0], b[1]);
          }
          if (own == kAtOnce - 1) {
            float scale[2];
            Format::unpack_scales(s.scales[pass], scale);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[pass][tile][j] += products[tile][j] * scale[j / 2];
          }
        }
      }
    }
  };

  // scratch[2][warp][row of x][row of weight]: of two turns, so that one barrier a turn is enough.
  constexpr int kSums = kRows * kBlockRows;
  int turn = 0;
  const auto finish = [&](int64_t index) {
#pragma unroll
    for (int half = kPasses / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
#pragma unroll
        for (int j = 0; j < 4 * kTiles; ++j) sums[i][j / 4][j % 4] += sums[i + half][j / 4][j % 4];
      }
    }
#pragma unroll
    for (int half = kAtOnce / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sums[0][0][j] += shuffle_xor(sums[0][0][j], half * kTileRows / 2);
    }
    float* turn_sums = scratch + turn * plan.warps * kSums;
    turn ^= 1;
    if (2 * t < kTileRows) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int x_row = 8 * i + 2 * t + j % 2;
          turn_sums[warp * kSums + x_row * kBlockRows + 2 * g + j / 2] = sums[0][i][j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < 4 * kTiles; ++j) sums[i][j / 4][j % 4] = 0;
    }
    __syncthreads();
    const PackedBlock<Format> block(p.weight, p.scales, index, p.out_features, chunks);
    for (int i = threadIdx.x; i < int(p.rows) * kBlockRows; i += blockDim.x) {
      const int x_row = i / kBlockRows, column = i % kBlockRows;
      if (column >= block.rows) continue;
      float result = 0;
      for (int w = 0; w < plan.warps; ++w) result += turn_sums[w * kSums + i];
      result *= block.row_factor(column);
      if (p.softcap > 0) result = p.softcap * tanhf(result / p.softcap);
      const int64_t at = x_row * p.out_stride + index * kBlockRows + column;
      if (p.out_dtype == DType::kFloat32) {
        static_cast<float*>(p.out)[at] = result;
      } else {
        static_cast<T*>(p.out)[at] = from_float<T>(result);
      }
    }
  };

  Step steps[kDepth];
  Place at{blockIdx.x, 0}, ahead = at;
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    load(steps[i], ahead);
    go_on(ahead);
  }
  int phase = -1;
  while (true) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (at.block >= blocks) return;
      if (at.step / plan.phase_steps != phase) {
        phase = at.step / plan.phase_steps;
        __syncthreads();  // the part before has been used
        copy_x(phase);
        __syncthreads();
      }
      const int of_phase = (at.step - phase * plan.phase_steps) * plan.warps + warp;
      if (int64_t(at.step) * plan.warps + warp < all_steps) multiply(steps[i], of_phase * kStepBytes);
      load(steps[i], ahead);
      go_on(ahead);
      if (at.step + 1 == plan.steps) finish(at.block);
      go_on(at);
    }
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


inline int plan_warps(int64_t steps) {
  int best = 1;
  double least = 1e30;
  for (int w = 1; w <= 12 && w <= steps; ++w) {
    const double cost = double(divide_up(steps, w) * w) / double(steps);
    if (cost <= least) least = cost, best = w;
  }
  return best;
}
constexpr int kXBytes = 76 << 10;
template <class T>
Plan make_plan(const LinearParams& p, int warps) {
  Plan plan;
  const int64_t steps = divide_up(p.in_features, kStepColumns);
  plan.warps = warps ? warps : plan_warps(steps);
  plan.steps = int(divide_up(steps, plan.warps));
  plan.phase_steps = plan.steps;
  while (p.rows * (plan.phase_steps * plan.warps * 256 + 64) > kXBytes && plan.phase_steps > 1)
    plan.phase_steps = int(divide_up(plan.phase_steps, 2));
  plan.x_aligned = is_aligned(p.x, p.x_stride * sizeof(T));
  plan.weight_aligned = reinterpret_cast<uintptr_t>(p.weight) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(p.scales) % 4 == 0;
  return plan;
}
template <class T, class Format, int kRows, int kDepth, bool kBiasMma, int kMinBlocks>
void launch_rows(const char* op, const LinearParams& p, cudaStream_t stream, int warps = 0, int a_multiprocessor = 3) {
  const Plan plan = make_plan<T>(p, warps);
  const int64_t pad = kRows == 2 ? 64 : 32;
  const int64_t bytes = p.rows * (plan.phase_steps * plan.warps * 256 + pad) + 2 * plan.warps * kRows * kBlockRows * 4;
  const int64_t blocks = divide_up(p.out_features, kBlockRows);
  const int64_t most = int64_t(device_properties().multiprocessors) * a_multiprocessor;
  launch(op, linear_quantized_kernel<T, Format, kRows, kDepth, kBiasMma, kMinBlocks>, row_grid(blocks < most ? blocks : most), plan.warps * kWarpSize, bytes, stream, p, plan);
}
template <class T, class Format>
void launch_16_bit(const char* op, const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 2) return launch_rows<T, Format, 2, 2, false, 2>(op, p, stream);
  if (p.rows <= 4) return launch_rows<T, Format, 4, 2, false, 2>(op, p, stream);
  if (p.rows <= 8) return launch_rows<T, Format, 8, 2, false, 1>(op, p, stream);
  return launch_rows<T, Format, 16, 2, false, 1>(op, p, stream);
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
