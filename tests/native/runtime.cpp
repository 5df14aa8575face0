#include "runtime.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

namespace relrep::ort {

struct CustomOpDomain {
  std::vector<const CustomOp*> operators;
};

struct SessionOptions {
  std::vector<const CustomOpDomain*> domains;
};

}  // namespace relrep::ort

extern "C" relrep::ort::Status* RegisterCustomOps(relrep::ort::SessionOptions* options, const relrep::ort::ApiBase* base);

namespace relrep::stand_in {
namespace {

using namespace ort;  // every name below is the runtime's

std::size_t element_size(int type) { return type == kFloat ? sizeof(float) : type == 7 ? 8 : type == 6 || type == 12 ? 4 : 1; }

Status* failed(const std::string& text) { return new Status{text}; }

Status* created_status(int, const char* text) { return failed(text); }
Status* created_domain(const char*, CustomOpDomain** out) {
  *out = new CustomOpDomain;  // the library keeps it for good
  return nullptr;
}
Status* added_op(CustomOpDomain* domain, const CustomOp* op) {
  domain->operators.push_back(op);
  return nullptr;
}
Status* added_domain(SessionOptions* options, CustomOpDomain* domain) {
  options->domains.push_back(domain);
  return nullptr;
}
Status* tensor_data(Value* value, void** out) {
  *out = value->bytes.data();
  return nullptr;
}
Status* tensor_type(const ShapeInfo* info, int* out) {
  *out = info->type;
  return nullptr;
}
Status* tensor_rank(const ShapeInfo* info, std::size_t* out) {
  *out = info->dims.size();
  return nullptr;
}
Status* tensor_dims(const ShapeInfo* info, std::int64_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = info->dims.at(i);
  return nullptr;
}
Status* tensor_shape(const Value* value, ShapeInfo** out) {
  *out = new ShapeInfo(value->shape);
  return nullptr;
}
Status* float_attribute(const KernelInfo* info, const char* name, float* out) {
  const auto found = info->numbers.find(name);
  if (found == info->numbers.end()) return failed(std::string("no attribute ") + name);
  *out = found->second;
  return nullptr;
}
Status* integer_attribute(const KernelInfo* info, const char* name, std::int64_t* out) {
  const auto found = info->integers.find(name);
  if (found == info->integers.end() || found->second.size() != 1) return failed(std::string("no attribute ") + name);
  *out = found->second[0];
  return nullptr;
}
Status* integers_attribute(const KernelInfo* info, const char* name, std::int64_t* out, std::size_t* n) {
  const auto found = info->integers.find(name);
  if (found == info->integers.end()) return failed(std::string("no attribute ") + name);
  *n = found->second.size();
  for (std::size_t i = 0; out != nullptr && i < *n; ++i) out[i] = found->second[i];
  return nullptr;
}
Status* count_of_inputs(const KernelContext* context, std::size_t* out) {
  *out = context->inputs.size();
  return nullptr;
}
Status* input_of(const KernelContext* context, std::size_t index, const Value** out) {
  *out = context->inputs.at(index);
  return nullptr;
}
Status* output_of(KernelContext* context, std::size_t, const std::int64_t* dims, std::size_t n, Value** out) {
  Value& value = context->output;
  value.shape.dims.assign(dims, dims + n);
  std::size_t size = element_size(value.shape.type);
  for (const std::int64_t d : value.shape.dims) size *= static_cast<std::size_t>(d);
  value.bytes.assign(size, 0xff);  // not a number where nothing is written
  *out = &value;
  return nullptr;
}
void released_status(Status* status) { delete status; }
void released_shape(ShapeInfo* info) { delete info; }
Status* constant_of(const KernelInfo* info, std::size_t index, int* is_constant, const Value** out) {
  const auto found = info->constants.find(index);
  *is_constant = found != info->constants.end();
  *out = *is_constant ? &found->second : nullptr;
  return nullptr;
}
Status* ran_parallel(const KernelContext* context, void (*work)(void*, std::size_t), std::size_t count, std::size_t, void* data) {
  std::atomic<std::size_t> next{0};
  const auto take = [&] {
    for (std::size_t i; (i = next++) < count;) work(data, i);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < context->threads; ++i) threads.emplace_back(take);
  take();
  for (std::thread& thread : threads) thread.join();
  return nullptr;
}
void missing() {
  std::fputs("the library calls a function of ONNX Runtime that the stand-in lacks\n", stderr);
  std::abort();
}

template <class Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

// The places are ONNX Runtime's, of version 17 of its table; a second opinion on ort_abi.h it is not: that comes from the real one.
Table table() {
  static const std::array<void*, 300> functions = [] {
    std::array<void*, 300> f;
    f.fill(address(missing));
    f[0] = address(created_status);
    f[26] = address(created_domain);
    f[27] = address(added_op);
    f[28] = address(added_domain);
    f[51] = address(tensor_data);
    f[60] = address(tensor_type);
    f[61] = address(tensor_rank);
    f[62] = address(tensor_dims);
    f[65] = address(tensor_shape);
    f[85] = address(float_attribute);
    f[86] = address(integer_attribute);
    f[88] = address(count_of_inputs);
    f[90] = address(input_of);
    f[91] = address(output_of);
    f[93] = address(released_status);
    f[99] = address(released_shape);
    f[163] = address(integers_attribute);
    f[249] = address(constant_of);
    f[274] = address(ran_parallel);
    return f;
  }();
  return functions.data();
}

std::string taken(Status* status) {
  if (status == nullptr) return {};
  const std::string text = status->text.empty() ? "an error without words" : status->text;
  delete status;
  return text;
}

std::uint32_t newest = 0;  // the version that the stand-in claims to be
const char* version_string() { return "stand-in"; }
Table api_of(std::uint32_t version) { return version <= newest ? table() : nullptr; }

std::vector<const CustomOp*>& operators() {
  static std::vector<const CustomOp*> all;
  return all;
}

}  // namespace

std::string register_library(std::uint32_t version) {
  newest = version;
  const ApiBase base{api_of, version_string};
  SessionOptions options;
  const std::string answer = taken(RegisterCustomOps(&options, &base));
  operators().clear();
  for (const CustomOpDomain* domain : options.domains)
    operators().insert(operators().end(), domain->operators.begin(), domain->operators.end());
  return answer;
}

const CustomOp& find(const std::string& name) {
  for (const CustomOp* op : operators())
    if (name == op->get_name(op)) return *op;
  throw std::out_of_range("the library has no operator " + name);
}

Node::Node(const std::string& name, KernelInfo info) : op_(find(name)), info_(std::move(info)) {
  error_ = taken(op_.create_kernel_v2(&op_, table(), &info_, &kernel_));
}

Node::~Node() {
  if (error_.empty()) op_.destroy(kernel_);
}

std::string Node::run(const std::map<std::size_t, Value>& inputs, int threads, Value& output) const {
  KernelContext context{std::vector<const Value*>(op_.get_input_count(&op_)), {{op_.get_output_type(&op_, 0), {}}, {}}, threads};
  for (const auto& [index, value] : info_.constants) context.inputs.at(index) = &value;
  for (const auto& [index, value] : inputs) context.inputs.at(index) = &value;
  std::string error = taken(op_.compute_v2(kernel_, &context));
  output = std::move(context.output);
  return error;
}

}  // namespace relrep::stand_in
