#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "quantized.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gemma2 {
namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
[[maybe_unused]] bool has_avx2() {
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Leaf 7 of cpuid; zeros where there is none.
struct Leaf7 {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Leaf7(unsigned subleaf) { __get_cpuid_count(7, subleaf, &a, &b, &c, &d); }
};

[[maybe_unused]] bool has_avx2_vnni() {
#ifdef GEMMA2_EMULATE_ISA
  return has_avx2();
#else
  constexpr unsigned kAvxVnni = 1u << 4;
  return has_avx2() && (Leaf7(1).a & kAvxVnni);
#endif
}

[[maybe_unused]] bool has_avx512() {
#ifdef GEMMA2_EMULATE_ISA
  return has_avx2();
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}

[[maybe_unused]] bool has_avx512_vnni() {
#ifdef GEMMA2_EMULATE_ISA
  return has_avx512();
#else
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#endif
}

[[maybe_unused]] bool has_avx512_bf16() {
#ifdef GEMMA2_EMULATE_ISA
  return has_avx512();
#else
  return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
#endif
}

// Whether the processor multiplies tiles of bfloat16 and int8, and Linux lets this process: it
// saves the registers' 8 KiB for those threads only that have asked.
[[maybe_unused]] bool has_avx512_amx() {
#ifdef GEMMA2_EMULATE_ISA
  return has_avx512_bf16();
#else
  static const bool has = [] {
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    if (!has_avx512_bf16() || (Leaf7(0).d & kAll) != kAll) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of Linux' asm/prctl.h
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#endif
}
#endif

// Products of bytes, and of bfloat16 with those of matrices of bytes.
#if defined(__aarch64__) && defined(__linux__)
// Bits of Linux' asm/hwcap.h.
[[maybe_unused]] bool has_neon_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }
[[maybe_unused]] bool has_neon_bf16() {
  constexpr unsigned long kAll = 1ul << 14 | 1ul << 13;  // bfloat16, int8
  return has_neon_dot() && (getauxval(AT_HWCAP2) & kAll) == kAll;
}
#else
[[maybe_unused]] bool has_neon_dot() {
#ifdef GEMMA2_EMULATE_ISA
  return true;
#else
  return false;
#endif
}
[[maybe_unused]] bool has_neon_bf16() { return has_neon_dot(); }
#endif

// Levels that are another one but for some kernels.

// Products of packed weights from another namespace.
#define GEMMA2_TAKE_PACKED(kernels, isa)              \
  kernels.linear_int8_pack = isa::linear_int8_pack;   \
  kernels.linear_int8_units = isa::linear_int8_units; \
  kernels.linear_int4_pack = isa::linear_int4_pack;   \
  kernels.linear_int4_units = isa::linear_int4_units;

#ifdef GEMMA2_BUILT_neon_dot
void neon_dot_probe(const ProbeParams& p, int64_t begin, int64_t end) {
  (p.int8 ? neon_dot::probe_multiply : scalar::probe_multiply)(p, begin, end);
}

const CpuKernels& neon_dot_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels mixed = scalar::kKernels;
    GEMMA2_TAKE_PACKED(mixed, neon_dot)
    mixed.probe_multiply = neon_dot_probe;
    return mixed;
  }();
  return kernels;
}
#endif

#ifdef GEMMA2_BUILT_avx2_vnni
void avx2_vnni_probe(const ProbeParams& p, int64_t begin, int64_t end) {
  (p.int8 ? avx2_vnni::probe_multiply : avx2::probe_multiply)(p, begin, end);
}

const CpuKernels& avx2_vnni_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels mixed = avx2::kKernels;
    GEMMA2_TAKE_PACKED(mixed, avx2_vnni)
    mixed.probe_multiply = avx2_vnni_probe;
    return mixed;
  }();
  return kernels;
}
#endif

#ifdef GEMMA2_BUILT_avx512_vnni
void avx512_vnni_probe(const ProbeParams& p, int64_t begin, int64_t end) {
  (p.int8 ? avx512_vnni::probe_multiply : avx512::probe_multiply)(p, begin, end);
}

// Where there is bfloat16's rounding in an instruction, it serves what is bound by loads and
// stores.
const CpuKernels& avx512_vnni_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels mixed = avx512::kKernels;
    GEMMA2_TAKE_PACKED(mixed, avx512_vnni)
    mixed.probe_multiply = avx512_vnni_probe;
#ifdef GEMMA2_BUILT_avx512_bf16
    if (has_avx512_bf16()) {
      mixed.rms_norm_rows = avx512_bf16::rms_norm_rows;
      mixed.add_rms_norm_rows = avx512_bf16::add_rms_norm_rows;
      mixed.geglu_runs = avx512_bf16::geglu_runs;
      mixed.rope_tokens = avx512_bf16::rope_tokens;
    }
#endif
    return mixed;
  }();
  return kernels;
}
#endif

