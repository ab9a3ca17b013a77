# find_package(structadmm): the target structadmm::structadmm, the engine without Python. This file lies in lib/cmake/structadmm of an
# installation, or of the wheel's folder: CMAKE_PREFIX_PATH=$(python -c "import structadmm, os; print(os.path.dirname(structadmm.__file__))")
if(NOT TARGET structadmm::structadmm)
  get_filename_component(_structadmm_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
  add_library(structadmm::structadmm SHARED IMPORTED)
  set_target_properties(
    structadmm::structadmm
    PROPERTIES IMPORTED_LOCATION "${_structadmm_root}/lib/libstructadmm.so" INTERFACE_INCLUDE_DIRECTORIES "${_structadmm_root}/include"
               INTERFACE_COMPILE_FEATURES cxx_std_17)
  unset(_structadmm_root)
endif()
