// out = x weight^T for 1 to 16 rows over packed 8 or 4 bit weights, packed weights back to 16 bits
// for more rows, and single rows of them as an embedding.
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
// Memory bounds it: 8.5 or 4.5 bits a weight. What keeps it from there is the number of
// instructions a weight, so widening and scaling are shared as far as the rows of x allow.
//
// 1 to 4 rows, linear_few_rows_kernel: weights come through a ring of each warp in shared memory, x
// goes there once. Numbers become floats by an exponent put above their bits, two at a time. A
// tensor core's product has 8 columns: with 1 or 2 rows of x they stand for 4 groups of weights,
// with 3 or 4 for 2, so that one scaling serves as many. A few warps, a team, have 16 rows of
// weight: few, for each time that they add up their sums costs them as much as two steps. About 2.5
// instructions for 32 weights. Where so few blocks of weight are left that some multiprocessors
// would have twice the work of others, a cluster of blocks shares the columns of each.
//
// 5 to 16 rows, linear_rows_kernel: a block takes a block of weights, its warps every kWarps-th
// chunk of 32 columns. The word of 4 columns that a lane loads is, widened to 16 bits, its operand
// of a tensor core as it is (which sums k in any order): columns 4v, 4v + 1 stand for k = 2t, 2t +
// 1 and 4v + 2, 4v + 3 for 2t + 8, 2t + 9. A group's sum is scaled in float32. About 3 instructions
// a weight.
//
// linear_few_rows_kernel: at most 80 registers, 136 KiB of shared memory (99 on most devices).
// linear_rows_kernel: at most 128 registers, 8192 bytes of shared memory.
// dequantize_kernel: at most 48 registers, 0 bytes of shared memory.
// embedding_kernel: at most 48 registers, 0 bytes of shared memory.
#include "int8.cuh"
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlockRows = 16;
constexpr int kChunk = 32;  // columns

// ---- numbers two at a time
//
// Of the 4 columns of a word the tensor core gets (0, 2) in one register and (1, 3) in the next: so
// lie the bytes after one mask. x is put in that order where it is copied to shared memory.

// Columns 4v + (0, 2) and 4v + (1, 3) of the low and of the high half of an int4 word, plus
// kInt4Bias<T>. An exponent put above the number makes a float of it: BFloat16 128 + q, Half 1024 +
// q or 1024 + 16 q. BFloat16's bias stays and is taken off with sums of x: in float32 a sum has so
// many bits more that the loss is 2e-5 of it. Half's bias would cost 2e-4, and is taken off here.
template <class T>
constexpr float kInt4Bias = 0.0f;
template <>
constexpr float kInt4Bias<BFloat16> = 136.0f;

GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&low)[2], uint32_t (&high)[2], BFloat16) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    low[i] = and_or(word >> (8 * i), 0x000f000fu, 0x43004300u);
    high[i] = and_or(word >> (8 * i + 4), 0x000f000fu, 0x43004300u);
  }
}
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&low)[2], uint32_t (&high)[2], Half) {
  constexpr uint32_t kExponent = 0x64006400u, kOne = 0x3c003c00u, kSixteenth = 0x2c002c00u;
  constexpr uint32_t kLowBias = 0xe408e408u, kHighBias = 0xd480d480u;  // -1032, -72
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t part = word >> (8 * i);
    low[i] = multiply_add_2<Half>(and_or(part, 0x000f000fu, kExponent), kOne, kLowBias);
    high[i] = multiply_add_2<Half>(and_or(part, 0x00f000f0u, kExponent), kSixteenth, kHighBias);
  }
}

// ---- the formats

// A "word" is 4 bytes of data of one row.
struct Int8 {
  using Scale = uint16_t;           // of that size
  static constexpr int kWords = 2;  // of a row in a chunk that one lane has
  static constexpr int kWordsOfRow = 8;
  static constexpr int kGroups = 1;  // in a chunk
  static constexpr int kRowBytes = 0;
  static constexpr int kScaleBytes = sizeof(Scale);
  // Steps of linear_few_rows_kernel whose weights are on the way.
  template <int kRows>
  static constexpr int kRing = 3;
  // What a step of a warp keeps a multiprocessor from others, in 15 cycles, where memory bounds it.
  static constexpr int kStepCost = 8;
  template <class T>
  static constexpr float kBias = 0.0f;  // what its numbers have too much

