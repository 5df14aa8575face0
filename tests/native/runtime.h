// A stand-in for ONNX Runtime: just what a node of the kernels' library needs to be made and run, with threads of its own.
//
// The library is entered as ONNX Runtime enters it (RegisterCustomOps, then the callbacks of each operator), so that its own checks
// and its private declaration of the ABI are under test on machines that have no ONNX Runtime.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "ort_abi.h"

// The runtime's objects, which the library only ever holds by pointer.
namespace relrep::ort {

struct Status {
  std::string text;
};

struct ShapeInfo {
  int type;
  std::vector<std::int64_t> dims;
};

struct Value {
  ShapeInfo shape;
  std::vector<std::uint8_t> bytes;  // an allocation of just this size: sanitizers watch its ends
};

struct KernelInfo {
  std::map<std::string, std::vector<std::int64_t>> integers;
  std::map<std::string, float> numbers;
  std::map<std::size_t, Value> constants;  // by the input's index
};

struct KernelContext {
  std::vector<const Value*> inputs;
  Value output;
  int threads;
};

}  // namespace relrep::ort

namespace relrep::stand_in {

template <class T>
ort::Value tensor(int type, std::vector<std::int64_t> dims, const std::vector<T>& elements) {
  ort::Value value{{type, std::move(dims)}, std::vector<std::uint8_t>(elements.size() * sizeof(T))};
  if (!elements.empty()) std::memcpy(value.bytes.data(), elements.data(), value.bytes.size());
  return value;
}

template <class T>
std::vector<T> elements(const ort::Value& value) {
  std::vector<T> out(value.bytes.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), value.bytes.data(), value.bytes.size());
  return out;
}

// Registers the library's operators with a runtime of this version; its answer, empty where it is content.
std::string register_library(std::uint32_t version);

// Throws std::out_of_range where the library has no such operator.
const ort::CustomOp& find(const std::string& name);

// One node of a session.
class Node {
 public:
  // `error` says why the library refused the node; then it cannot run.
  Node(const std::string& name, ort::KernelInfo info);
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // Inputs by index, constants among them; safe to call from several threads.  The library's message, or empty and the output.
  std::string run(const std::map<std::size_t, ort::Value>& inputs, int threads, ort::Value& output) const;

  const std::string& error() const { return error_; }

 private:
  const ort::CustomOp& op_;
  ort::KernelInfo info_;
  void* kernel_ = nullptr;
  std::string error_;
};

}  // namespace relrep::stand_in
