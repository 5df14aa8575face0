// The few functions of ONNX Runtime's C ABI that the kernels use, declared by their place in its table.
//
// `OrtApi` is a struct of function pointers that only ever grows at its end, so a function's place is fixed for good and version 17
// of the table (the first with KernelContext_ParallelFor) serves every later runtime.  No header of ONNX Runtime is needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace relrep::ort {

struct Status;
struct CustomOpDomain;
struct SessionOptions;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;

using Table = void* const*;

struct ApiBase {
  Table (*get_api)(std::uint32_t version);
  const char* (*get_version_string)();
};

enum Error : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6 };
enum Characteristic : int { kRequired = 0 };

constexpr std::uint32_t kApiVersion = 17;     // KernelContext_ParallelFor
constexpr std::uint32_t kCustomOpVersion = 16;  // CreateKernelV2 and KernelComputeV2, which may fail

// A custom operator as version 16 lays it out.  Its callbacks get the struct itself, so what follows `base` is ours.
struct CustomOp {
  std::uint32_t version;
  void* (*create_kernel)(const CustomOp*, Table, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, std::size_t);
  std::size_t (*get_input_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, std::size_t);
  std::size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*get_input_characteristic)(const CustomOp*, std::size_t);
  int (*get_output_characteristic)(const CustomOp*, std::size_t);
  int (*get_input_memory)(const CustomOp*, std::size_t);
  int (*get_variadic_input_least)(const CustomOp*);
  int (*get_variadic_input_same)(const CustomOp*);
  int (*get_variadic_output_least)(const CustomOp*);
  int (*get_variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Table, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
};

template <class... Arguments>
Status* call(Table table, std::size_t place, Arguments... arguments) {
  return reinterpret_cast<Status* (*)(Arguments...)>(table[place])(arguments...);
}

inline Status* create_status(Table t, Error code, const char* text) { return call(t, 0, static_cast<int>(code), text); }
inline Status* create_domain(Table t, const char* name, CustomOpDomain** out) { return call(t, 26, name, out); }
inline Status* add_op(Table t, CustomOpDomain* domain, const CustomOp* op) { return call(t, 27, domain, op); }
inline Status* add_domain(Table t, SessionOptions* options, CustomOpDomain* domain) { return call(t, 28, options, domain); }
inline Status* data(Table t, const Value* value, void** out) { return call(t, 51, value, out); }
inline Status* element_type(Table t, const ShapeInfo* info, int* out) { return call(t, 60, info, out); }
inline Status* rank(Table t, const ShapeInfo* info, std::size_t* out) { return call(t, 61, info, out); }
inline Status* dims(Table t, const ShapeInfo* info, std::int64_t* out, std::size_t n) { return call(t, 62, info, out, n); }
inline Status* shape_info(Table t, const Value* value, ShapeInfo** out) { return call(t, 65, value, out); }
inline Status* attribute(Table t, const KernelInfo* info, const char* name, float* out) { return call(t, 85, info, name, out); }
inline Status* attribute(Table t, const KernelInfo* info, const char* name, std::int64_t* out) {
  return call(t, 86, info, name, out);
}
inline Status* input_count(Table t, const KernelContext* context, std::size_t* out) { return call(t, 88, context, out); }
inline Status* input(Table t, const KernelContext* context, std::size_t index, const Value** out) {
  return call(t, 90, context, index, out);
}
inline Status* output(Table t, KernelContext* context, std::size_t index, const std::int64_t* shape, std::size_t n, Value** out) {
  return call(t, 91, context, index, shape, n, out);
}
inline void release_status(Table t, Status* status) { reinterpret_cast<void (*)(Status*)>(t[93])(status); }
inline void release_shape_info(Table t, ShapeInfo* info) { reinterpret_cast<void (*)(ShapeInfo*)>(t[99])(info); }
inline Status* attribute(Table t, const KernelInfo* info, const char* name, std::int64_t* out, std::size_t* n) {
  return call(t, 163, info, name, out, n);
}
inline Status* constant_input(Table t, const KernelInfo* info, std::size_t index, int* is_constant, const Value** out) {
  return call(t, 249, info, index, is_constant, out);
}
inline Status* parallel_for(Table t, const KernelContext* context, void (*work)(void*, std::size_t), std::size_t count,
                            std::size_t batches, void* data) {
  return call(t, 274, context, work, count, batches, data);
}

}  // namespace relrep::ort
