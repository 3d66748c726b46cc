# gemma2_cpu_kernels(target source...): compiles each source once per instruction set, in namespace GEMMA2_ISA.
#
# The flags go on those objects alone, so no wide instruction reaches code that runs before the run-time check.
# GEMMA2_EXT_CPU_ISAS limits the list; those of another processor are left out. GEMMA2_EXT_EMULATE_ISA compiles every
# level for x86, with AVX2's instructions at most (vectors of 16 lanes are lowered to two of 8), to test wide levels and
# NEON's on a machine without them; such a build is for tests only.
include(CheckCXXCompilerFlag)

set(gemma2_known_isas scalar neon_dot neon_bf16 avx2 avx2_vnni avx512 avx512_vnni avx512_bf16 avx512_amx)
set(GEMMA2_EXT_CPU_ISAS "${gemma2_known_isas}" CACHE STRING "instruction sets to compile for")
foreach(isa ${GEMMA2_EXT_CPU_ISAS})
  if(NOT isa IN_LIST gemma2_known_isas)
    message(FATAL_ERROR "GEMMA2_EXT_CPU_ISAS has ${isa}, which is none of ${gemma2_known_isas}")
  endif()
endforeach()
option(GEMMA2_EXT_EMULATE_ISA "compile the levels that this processor lacks with AVX2 instructions" OFF)

set(gemma2_flags_scalar "")
set(gemma2_flags_neon_dot -march=armv8.2-a+dotprod)
set(gemma2_flags_neon_bf16 -march=armv8.2-a+dotprod+bf16+i8mm)
set(gemma2_flags_avx2 -mavx2 -mfma -mf16c)
set(gemma2_flags_avx2_vnni ${gemma2_flags_avx2} -mavxvnni)
set(gemma2_flags_avx512 ${gemma2_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
  -mprefer-vector-width=512)
set(gemma2_flags_avx512_vnni ${gemma2_flags_avx512} -mavx512vnni)
set(gemma2_flags_avx512_bf16 ${gemma2_flags_avx512_vnni} -mavx512bf16)
set(gemma2_flags_avx512_amx ${gemma2_flags_avx512_bf16} -mamx-tile -mamx-int8 -mamx-bf16)
set(gemma2_lanes_scalar 4)
set(gemma2_lanes_neon_dot 4)
set(gemma2_lanes_neon_bf16 4)
set(gemma2_lanes_avx2 8)
set(gemma2_lanes_avx2_vnni 8)
set(gemma2_lanes_avx512 16)
set(gemma2_lanes_avx512_vnni 16)
set(gemma2_lanes_avx512_bf16 16)
set(gemma2_lanes_avx512_amx 16)

# Newer GCC (16) leaves some sums over a loop without FMA where vectors have 256 bits, as its tuning says, and others not,
# so that equal sums would differ.
check_cxx_compiler_flag(--param=avoid-fma-max-bits=0 GEMMA2_COMPILER_HAS_FMA_BITS)
if(GEMMA2_COMPILER_HAS_FMA_BITS)
  set(gemma2_always_fma --param=avoid-fma-max-bits=0)
endif()

# Objects of `target` from the sources for one instruction set.
function(gemma2_add_isa target isa)
  set(flags ${gemma2_flags_${isa}})
  set(optimization -O3)
  # The checks, and vectors that are lowered, make kernels so large that -O3 takes several times as long to compile. (Less
  # is known there of what has a value. Expensive: products join sums in one rounding, as they do elsewhere.)
  set(optimization_of_large -O1 -fexpensive-optimizations -Wno-maybe-uninitialized)
  if(GEMMA2_EXT_EMULATE_ISA AND isa MATCHES "avx512|vnni")
    set(flags ${gemma2_flags_avx2})
    set(optimization ${optimization_of_large})
  elseif(GEMMA2_EXT_EMULATE_ISA AND isa MATCHES "neon")
    set(flags ${gemma2_flags_scalar})
  endif()
  if(GEMMA2_EXT_SANITIZE)
    set(optimization ${optimization_of_large})
  endif()
  set(library ${target}_${isa})
  add_library(${library} OBJECT ${ARGN})
  # -fno-trapping-math lets a select become a blend; -Wno-psabi: vectors never cross a translation unit; -fno-exceptions:
  # nothing in a kernel throws, and what unwinds would be shared between instruction sets.
  target_compile_options(${library} PRIVATE ${flags} -Wall -Wextra ${optimization} -Wno-psabi -fno-exceptions
    -ffp-contract=fast ${gemma2_always_fma} -fno-math-errno -fno-trapping-math)
  target_compile_definitions(${library} PRIVATE GEMMA2_ISA=${isa} GEMMA2_LANES=${gemma2_lanes_${isa}}
    GEMMA2_ISA_${isa})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${library}>)
