// The kernels against plain loops over dense weights, for every instruction set this processor has, without ONNX Runtime.
//
//   grid [random cases]        prints two lines per instruction set; exit code 1 where an answer is wrong
//
// Each case runs with one thread and with three, which must agree to the bit.  A family of operators is a function that checks one
// case, a list of its cases and the error that is allowed; `main` names them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>

#include "runtime.h"

extern "C" const char* RelRepInstructionSets();

namespace {

using namespace relrep;
using Sizes = std::vector<std::int64_t>;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr float kLow = -0.5f, kHigh = 0.75f;
constexpr double kFloatTolerance = 1e-4;  // of the largest output
constexpr double kByteTolerance = 1.0;    // steps: a sum that lies between two is rounded either way
constexpr int kThreads = 3;

std::string describe(const Sizes& sizes) {
  std::string text;
  for (const std::int64_t size : sizes) text += (text.empty() ? "[" : " ") + std::to_string(size);
  return text + "]";
}

struct Window {
  Sizes strides{1, 1}, pads{0, 0, 0, 0}, dilations{1, 1};
  std::int64_t group = 1;
};

struct Case {
  const char* name;
  Sizes weight, x;
  Window window{};
  double density = 0.2;
  std::int64_t block = 1;  // neighbouring output channels (int8: input channels) that share their positions
  bool adds = false;
  const char* activation = "";

  std::string text() const {
    return std::string(name) + ", weight " + describe(weight) + ", X " + describe(x) + ", strides " + describe(window.strides) +
           ", pads " + describe(window.pads) + ", dilations " + describe(window.dilations) + ", groups " +
           std::to_string(window.group) + ", density " + std::to_string(density) + ", blocks of " + std::to_string(block) +
           (adds ? ", Add " : " ") + activation;
  }
};

std::mt19937 randomness(7);

std::int64_t product(const Sizes& sizes) {
  std::int64_t n = 1;
  for (const std::int64_t size : sizes) n *= size;
  return n;
}

Floats normal(std::int64_t n) {
  std::normal_distribution<float> draw;
  Floats out(static_cast<std::size_t>(n));
  for (float& v : out) v = draw(randomness);
  return out;
}

Floats sparse_weight(const Case& c) {
  std::bernoulli_distribution keep(c.density);
  Floats weight = normal(product(c.weight));
  const std::int64_t cols = product(c.weight) / c.weight[0];
  std::vector<bool> kept(static_cast<std::size_t>(cols));
  for (std::int64_t r = 0; r < c.weight[0]; ++r) {
    if (r % c.block == 0)
      for (std::int64_t i = 0; i < cols; ++i) kept[i] = keep(randomness);
    for (std::int64_t i = 0; i < cols; ++i)
      if (!kept[i]) weight[r * cols + i] = 0.0f;
  }
  return weight;
}

std::vector<std::int8_t> sparse_bytes(const Case& c) {
  std::bernoulli_distribution keep(c.density);
  std::uniform_int_distribution<int> draw(-127, 127);
  std::vector<std::int8_t> weight(static_cast<std::size_t>(product(c.weight)));
  const std::int64_t kernel = product(c.weight) / c.weight[0] / c.weight[1];
  std::vector<bool> kept(static_cast<std::size_t>(kernel));
  for (std::int64_t i = 0; i < c.weight[0] * c.weight[1]; ++i) {
    if (i % c.weight[1] % c.block == 0)
      for (std::int64_t k = 0; k < kernel; ++k) kept[k] = keep(randomness);
    for (std::int64_t k = 0; k < kernel; ++k)
      if (kept[k]) weight[i * kernel + k] = static_cast<std::int8_t>(draw(randomness));
  }
  return weight;
}

// The nonzeros and the distances between their positions; at least one entry.
template <class T>
std::pair<std::vector<T>, std::vector<std::uint8_t>> encode(const std::vector<T>& weight) {
  std::vector<T> values;
  std::vector<std::uint8_t> gaps;
  std::size_t last = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) {
    if (weight[i] == T{}) continue;
    for (; i - last > 255; last += 255) {
      values.push_back(T{});
      gaps.push_back(255);
    }
    values.push_back(weight[i]);
    gaps.push_back(static_cast<std::uint8_t>(i - last));
    last = i;
  }
  if (values.empty()) return {{T{}}, {0}};
  return {values, gaps};
}

