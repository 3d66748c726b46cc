// Products and attention of every instruction set that this processor has, beside the scalar ones,
// without Python or torch: for a processor that is emulated (scripts/neon_check.sh). Says what
// differs; the exit status is how many.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/quantized.h"

using namespace gemma2;

namespace {

using Bits = std::vector<uint16_t>;  // bfloat16

int differing = 0;

uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33);
}
float random_float() { return float(random_bits() & 0xffff) / 32768.0f - 1.0f; }
uint16_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
Bits random_values(int64_t n) {
  Bits values(n);
  for (uint16_t& x : values) x = to_bits(random_float());
  return values;
}
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Memory of NaN.
template <class T>
struct Room {
  std::vector<float> floats;
  T* data;

  explicit Room(int64_t n) : floats((n * sizeof(T) + 67) / 4 + 16, NAN) {
    data = (T*)((uintptr_t(floats.data()) + 63) / 64 * 64);
  }
};

// run() returns an op's result; of every instruction set it may be off by `part` of the largest of
// the scalar one's: where it is bfloat16, by the next number to it (linear: 2^-7), of attention
// also by weights rounded to bfloat16, some of them up; of float32, by the order of up to 601
// additions, each off by 2^-24 of a sum in some direction.
template <class F>
void compare(const std::string& what, double part, const F& run) {
  set_cpu_isa("scalar");
  const std::vector<float> right = run();
  double largest = 0;
  for (const float x : right) largest = std::fmax(largest, std::fabs(x));
  for (const std::string& isa : supported_cpu_isas()) {
    set_cpu_isa(isa);
    const std::vector<float> result = run();
    double worst = 0;
    for (size_t i = 0; i < right.size(); ++i) {
      const double difference = std::fabs(double(result[i]) - right[i]);
      worst = std::isnan(difference) ? INFINITY : std::fmax(worst, difference);
    }
    if (worst <= part * largest) continue;
    printf("%s, %s: %g beside %g\n", what.c_str(), isa.c_str(), worst, largest);
    ++differing;
  }
}

std::vector<float> widened(const Bits& bits) {
  std::vector<float> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = to_float(bits[i]);
  return values;
}

void linear(int64_t rows, int64_t depth, int64_t columns) {
  const Bits x = random_values(rows * depth), weight = random_values(columns * depth);
  compare("linear " + std::to_string(rows) + " x " + std::to_string(depth), 1.0 / 128, [&] {
    Bits out(rows * columns);
    LinearParams p{};
    p.x = x.data(), p.x_stride = depth;
    p.weight = weight.data(), p.weight_stride = depth;
    p.out = out.data(), p.out_stride = columns;
    p.rows = rows, p.in_features = depth, p.out_features = columns;
    p.dtype = p.out_dtype = DType::kBFloat16;
    p.range_columns = up(columns, 32), p.range_units = (columns + 95) / 96;
    p.unit_columns = up((p.range_columns + p.range_units - 1) / p.range_units, 32);
    Room<float> packed(up(rows, 32) * up(depth, 64)), scratch(kLinearScratch);
    p.packed_x = packed.data, p.scratch = scratch.data;
    const CpuKernels& kernels = cpu_kernels();
    if (rows <= kLinearFewRows) {
      kernels.linear_pack_rows(p, 0, 1);
      kernels.linear_few_rows(p, 0, (columns + kLinearFewColumns - 1) / kLinearFewColumns);
    } else {
      kernels.linear_pack_panels(p, 0, rows);
      kernels.linear_many_rows(p, 0, p.range_units);
    }
    return widened(out);
  });
}

void gemm(int64_t rows, int64_t depth, int64_t columns) {
  const Bits a = random_values(rows * depth), b = random_values(columns * depth);
  compare("gemm " + std::to_string(rows) + " x " + std::to_string(depth), 1e-5, [&] {
    std::vector<float> out(rows * columns, 1.0f);
    GemmParams p{};
    p.a = a.data(), p.a_row = depth, p.a_k = 1;
    p.b = b.data(), p.b_row = depth, p.b_k = 1;
    p.out = out.data(), p.out_stride = columns;
    p.rows = rows, p.columns = columns, p.depth = depth, p.unit_rows = 96;
    p.a_dtype = p.b_dtype = p.product = DType::kBFloat16, p.out_dtype = DType::kFloat32;
    p.add = true;
    Room<float> packed(up(columns, 32) * up(depth, 32)), scratch(gemm_scratch(columns));
    p.packed_b = packed.data, p.scratch = scratch.data;
    cpu_kernels().gemm_pack_panels(p, 0, columns);
    cpu_kernels().gemm_rows(p, 0, (rows + 95) / 96);
    return out;
  });
}

