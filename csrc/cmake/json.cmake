# nlohmann_json from PyPI, headers alone: wherever the build's Python has it, or in STRUCTADMM_JSON_DIR (a folder that
# `pip install --target` filled).
set(STRUCTADMM_JSON_DIR "" CACHE PATH "Where to look for the nlohmann_json package besides the build's Python")
execute_process(
  COMMAND
    ${Python_EXECUTABLE} -c
    "import importlib.util as u, pathlib, sys; sys.path.append(sys.argv[1]); s = u.find_spec('nlohmann_json'); print((pathlib.Path(s.origin).parent / 'include').as_posix() if s else '', end='')"
    "${STRUCTADMM_JSON_DIR}"
  OUTPUT_VARIABLE SADMM_JSON_INCLUDE)
if(NOT EXISTS "${SADMM_JSON_INCLUDE}/nlohmann/json.hpp")
  message(FATAL_ERROR "no nlohmann_json in ${Python_EXECUTABLE}: pip install nlohmann-json")
endif()
