// The kernels against plain loops over dense weights, for every instruction set this processor has, without ONNX Runtime.
//
//   grid [random cases]        prints a line per instruction set; exit code 1 where an answer is wrong
//
// Each case runs with one thread and with three, which must agree to the bit.  A family of operators is a function that checks one
// case and a list of its cases; `main` names them.
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

constexpr float kLow = -0.5f, kHigh = 0.75f;
constexpr double kTolerance = 1e-4;  // of the largest output
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
  std::int64_t block = 1;  // neighbouring output channels that share their positions
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

// The nonzeros and the distances between their positions; at least one entry.
std::pair<Floats, std::vector<std::uint8_t>> encode(const Floats& weight) {
  Floats values;
  std::vector<std::uint8_t> gaps;
  std::size_t last = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) {
    if (weight[i] == 0.0f) continue;
    for (; i - last > 255; last += 255) {
      values.push_back(0.0f);
      gaps.push_back(255);
    }
    values.push_back(weight[i]);
    gaps.push_back(static_cast<std::uint8_t>(i - last));
    last = i;
  }
  if (values.empty()) return {{0.0f}, {0}};
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

std::vector<double> dense_conv(const Case& c, const Floats& weight, const Floats& x, const Floats& bias) {
  const Sizes dims = conv_dims(c);
  const std::int64_t channels = c.weight[1], kh = c.weight[2], kw = c.weight[3], rows = c.weight[0] / c.window.group;
  std::vector<double> y(static_cast<std::size_t>(product(dims)));
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
                sum += static_cast<double>(weight[((r * channels + ch) * kh + ky) * kw + kx]) * x[from];
              }
          y[at] = sum;
        }
  return y;
}

std::vector<double> dense_gemm(const Case& c, const Floats& weight, const Floats& x, const Floats& bias) {
  const std::int64_t rows = c.weight[0], cols = c.weight[1], batch = product(c.x) / cols;
  std::vector<double> y(static_cast<std::size_t>(batch * rows));
  for (std::int64_t n = 0; n < batch; ++n)
    for (std::int64_t r = 0; r < rows; ++r) {
      double sum = bias[r];
      for (std::int64_t i = 0; i < cols; ++i) sum += static_cast<double>(weight[r * cols + i]) * x[n * cols + i];
      y[n * rows + r] = sum;
    }
  return y;
}

// ------------------------------------------------------------------------------------------------------ a case of one family

// The largest error as a share of the largest output; throws std::runtime_error where the library refuses or its threads disagree.
double check(const Case& c) {
  const bool conv = c.weight.size() == 4;
  const Floats weight = sparse_weight(c), x = normal(product(c.x)), bias = normal(c.weight[0]);
  const auto [values, gaps] = encode(weight);
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  ort::KernelInfo info;
  info.integers["weight_shape"] = c.weight;
  info.numbers = {{"min", kLow}, {"max", kHigh}};
  if (conv) {
    info.integers["strides"] = c.window.strides;
    info.integers["pads"] = c.window.pads;
    info.integers["dilations"] = c.window.dilations;
    info.integers["group"] = {c.window.group};
  }
  info.constants[1] = stand_in::tensor(ort::kFloat, {count}, values);
  info.constants[2] = stand_in::tensor(ort::kUint8, {count}, gaps);
  info.constants[3] = stand_in::tensor(ort::kFloat, {c.weight[0]}, bias);

  std::vector<double> wanted = conv ? dense_conv(c, weight, x, bias) : dense_gemm(c, weight, x, bias);
  Sizes dims = conv ? conv_dims(c) : c.x;
  if (!conv) dims.back() = c.weight[0];
  std::map<std::size_t, ort::Value> inputs{{0, stand_in::tensor(ort::kFloat, c.x, x)}};
  if (c.adds) {
    const Floats residual = normal(product(dims));
    inputs[4] = stand_in::tensor(ort::kFloat, dims, residual);
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] += residual[i];
  }
  const std::string activation = c.activation;
  const double infinity = std::numeric_limits<double>::infinity();
  const double low = activation == "Relu" ? 0.0 : activation == "Clip" ? kLow : -infinity, high = activation == "Clip" ? kHigh : infinity;

  const stand_in::Node node(std::string(conv ? "SparseConv" : "SparseGemm") + (c.adds ? "Add" : "") + activation, info);
  ort::Value one, several;
  std::string error = node.error();
  if (error.empty()) error = node.run(inputs, 1, one);
  if (error.empty()) error = node.run(inputs, kThreads, several);
  if (!error.empty()) throw std::runtime_error(error);
  if (one.shape.dims != dims) throw std::runtime_error("the output is " + describe(one.shape.dims));
  if (one.bytes != several.bytes) throw std::runtime_error("one thread and several disagree");
  const Floats got = stand_in::elements<float>(one);
  double largest = 1e-3, off = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double clamped = std::min(std::max(wanted[i], low), high);
    largest = std::max(largest, std::abs(clamped));
    off = std::max(off, std::isnan(got[i]) ? infinity : std::abs(got[i] - clamped));
  }
  return off / largest;
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
std::vector<Case> floating_point_cases(int random) {
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

// All cases on the instruction set that the environment names; how many were wrong.
int run_cases(const std::string& isa, const std::vector<Case>& cases) {
  double worst = 0.0;
  int wrong = 0;
  for (const Case& c : cases) {
    try {
      const double error = check(c);
      worst = std::max(worst, error);
      if (error > kTolerance) throw std::runtime_error("it is off by " + std::to_string(error));
    } catch (const std::runtime_error& error) {
      ++wrong;
      std::printf("%s: %s: %s\n", isa.c_str(), c.text().c_str(), error.what());
    }
  }
  wrong += crowd() + hostile();
  std::printf("%s: %zu cases, %d wrong, largest error %.1e\n", isa.c_str(), cases.size(), wrong, worst);
  return wrong;
}

}  // namespace

int main(int count, char** arguments) {
  const int random = count > 1 ? std::atoi(arguments[1]) : 200;
  int wrong = 0;
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
    wrong += run_cases(isa, floating_point_cases(random));
  }
  return wrong == 0 ? 0 : 1;
}
