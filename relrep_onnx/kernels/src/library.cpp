// What the library shows: the entry point that ONNX Runtime looks up, and the names of the instruction sets.
#include <mutex>

#include "dispatch.h"
#include "operators.h"
#include "session.h"

#if defined(_WIN32)
#define RELREP_EXPORT extern "C" __declspec(dllexport)
#else
#define RELREP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr const char* kDomain = "relrep";

// Domains must outlive every session, and sessions share them: one, made on the first call.
relrep::ort::CustomOpDomain* shared_domain(relrep::ort::Table api) {
  static std::mutex mutex;
  static relrep::ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    relrep::ort::CustomOpDomain* made = nullptr;
    relrep::check(relrep::ort::create_domain(api, kDomain, &made));
    for (std::size_t i = 0; i < relrep::operator_count(); ++i) relrep::check(relrep::ort::add_op(api, made, relrep::operator_at(i)));
    domain = made;
  }
  return domain;
}

}  // namespace

RELREP_EXPORT relrep::ort::Status* RegisterCustomOps(relrep::ort::SessionOptions* options, const relrep::ort::ApiBase* base) {
  const relrep::ort::Table api = base->get_api(relrep::ort::kApiVersion);
  if (api == nullptr)  // CreateStatus is as old as the table itself
    return relrep::ort::create_status(base->get_api(1), relrep::ort::kFail,
                                      "relrep: this ONNX Runtime is older than 1.17, which the sparse kernels need");
  return relrep::guarded(api, "RegisterCustomOps",
                         [&] { relrep::check(relrep::ort::add_domain(api, options, shared_domain(api))); });
}

RELREP_EXPORT const char* RelRepInstructionSets() { return relrep::instruction_set_names(); }