#ifdef GEMMA2_BUILT_avx512_amx
void amx_attention(const AttentionWork& w, int64_t begin, int64_t end) {
  const bool tiles = !w.stream && w.p.dtype == DType::kBFloat16;
  (tiles ? avx512_amx::attention_units : avx512::attention_units)(w, begin, end);
}
void amx_attention_backward(const AttentionBackwardWork& w, int64_t begin, int64_t end) {
  const bool tiles = w.p.forward.dtype == DType::kBFloat16;
  (tiles ? avx512_amx::attention_backward_keys : avx512::attention_backward_keys)(w, begin, end);
}
// Few rows are memory's; up to kQuantFewRows share a pass over it.
template <auto kTiles, auto kFewRows>
void amx_packed(const LinearParams& p, int64_t begin, int64_t end) {
  (p.rows > kQuantFewRows ? kTiles : kFewRows)(p, begin, end);
}
void amx_probe(const ProbeParams& p, int64_t begin, int64_t end) {
  const bool tiles = p.int8 || p.dtype == DType::kBFloat16;
  (tiles ? avx512_amx::probe_multiply : avx512::probe_multiply)(p, begin, end);
}

// avx512_vnni with the products of many rows by tiles.
const CpuKernels& amx_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels mixed = avx512_vnni_kernels();
    mixed.attention_units = amx_attention;
    mixed.attention_backward_keys = amx_attention_backward;
    mixed.linear_pack_panels = avx512_amx::linear_pack_panels;
    mixed.linear_many_rows = avx512_amx::linear_many_rows;
    mixed.gemm_pack_panels = avx512_amx::gemm_pack_panels;
    mixed.gemm_rows = avx512_amx::gemm_rows;
    mixed.gemm_round_rows = avx512_amx::gemm_round_rows;
    mixed.linear_loss_words = avx512_amx::linear_loss_words;
    mixed.linear_loss_merge = avx512_amx::linear_loss_merge;
    mixed.linear_loss_gradient = avx512_amx::linear_loss_gradient;
    mixed.linear_int8_pack =
        amx_packed<avx512_amx::linear_int8_pack, avx512_vnni::linear_int8_pack>;
    mixed.linear_int8_units =
        amx_packed<avx512_amx::linear_int8_units, avx512_vnni::linear_int8_units>;
    mixed.linear_int4_pack =
        amx_packed<avx512_amx::linear_int4_pack, avx512_vnni::linear_int4_pack>;
    mixed.linear_int4_units =
        amx_packed<avx512_amx::linear_int4_units, avx512_vnni::linear_int4_units>;
    mixed.probe_multiply = amx_probe;
    return mixed;
  }();
  return kernels;
}
#endif

const Isa kIsas[] = {
    {"scalar", &scalar::kKernels, always},
#ifdef GEMMA2_BUILT_neon_dot
    {"neon_dot", &neon_dot_kernels(), has_neon_dot},
#endif
#ifdef GEMMA2_BUILT_neon_bf16
    {"neon_bf16", &neon_bf16::kKernels, has_neon_bf16},
#endif
#ifdef GEMMA2_BUILT_avx2
    {"avx2", &avx2::kKernels, has_avx2},
#endif
#ifdef GEMMA2_BUILT_avx2_vnni
    {"avx2_vnni", &avx2_vnni_kernels(), has_avx2_vnni},
#endif
#ifdef GEMMA2_BUILT_avx512
    {"avx512", &avx512::kKernels, has_avx512},
#endif
#ifdef GEMMA2_BUILT_avx512_vnni
    {"avx512_vnni", &avx512_vnni_kernels(), has_avx512_vnni},
#endif
#ifdef GEMMA2_BUILT_avx512_bf16
    {"avx512_bf16", &avx512_bf16::kKernels, has_avx512_bf16},
#endif
#ifdef GEMMA2_BUILT_avx512_amx
    {"avx512_amx", &amx_kernels(), has_avx512_amx},
#endif
};

// Intel's bf16 dot does half the products of its float32 FMA in the same time (a Sapphire Rapids:
// 160 GFLOP/s beside 285); AMD's does twice as many. So Intel takes the level below.
bool fast([[maybe_unused]] const Isa& isa) {
#if defined(__x86_64__)
  return isa.name != std::string("avx512_bf16") || !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

const Isa* find_isa(const std::string& name, const char* source) {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (name == isa.name) return &isa;
    names += names.empty() ? "" : ", ";
    names += isa.name;
  }
  throw std::invalid_argument("gemma2_ext: " + std::string(source) + " must be one of " + names +
                              " on this machine, got '" + name + "'");
}

const Isa* initial_isa() {
  const char* forced = std::getenv("GEMMA2_EXT_CPU_ISA");
  if (forced && *forced) return find_isa(forced, "GEMMA2_EXT_CPU_ISA");
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.supported() && fast(isa)) best = &isa;
  }
  return best;
}

std::atomic<const Isa*>& current_isa() {
  static std::atomic<const Isa*> isa{initial_isa()};
  return isa;
}

// AMD's family 19h has AVX-512 in a Zen 4 only.
bool detect_zen4() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return (a >> 8 & 0xf) + (a >> 20 & 0xff) == 0x19 && __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

std::atomic<bool>& current_zen4() {
  static std::atomic<bool> zen4{detect_zen4()};
  return zen4;
}

}  // namespace

std::vector<std::string> supported_cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

std::string cpu_isa() { return current_isa().load()->name; }

void set_cpu_isa(const std::string& name) { current_isa().store(find_isa(name, "cpu_isa")); }

const CpuKernels& cpu_kernels() { return *current_isa().load(std::memory_order_relaxed)->kernels; }

bool is_zen4() { return current_zen4().load(std::memory_order_relaxed); }

void set_zen4(bool zen4) { current_zen4().store(zen4); }

}  // namespace gemma2