// ---------------------------------------------------------------------------------------------------------- the plain loops

Sizes conv_dims(const Case& c) {
  const auto out = [&](int axis) {
    const std::int64_t reach = (c.weight[2 + axis] - 1) * c.window.dilations[axis] + 1;
    return (c.x[2 + axis] + c.window.pads[axis] + c.window.pads[axis + 2] - reach) / c.window.strides[axis] + 1;
  };
  return {c.x[0], c.weight[0], out(0), out(1)};
}

Doubles dense_conv(const Case& c, const Doubles& weight, const Doubles& x, const Doubles& bias) {
  const Sizes dims = conv_dims(c);
  const std::int64_t channels = c.weight[1], kh = c.weight[2], kw = c.weight[3], rows = c.weight[0] / c.window.group;
  Doubles y(static_cast<std::size_t>(product(dims)));
  std::size_t at = 0;
  for (std::int64_t n = 0; n < dims[0]; ++n)
    for (std::int64_t r = 0; r < dims[1]; ++r)
      for (std::int64_t oy = 0; oy < dims[2]; ++oy)
        for (std::int64_t ox = 0; ox < dims[3]; ++ox, ++at) {
          double sum = bias[r];
          for (std::int64_t ch = 0; ch < channels; ++ch)
            for (std::int64_t ky = 0; ky < kh; ++ky)
              for (std::int64_t kx = 0; kx < kw; ++kx) {
                const std::int64_t iy = oy * c.window.strides[0] + ky * c.window.dilations[0] - c.window.pads[0];
                const std::int64_t ix = ox * c.window.strides[1] + kx * c.window.dilations[1] - c.window.pads[1];
                if (iy < 0 || iy >= c.x[2] || ix < 0 || ix >= c.x[3]) continue;
                const std::int64_t from = ((n * c.x[1] + r / rows * channels + ch) * c.x[2] + iy) * c.x[3] + ix;
                sum += weight[((r * channels + ch) * kh + ky) * kw + kx] * x[from];
              }
          y[at] = sum;
        }
  return y;
}

Doubles dense_gemm(const Case& c, const Doubles& weight, const Doubles& x, const Doubles& bias) {
  const std::int64_t rows = c.weight[0], cols = c.weight[1], batch = product(c.x) / cols;
  Doubles y(static_cast<std::size_t>(batch * rows));
  for (std::int64_t n = 0; n < batch; ++n)
    for (std::int64_t r = 0; r < rows; ++r) {
      double sum = bias[r];
      for (std::int64_t i = 0; i < cols; ++i) sum += weight[r * cols + i] * x[n * cols + i];
      y[n * rows + r] = sum;
    }
  return y;
}

bool convolves(const Case& c) { return c.weight.size() == 4; }

Doubles dense(const Case& c, const Doubles& weight, const Doubles& x, const Doubles& bias) {
  return convolves(c) ? dense_conv(c, weight, x, bias) : dense_gemm(c, weight, x, bias);
}

Sizes dims_of(const Case& c) {
  if (convolves(c)) return conv_dims(c);
  Sizes dims = c.x;
  dims.back() = c.weight[0];
  return dims;
}

template <class T>
Doubles doubles(const std::vector<T>& values) {
  return Doubles(values.begin(), values.end());
}

// ------------------------------------------------------------------------------------------------------ a case of one family

ort::KernelInfo attributes_of(const Case& c) {
  ort::KernelInfo info;
  info.integers["weight_shape"] = c.weight;
  if (convolves(c)) {
    info.integers["strides"] = c.window.strides;
    info.integers["pads"] = c.window.pads;
    info.integers["dilations"] = c.window.dilations;
    info.integers["group"] = {c.window.group};
  }
  return info;
}

// The output; throws std::runtime_error where the library refuses, its threads disagree or the shape is wrong.
ort::Value run(const Case& c, const std::string& name, const ort::KernelInfo& info, const std::map<std::size_t, ort::Value>& inputs) {
  const stand_in::Node node(name, info);
  ort::Value one, several;
  std::string error = node.error();
  if (error.empty()) error = node.run(inputs, 1, one);
  if (error.empty()) error = node.run(inputs, kThreads, several);
  if (!error.empty()) throw std::runtime_error(error);
  if (one.shape.dims != dims_of(c)) throw std::runtime_error("the output is " + describe(one.shape.dims));
  if (one.bytes != several.bytes) throw std::runtime_error("one thread and several disagree");
  return one;
}

