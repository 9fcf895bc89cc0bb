# The CUDA library: built from csrc/cuda where there is a CUDA compiler. It needs no GPU and no CUDA build of torch.

file(GLOB SHAPO_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu")
if(SHAPO_CUDA STREQUAL "0")
  message(STATUS "CUDA library: not built (SHAPO_CUDA=0)")
  return()
endif()
if(NOT SHAPO_CUDA_SOURCES)
  message(STATUS "CUDA library: not built (no sources in csrc/cuda)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(SHAPO_CUDA STREQUAL "1")
    message(FATAL_ERROR "SHAPO_CUDA=1, but there is no CUDA compiler: put nvcc on PATH or set CUDACXX")
  endif()
  message(STATUS "CUDA library: not built (no CUDA compiler)")
  return()
endif()

execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE SHAPO_NVCC_VERSION)
string(REGEX MATCH "release ([0-9]+)" SHAPO_NVCC_VERSION "${SHAPO_NVCC_VERSION}")
if(NOT SHAPO_CUDA_ARCHS)
  # Binary code for A100, H100 and B200; for the newest family also PTX, which later GPUs translate.
  if(CMAKE_MATCH_1 GREATER_EQUAL 13)
    set(SHAPO_CUDA_ARCHS "80-real;90-real;100-real;120")
  else()
    set(SHAPO_CUDA_ARCHS "80-real;90")
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES "${SHAPO_CUDA_ARCHS}")
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

# The library must ask the loader for libtorch_cuda, which a CPU-only torch does not have: an empty library of that name
# stands in for it at link time.
set(SHAPO_TORCH_CUDA "${SHAPO_TORCH}/lib/libtorch_cuda.so")
if(NOT EXISTS "${SHAPO_TORCH_CUDA}")
  file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp" "")
  add_library(torch_cuda_stub SHARED "${CMAKE_BINARY_DIR}/torch_cuda_stub.cpp")
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda)
  set(SHAPO_TORCH_CUDA torch_cuda_stub)
endif()

# The static runtime: the library then serves torch builds of any CUDA major version that the driver runs.
add_library(shapo_cuda MODULE ${SHAPO_CUDA_SOURCES})
set_target_properties(shapo_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(shapo_cuda PRIVATE shapo_torch "${SHAPO_TORCH_CUDA}")
target_compile_definitions(shapo_cuda PRIVATE USE_CUDA)
target_compile_options(
  shapo_cuda PRIVATE -O3 -Xcompiler=-Wall "-Xcompiler=-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")
target_link_options(shapo_cuda PRIVATE -Wl,--no-as-needed -Wl,--exclude-libs,ALL)
install(TARGETS shapo_cuda LIBRARY DESTINATION .)

string(REPLACE ";" " " SHAPO_CUDA_ARCHS_LINE "${SHAPO_CUDA_ARCHS}")
file(WRITE "${CMAKE_BINARY_DIR}/cuda_architectures.txt" "${SHAPO_CUDA_ARCHS_LINE}\n")
install(FILES "${CMAKE_BINARY_DIR}/cuda_architectures.txt" DESTINATION .)
message(STATUS "CUDA library: ${SHAPO_CUDA_ARCHS_LINE}")