  GEMMA2_DEVICE static float scale(const void* scales, int64_t at) {
    return to_float(static_cast<const BFloat16*>(scales)[at]);
  }
  // Scales of two rows.
  GEMMA2_DEVICE static uint32_t load_scales(const void* p) { return load_4(p); }
  GEMMA2_DEVICE static void unpack_scales(uint32_t bits, float (&scale)[2]) {
    scale[0] = bits_to_float(bits << 16);
    scale[1] = bits_to_float(bits & 0xffff0000u);
  }
  // The operands [group][word] that a chunk's words of two rows make.
  template <class T>
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
  using Scale = uint8_t;
  static constexpr int kWords = 1;
  static constexpr int kWordsOfRow = 4;
  static constexpr int kGroups = 2;
  static constexpr int kRowBytes = 2;  // of scales, before the groups'
  static constexpr int kScaleBytes = sizeof(Scale);
  template <int kRows>
  static constexpr int kRing = kRows == 2 ? 6 : 5;
  static constexpr int kStepCost = 4;
  template <class T>
  static constexpr float kBias = kInt4Bias<T>;

  GEMMA2_DEVICE static float scale(const void* scales, int64_t at) {
    const float s = static_cast<const int8_t*>(scales)[at];
    return s * fabsf(s);
  }
  GEMMA2_DEVICE static uint32_t load_scales(const void* p) {
    return *static_cast<const uint16_t*>(p);
  }
  GEMMA2_DEVICE static void unpack_scales(uint32_t bits, float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float s = int8_t(bits >> (8 * i));
      scale[i] = s * fabsf(s);
    }
  }
  template <class T>
  GEMMA2_DEVICE static void operands(const Vector8 (&words)[1], uint32_t (&a)[2][1][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t low[2], high[2];
      widen(words[0].words[r], low, high, T{});
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

// Stores a finished result of row `x_row` of x with row `row` of weight.
template <class T>
GEMMA2_DEVICE void store_result(const LinearParams& p, int64_t x_row, int64_t row, float result) {
  if (p.softcap > 0) result = p.softcap * tanhf(result / p.softcap);
  const int64_t at = x_row * p.out_stride + row;
  if (p.out_dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[at] = result;
  } else {
    static_cast<T*>(p.out)[at] = from_float<T>(result);
  }
}

// ---- 5 to 16 rows

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
    linear_rows_kernel(const LinearParams p, bool aligned) {
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
      store_result<T>(p, x_row, index * kBlockRows + column, result * block.row_factor(column));
    }
    __syncthreads();  // scratch is written again for the next block
  }
}

// ---- 1 to 4 rows

constexpr int kMostWarps = 12;            // of a block
constexpr int kMultiprocessorWarps = 24;  // by registers
constexpr int kStepChunks = 4;            // that a warp takes at once
constexpr int kStepColumns = kStepChunks * kChunk;
constexpr int kStepRowBytes = kStepColumns * 2 + 32;  // of x; rows start in other banks
constexpr int64_t kMostXBytes = 48 << 10;             // of x in shared memory at once
constexpr int kFewRowsRegisters = 80;                 // of a thread of linear_few_rows_kernel
constexpr int kMostParts = 8;                         // blocks of a cluster

// A step's words [chunk][word][16 rows], then its scales [group][16 rows]: what a warp's ring has
// kRing times.
template <class Format>
struct PackedStep {
  static constexpr int kGroups = kStepChunks * Format::kGroups;
  static constexpr int kWords = kStepChunks * Format::kWordsOfRow;
  static constexpr int kWordBytes = kWords * kBlockRows * 4;
  static constexpr int kScaleBytes = kGroups * kBlockRows * Format::kScaleBytes;
  static constexpr int kBytes = kWordBytes + kScaleBytes;
};

// How a launch divides its work. A team of warps has 16 rows of weight, or part of their columns, a
// step in turn each; a block has several teams. The sums' order hangs on parts and team, so those
// come from the weights' shape and the device alone.
struct Plan {
  int parts;         // of the columns, each of a block of a cluster; with several there is one turn
  int warps;         // of a team
  int teams;         // of a block
  int steps;         // of a warp, for 16 rows of weight
  int turns;         // of a team
  int phase_steps;   // of a warp, whose part of x is in shared memory at once
  int x_step_bytes;  // of a step's part of x, with its sums
  // What a warp's next step is further.
  int x_advance, word_advance, scale_advance;
  bool x_aligned;  // to 16 bytes
  bool weight_aligned;
};

// Behind a step's rows of x: the sums of its groups [group][kRows], where the format's numbers have
// a bias.
template <class T, class Format, int kRows>
constexpr int kStepSumBytes =
    Format::template kBias<T> != 0 ? PackedStep<Format>::kGroups * kRows * 4 : 0;