// The largest error as a share of the largest output.
double check_floats(const Case& c) {
  const Floats weight = sparse_weight(c), x = normal(product(c.x)), bias = normal(c.weight[0]);
  const auto [values, gaps] = encode(weight);
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  ort::KernelInfo info = attributes_of(c);
  info.numbers = {{"min", kLow}, {"max", kHigh}};
  info.constants[1] = stand_in::tensor(ort::kFloat, {count}, values);
  info.constants[2] = stand_in::tensor(ort::kUint8, {count}, gaps);
  info.constants[3] = stand_in::tensor(ort::kFloat, {c.weight[0]}, bias);
  Doubles wanted = dense(c, doubles(weight), doubles(x), doubles(bias));
  std::map<std::size_t, ort::Value> inputs{{0, stand_in::tensor(ort::kFloat, c.x, x)}};
  if (c.adds) {
    const Floats residual = normal(product(dims_of(c)));
    inputs[4] = stand_in::tensor(ort::kFloat, dims_of(c), residual);
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] += residual[i];
  }
  const std::string activation = c.activation;
  const double infinity = std::numeric_limits<double>::infinity();
  const double low = activation == "Relu" ? 0.0 : activation == "Clip" ? kLow : -infinity;
  const double high = activation == "Clip" ? kHigh : infinity;
  const std::string name = std::string(convolves(c) ? "SparseConv" : "SparseGemm") + (c.adds ? "Add" : "") + activation;
  const Floats got = stand_in::elements<float>(run(c, name, info, inputs));
  double largest = 1e-3, off = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double right = std::min(std::max(wanted[i], low), high);
    largest = std::max(largest, std::abs(right));
    off = std::max(off, std::isnan(got[i]) ? infinity : std::abs(got[i] - right));
  }
  return off / largest;
}

// The largest error in steps of the output's bytes.
double check_bytes(const Case& c) {
  constexpr std::uint8_t kXZero = 113, kYZero = 90, kLowest = 60, kHighest = 200;
  const std::size_t rows = static_cast<std::size_t>(c.weight[0]);
  const std::vector<std::int8_t> weight = sparse_bytes(c);
  std::vector<std::uint8_t> x(static_cast<std::size_t>(product(c.x)));
  for (std::uint8_t& v : x) v = static_cast<std::uint8_t>(std::uniform_int_distribution<int>(0, 255)(randomness));
  std::vector<std::int32_t> bias(rows);
  for (std::int32_t& v : bias) v = std::uniform_int_distribution<std::int32_t>(-5000, 5000)(randomness);
  Floats scale(rows);
  for (float& v : scale) v = std::uniform_real_distribution<float>(0.01f, 0.03f)(randomness);

  Doubles shifted = doubles(x);
  for (double& v : shifted) v -= kXZero;  // padding is the zero point, which is 0 here
  Doubles wanted = dense(c, doubles(weight), shifted, doubles(bias));
  const Sizes dims = dims_of(c);
  const std::size_t plane = convolves(c) ? static_cast<std::size_t>(dims[2] * dims[3]) : 1;
  double largest = 1.0;
  for (const double v : wanted) largest = std::max(largest, std::abs(v));
  const float x_scale = 0.02f, y_scale = static_cast<float>(x_scale * 0.03 * largest / 160);

  const auto [values, gaps] = encode(weight);
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  const bool clips = std::string(c.activation) == "Clip";
  ort::KernelInfo info = attributes_of(c);
  if (clips) info.integers.insert({{"low", {kLowest}}, {"high", {kHighest}}});
  info.constants[1] = stand_in::tensor(ort::kFloat, {}, Floats{x_scale});
  info.constants[2] = stand_in::tensor(ort::kUint8, {}, std::vector<std::uint8_t>{kXZero});
  info.constants[3] = stand_in::tensor(ort::kInt8, {count}, values);
  info.constants[4] = stand_in::tensor(ort::kUint8, {count}, gaps);
  info.constants[5] = stand_in::tensor(ort::kFloat, {c.weight[0]}, scale);
  info.constants[6] = stand_in::tensor(ort::kFloat, {}, Floats{y_scale});
  info.constants[7] = stand_in::tensor(ort::kUint8, {}, std::vector<std::uint8_t>{kYZero});
  info.constants[8] = stand_in::tensor(ort::kInt32, {c.weight[0]}, bias);
  const std::string name = std::string(convolves(c) ? "SparseQConv" : "SparseQGemm") + (clips ? "Clip" : "");
  const ort::Value output = run(c, name, info, {{0, stand_in::tensor(ort::kUint8, c.x, x)}});
  double off = 0.0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const double rounded = std::nearbyint(wanted[i] * x_scale * scale[i / plane % rows] / y_scale) + kYZero;
    const double right = std::min(std::max(rounded, clips ? kLowest : 0.0), clips ? kHighest : 255.0);
    off = std::max(off, std::abs(output.bytes[i] - right));
  }
  return off;
}

