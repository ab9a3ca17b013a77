// The kernels over a type V of vectors, included by the ISA files inside their anonymous namespaces.
//
// V's *pieces*: a vector is kLanes / 4 pieces of four elements. load_pieces(p) makes piece k from the four floats at
// p[4 * k]; transpose(r) turns four vectors, as 4 x 4 in each piece: r[i] with four pixels of lanes i, 4 + i, 8 + i ..
// become four vectors of one pixel of every lane in order, and back.

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
  float* const sums = a.sums + first * (R * Q * V::kLanes);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        acc[m][r][q] =
            a.bias ? V::broadcast(a.bias[first + m]) : V::load(sums + ((m * R + r) * Q + q) * V::kLanes);
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
    for (int64_t i = 0; i < common; ++i) {
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
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) V::store(sums + ((m * R + r) * Q + q) * V::kLanes, acc[m][r][q]);
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
void pack(const NonzerosPackArgs& a) {
  uint8_t bits[V::kLanes];
  for (uint8_t& b : bits) b = static_cast<uint8_t>((1 << (a.cols % 4)) - 1);
  for (int64_t c = 0; c < a.channel_count; ++c) {
    for (int64_t row = 0; row < a.rows; ++row) {
      if (a.row_place[row] < 0) continue;
      const float* const x = a.x + a.channels[c] * a.channel_stride + row * a.row_stride;
      float* const to = a.patch + c * a.patch_channel_stride + a.row_place[row] * a.patch_row_stride;
      const float* p[V::kLanes];
      for (int l = 0; l < V::kLanes; ++l) p[l] = x + a.lane[l];
      for (int64_t col = 0; col < a.cols; col += 4) {
        typename V::Reg r[4];
        if (col + 4 <= a.cols) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) r[i] = V::load_pieces(p + i, col);
        } else {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) r[i] = V::load_pieces(p + i, col, bits + i);
        }
        V::transpose(r);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          if (col + i < a.cols && a.col_place[col + i] >= 0) V::store(to + a.col_place[col + i] * V::kLanes, r[i]);
        }
      }
    }
  }
}

// Out of line: the curves are large. kClamp is not worth a call.
template <class V>
__attribute__((noinline)) typename V::Reg curve(typename V::Reg r, const Epilogue& epilogue) {
  return V::curve(r, epilogue);
}

template <class V>
void unpack(const NonzerosUnpackArgs& a) {
  const bool clamp = a.epilogue->activation == Activation::kClamp;
  const typename V::Reg low = V::broadcast(a.epilogue->low), high = V::broadcast(a.epilogue->high);
  const float* sums = a.sums;
  for (int64_t f = 0; f < a.filters; ++f) {
    for (int64_t row = 0; row < a.rows; ++row, sums += a.cols * V::kLanes) {
      float* y[V::kLanes];
      const float* residual[V::kLanes] = {};
      for (int l = 0; l < V::kLanes; ++l) y[l] = a.y + f * a.filter_stride + row * a.row_stride + a.lane[l];
      if (a.residual) {
        const float* const from = a.residual + f * a.residual_filter_stride + row * a.residual_row_stride;
        for (int l = 0; l < V::kLanes; ++l) residual[l] = from + a.residual_lane[l];
      }
      for (int64_t col = 0; col < a.cols; col += 4) {
        const bool full = a.whole && col + 4 <= a.cols;
        uint8_t bits[V::kLanes];
        if (!full) {
          const int within = col + 4 <= a.cols ? 15 : (1 << (a.cols - col)) - 1;
          for (int l = 0; l < V::kLanes; ++l) {
            const int64_t skip = a.first_row[l] > row ? 4 : a.first_col[l] - col;
            bits[l] = static_cast<uint8_t>(skip >= 4 ? 0 : skip > 0 ? within & ~((1 << skip) - 1) : within);
          }
        }
        typename V::Reg r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) r[i] = col + i < a.cols ? V::load(sums + (col + i) * V::kLanes) : V::zero();
        V::transpose(r);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          if (a.residual) {
            const typename V::Reg more =
                full ? V::load_pieces(residual + i, col) : V::load_pieces(residual + i, col, bits + i);
            r[i] = V::add(r[i], more);
          }
          r[i] = clamp ? V::clamp(r[i], low, high) : curve<V>(r[i], *a.epilogue);
          if (full) {
            V::store_pieces(y + i, col, r[i]);
          } else {
            V::store_pieces(y + i, col, bits + i, r[i]);
          }
        }
      }
    }
  }
}

// Tiles of at most `most` vectors; the rest of the registers hold the weight and what the compiler needs.
template <class V, int most, int R, int... Q>
constexpr void fill_row(NonzerosSum (&row)[kMostTileCols], std::integer_sequence<int, Q...>) {
  ((row[Q] = [] {
     if constexpr (R * (Q + 1) <= most) {
       return &sum<V, R, Q + 1>;
     } else {
       return static_cast<NonzerosSum>(nullptr);
     }
   }()),
   ...);
}

template <class V, int most>
constexpr ConvNonzeros make(const char* isa) {
  ConvNonzeros k{.isa = isa, .lanes = V::kLanes, .sum = {}, .pack = &pack<V>, .unpack = &unpack<V>};
  fill_row<V, most, 1>(k.sum[0], std::make_integer_sequence<int, kMostTileCols>());
  fill_row<V, most, 2>(k.sum[1], std::make_integer_sequence<int, kMostTileCols>());
  fill_row<V, most, 3>(k.sum[2], std::make_integer_sequence<int, kMostTileCols>());
  fill_row<V, most, 4>(k.sum[3], std::make_integer_sequence<int, kMostTileCols>());
  return k;
}
