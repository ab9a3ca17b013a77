// struct Epilogue stands in base, because kernels apply it.
#pragma once

#include "base/epilogue.h"