// ------------------------------------------------------------------------------------------------------------------ the cases

std::vector<Case> shapes() {
  const Sizes around{1, 1, 1, 1};
  std::vector<Case> cases{
      {"3x3", {16, 8, 3, 3}, {2, 8, 14, 15}, {{1, 1}, around}},
      {"3x3 without padding", {8, 5, 3, 3}, {1, 5, 9, 9}},
      {"asymmetric padding", {8, 4, 3, 2}, {1, 4, 10, 7}, {{1, 1}, {0, 1, 2, 3}}},
      {"stride 2", {12, 6, 3, 3}, {1, 6, 15, 16}, {{2, 2}, around}},
      {"strides 3 and 1", {8, 3, 5, 3}, {1, 3, 20, 11}, {{3, 1}, {2, 1, 2, 1}}},
      {"dilation", {8, 4, 3, 3}, {1, 4, 16, 17}, {{1, 1}, {2, 3, 2, 3}, {2, 3}}},
      {"dilation and stride", {8, 4, 3, 3}, {1, 4, 23, 21}, {{2, 3}, {2, 2, 2, 2}, {3, 2}}},
      {"7x7 stride 2", {16, 3, 7, 7}, {1, 3, 33, 40}, {{2, 2}, {3, 3, 3, 3}}},
      {"1x1", {24, 40, 1, 1}, {2, 40, 12, 11}},
      {"1x1 on few places", {8, 16, 1, 1}, {1, 16, 1, 3}},
      {"1x1 stride 2", {8, 16, 1, 1}, {1, 16, 9, 10}, {{2, 2}}},
      {"1x1 with padding", {8, 16, 1, 1}, {1, 16, 5, 6}, {{1, 1}, around}},
      {"many channels", {8, 300, 3, 3}, {1, 300, 7, 7}, {{1, 1}, around}},
      {"many channels, 1x1", {8, 700, 1, 1}, {1, 700, 14, 14}},
      {"groups", {16, 4, 3, 3}, {2, 16, 9, 8}, {{1, 1}, around, {1, 1}, 4}},
      {"odd groups", {15, 2, 3, 3}, {1, 6, 9, 8}, {{1, 1}, around, {1, 1}, 3}},
      {"depthwise", {20, 1, 3, 3}, {1, 20, 14, 14}, {{1, 1}, around, {1, 1}, 20}},
      {"depthwise stride 2", {20, 1, 3, 3}, {1, 20, 15, 14}, {{2, 2}, around, {1, 1}, 20}},
      {"depthwise, many tiles", {3, 1, 5, 5}, {2, 3, 130, 121}, {{1, 1}, {2, 2, 2, 2}, {1, 1}, 3}},
      {"depthwise, narrow", {6, 1, 3, 3}, {2, 6, 7, 3}, {{1, 1}, around, {1, 1}, 6}},
      {"depthwise, dilation and stride", {5, 1, 3, 4}, {1, 5, 40, 37}, {{2, 3}, {2, 1, 0, 3}, {3, 1}, 5}},
      {"depthwise 1x1", {8, 1, 1, 1}, {1, 8, 9, 10}, {{1, 1}, {0, 0, 0, 0}, {1, 1}, 8}},
      {"wide", {4, 3, 3, 3}, {1, 3, 5, 700}, {{1, 1}, around}},
      {"wide stride 2", {4, 3, 3, 3}, {1, 3, 9, 900}, {{2, 2}, around}},
      {"tall", {4, 3, 3, 3}, {1, 3, 600, 5}, {{1, 1}, around}},
      {"kernel as large as the image", {4, 3, 6, 6}, {1, 3, 6, 6}},
      {"no image", {4, 3, 3, 3}, {0, 3, 6, 6}},
  };
  for (const std::int64_t batch : {0, 1, 2, 5, 33, 130}) cases.push_back({"product", {60, 90}, {batch, 90}});
  cases.push_back({"product of a stack", {24, 300}, {2, 3, 300}});
  return cases;
}