// The same to the bit where the scalar level has a fused multiply-add, as an Arm processor's has.
void packed(bool int8, int64_t rows, int64_t depth, int64_t columns) {
  const int64_t pieces = (depth + kQuantDepth - 1) / kQuantDepth;
  const Bits x = random_values(rows * depth);
  std::vector<int8_t> data(columns * pieces * (int8 ? kInt8RowBytes : kInt4RowBytes));
  for (int8_t& q : data) q = int8_t(int8 ? int(random_bits() % 255) - 127 : int(random_bits()));
  std::vector<char> scales(columns * (pieces * 2 + 2));
  char* at = scales.data();
  for (int64_t b = 0; b < columns; b += kQuantRows) {
    const int64_t of_block = columns - b < kQuantRows ? columns - b : kQuantRows;
    for (int64_t i = 0; i < of_block * (int8 ? pieces : 1); ++i, at += 2) {
      const uint16_t factor = to_bits(random_float() / 100);
      memcpy(at, &factor, 2);
    }
    for (int64_t i = 0; !int8 && i < of_block * pieces * 2; ++i)
      *at++ = char(int(random_bits() % 255) - 127);
  }
  compare((int8 ? "int8 " : "int4 ") + std::to_string(rows) + " x " + std::to_string(depth), 0,
          [&] {
            std::vector<float> out(rows * columns);
            LinearParams p{};
            p.x = x.data(), p.x_stride = depth, p.weight = data.data(), p.scales = scales.data();
            p.out = out.data(), p.out_stride = columns;
            p.rows = rows, p.in_features = depth, p.out_features = columns;
            p.dtype = DType::kBFloat16, p.out_dtype = DType::kFloat32;
            Room<char> room(rows * pieces * kQuantPackedBytes);
            p.packed_x = room.data;
            const CpuKernels& kernels = cpu_kernels();
            const int64_t units =
                up(columns, kQuantRows * kQuantUnitBlocks) / kQuantRows / kQuantUnitBlocks;
            (int8 ? kernels.linear_int8_pack : kernels.linear_int4_pack)(p, 0, rows);
            (int8 ? kernels.linear_int8_units : kernels.linear_int4_units)(p, 0, units);
            return out;
          });
}

void attention(int64_t queries, int64_t keys, int64_t group, int64_t head_dim, int64_t window) {
  const Bits q = random_values(queries * group * head_dim);
  const Bits k = random_values(keys * head_dim), v = random_values(keys * head_dim);
  const auto name = std::to_string(queries) + " x " + std::to_string(keys);
  compare("attention " + name + " x " + std::to_string(head_dim), 1.0 / 64, [&] {
    Bits out(q.size());
    AttentionWork w{};
    AttentionParams& p = w.p;
    p.q = {(void*)q.data(), 0, group * head_dim, head_dim};
    p.out = {out.data(), 0, group * head_dim, head_dim};
    p.k = {(void*)k.data(), 0, head_dim, head_dim};
    p.v = {(void*)v.data(), 0, head_dim, head_dim};
    p.batch = 1, p.seqlen_q = queries, p.seqlen_k = keys;
    p.num_heads = group, p.num_kv_heads = 1, p.head_dim = head_dim;
    p.scale = 1 / std::sqrt(double(head_dim)), p.softcap = 50, p.window = window;
    p.causal = true, p.dtype = DType::kBFloat16;
    const int64_t rows = group * queries, dim = attention_padded_dim(head_dim);
    w.stream = rows <= kAttentionStreamRows;
    w.block_rows = w.stream ? attention_stream_rows(rows) : rows < 192 ? up(rows, 48) : 192;
    w.row_blocks = (rows + w.block_rows - 1) / w.block_rows;
    w.unit_heads = w.splits = 1, w.split_keys = keys;
    Room<float> scratch(w.block_rows * (kAttentionQueryStride + kAttentionScoreStride + dim) +
                        kAttentionKeyBlock * 2 * dim + 64);
    int64_t next = -1;
    w.scratch = scratch.data, w.next = &next;
    cpu_kernels().attention_units(w, 0, w.row_blocks);
    return widened(out);
  });
}

}  // namespace

int main() {
  for (const int64_t rows : {1, 2, 5, 8, 16, 17, 33, 70}) {
    for (const int64_t depth : {1, 7, 64, 301, 2306}) linear(rows, depth, 50);
  }
  for (const int64_t depth : {1, 2, 3, 300, 601}) gemm(37, depth, 45), gemm(100, depth, 130);
  for (const bool int8 : {false, true}) {
    for (const int64_t rows : {1, 2, 3, 4, 8, 9, 15, 66}) {
      for (const int64_t depth : {1, 33, 300}) packed(int8, rows, depth, 41);
    }
  }
  for (const int64_t head_dim : {8, 40, 64, 256}) {
    for (const int64_t queries : {1, 2, 7, 100}) {
      attention(queries, 130, 2, head_dim, 0);
      attention(queries, 130, 2, head_dim, 33);
      attention(queries, 100, 1, head_dim, 0);
    }
  }
  std::string names;
  for (const std::string& isa : supported_cpu_isas()) names += " " + isa;
  printf("instruction sets%s: %d results differ\n", names.c_str(), differing);
  return differing > 99 ? 99 : differing;
}
