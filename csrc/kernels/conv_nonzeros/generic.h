// The kernels over a type V of vectors, included by the ISA files inside their anonymous namespaces.
//
// V's *pieces*: a vector is kLanes / 4 pieces of four elements. load_pieces(p, lane) makes piece k from the four floats
// at p + lane[4 * k]; transpose(r) turns four vectors, as 4 x 4 in each piece: r[i] with four pixels of lanes i, 4 + i,
// 8 + i .. become four vectors of one pixel of every lane in order, and back. permute(r, from): lane l of r[from[l]],
// zero where that is negative.

template <class V, int R, int Q>
inline void multiply_add(const float* patch, int64_t row_stride, float weight, typename V::Reg (&acc)[R][Q]) {
  const typename V::Reg w = V::broadcast(weight);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, patch += row_stride) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) acc[r][q] = V::fma(w, V::load(patch + q * V::kLanes), acc[r][q]);
  }
}

template <class V, int R, int Q, int M>
inline void sum_filters(const NonzerosSumArgs& a, int64_t first) {
  typename V::Reg acc[M][R][Q];
  int64_t filter[M];
  float* sums[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    filter[m] = first + m + a.shift[first + m];
    sums[m] = a.sums + filter[m] * (R * Q * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        acc[m][r][q] = a.bias ? V::broadcast(a.bias[filter[m]]) : V::load(sums[m] + (r * Q + q) * V::kLanes);
      }
    }
  }
  const Nonzero *at[M], *end[M];
  int64_t common = INT64_MAX;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    at[m] = a.nonzeros + a.begin[first + m];
    end[m] = a.nonzeros + a.begin[first + m + 1];
    common = end[m] - at[m] < common ? end[m] - at[m] : common;
  }
  if constexpr (M > 1) {
    const Nonzero* ahead = end[M - 1];
    for (int64_t i = 0; i < common; ++i) {
      // Short streams side by side, each gone before a prefetcher follows it: the weights of the next filters.
      if constexpr (M > 2) {
        __builtin_prefetch(ahead);
        ahead += M;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        multiply_add<V, R, Q>(a.patch + at[m][i].offset, a.row_stride, at[m][i].weight, acc[m]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) at[m] += common;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 1
    for (; at[m] != end[m]; ++at[m]) {
      multiply_add<V, R, Q>(a.patch + at[m]->offset, a.row_stride, at[m]->weight, acc[m]);
    }
  }
  if (a.y) {
    const typename V::Reg low = V::broadcast(a.low), high = V::broadcast(a.high);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* y = a.y + filter[m] * a.filter_stride;
      const float* residual = a.residual ? a.residual + filter[m] * a.residual_filter_stride : nullptr;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, y += a.y_row_stride) {
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
          typename V::Reg sum = acc[m][r][q];
          if (residual) sum = V::add(sum, V::load(residual + q * V::kLanes));
          V::store(y + q * V::kLanes, V::clamp(sum, low, high));
        }
        if (residual) residual += a.residual_row_stride;
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) V::store(sums[m] + (r * Q + q) * V::kLanes, acc[m][r][q]);
    }
  }
}

template <class V, int R, int Q>
void sum(const NonzerosSumArgs& a) {
  constexpr int M = filters_at_once(R * Q);
  int64_t f = 0;
  if constexpr (M > 1) {
    for (; f + M <= a.filters; f += M) sum_filters<V, R, Q, M>(a, f);
  }
  for (; f < a.filters; ++f) sum_filters<V, R, Q, 1>(a, f);
}

template <class V>
void pack(NonzerosPackArgs a) {
  const int64_t whole = a.cols / 4 * 4, rest = a.cols % 4;
  uint8_t bits[V::kLanes];
  for (uint8_t& b : bits) b = static_cast<uint8_t>((1 << rest) - 1);
  for (int64_t c = 0; c < a.channel_count; ++c) {
    for (int64_t row = 0; row < a.rows; ++row) {
      if (a.row_place[row] < 0) continue;
      const float* const x = a.x + a.channels[c] * a.channel_stride + row * a.row_stride;
      float* const to = a.patch + c * a.patch_channel_stride + a.row_place[row] * a.patch_row_stride;
      typename V::Reg r[4];
      for (int64_t col = 0; col < whole; col += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) r[i] = V::load_pieces(x + col, a.lane + i);
        V::transpose(r);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          if (a.col_place[col + i] >= 0) V::store(to + a.col_place[col + i] * V::kLanes, r[i]);
        }
      }
      if (rest == 0) continue;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) r[i] = V::load_pieces(x + whole, a.lane + i, bits + i);
      V::transpose(r);