// Every shape in every density and block, then every fusion, then random convolutions.
std::vector<Case> float_cases(int random) {
  std::vector<Case> cases;
  for (Case c : shapes())
    for (const auto& [density, block] : {std::pair{0.2, 1}, {0.2, 4}, {0.02, 1}, {1.0, 1}, {0.0, 1}}) {
      c.density = density;
      c.block = block;
      cases.push_back(c);
    }
  for (const bool adds : {false, true})
    for (const char* activation : {"", "Relu", "Clip"})
      for (const std::int64_t block : {1, 4}) {
        const auto fused = [&](const char* name, Sizes weight, Sizes x, Sizes pads) {
          cases.push_back({name, std::move(weight), std::move(x), {{1, 1}, std::move(pads)}, 0.3, block, adds, activation});
        };
        fused("fused 3x3", {8, 6, 3, 3}, {2, 6, 7, 9}, {1, 1, 1, 1});
        fused("fused 1x1", {8, 6, 1, 1}, {2, 6, 16, 16}, {0, 0, 0, 0});
        fused("fused row", {24, 30}, {1, 30}, {});
        fused("fused rows", {24, 30}, {9, 30}, {});
      }
  const auto draw = [](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(randomness);
  };
  for (int i = 0; i < random; ++i) {
    const std::int64_t group = draw(1, 3), kh = draw(1, 4), kw = draw(1, 4), channels = draw(1, 9);
    const Window window{{draw(1, 3), draw(1, 3)}, {draw(0, 3), draw(0, 3), draw(0, 3), draw(0, 3)}, {draw(1, 3), draw(1, 3)}, group};
    const Sizes x{draw(1, 2), channels * group, draw((kh - 1) * window.dilations[0] + 1, 30), draw((kw - 1) * window.dilations[1] + 1, 30)};
    const char* activations[] = {"", "Relu", "Clip"};
    cases.push_back({"random", {group * draw(1, 9), channels, kh, kw}, x, window, 0.05 * static_cast<double>(draw(0, 20)),
                     draw(0, 1) ? 4 : 1, draw(0, 1) == 1, activations[draw(0, 2)]});
  }
  return cases;
}

// Several threads share a node while others make and close their own: the number of wrong answers.
int crowd() {
  const Floats weight(48 * 32 * 9, 0.25f), x = normal(32 * 20 * 20);
  const auto [values, gaps] = encode(weight);
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  ort::KernelInfo info;
  info.integers = {{"weight_shape", {48, 32, 3, 3}}};
  info.constants[1] = stand_in::tensor(ort::kFloat, {count}, values);
  info.constants[2] = stand_in::tensor(ort::kUint8, {count}, gaps);
  info.constants[3] = stand_in::tensor(ort::kFloat, {48}, normal(48));
  const std::map<std::size_t, ort::Value> inputs{{0, stand_in::tensor(ort::kFloat, {1, 32, 20, 20}, x)}};
  const stand_in::Node shared("SparseConvRelu", info);
  ort::Value wanted;
  std::atomic<int> wrong{shared.run(inputs, 1, wanted).empty() ? 0 : 1};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int run = 0; run < 5; ++run) {
        const stand_in::Node own("SparseConvRelu", info);
        for (const stand_in::Node* node : {&own, &shared}) {
          ort::Value got;
          if (!node->run(inputs, 2, got).empty() || got.bytes != wanted.bytes) ++wrong;
        }
      }
    });
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

