#include "runtime/graph.h"

#include "base/check.h"

namespace structadmm::runtime {
namespace {

using Shape = std::vector<int64_t>;

std::string text(const Shape& s) {
  std::string out = "[N";
  for (const int64_t size : s) out += ", " + std::to_string(size);
  return out + "]";
}

int64_t numel(const Shape& s) {
  int64_t n = 1;
  for (const int64_t size : s) {
    SADMM_CHECK(size == 0 || n <= (int64_t{1} << 40) / size, "shape got ", text(s), ", wanted fewer than 2^40 values");
    n *= size;
  }
  return n;
}

// Features are maps of one pixel.
Shape maps(const Shape& s) {
  return s.size() == 1 ? Shape{s[0], 1, 1} : s;
}

void expect(bool ok, const char* what, const Shape& got, const std::string& wanted) {
  SADMM_CHECK(ok, what, " got ", text(got), ", wanted ", wanted);
}

int64_t pooled(const Node& n, int axis, int64_t in) {
  const Pool& p = n.pool;
  const int64_t reach = p.dilation[axis] * (p.kernel[axis] - 1) + 1, room = in + 2 * p.padding[axis] - reach;
  if (room < 0) return 0;
  int64_t out = (n.ceil_mode ? (room + p.stride[axis] - 1) / p.stride[axis] : room / p.stride[axis]) + 1;
  // As PyTorch: no window may begin in the padding on the right.
  if (n.ceil_mode && (out - 1) * p.stride[axis] >= in + p.padding[axis]) --out;
  return out;
}

Shape shape_of(const Node& n, const std::vector<Shape>& in) {
  switch (n.kind) {
    case Kind::kInput:
      return in[0];
    case Kind::kConv: {
      const Shape x = maps(in[0]);
      expect(x[0] == n.conv->in_channels, "x", in[0], std::to_string(n.conv->in_channels) + " channels");
      const Shape y = {n.conv->out_channels, n.conv->out_size(0, x[1]), n.conv->out_size(1, x[2])};
      expect(x[1] + 2 * n.conv->padding[0] >= n.conv->dilation[0] * (n.conv->kernel[0] - 1) + 1 &&
                 x[2] + 2 * n.conv->padding[1] >= n.conv->dilation[1] * (n.conv->kernel[1] - 1) + 1,
             "x", in[0], "maps at least as large as the kernel");
      if (n.conv->epilogue.residual) expect(maps(in[1]) == y, "residual", in[1], text(y));
      return y;
    }
    case Kind::kLinear: {
      expect(in[0].size() == 1 && in[0][0] == n.linear->in_features, "x", in[0],
             std::to_string(n.linear->in_features) + " features");
      const Shape y = {n.linear->out_features};
      if (n.linear->epilogue.residual) expect(in[1] == y, "residual", in[1], text(y));
      return y;
    }
    case Kind::kPool: {
      const Shape x = maps(in[0]), y = {x[0], pooled(n, 0, x[1]), pooled(n, 1, x[2])};
      expect(y[1] > 0 && y[2] > 0, "x", in[0], "maps at least as large as the window");
      return y;
    }
    case Kind::kAdaptivePool:
      return {in[0][0], n.size[0], n.size[1]};
    case Kind::kCopy:
      if (n.epilogue.residual)
        expect(in[0] == in[1], "the second value", in[1], "the shape of the first, " + text(in[0]));
      return in[0];
    case Kind::kMultiply: {
      const Shape g = maps(in[1]);
      expect(in[0] == in[1] || (in[0][0] == g[0] && g[1] == 1 && g[2] == 1), "gate", in[1],
             text(in[0]) + " or one value per channel");
      return in[0];
    }
    case Kind::kScaleShift:
      expect(in[0][0] == static_cast<int64_t>(n.scale.size()), "x", in[0],
             std::to_string(n.scale.size()) + " channels");
      return in[0];
    case Kind::kConcat: {
      Shape y = in[0];
      for (size_t i = 1; i < in.size(); ++i) {
        Shape same = in[i];
        same[0] = in[0][0];
        expect(same == in[0], "a value", in[i], text(in[0]) + " in all but the channels");
        y[0] += in[i][0];
      }
      return y;
    }
    case Kind::kFlatten: {
      const int64_t features = numel(in[0]);
      expect(n.features == 0 || n.features == features, "x", in[0], std::to_string(n.features) + " values per image");
      return {features};
    }
  }
  return {};
}

}  // namespace

std::vector<Shape> infer_shapes(const Graph& graph, const std::vector<Shape>& inputs) {
  SADMM_CHECK(inputs.size() == graph.inputs.size(), "inputs got ", inputs.size(), " tensors, wanted ",
              graph.inputs.size());
  std::vector<Shape> shapes;
  size_t next = 0;
  for (const Node& node : graph.nodes) {
    std::vector<Shape> in;
    for (const int i : node.inputs) in.push_back(shapes[static_cast<size_t>(i)]);
    try {
      if (node.kind == Kind::kInput) {
        // Inputs may come in another order than their nodes.
        const auto self = static_cast<int>(shapes.size());
        for (next = 0; graph.inputs[next] != self;) ++next;
        in.push_back(inputs[next]);
        bool fits = in[0].size() == 1 || in[0].size() == 3;
        for (const int64_t size : in[0]) fits = fits && size > 0;
        expect(fits, "input", in[0], "[N, C, H, W] or [N, C], nothing of size 0");
      }
      Shape shape = shape_of(node, in);
      numel(shape);
      shapes.push_back(std::move(shape));
    } catch (const Error& e) {
      throw Error(node.name + ": " + e.what());
    }
  }
  return shapes;
}

}  // namespace structadmm::runtime