#pragma GCC unroll 4
      for (int i = 0; i < 3; ++i) {
        if (i < rest && a.col_place[whole + i] >= 0) V::store(to + a.col_place[whole + i] * V::kLanes, r[i]);
      }
    }
  }
}

template <class V>
void gather(NonzerosGatherArgs a) {
  for (int64_t c = 0; c < a.channel_count; ++c) {
    const float* const x = a.x + a.channels[c] * a.channel_stride;
    float* const to = a.patch + c * a.patch_channel_stride;
    const NonzerosPlace* p = a.places;
    for (; p != a.places + a.as_they_are; ++p) V::store(to + p->to, V::load(x + p->from));
    for (; p != a.places + a.place_count; ++p) {
      V::store(to + p->to, V::permute(V::load(x + p->from), a.shifts + p->shift * kMostLanes));
    }
  }
}

// Out of line: the curves are large. kClamp is not worth a call.
template <class V>
__attribute__((noinline)) typename V::Reg curve(typename V::Reg r, const Epilogue& epilogue) {
  return V::curve(r, epilogue);
}

// Four pixels, or fewer where `bits` says so, of every lane.
template <class V, bool Whole>
inline void unpack_pixels(const NonzerosUnpackArgs& a, const float* sums, int64_t count, float* y,
                          const float* residual, const uint8_t* bits, typename V::Reg low, typename V::Reg high) {
  const bool clamp = a.epilogue->activation == Activation::kClamp;
  typename V::Reg r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = Whole || i < count ? V::load(sums + i * V::kLanes) : V::zero();
  const bool in_lanes = a.residual && !a.residual_lane;
  if (in_lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (Whole || i < count) r[i] = V::add(r[i], V::load(residual + i * V::kLanes));
    }
  }
  V::transpose(r);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (a.residual && !in_lanes) {
      typename V::Reg more;
      if constexpr (Whole) {
        more = V::load_pieces(residual, a.residual_lane + i);
      } else {
        more = V::load_pieces(residual, a.residual_lane + i, bits + i);
      }
      r[i] = V::add(r[i], more);
    }
    r[i] = clamp ? V::clamp(r[i], low, high) : curve<V>(r[i], *a.epilogue);
    if constexpr (Whole) {
      V::store_pieces(y, a.lane + i, r[i]);
    } else {
      V::store_pieces(y, a.lane + i, bits + i, r[i]);
    }
  }
}

template <class V>
void unpack(NonzerosUnpackArgs a) {
  const typename V::Reg low = V::broadcast(a.epilogue->low), high = V::broadcast(a.epilogue->high);
  uint8_t bits[4][V::kLanes];  // [pixels within the tile % 4]
  for (int n = 0; n < 4; ++n) {
    for (uint8_t& b : bits[n]) b = static_cast<uint8_t>(n == 0 ? 15 : (1 << n) - 1);
  }
  for (int64_t f = 0; f < a.filters; ++f) {
    for (int64_t row = 0; row < a.rows; ++row) {
      float* const y = a.y + f * a.filter_stride + row * a.row_stride;
      const float* const residual =
          a.residual ? a.residual + (f * a.residual_filter_stride + row * a.residual_row_stride) : nullptr;
      for (int64_t tile = 0; tile < a.cols; tile += a.tile_cols) {
        const int64_t cols = a.cols - tile < a.tile_cols ? a.cols - tile : a.tile_cols;
        const float* const sums = a.sums + (tile * a.filters * a.rows + (f * a.rows + row) * cols) * V::kLanes;
        for (int64_t col = 0; col < cols; col += 4) {
          const int64_t count = cols - col < 4 ? cols - col : 4, at = tile + col;
          const float* const more = residual ? residual + (a.residual_lane ? at : at * V::kLanes) : nullptr;
          if (a.whole && count == 4) {
            unpack_pixels<V, true>(a, sums + col * V::kLanes, 4, y + at, more, nullptr, low, high);
            continue;
          }
          const uint8_t* b = bits[count % 4];
          uint8_t owned[V::kLanes];
          if (!a.whole) {
            for (int l = 0; l < V::kLanes; ++l) {
              const int64_t skip = a.first_row[l] > row ? 4 : a.first_col[l] - at;
              owned[l] = static_cast<uint8_t>(skip >= 4 ? 0 : skip > 0 ? b[l] & ~((1 << skip) - 1) : b[l]);
            }
            b = owned;
          }
          unpack_pixels<V, false>(a, sums + col * V::kLanes, count, y + at, more, b, low, high);
        }
      }
    }
  }
}

