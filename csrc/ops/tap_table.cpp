#include "ops/tap_table.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/check.h"

namespace structadmm {
namespace {

using kernels::Tap;

constexpr char kMagic[8] = {'s', 'a', 'd', 'm', 'm', 'p', 'k', '1'};
constexpr int32_t kLayout = 1;

int64_t total_filters(const TapTable& t) {
  int64_t n = 0;
  for (int32_t f : t.block_filters) n += f;
  return n;
}

// Panels 16 wide as long as they are filled, and for the rest the fewest padded filters.
int panel_width(int64_t filters) {
  if (filters > 12) return 16;
  if (filters > 4) return 8;
  return 4;
}

int64_t aligned(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

template <class T>
std::span<const T> values(const char* op, const char* name, const TensorView& t, Dtype dtype) {
  SADMM_CHECK(t.dtype == dtype, op, ": ", name, " got ", dtype_name(t.dtype), ", wanted ", dtype_name(dtype));
  SADMM_CHECK(t.device == Device::kCpu, op, ": ", name, " got a tensor on another device, wanted the CPU");
  SADMM_CHECK(t.dims == 1 && (t.sizes[0] <= 1 || t.strides[0] == 1), op, ": ", name, " got shape ", t.shape(),
              ", wanted a contiguous vector");
  return {static_cast<const T*>(t.data), static_cast<size_t>(t.sizes[0])};
}

// FNV-1a.
uint64_t hash(uint64_t h, int64_t value) {
  for (int i = 0; i < 8; ++i, value >>= 8) h = (h ^ (value & 255)) * 0x100000001b3;
  return h;
}

template <class T>
T* at(std::byte* base, int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}
template <class T>
const T* at(const std::byte* base, int64_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

}  // namespace

TapTable tap_table(const char* op, const TensorView& weight, const TensorView* bias, const TensorView& taps,
                   const TensorView& block_filters, const TensorView& block_taps, int64_t in_channels, int64_t kernel_h,
                   int64_t kernel_w, int64_t conv_groups) {
  TapTable t;
  t.weight = values<float>(op, "weight", weight, Dtype::kF32);
  t.has_bias = bias != nullptr;
  if (bias) t.bias = values<float>(op, "bias", *bias, Dtype::kF32);
  t.taps = values<int32_t>(op, "taps", taps, Dtype::kI32);
  t.block_filters = values<int32_t>(op, "block_filters", block_filters, Dtype::kI32);
  t.block_taps = values<int32_t>(op, "block_taps", block_taps, Dtype::kI32);
  t.in_channels = in_channels;
  t.kernel_size[0] = kernel_h;
  t.kernel_size[1] = kernel_w;
  t.conv_groups = conv_groups;
  return t;
}

void check(const char* op, const TapTable& t) {
  const int64_t positions = t.kernel_size[0] * t.kernel_size[1];
  SADMM_CHECK(t.kernel_size[0] >= 1 && t.kernel_size[1] >= 1, op, ": kernel_size got (", t.kernel_size[0], ", ",
              t.kernel_size[1], "), wanted at least 1");
  SADMM_CHECK(t.conv_groups >= 1, op, ": groups got ", t.conv_groups, ", wanted at least 1");
  SADMM_CHECK(t.in_channels >= 1 && t.in_channels % t.conv_groups == 0, op, ": in_channels got ", t.in_channels,
              ", wanted a positive multiple of groups ", t.conv_groups);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  SADMM_CHECK(positions <= kMost && t.in_channels <= kMost / positions, op, ": in_channels * kernel got ",
              t.in_channels, " * ", positions, ", wanted fewer than 2^31 columns");
  const int64_t columns = t.in_channels / t.conv_groups * positions;
  const int64_t blocks = static_cast<int64_t>(t.block_filters.size());
  SADMM_CHECK(blocks >= 1, op, ": block_filters got no block, wanted at least one");
  SADMM_CHECK(static_cast<int64_t>(t.block_taps.size()) == blocks + 1, op, ": block_taps got ", t.block_taps.size(),
              " offsets, wanted ", blocks + 1);
  int64_t filters = 0, weights = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    SADMM_CHECK(t.block_filters[b] >= 1, op, ": block_filters[", b, "] got ", t.block_filters[b],
                ", wanted at least 1");
    filters += t.block_filters[b];
  }
  SADMM_CHECK(filters < (1 << 27) && filters % t.conv_groups == 0, op, ": block_filters got ", filters,
              " filters in all, wanted a multiple of groups ", t.conv_groups);
  const int64_t per_group = filters / t.conv_groups;
  SADMM_CHECK(t.block_taps[0] == 0, op, ": block_taps[0] got ", t.block_taps[0], ", wanted 0");
  int64_t filter = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t last = filter + t.block_filters[b] - 1;
    SADMM_CHECK(filter / per_group == last / per_group, op, ": block_filters[", b, "] got filters ", filter, " to ",
                last, ", wanted a block within a conv group of ", per_group);
    const int64_t begin = t.block_taps[b], end = t.block_taps[b + 1];
    SADMM_CHECK(begin <= end && end <= static_cast<int64_t>(t.taps.size()), op, ": block_taps[", b + 1, "] got ", end,
                ", wanted ", begin, " to ", t.taps.size());
    int64_t before = -1;
    for (int64_t i = begin; i < end; ++i) {
      SADMM_CHECK(t.taps[i] >= 0 && t.taps[i] < columns, op, ": taps[", i, "] got ", t.taps[i], ", wanted 0 to ",
                  columns - 1);
      SADMM_CHECK(t.taps[i] > before, op, ": taps[", i, "] got ", t.taps[i], " after ", before,
                  ", wanted ascending taps within a block");
      before = t.taps[i];
    }
    weights += t.block_filters[b] * (end - begin);
    filter += t.block_filters[b];
  }
  SADMM_CHECK(t.block_taps[blocks] == static_cast<int64_t>(t.taps.size()), op, ": taps got ", t.taps.size(),
              " taps, wanted the ", t.block_taps[blocks], " of block_taps");
  SADMM_CHECK(static_cast<int64_t>(t.weight.size()) == weights, op, ": weight got ", t.weight.size(),
              " values, wanted ", weights);
  SADMM_CHECK(!t.has_bias || static_cast<int64_t>(t.bias.size()) == filters, op, ": bias got ", t.bias.size(),
              " values, wanted ", filters);
}

PackedBytes pack(const char* op, const TapTable& t) {
  check(op, t);
  const int64_t positions = t.kernel_size[0] * t.kernel_size[1];
  const int64_t group_channels = t.in_channels / t.conv_groups;
  const int64_t filters = total_filters(t), per_group = filters / t.conv_groups;

  std::vector<Panel> panels;
  int64_t weights = 0, filter = 0;
  for (size_t b = 0; b < t.block_filters.size(); ++b) {
    const int64_t first_tap = t.block_taps[b], n_taps = t.block_taps[b + 1] - first_tap;
    for (int64_t left = t.block_filters[b]; left > 0;) {
      const int width = panel_width(left);
      const int64_t n = std::min<int64_t>(left, width);
      panels.push_back({static_cast<int32_t>(filter), static_cast<int32_t>(n), width, static_cast<int32_t>(b),
                        first_tap, n_taps, weights});
      weights += n_taps * width;
      filter += n;
      left -= n;
    }
  }
  std::vector<char> read(t.in_channels, 0);
  filter = 0;
  for (size_t b = 0; b < t.block_filters.size(); ++b) {
    char* group = read.data() + filter / per_group * group_channels;
    for (int64_t i = t.block_taps[b]; i < t.block_taps[b + 1]; ++i) group[t.taps[i] / positions] = 1;
    filter += t.block_filters[b];
  }

  PackedHeader h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.layout = kLayout;
  h.in_channels = static_cast<int32_t>(t.in_channels);
  h.out_channels = static_cast<int32_t>(filters);
  h.conv_groups = static_cast<int32_t>(t.conv_groups);
  h.kernel_h = static_cast<int32_t>(t.kernel_size[0]);
  h.kernel_w = static_cast<int32_t>(t.kernel_size[1]);
  h.structure = 0xcbf29ce484222325;
  for (const int64_t v : {t.in_channels, filters, t.conv_groups, t.kernel_size[0], t.kernel_size[1]}) {
    h.structure = hash(h.structure, v);
  }
  for (const Panel& p : panels) {
    for (const int64_t v : {int64_t{p.filters}, int64_t{p.width}, int64_t{p.block}, p.n_taps})
      h.structure = hash(h.structure, v);
  }
  for (const int32_t tap : t.taps) h.structure = hash(h.structure, tap);
  h.panels = static_cast<int64_t>(panels.size());
  h.taps = static_cast<int64_t>(t.taps.size());
  h.channels = std::count(read.begin(), read.end(), 1);
  h.weights = weights;
  h.panels_at = aligned(sizeof h);
  h.taps_at = h.panels_at + aligned(h.panels * sizeof(Panel));
  h.channels_at = h.taps_at + aligned(h.taps * sizeof(Tap));
  h.weights_at = h.channels_at + aligned(h.channels * sizeof(int32_t));
  h.bias_at = h.weights_at + aligned(h.weights * sizeof(float));
  h.bytes = h.bias_at + aligned((filters + kernels::kMaxPanel) * sizeof(float));

  PackedBytes bytes(h.bytes);  // zeros
  std::byte* base = bytes.data();
  std::memcpy(base, &h, sizeof h);
  std::copy(panels.begin(), panels.end(), at<Panel>(base, h.panels_at));
  auto* channel = at<int32_t>(base, h.channels_at);
  for (int64_t c = 0; c < t.in_channels; ++c) {
    if (read[c]) *channel++ = static_cast<int32_t>(c);
  }
  if (t.has_bias) std::copy(t.bias.begin(), t.bias.end(), at<float>(base, h.bias_at));
  auto* tap = at<Tap>(base, h.taps_at);
  auto* packed = at<float>(base, h.weights_at);
  const float* block = t.weight.data();
  size_t p = 0;
  filter = 0;
  for (size_t b = 0; b < t.block_filters.size(); ++b) {
    const int64_t first_tap = t.block_taps[b], n_taps = t.block_taps[b + 1] - first_tap;
    const int64_t first_channel = filter / per_group * group_channels;
    for (int64_t i = first_tap; i < first_tap + n_taps; ++i) {
      tap[i] = {static_cast<int32_t>(first_channel + t.taps[i] / positions),
                static_cast<int32_t>(t.taps[i] % positions)};
    }
    for (; p < panels.size() && panels[p].block == static_cast<int32_t>(b); ++p) {
      float* w = packed + panels[p].weight;
      const float* rows = block + (panels[p].first_filter - filter) * n_taps;
      for (int64_t f = 0; f < panels[p].filters; ++f) {
        for (int64_t i = 0; i < n_taps; ++i) w[i * panels[p].width + f] = rows[f * n_taps + i];
      }
    }
    block += t.block_filters[b] * n_taps;
    filter += t.block_filters[b];
  }
  return bytes;
}

Packed unpack(const char* op, std::span<const std::byte> bytes) {
  const auto* h = at<PackedHeader>(bytes.data(), 0);
  SADMM_CHECK(bytes.size() >= sizeof(PackedHeader) && std::memcmp(h->magic, kMagic, sizeof kMagic) == 0 &&
                  h->layout == kLayout && h->bytes == static_cast<int64_t>(bytes.size()),
              op, ": packed got ", bytes.size(), " other bytes, wanted a packed weight of this build: pack again");
  const std::byte* base = bytes.data();
  return {.header = h,
          .panels = {at<Panel>(base, h->panels_at), static_cast<size_t>(h->panels)},
          .taps = at<Tap>(base, h->taps_at),
          .channels = {at<int32_t>(base, h->channels_at), static_cast<size_t>(h->channels)},
          .weights = at<float>(base, h->weights_at),
          .bias = at<float>(base, h->bias_at)};
}

std::vector<int64_t> features_of(const Packed& packed) {
  std::vector<int64_t> features(static_cast<size_t>(packed.header->taps));
  std::transform(packed.taps, packed.taps + packed.header->taps, features.begin(),
                 [](const kernels::Tap& t) { return int64_t{t.channel}; });
  return features;
}

int next_panels(const Packed& packed, int64_t i, const kernels::GemmCompact& k) {
  const auto all = static_cast<int64_t>(packed.panels.size());
  const Panel& first = packed.panels[i];
  const int most = k.nv[kernels::width_class(first.width)];
  int alike = 1;
  while (i + alike < all && packed.panels[i + alike].block == first.block &&
         packed.panels[i + alike].width == first.width) {
    ++alike;
  }
  const int jobs = (alike + most - 1) / most;
  return (alike + jobs - 1) / jobs;
}

}  // namespace structadmm
