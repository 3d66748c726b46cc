# gemma2_cpu_kernels(target source...): compiles each source once per instruction set, in namespace GEMMA2_ISA.
#
# The flags go on those objects alone, so no wide instruction reaches code that runs before the run-time check.
# GEMMA2_EXT_CPU_ISAS limits the list; on a processor other than x86 it is "scalar". GEMMA2_EXT_EMULATE_ISA compiles
# every level with AVX2's instructions (vectors of 16 lanes are lowered to two of 8), to test wide levels on a narrow
# machine; such a build is for tests only.
include(CheckCXXCompilerFlag)

set(GEMMA2_EXT_CPU_ISAS "scalar;avx2;avx512;avx512_bf16" CACHE STRING "instruction sets to compile for")
option(GEMMA2_EXT_EMULATE_ISA "compile the AVX-512 levels with AVX2 instructions" OFF)

set(gemma2_flags_scalar "")
set(gemma2_flags_avx2 -mavx2 -mfma -mf16c)
set(gemma2_flags_avx512 ${gemma2_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
  -mprefer-vector-width=512)
set(gemma2_flags_avx512_bf16 ${gemma2_flags_avx512} -mavx512bf16 -mavx512vnni)
set(gemma2_lanes_scalar 4)
set(gemma2_lanes_avx2 8)
set(gemma2_lanes_avx512 16)
set(gemma2_lanes_avx512_bf16 16)

function(gemma2_cpu_kernels target)
  set(isas scalar)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    foreach(isa avx2 avx512 avx512_bf16)
      string(REPLACE ";" " " flags "${gemma2_flags_${isa}}")
      check_cxx_compiler_flag("${flags}" GEMMA2_COMPILER_HAS_${isa})
      if(isa IN_LIST GEMMA2_EXT_CPU_ISAS AND GEMMA2_COMPILER_HAS_${isa})
        list(APPEND isas ${isa})
      endif()
    endforeach()
  endif()
  message(STATUS "gemma2_ext CPU kernels: ${isas}")
  set(optimization -O3)
  if(GEMMA2_EXT_SANITIZE)
    set(optimization -O1)  # the checks make the kernels so large that -O3 takes six times as long to compile
  endif()
  foreach(isa ${isas})
    set(flags ${gemma2_flags_${isa}})
    if(GEMMA2_EXT_EMULATE_ISA AND isa MATCHES "avx512")
      set(flags ${gemma2_flags_avx2})
    endif()
    set(library ${target}_${isa})
    add_library(${library} OBJECT ${ARGN})
    # -fno-trapping-math lets a select become a blend; -Wno-psabi: vectors never cross a translation unit.
    target_compile_options(${library} PRIVATE ${flags} ${optimization} -Wall -Wextra -Wno-psabi
      -ffp-contract=fast -fno-math-errno -fno-trapping-math)
    target_compile_definitions(${library} PRIVATE GEMMA2_ISA=${isa} GEMMA2_LANES=${gemma2_lanes_${isa}}
      GEMMA2_ISA_${isa})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${library}>)
    list(APPEND built GEMMA2_BUILT_${isa})
  endforeach()
  if(GEMMA2_EXT_EMULATE_ISA)
    list(APPEND built GEMMA2_EMULATE_ISA)
  endif()
  # For the file that chooses alone: all others are the same however many levels there are.
  set_source_files_properties(csrc/cpu/isa.cpp PROPERTIES COMPILE_DEFINITIONS "${built}")
endfunction()