// Residuals of four pixels, or fewer, from planes that are not in lanes.
template <class V>
inline void residual_pixels(const NonzerosUnpackArgs& a, const float* residual, int64_t count,
                            typename V::Reg (&r)[4]) {
  uint8_t bits[V::kLanes];
  for (uint8_t& b : bits) b = static_cast<uint8_t>((1 << count) - 1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = count == 4 ? V::load_pieces(residual, a.residual_lane + i)
                      : V::load_pieces(residual, a.residual_lane + i, bits + i);
  }
  V::transpose(r);
}

template <class V>
void finish(NonzerosUnpackArgs a) {
  const typename V::Reg low = V::broadcast(a.epilogue->low), high = V::broadcast(a.epilogue->high);
  const bool clamp = a.epilogue->activation == Activation::kClamp, scattered = a.residual && a.residual_lane;
  for (int64_t f = 0; f < a.filters; ++f) {
    for (int64_t row = 0; row < a.rows; ++row) {
      float* const y = a.y + f * a.filter_stride + row * a.row_stride;
      const float* const residual =
          a.residual ? a.residual + (f * a.residual_filter_stride + row * a.residual_row_stride) : nullptr;
      for (int64_t tile = 0; tile < a.cols; tile += a.tile_cols) {
        const int64_t cols = a.cols - tile < a.tile_cols ? a.cols - tile : a.tile_cols;
        const float* const sums = a.sums + (tile * a.filters * a.rows + (f * a.rows + row) * cols) * V::kLanes;
        typename V::Reg more[4];
        for (int64_t col = 0; col < cols; ++col) {
          const int64_t at = tile + col;
          typename V::Reg r = V::load(sums + col * V::kLanes);
          if (scattered) {
            if (col % 4 == 0) residual_pixels<V>(a, residual + at, cols - col < 4 ? cols - col : 4, more);
            r = V::add(r, more[col % 4]);
          } else if (residual) {
            r = V::add(r, V::load(residual + at * V::kLanes));
          }
          V::store(y + at * V::kLanes, clamp ? V::clamp(r, low, high) : curve<V>(r, *a.epilogue));
        }
      }
    }
  }
}

// Tiles of at most `most` vectors; the rest of the registers hold the weight and what the compiler needs.
template <class V, int most, int R, int... Q>
constexpr void fill_row(NonzerosSum (&row)[kMostTileCols], std::integer_sequence<int, Q...>) {
  ((row[Q] =
        [] {
          if constexpr (R * (Q + 1) <= most) {
            return &sum<V, R, Q + 1>;
          } else {
            return static_cast<NonzerosSum>(nullptr);
          }
        }()),
   ...);
}

template <class V, int most>
constexpr ConvNonzeros make(const char* isa, int patch_small, int patch) {
  ConvNonzeros k{.isa = isa,
                 .lanes = V::kLanes,
                 .patch_small = patch_small,
                 .patch = patch,
                 .sum = {},
                 .pack = &pack<V>,
                 .gather = &gather<V>,
                 .unpack = &unpack<V>,
                 .finish = &finish<V>};
  fill_row<V, most, 1>(k.sum[0], std::make_integer_sequence<int, kMostTileCols>());
  fill_row<V, most, 2>(k.sum[1], std::make_integer_sequence<int, kMostTileCols>());
  fill_row<V, most, 3>(k.sum[2], std::make_integer_sequence<int, kMostTileCols>());
  fill_row<V, most, 4>(k.sum[3], std::make_integer_sequence<int, kMostTileCols>());
  return k;
}
