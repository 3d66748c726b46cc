# The torch that the extension is built against, as the interface target gemma2_torch.
#
# Not find_package(Torch): with a CUDA build of torch it demands a full CUDA toolkit and probes for a GPU. A stable-ABI
# extension needs the headers and two shared libraries. TORCH_TARGET_VERSION is 2.11, so that one binary loads on
# torch 2.11 and later.
if(NOT TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util, os
spec = importlib.util.find_spec('torch')
folder = os.path.dirname(spec.origin)
facts = {}
exec(open(os.path.join(folder, 'version.py')).read(), facts)
print(folder, facts['__version__'], facts.get('cuda') or '', sep=';')"
    OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(GET torch_facts 0 TORCH_DIR)
  list(GET torch_facts 1 TORCH_VERSION)
  list(LENGTH torch_facts fact_count)
  if(fact_count GREATER 2)
    list(GET torch_facts 2 TORCH_CUDA)
  endif()
endif()
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "gemma2_ext needs PyTorch >= 2.11, found ${TORCH_VERSION} in ${TORCH_DIR}")
endif()
message(STATUS "PyTorch ${TORCH_VERSION} (CUDA: '${TORCH_CUDA}') in ${TORCH_DIR}")

set(GEMMA2_TORCH_TARGET 0x020b000000000000ULL)
add_library(gemma2_torch INTERFACE)
target_include_directories(gemma2_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_compile_definitions(gemma2_torch INTERFACE TORCH_TARGET_VERSION=${GEMMA2_TORCH_TARGET}
  GEMMA2_BUILT_WITH_TORCH="${TORCH_VERSION}")
target_link_libraries(gemma2_torch INTERFACE ${TORCH_DIR}/lib/libtorch_cpu.so ${TORCH_DIR}/lib/libc10.so)
# `import torch` has loaded these libraries before _C is imported, so no path needs to be stored.
set(CMAKE_SKIP_RPATH ON)
