# sadmm_torch: torch's stable-ABI headers and libtorch_cpu, found by asking Python's torch for its folder. TorchConfig.cmake is
# not used: it brings CUDA detection, the Python library and flags that a stable-ABI library must not have.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent.as_posix(), end='')"
  OUTPUT_VARIABLE SADMM_TORCH_DIR RESULT_VARIABLE failed)
if(failed OR NOT EXISTS "${SADMM_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "no torch >= 2.11 in ${Python_EXECUTABLE} (looked in '${SADMM_TORCH_DIR}'): pip install 'torch>=2.11'")
endif()

add_library(sadmm_torch INTERFACE)
target_include_directories(sadmm_torch SYSTEM INTERFACE ${SADMM_TORCH_DIR}/include)
# 2.11: the oldest torch that the op library runs under, whatever torch it was built with.
target_compile_definitions(sadmm_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# rpath-link only lets the linker find libtorch_cpu's own dependencies; at run time torch is loaded before us.
target_link_libraries(sadmm_torch INTERFACE ${SADMM_TORCH_DIR}/lib/libtorch_cpu.so ${CMAKE_DL_LIBS})
target_link_options(sadmm_torch INTERFACE LINKER:-rpath-link,${SADMM_TORCH_DIR}/lib LINKER:--allow-shlib-undefined)