// 8 elements of x, zeros behind the first n. In little code: it stands in several places.
template <class T>
GEMMA2_DEVICE Vector16 load_8_elements(const T* p, int n) {
  uint64_t halves[2] = {};
#pragma unroll 1
  for (int i = 0; i < 8 && i < n; ++i) {
    const uint64_t bits = uint64_t(p[i].bits) << (16 * (i % 4));
    halves[0] |= i < 4 ? bits : 0;
    halves[1] |= i < 4 ? 0 : bits;
  }
  return {{uint32_t(halves[0]), uint32_t(halves[0] >> 32), uint32_t(halves[1]),
           uint32_t(halves[1] >> 32)}};
}

// kRows: the most rows of x, 2 or 4.
template <class T, class Format, int kRows>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 2)
    linear_few_rows_kernel(const LinearParams p, const Plan plan) {
  using Packed = PackedStep<Format>;
  constexpr int kWords = Format::kWords, kGroups = Format::kGroups;
  constexpr int kAtOnce = 8 / kRows;  // groups in the columns of one product
  constexpr int kPasses = Packed::kGroups / kAtOnce;
  constexpr int kGroupColumns = kChunk / kGroups, kGroupBytes = kGroupColumns * 2;  // of x
  constexpr int kRing = Format::template kRing<kRows>, kRingBytes = kRing * Packed::kBytes;
  constexpr float kBias = Format::template kBias<T>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4, rows = int(p.rows);
  // By a shuffle the compiler knows them as the same in all lanes.
  const int warp_of_block = shuffle(int(threadIdx.x) / kWarpSize, 0);
  const int team = warp_of_block / plan.warps, warp = warp_of_block % plan.warps;  // of the team
  const int chunks = int((p.in_features + kChunk - 1) / kChunk);
  const int all_steps = (chunks + kStepChunks - 1) / kStepChunks;
  const int blocks = int((p.out_features + kBlockRows - 1) / kBlockRows);
  const int part = int(blockIdx.x) % plan.parts, first_step = part * plan.steps * plan.warps;
  // A team's next rows are as many blocks further as there are teams, one for all parts.
  const int clusters = int(gridDim.x) / plan.parts;
  const int first_block = team * clusters + int(blockIdx.x) / plan.parts;
  // Each warp's ring, of which no other reads; x; the warps' sums.
  const int all_warps = plan.teams * plan.warps;
  unsigned char* const ring = shared_memory() + warp_of_block * kRingBytes;
  unsigned char* const x_shared = shared_memory() + all_warps * kRingBytes;
  float* const scratch =
      reinterpret_cast<float*>(x_shared + plan.phase_steps * plan.warps * plan.x_step_bytes);

  const auto packed_block = [&](int block) {
    return PackedBlock<Format>(p.weight, p.scales, block, p.out_features, chunks);
  };
  // The copies go through steps and blocks as the sums do, kRing steps in front of them.
  const int end_step = first_step + plan.steps * plan.warps;
  int copied_block = first_block, copied_step = 0, whole_steps = 0;
  const char *words, *scales;  // of this lane, in the step copied next
  const auto begin_block = [&] {
    copied_step = first_step + warp, whole_steps = 0;
    if (copied_block >= blocks) return;
    const PackedBlock<Format> block = packed_block(copied_block);
    if (plan.weight_aligned && block.rows == kBlockRows) whole_steps = chunks / kStepChunks;
    words = reinterpret_cast<const char*>(block.words) + copied_step * Packed::kWordBytes;
    scales = static_cast<const char*>(block.scales) + copied_step * Packed::kScaleBytes;
    words += 16 * lane, scales += 16 * lane;
  };
  // Behind the last row or chunk the last one is read again; its sums are not used, or times 0. A
  // lane has row lane % 16 of every second word and group.
  const auto copy_partial_step = [&](unsigned char* stage) {
    using Scale = typename Format::Scale;
    const PackedBlock<Format> block = packed_block(copied_block);
    const int row = min(lane % kBlockRows, block.rows - 1);
    auto* to = reinterpret_cast<uint32_t*>(stage) + lane % kBlockRows;
    auto* scales_to = reinterpret_cast<Scale*>(stage + Packed::kWordBytes) + lane % kBlockRows;
#pragma unroll 1
    for (int i = lane / kBlockRows; i < Packed::kWords; i += kWarpSize / kBlockRows) {
      const int chunk = min(copied_step * kStepChunks + i / Format::kWordsOfRow, chunks - 1);
      const int64_t word = int64_t(chunk) * Format::kWordsOfRow + i % Format::kWordsOfRow;
      to[i * kBlockRows] = load_4_once(block.words + word * block.rows + row);
    }
#pragma unroll 1
    for (int i = lane / kBlockRows; i < Packed::kGroups; i += kWarpSize / kBlockRows) {
      const int64_t group = min(copied_step * Packed::kGroups + i, chunks * kGroups - 1);
      scales_to[i * kBlockRows] = static_cast<const Scale*>(block.scales)[group * block.rows + row];
    }
  };
  const auto start_copy = [&](unsigned char* to) {  // this lane's place of a stage
    if (copied_step < whole_steps) {
#pragma unroll
      for (int i = 0; i < Packed::kWordBytes; i += 16 * kWarpSize)
        cp_async<16>(to + i, words + i, true);
      if (16 * lane < Packed::kScaleBytes) cp_async<16>(to + Packed::kWordBytes, scales, true);
      words += plan.word_advance, scales += plan.scale_advance;
    } else if (copied_step < all_steps && copied_block < blocks) {
      copy_partial_step(to - 16 * lane);
    }
    cp_async_commit();  // of nothing at the end, so that the waits count alike
    copied_step += plan.warps;
    if (copied_step < end_step) return;
    copied_block += clusters * plan.teams;
    begin_block();
  };

  // Columns of x from the phase's first on, zeros behind the last; some vectors of a thread on the
  // way at once.
  const auto copy_x = [&](int phase) {
    constexpr int kVectors = 3;
    const int columns = plan.phase_steps * plan.warps * kStepColumns;
    const int first = first_step * kStepColumns + phase * columns;
    const int left = int(p.in_features) - first;
    const int vectors = min(all_steps * kStepColumns - first, columns) / 8;
    const int end = rows * vectors, stride = blockDim.x;
    // The row that vector i is of; i becomes its place there.
    const auto row_of = [&](int& i) {
      int row = 0;
#pragma unroll
      for (int r = 1; r < kRows; ++r) {
        if (i >= vectors) i -= vectors, ++row;
      }
      return row;
    };
    // All lanes of a warp go on together: they add up each other's sums.
    for (int begin = threadIdx.x - lane; begin < end; begin += kVectors * stride) {
      Vector16 x[kVectors];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (begin + k * stride >= end) break;
        int i = min(begin + k * stride + lane, end - 1);
        const T* row = static_cast<const T*>(p.x) + row_of(i) * p.x_stride + first;
        const bool whole = plan.x_aligned && 8 * i + 8 <= left;
        x[k] = whole ? load_16(row + 8 * i) : load_8_elements(row + 8 * i, left - 8 * i);
      }
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (begin + k * stride >= end) break;
        const Vector16& v = x[k];
        Vector16 mixed;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          mixed.words[j] = (v.words[j] & 0xffff) | v.words[j + 1] << 16;
          mixed.words[j + 1] = v.words[j] >> 16 | (v.words[j + 1] & 0xffff0000u);
        }
        float sum = 0;
        if constexpr (kBias != 0) {
          static_assert(kGroupColumns == 16, "two lanes have a group");
          float values[8];
          unpack(v, values, T{});
#pragma unroll
          for (int j = 0; j < 8; ++j) sum += values[j];
          sum += shuffle_xor(sum, 1);
        }
        int i = begin + k * stride + lane;
        if (i >= end) continue;
        const int row = row_of(i), column = 8 * i % kStepColumns;
        unsigned char* const step = x_shared + 8 * i / kStepColumns * plan.x_step_bytes;
        store_16(step + row * kStepRowBytes + 2 * column, mixed);
        if (kBias != 0 && lane % 2 == 0) {
          reinterpret_cast<float*>(
              step + rows * kStepRowBytes)[column / kGroupColumns * kRows + row] = -kBias * sum;
        }
      }
    }
  };

  // Column n of a product stands for row n % kRows of x in group n / kRows of kAtOnce. x is zero
  // there but in the column's own group, so the sums of kAtOnce groups come out side by side, each
  // to be scaled once. Where this lane's part of the next step is:
  const unsigned char* x_at;
  const unsigned char* x_sums_at;  // columns 2t and 2t + 1
  const auto begin_phase = [&] {
    x_at = x_shared + warp * plan.x_step_bytes + min(g % kRows, rows - 1) * kStepRowBytes +
           g / kRows * kGroupBytes + 8 * t;
    x_sums_at = x_shared + warp * plan.x_step_bytes + rows * kStepRowBytes + 8 * t;
  };
  // Zero for ever but in the group that is the lane's own.
  Vector8 x_part[kAtOnce][kWords] = {};

  // A lane has rows 2g and 2g + 1 of the weights.
  float sums[kPasses][4] = {};
  const unsigned char* words_at = ring + 4 * (kBlockRows * t + 2 * g);
  const unsigned char* scales_at =
      ring + Packed::kWordBytes + (2 * t / kRows * kBlockRows + 2 * g) * Format::kScaleBytes;
  const auto multiply = [&] {
    Vector8 step[kStepChunks][kWords];
    uint32_t step_scales[kPasses];
#pragma unroll
    for (int c = 0; c < kStepChunks; ++c) {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        step[c][w] = load_8(words_at + (c * kWords + w) * 4 * 4 * kBlockRows);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      step_scales[i] =
          Format::load_scales(scales_at + i * kAtOnce * kBlockRows * Format::kScaleBytes);
    }
    float products[4];
#pragma unroll
    for (int c = 0; c < kStepChunks; ++c) {
      uint32_t a[kGroups][kWords][4];
      Format::template operands<T>(step[c], a);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int pass = (c * kGroups + i) / kAtOnce, own = (c * kGroups + i) % kAtOnce;
        if (own == 0) {
          Vector8 begin{};
          if constexpr (kBias != 0) begin = load_8(x_sums_at + 32 * pass);
#pragma unroll
          for (int j = 0; j < 2; ++j) products[j] = products[j + 2] = bits_to_float(begin.words[j]);
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          if (g / kRows == own)
            x_part[own][w] = load_8(x_at + pass * kAtOnce * kGroupBytes + 32 * w);
          mma_m16n8k16<T>(products, a[i][w], x_part[own][w].words[0], x_part[own][w].words[1]);
        }
        if (own < kAtOnce - 1) continue;
        float scale[2];
        Format::unpack_scales(step_scales[pass], scale);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[pass][j] += products[j] * scale[j / 2];
      }
    }
  };

  // scratch[2][warp][row of x][row of weight]: of two turns, so that one barrier a turn is enough.
  // A thread's results are all of one row of weight, whose factor is on its way in time.
  constexpr int kSums = kRows * kBlockRows;
  const int team_thread = warp * kWarpSize + lane;
  float* const part_sums = scratch + (all_warps + team * plan.warps) * kSums;  // of no second turn
  const auto load_row_factor = [&](int index) {
    if (index >= blocks || team_thread >= rows * kBlockRows) return 1.0f;
    const PackedBlock<Format> block = packed_block(index);
    return block.row_factor(min(team_thread % kBlockRows, block.rows - 1));
  };
  const auto finish = [&](int index, int turn, float row_factor) {
#pragma unroll
    for (int half = kPasses / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += sums[i + half][j];
      }
    }
