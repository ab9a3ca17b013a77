// classify NET.safetensors IMAGE [MEAN DEVIATION]: the classes that a network gives an image, best first.
//
// IMAGE is a binary PGM or PPM (P5, P6) of the size and channels that the network takes; pixels become
// (value / 255 - MEAN) / DEVIATION, by default (value / 255). Needs nothing but libstructadmm.
#include <structadmm/engine.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

namespace {

struct Image {
  int64_t channels, height, width;
  std::vector<float> values;  // [channels, height, width], 0 to 1
};

// The next number of the header; lines that begin with # are comments.
int64_t number(std::istream& in) {
  while ((in >> std::ws) && in.peek() == '#') in.ignore(1 << 20, '\n');
  int64_t value = 0;
  if (!(in >> value) || value < 1 || value > 65535) throw structadmm::Error("image got a header of another kind");
  return value;
}

Image read_image(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  char magic[2] = {};
  in.read(magic, 2);
  if (!in || magic[0] != 'P' || (magic[1] != '5' && magic[1] != '6')) {
    throw structadmm::Error(path + ": image got another file, wanted a binary PGM or PPM");
  }
  Image image{magic[1] == '6' ? 3 : 1, 0, 0, {}};
  image.width = number(in);
  image.height = number(in);
  const int64_t most = number(in);
  if (most > 255) throw structadmm::Error(path + ": image got 16-bit values, wanted 8-bit ones");
  in.get();
  const int64_t pixels = image.height * image.width;
  std::vector<char> bytes(static_cast<size_t>(pixels * image.channels));
  if (!in.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw structadmm::Error(path + ": image got too few pixels");
  image.values.resize(bytes.size());
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < image.channels; ++c) {
      const auto byte = static_cast<unsigned char>(bytes[static_cast<size_t>(p * image.channels + c)]);
      image.values[static_cast<size_t>(c * pixels + p)] = static_cast<float>(byte) / static_cast<float>(most);
    }
  }
  return image;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 5) {
    std::fprintf(stderr, "usage: %s NET.safetensors IMAGE.ppm [MEAN DEVIATION]\n", argv[0]);
    return 2;
  }
  try {
    const structadmm::Engine engine(argv[1]);
    Image image = read_image(argv[2]);
    const float mean = argc == 5 ? std::strtof(argv[3], nullptr) : 0.0f;
    const float deviation = argc == 5 ? std::strtof(argv[4], nullptr) : 1.0f;
    for (float& v : image.values) v = (v - mean) / deviation;
    const std::vector<float> scores = engine.run(image.values.data(), {1, image.channels, image.height, image.width});
    std::vector<size_t> order(scores.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
    for (size_t i = 0; i < std::min<size_t>(5, order.size()); ++i)
      std::printf("%zu %.6g\n", order[i], scores[order[i]]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