endfunction()

# gemma2_cpu_kernels(target ALL source... BYTES source... TILES source...): ALL are compiled for every level of its own.
# A level that is another one but for products of bytes in an instruction has those of BYTES, that of AMX, for
# products of bfloat16 and int8, those of TILES; isa.cpp says where they get all else.
function(gemma2_cpu_kernels target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "ALL;BYTES;TILES")
  set(isas scalar)
  set(of_processor "")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(of_processor avx2 avx2_vnni avx512 avx512_vnni avx512_bf16 avx512_amx)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    set(of_processor neon_dot neon_bf16)
  endif()
  if(GEMMA2_EXT_EMULATE_ISA)
    list(PREPEND of_processor neon_dot neon_bf16)
  endif()
  list(REMOVE_DUPLICATES of_processor)
  foreach(isa ${of_processor})
    string(REPLACE ";" " " flags "${gemma2_flags_${isa}}")
    if(GEMMA2_EXT_EMULATE_ISA AND isa MATCHES "neon")
      set(flags "")
    endif()
    check_cxx_compiler_flag("${flags}" GEMMA2_COMPILER_HAS_${isa})
    if(isa IN_LIST GEMMA2_EXT_CPU_ISAS AND GEMMA2_COMPILER_HAS_${isa})
      list(APPEND isas ${isa})
    endif()
  endforeach()
  # Those that take kernels of others.
  foreach(pair avx2_vnni:avx2 avx512_vnni:avx512 avx512_amx:avx512_vnni)
    string(REPLACE ":" ";" pair ${pair})
    list(POP_FRONT pair isa base)
    if(isa IN_LIST GEMMA2_EXT_CPU_ISAS AND NOT base IN_LIST GEMMA2_EXT_CPU_ISAS)
      message(FATAL_ERROR "GEMMA2_EXT_CPU_ISAS has ${isa}, which takes kernels of ${base}, without ${base}: "
        "${GEMMA2_EXT_CPU_ISAS}")
    endif()
    if(NOT base IN_LIST isas)
      list(REMOVE_ITEM isas ${isa})
    endif()
  endforeach()
  message(STATUS "gemma2_ext CPU kernels: ${isas}")
  foreach(isa ${isas})
    if(isa MATCHES "_vnni$|_dot$")
      gemma2_add_isa(${target} ${isa} ${arg_BYTES})
    elseif(isa STREQUAL avx512_amx)
      gemma2_add_isa(${target} ${isa} ${arg_TILES})
      target_compile_definitions(${target}_${isa} PRIVATE GEMMA2_ISA_avx512_bf16)
    else()
      gemma2_add_isa(${target} ${isa} ${arg_ALL})
    endif()
    list(APPEND built GEMMA2_BUILT_${isa})
  endforeach()
  if(GEMMA2_EXT_EMULATE_ISA)
    list(APPEND built GEMMA2_EMULATE_ISA)
  endif()
  # For the file that chooses alone: all others are the same however many levels there are.
  set_source_files_properties(csrc/cpu/isa.cpp PROPERTIES COMPILE_DEFINITIONS "${built}")
endfunction()