#pragma unroll
    for (int half = kAtOnce / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[0][j] += shuffle_xor(sums[0][j], half * kRows / 2);
    }
    float* const team_sums = scratch + (turn % 2 * all_warps + team * plan.warps) * kSums;
    if (2 * t < kRows) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        team_sums[warp * kSums + (2 * t + j % 2) * kBlockRows + 2 * g + j / 2] = sums[0][j];
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
    }
    __syncthreads();  // of all teams, those without rows too: their turns are the same
    const int row = index * kBlockRows + team_thread % kBlockRows;
    if (row >= p.out_features) return;
    for (int i = team_thread; i < rows * kBlockRows; i += plan.warps * kWarpSize) {
      float sum = 0;
      for (int w = 0; w < plan.warps; ++w) sum += team_sums[w * kSums + i];
      if (plan.parts == 1) {
        store_result<T>(p, i / kBlockRows, row, sum * row_factor);
      } else {
        part_sums[i] = sum;
      }
    }
  };
  // By the block of the first part: the others' sums, in order.
  const auto finish_parts = [&](int index, float row_factor) {
    const int row = index * kBlockRows + team_thread % kBlockRows;
    if (part != 0 || index >= blocks || row >= p.out_features) return;
    for (int i = team_thread; i < rows * kBlockRows; i += plan.warps * kWarpSize) {
      float of_part[kMostParts][1] = {};
#pragma unroll
      for (int k = 0; k < kMostParts; ++k) {
        if (k < plan.parts) load_of_block(of_part[k], part_sums + i, k);
      }
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kMostParts; ++k) sum += of_part[k][0];
      store_result<T>(p, i / kBlockRows, row, sum * row_factor);
    }
  };

  allow_next_kernel();
  begin_block();
