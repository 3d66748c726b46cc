# gemma2_cuda_kernels(target source...): the CUDA kernels, by calling nvcc directly.
#
# GEMMA2_EXT_CUDA: AUTO (build them in when torch is a CUDA build and nvcc is found), ON, OFF, or CHECK (compile to
# objects only, which works beside a CPU-only torch; ptxas's report on each goes into NAME.cu.o.resources, which
# tests/test_cuda_resources.py reads). CMake's own CUDA language stays off: CMake 3.25 does not know nvcc 13's dialect
# flags and wants a full toolkit.
set(GEMMA2_EXT_CUDA AUTO CACHE STRING "AUTO, ON, OFF or CHECK")
set(GEMMA2_EXT_CUDA_ARCHS "80;90a;100;120" CACHE STRING "SM versions; those from 100 on and the last get PTX too")

function(gemma2_cuda_kernels target)
  if(NOT ARGN)
    return()
  endif()
  set(mode ${GEMMA2_EXT_CUDA})
  find_program(GEMMA2_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin NO_CACHE)
  if(mode STREQUAL AUTO)
    if(TORCH_CUDA AND GEMMA2_NVCC)
      set(mode ON)
    else()
      set(mode OFF)
    endif()
  endif()
  message(STATUS "gemma2_ext CUDA kernels: ${mode} (nvcc: ${GEMMA2_NVCC})")
  if(mode STREQUAL OFF)
    return()
  endif()
  if(NOT GEMMA2_NVCC)
    message(FATAL_ERROR "GEMMA2_EXT_CUDA=${mode} needs nvcc, which was found neither on PATH nor in CUDA_HOME")
  endif()
  if(mode STREQUAL ON AND NOT TORCH_CUDA)
    message(FATAL_ERROR "GEMMA2_EXT_CUDA=ON, but ${TORCH_DIR} is a CPU-only PyTorch")
  endif()
  execute_process(COMMAND ${GEMMA2_NVCC} --version OUTPUT_VARIABLE version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "release (([0-9]+)\\.[0-9]+)" _ "${version}")
  set(version_number ${CMAKE_MATCH_1})
  set(major ${CMAKE_MATCH_2})
  if(TORCH_CUDA AND NOT TORCH_CUDA MATCHES "^${major}\\.")
    message(FATAL_ERROR "nvcc is CUDA ${version_number}, but PyTorch was built with CUDA ${TORCH_CUDA}")
  endif()

  # PTX of 100 is for 110, that of the last one for what comes later: device.py knows. Without its "a" 90 has no wgmma.
  list(TRANSFORM GEMMA2_EXT_CUDA_ARCHS REPLACE "^90$" "90a" OUTPUT_VARIABLE built)
  list(SORT built COMPARE NATURAL)  # as code_version in launch.cuh takes them
  set(architectures "")
  list(GET built -1 last)
  foreach(arch ${built})
    if(NOT arch MATCHES "^([0-9]+)[af]?$" OR CMAKE_MATCH_1 LESS 80)
      message(FATAL_ERROR "GEMMA2_EXT_CUDA_ARCHS has ${arch}, which is no SM version from 80 on, as 80 or 90a")
    endif()
    list(APPEND architectures -gencode=arch=compute_${arch},code=sm_${arch})
    if(arch STREQUAL last OR arch MATCHES "^1[0-9][0-9]$")
      list(APPEND architectures -gencode=arch=compute_${arch},code=compute_${arch})
    endif()
  endforeach()

  # The report is in order only where one architecture is compiled after the other; files still go in parallel.
  if(mode STREQUAL CHECK)
    set(threads 1)
  else()
    set(threads 0)
  endif()
  set(objects "")
  foreach(source ${ARGN})
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.cu.o)
    add_custom_command(OUTPUT ${object} DEPFILE ${object}.d
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${source}
      COMMAND sh -c "\"$@\" 2>${object}.resources || ! cat ${object}.resources >&2"
        nvcc ${GEMMA2_NVCC} -c ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object}
        -MD -MF ${object}.d -MT ${object} -std=c++17 -O3 ${architectures} --threads ${threads}
        -Werror all-warnings -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra
      COMMENT "nvcc ${source} [${built}]" VERBATIM COMMAND_EXPAND_LISTS)
    list(APPEND objects ${object})
  endforeach()
  if(mode STREQUAL CHECK)
    add_custom_target(cuda_check DEPENDS ${objects})
    return()
  endif()

  target_sources(${target} PRIVATE ${objects})
  target_compile_definitions(${target} PRIVATE GEMMA2_WITH_CUDA="${version_number}"
    GEMMA2_CUDA_ARCHS="${built}" USE_CUDA)
  # The static runtime: no libcudart to find when the extension is imported; it shares torch's primary context.
  execute_process(COMMAND ${GEMMA2_NVCC} -dryrun -c x.cu ERROR_VARIABLE dryrun OUTPUT_QUIET)
  string(REGEX MATCH "TOP=([^\n]+)" _ "${dryrun}")
  set(top ${CMAKE_MATCH_1})
  string(REGEX MATCH "_TARGET_DIR_=(targets[^\n]+)" _ "${dryrun}")  # by processor
  find_library(GEMMA2_CUDART cudart_static REQUIRED NO_CACHE HINTS ${top}/lib64 ${top}/lib
    ${top}/${CMAKE_MATCH_1}/lib)
  target_link_libraries(${target} PRIVATE ${TORCH_DIR}/lib/libtorch_cuda.so ${GEMMA2_CUDART} dl rt pthread)
endfunction()