// Files that must be refused: what is accepted.
int hostile() {
  const Sizes weight{8, 6, 3, 3};
  const std::map<std::string, std::function<void(ort::KernelInfo&)>> attacks{
      {"positions outside", [](ort::KernelInfo& i) { i.constants[2] = stand_in::tensor<std::uint8_t>(ort::kUint8, {4}, {255, 255, 255, 255}); }},
      {"positions twice", [](ort::KernelInfo& i) { i.constants[2] = stand_in::tensor<std::uint8_t>(ort::kUint8, {4}, {1, 0, 1, 1}); }},
      {"fewer gaps", [](ort::KernelInfo& i) { i.constants[2] = stand_in::tensor<std::uint8_t>(ort::kUint8, {3}, {1, 1, 1}); }},
      {"not a number", [](ort::KernelInfo& i) { i.constants[1] = stand_in::tensor<float>(ort::kFloat, {4}, {1, NAN, 1, 1}); }},
      {"integers for values", [](ort::KernelInfo& i) { i.constants[1] = stand_in::tensor<std::uint8_t>(ort::kUint8, {4}, {1, 1, 1, 1}); }},
      {"no values", [](ort::KernelInfo& i) { i.constants.erase(1); }},
      {"a size of zero", [](ort::KernelInfo& i) { i.integers["weight_shape"] = {8, 0, 3, 3}; }},
      {"an overflowing size", [](ort::KernelInfo& i) { i.integers["weight_shape"] = {std::int64_t{1} << 62, 8, 3, 3}; }},
      {"no stride", [](ort::KernelInfo& i) { i.integers["strides"] = {0, 1}; }},
      {"no groups", [](ort::KernelInfo& i) { i.integers["group"] = {0}; }},
  };
  int accepted = 0;
  for (const auto& [name, attack] : attacks) {
    ort::KernelInfo info;
    info.integers = {{"weight_shape", weight}};
    info.constants[1] = stand_in::tensor<float>(ort::kFloat, {4}, {1, 2, 3, 4});
    info.constants[2] = stand_in::tensor<std::uint8_t>(ort::kUint8, {4}, {0, 1, 2, 255});
    info.constants[3] = stand_in::tensor<float>(ort::kFloat, {8}, Floats(8));
    if (const stand_in::Node whole("SparseConv", info); !whole.error().empty()) {
      std::printf("the file to attack is refused: %s\n", whole.error().c_str());
      return 1;
    }
    attack(info);
    if (const stand_in::Node node("SparseConv", info); node.error().empty()) {
      std::printf("accepted: %s\n", name.c_str());
      ++accepted;
    }
  }
  return accepted;
}

// The same without what the int8 operators do not fuse.
std::vector<Case> byte_cases(int random) {
  std::vector<Case> cases;
  for (const Case& c : float_cases(random))
    if (!c.adds && std::string(c.activation) != "Relu") cases.push_back(c);
  return cases;
}

// All cases of a family on the instruction set that the environment names; how many were wrong.
int run_cases(const std::string& title, const std::vector<Case>& cases, double (*check)(const Case&), double allowed) {
  double worst = 0.0;
  int wrong = 0;
  for (const Case& c : cases) {
    try {
      const double error = check(c);
      worst = std::max(worst, error);
      if (error > allowed) throw std::runtime_error("it is off by " + std::to_string(error));
    } catch (const std::runtime_error& error) {
      ++wrong;
      std::printf("%s: %s: %s\n", title.c_str(), c.text().c_str(), error.what());
    }
  }
  std::printf("%s: %zu cases, %d wrong, largest error %.1e (allowed: %.0e)\n", title.c_str(), cases.size(), wrong, worst, allowed);
  return wrong;
}

}  // namespace

int main(int count, char** arguments) {
  const int random = count > 1 ? std::atoi(arguments[1]) : 200;
  int wrong = 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (stand_in::register_library(ort::kApiVersion - 1).empty()) {
    ++wrong;
    std::puts("a runtime that is too old is not refused");
  }
  const std::string refused = stand_in::register_library(ort::kApiVersion);
  if (!refused.empty()) {
    std::puts(refused.c_str());
    return 1;
  }
  std::string names = RelRepInstructionSets();
  for (std::size_t end; !names.empty(); names = end == std::string::npos ? "" : names.substr(end + 1)) {
    end = names.find(',');
    const std::string isa = names.substr(0, end);
    setenv("RELREP_KERNELS_ISA", isa.c_str(), 1);
    randomness.seed(7);
    wrong += run_cases(isa + " fp32", float_cases(random), check_floats, kFloatTolerance);
    wrong += run_cases(isa + " int8", byte_cases(random), check_bytes, kByteTolerance);
    const int crowded = crowd();
    if (crowded != 0) std::printf("%s: %d wrong answers where threads share a node\n", isa.c_str(), crowded);
    wrong += crowded + hostile();
  }
  return wrong == 0 ? 0 : 1;
}