#pragma unroll 1
  for (int i = 0; i < kRingBytes; i += Packed::kBytes) start_copy(ring + 16 * lane + i);
  float row_factor = load_row_factor(first_block);
  wait_for_previous_kernels();
  unsigned char* copy_at = ring + 16 * lane;
  int stage = 0, block = first_block;
  for (int turn = 0; turn < plan.turns; ++turn) {
    int number = first_step + warp;  // of the step
#pragma unroll 1
    for (int first = 0; first < plan.steps; first += plan.phase_steps) {
      // x stays where one phase has it all.
      if (turn == 0 || plan.phase_steps < plan.steps) {
        __syncthreads();  // the part before has been used
        copy_x(first / plan.phase_steps);
        __syncthreads();
      }
      if (block >= blocks) continue;
      begin_phase();
#pragma unroll 1
      for (int left = min(plan.phase_steps, plan.steps - first); left > 0; --left) {
        cp_async_wait<kRing - 1>();
        __syncwarp();
        if (number < all_steps) multiply();
        x_at += plan.x_advance, x_sums_at += plan.x_advance;
        number += plan.warps;
        start_copy(copy_at);  // all lanes have read the stage: they met in the products
        // These go along, for the compiler would count them out of the lane every time.
        stage = stage == kRing - 1 ? 0 : stage + 1;
        const int further = stage == 0 ? Packed::kBytes - kRingBytes : Packed::kBytes;
        words_at += further, scales_at += further, copy_at += further;
      }
    }
    finish(block, turn, row_factor);
    if (plan.turns == 1) break;
    block += clusters * plan.teams;
    row_factor = load_row_factor(block);
  }
  if (plan.parts == 1) return;
  cluster_barrier();
  finish_parts(first_block, row_factor);
  cluster_barrier_after_reads();
}

