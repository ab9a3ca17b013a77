// The one error of the core and its grammar: "op: argument got ..., wanted ...". Python sees a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace structadmm {

// As include/structadmm/engine.h has it, with the same linkage: one class for the core and for its callers.
#ifndef STRUCTADMM_ERROR
#define STRUCTADMM_ERROR
class [[gnu::visibility("default")]] Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};
#endif

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace structadmm

// Throws structadmm::Error made of the parts if the condition does not hold.
#define SADMM_CHECK(condition, ...)    \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      ::structadmm::fail(__VA_ARGS__); \
  } while (false)
