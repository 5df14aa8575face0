#include "session.h"

#include <atomic>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

namespace relrep {
namespace {

struct Buffer {
  void* data = nullptr;
  std::int64_t words = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }

  void* at_least(std::int64_t wanted) {
    if (wanted > words) {
      std::free(data);
      data = nullptr;
      words = 0;
      const std::size_t bytes = (static_cast<std::size_t>(wanted) * 4 + 63) / 64 * 64;
      data = std::aligned_alloc(64, bytes);
      if (data == nullptr) throw std::bad_alloc();
      std::memset(data, 0, bytes);  // garbage would be read into lanes that are dropped, and denormals there are slow
      words = wanted;
    }
    return data;
  }
};

struct Job {
  const std::function<void(std::int64_t, std::int64_t)>& work;
  std::int64_t tasks, chunks;
  std::atomic<bool> failed{false};
};

void run_chunk(void* data, std::size_t index) {
  Job& job = *static_cast<Job*>(data);
  const std::int64_t i = static_cast<std::int64_t>(index);
  try {
    job.work(job.tasks * i / job.chunks, job.tasks * (i + 1) / job.chunks);
  } catch (const std::bad_alloc&) {  // must not leave a thread of the runtime's pool
    job.failed = true;
  }
}

}  // namespace

Tensor read_tensor(ort::Table api, const ort::Value* value, ort::ElementType type, const char* name) {
  if (value == nullptr) throw Refusal(std::string("input '") + name + "' is missing");
  ort::ShapeInfo* info = nullptr;
  check(ort::shape_info(api, value, &info));
  struct Release {
    ort::Table api;
    ort::ShapeInfo* info;
    ~Release() { ort::release_shape_info(api, info); }
  } release{api, info};
  int found = 0;
  std::size_t rank = 0;
  check(ort::element_type(api, info, &found));
  if (found != type) throw Refusal(std::string("input '") + name + "' has the wrong element type");
  check(ort::rank(api, info, &rank));
  Tensor tensor{nullptr, std::vector<std::int64_t>(rank)};
  check(ort::dims(api, info, tensor.dims.data(), rank));
  check(ort::data(api, value, &tensor.data));
  return tensor;
}

Tensor constant_tensor(ort::Table api, const ort::KernelInfo* info, std::size_t index, ort::ElementType type, const char* name) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(ort::constant_input(api, info, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr)
    throw Refusal(std::string("input '") + name + "' must be an initializer that no graph input overrides");
  return read_tensor(api, value, type, name);
}

Tensor input_tensor(ort::Table api, const ort::KernelContext* context, std::size_t index, ort::ElementType type, const char* name) {
  const ort::Value* value = nullptr;
  check(ort::input(api, context, index, &value));
  return read_tensor(api, value, type, name);
}

void* output_data(ort::Table api, ort::KernelContext* context, const std::vector<std::int64_t>& dims) {
  ort::Value* value = nullptr;
  void* data = nullptr;
  check(ort::output(api, context, std::size_t{0}, dims.data(), dims.size(), &value));
  check(ort::data(api, value, &data));
  return data;
}

void check_inputs(ort::Table api, const ort::KernelContext* context, std::size_t wanted) {
  std::size_t count = 0;
  check(ort::input_count(api, context, &count));
  if (count != wanted) throw Refusal("it has " + std::to_string(count) + " inputs, not " + std::to_string(wanted));
}

void check_lists(const Tensor& values, const Tensor& gaps, const Tensor& bias, std::int64_t rows) {
  if (values.dims.size() != 1 || gaps.dims != values.dims)
    throw Refusal("values [" + describe(values.dims) + "] and gaps [" + describe(gaps.dims) + "] must be two lists of one length");
  if (bias.dims != std::vector<std::int64_t>{rows})
    throw Refusal("bias is [" + describe(bias.dims) + "], not [" + std::to_string(rows) + "]");
}

std::vector<std::int64_t> integers(ort::Table api, const ort::KernelInfo* info, const char* name,
                                   std::vector<std::int64_t> otherwise) {
  std::size_t count = 0;
  ort::Status* absent = ort::attribute(api, info, name, static_cast<std::int64_t*>(nullptr), &count);
  if (absent != nullptr) {
    ort::release_status(api, absent);
    return otherwise;
  }
  if (count > 16) throw Refusal(std::string("attribute '") + name + "' has " + std::to_string(count) + " values");
  std::vector<std::int64_t> values(count);
  if (count > 0) check(ort::attribute(api, info, name, values.data(), &count));
  return values;
}

std::int64_t integer(ort::Table api, const ort::KernelInfo* info, const char* name, std::int64_t otherwise) {
  std::int64_t value = otherwise;
  ort::Status* absent = ort::attribute(api, info, name, &value);
  if (absent != nullptr) {
    ort::release_status(api, absent);
    return otherwise;
  }
  return value;
}

float number(ort::Table api, const ort::KernelInfo* info, const char* name) {
  float value = 0.0f;
  check(ort::attribute(api, info, name, &value));
  return value;
}

void* scratch(int slot, std::int64_t words) {
  thread_local Buffer buffers[2];
  return buffers[slot].at_least(words);
}

void parallel(ort::Table api, const ort::KernelContext* context, std::int64_t tasks, std::int64_t chunks,
              const std::function<void(std::int64_t, std::int64_t)>& work) {
  if (chunks <= 1) {
    work(0, tasks);
    return;
  }
  Job job{work, tasks, chunks};
  check(ort::parallel_for(api, context, run_chunk, static_cast<std::size_t>(chunks), 0, &job));
  if (job.failed) throw std::bad_alloc();
}

ort::Status* guarded(ort::Table api, const char* op, const std::function<void()>& body) {
  try {
    body();
    return nullptr;
  } catch (const OrtError& error) {
    return error.status;
  } catch (const Refusal& refusal) {
    return ort::create_status(api, ort::kInvalidArgument, (std::string("relrep.") + op + ": " + refusal.what()).c_str());
  } catch (const std::exception& error) {
    return ort::create_status(api, ort::kFail, (std::string("relrep.") + op + ": " + error.what()).c_str());
  }
}

}  // namespace relrep