// f(s, numbers) for columns 16 s + 4 t to 16 s + 4 t + 3 of a chunk, of one row of a block;
// `factor` goes into all.
template <class Format, class F>
GEMMA2_DEVICE void for_numbers(const PackedBlock<Format>& block, int row, int64_t chunk, int t,
                               float factor, const F& f) {
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
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] *= scale;
    f(s, q);
  }
}

// A warp unpacks a chunk of all rows, a lane columns 8 h and 16 + 8 h on of one: a store of the
// warp fills 32 bytes of each row.
template <class T, class Format, bool kAligned>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  constexpr int kSize = kVectorSize<T>;
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  const int64_t index = blockIdx.x;
  const PackedBlock<Format> block(p.data, p.scales, index, p.out_features, chunks);
  const int row = threadIdx.x % kBlockRows, h = threadIdx.x % kWarpSize / kBlockRows;
  if (row >= block.rows) return;
  T* out = static_cast<T*>(p.out) + (index * kBlockRows + row) * p.in_features;
  const float factor = block.row_factor(row);
  for (int64_t chunk = blockIdx.y * kWarps + threadIdx.x / kWarpSize; chunk < chunks;
       chunk += gridDim.y * kWarps) {
    float numbers[2][8];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      for_numbers(block, row, chunk, 2 * h + t, factor, [&](int s, const float (&q)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) numbers[s][4 * t + i] = q[i];
      });
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int part = 0; part < 8; part += kSize) {
        const int64_t column = chunk * kChunk + 16 * s + 8 * h + part;
        float x[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] = numbers[s][part + i];
        store_vector<kAligned>(out + column, p.in_features - column, pack_vector(x, T{}));
      }
    }
  }
}

// A block a row, rounded to T, then times p.scale.
template <class T, class Format>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const EmbeddingParams p) {
  allow_next_kernel();
  wait_for_previous_kernels();
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  for (int64_t index = blockIdx.x; index < p.count; index += gridDim.x) {
    const int64_t id = p.ids[index];
    T* out = static_cast<T*>(p.out) + index * p.in_features;
    if (id < 0 || id >= p.out_features) {
      for (int64_t i = threadIdx.x; i < p.in_features; i += kThreads) out[i] = from_float<T>(NAN);
      continue;
    }
    const PackedBlock<Format> block(p.data, p.scales, id / kBlockRows, p.out_features, chunks);
    const int row = int(id % kBlockRows);
    const float factor = block.row_factor(row);
    for (int64_t i = threadIdx.x; i < 4 * chunks; i += kThreads) {
      for_numbers(block, row, i / 4, int(i % 4), factor, [&](int s, const float (&q)[4]) {
        const int64_t column = i / 4 * kChunk + 16 * s + i % 4 * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (column + j >= p.in_features) continue;
          out[column + j] = from_float<T>(to_float(from_float<T>(q[j])) * p.scale);
        }
      });
    }
  }
}

// What all steps take together is the same however they are divided. Beside that a turn has the
// time from its first copy to its last sum, and each part of x is waited for, and a cluster, in 150
// cycles about:
constexpr int64_t turn_cost(int64_t steps) { return 3 * steps + 4; }
constexpr int64_t kPhaseCost = 7, kClusterCost = 15;
constexpr int64_t kMultiprocessors = 128;  // about, of any device

// Warps of a team that has all columns.
int team_warps(int64_t blocks, int64_t steps) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int warps = 1; warps <= kMostWarps && warps <= steps; ++warps) {
    const int64_t of_warp = divide_up(steps, warps);
    const int64_t turns = divide_up(blocks, kMultiprocessors * (kMultiprocessorWarps / warps));
    if (turns * turn_cost(of_warp) >= least) continue;
    least = turns * turn_cost(of_warp), best = warps;
  }
  return best;
}

// Of a warp, and of a step of x, with any number of rows.
template <class Format, int kRows>
constexpr int kFewRowsWarpBytes = Format::template kRing<kRows> * PackedStep<Format>::kBytes +
                                  2 * kRows * kBlockRows * int(sizeof(float));
template <class Format>
constexpr int kMostWarpBytes =
    kFewRowsWarpBytes<Format, 2> > kFewRowsWarpBytes<Format, 4> ? kFewRowsWarpBytes<Format, 2>
                                                                : kFewRowsWarpBytes<Format, 4>;

// Parts, warps and steps: parts where a few blocks of weight leave some multiprocessors with twice
// the work of others. By the weights' shape and the device, so that a row's sums do not hang on the
// rows beside it.
template <class T, class Format>
void divide(Plan& plan, int64_t blocks, int64_t steps, const DeviceProperties& device) {
  plan.parts = 1, plan.warps = team_warps(blocks, steps);
  plan.steps = int(divide_up(steps, plan.warps));
  if (!device.clusters) return;
  const auto cost = [&](int64_t parts, int64_t steps_of_part, int64_t steps_of_warp) {
    const int64_t blocks_of_one = divide_up(blocks * parts, device.multiprocessors);
    return blocks_of_one * steps_of_part * Format::kStepCost / 10 + turn_cost(steps_of_warp);
  };
  // With more blocks a turn would not be the only one, and work is even.
  if (blocks > 2 * device.multiprocessors) return;
  int64_t least = cost(1, steps, plan.steps);
  for (int parts = 2; parts <= kMostParts; parts *= 2) {
    for (int warps = 1; warps <= kMostWarps; ++warps) {
      const int64_t of_warp = divide_up(steps, parts * warps), of_part = of_warp * warps;
      const int64_t x_bytes = of_part * (4 * kStepRowBytes + kStepSumBytes<T, Format, 4>);
      const int64_t bytes = warps * int64_t(kMostWarpBytes<Format>) + x_bytes;
      const int64_t blocks_of_one = divide_up(blocks * parts, device.multiprocessors);
      const bool fits =
          x_bytes <= kMostXBytes && bytes <= device.shared_bytes &&
          blocks_of_one <= resident_blocks(bytes, warps * kWarpSize, kFewRowsRegisters, device) &&
          blocks * parts <= device.max_blocks;
      const bool all_busy = (parts - 1) * of_part < steps;
      const int64_t this_cost = cost(parts, of_part, of_warp) + kClusterCost;
      if (!fits || !all_busy || this_cost >= least) continue;
      least = this_cost;
      plan.parts = parts, plan.warps = warps, plan.steps = int(of_warp);
    }
  }
}

template <class T, class Format, int kRows>
void launch_few_rows(const char* op, const LinearParams& p, cudaStream_t stream) {
  using Packed = PackedStep<Format>;
  constexpr int kWarpBytes = kFewRowsWarpBytes<Format, kRows>;
  constexpr int kLeastXBytes = kRows * kStepRowBytes + kStepSumBytes<T, Format, kRows>;
  static_assert(kMostWarps * (kWarpBytes + kLeastXBytes) <= 99 << 10, "");
  const int64_t blocks = divide_up(p.out_features, kBlockRows);
  const int64_t steps = divide_up(p.in_features, kStepColumns);
  const DeviceProperties& device = device_properties();
  Plan plan{};
  divide<T, Format>(plan, blocks, steps, device);
  plan.x_step_bytes = int(p.rows) * kStepRowBytes + kStepSumBytes<T, Format, kRows>;
  plan.x_advance = plan.warps * plan.x_step_bytes;
  plan.word_advance = plan.warps * Packed::kWordBytes;
  plan.scale_advance = plan.warps * Packed::kScaleBytes;
  plan.x_aligned = is_aligned(p.x, p.x_stride * sizeof(T));
  plan.weight_aligned = is_aligned(p.weight, 0) && is_aligned(p.scales, 0);
  const auto kernel = linear_few_rows_kernel<T, Format, kRows>;
  if (plan.parts > 1) {
    plan.teams = plan.turns = 1, plan.phase_steps = plan.steps;
    const int64_t bytes = plan.warps * int64_t(kWarpBytes) + plan.steps * int64_t(plan.x_advance);
    return launch_clusters(op, kernel, plan.parts, dim3(unsigned(blocks * plan.parts)),
                           plan.warps * kWarpSize, bytes, stream, p, plan);
  }
  // Teams of a block, the more the better where they cost the same, for they share x; and parts of
  // x, which stays where there is one.
  int64_t bytes = 0, most = 0, least = INT64_MAX;
  for (int teams = kMostWarps / plan.warps; teams > 0; --teams) {
    const int warps = teams * plan.warps;
    for (int phase_steps = plan.steps;; phase_steps = int(divide_up(phase_steps, 2))) {
      const int64_t x_bytes = phase_steps * int64_t(plan.x_advance);
      const int64_t all_bytes = warps * int64_t(kWarpBytes) + x_bytes;
      const bool fits = x_bytes <= kMostXBytes && all_bytes <= device.shared_bytes;
      const bool last = phase_steps == 1;
      if (fits || (last && teams == 1)) {
        const int64_t blocks_at_once =
            device.multiprocessors *
            resident_blocks(all_bytes, warps * kWarpSize, kFewRowsRegisters, device);
        const int64_t turns = divide_up(blocks, blocks_at_once * teams);
        const int64_t phases = divide_up(plan.steps, phase_steps);
        const int64_t cost =
            turns * turn_cost(plan.steps) + (phases > 1 ? turns * phases : 1) * kPhaseCost;
        if (cost < least) {
          least = cost, bytes = all_bytes, most = blocks_at_once;
          plan.teams = teams, plan.phase_steps = phase_steps;
        }
      }
      if (last) break;
    }
  }
  const dim3 grid = row_grid(blocks < most ? blocks : most);
  plan.turns = int(divide_up(blocks, int64_t(grid.x) * plan.teams));
  launch_early(op, kernel, grid, plan.teams * plan.warps * kWarpSize, bytes, stream, p, plan);
}

template <class T, class Format>
void launch_16_bit(const char* op, const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 2) return launch_few_rows<T, Format, 2>(op, p, stream);
  if (p.rows <= 4) return launch_few_rows<T, Format, 4>(op, p, stream);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 8 == 0 && p.x_stride * sizeof(T) % 8 == 0;
  const bool few = p.rows <= 8;
  const auto kernel = few ? linear_rows_kernel<T, Format, 1> : linear_rows_kernel<T, Format, 2>;
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
  grid.y = unsigned(divide_up(divide_up(p.in_features, kChunk), 8 * kWarps));
  dispatch_dtype(op, p.dtype, [&](auto t) {
    using T = decltype(t);
    if (is_aligned(p.out, p.in_features * int64_t(sizeof(T)))) {
      launch(op, dequantize_kernel<T, Format, true>, grid, kThreads, 0, stream, p);
    } else {
      launch(op, dequantize_kernel<T, Format, false>, grid, kThreads, 0, stream, p);
    }
  });
}

template <class Format>
void launch_embedding(const char* op, const EmbeddingParams& p, cudaStream_t stream) {
  if (p.count == 0 || p.in_features == 0) return;
  dispatch_dtype(op, p.dtype, [&](auto t) {
    launch_early(op, embedding_kernel<decltype(t), Format>, row_grid(p.count), kThreads, 0, stream,
                 p);
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
void launch_embedding_int8(const EmbeddingParams& p, cudaStream_t stream) {
  cuda::launch_embedding<cuda::Int8>("embedding_int8", p, stream);
}
void launch_embedding_int4(const EmbeddingParams& p, cudaStream_t stream) {
  cuda::launch_embedding<cuda::Int4>("embedding_int4", p, stream);
}

}  // namespace gemma2
