// Greedy answers of one graph under several tasks: onnxruntime's adapter files alone make the difference.
//
//     g++ -std=c++17 -O2 tasks.cpp -I ORT/include -L ORT/lib -l onnxruntime -o tasks
//     ./tasks BUNDLE/model.onnx 464,2068,7586 20 BUNDLE/adapters/headline.onnx_adapter BUNDLE/adapters/json.onnx_adapter
//
// prints a line of new token ids for the bare model, then one for each adapter. ORT is a release of onnxruntime, 1.20 or
// later; the bundle is one of `prefix-export build --adapters onnx`.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr uint32_t kAdaptersSince = 20;  // of onnxruntime's API
const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

// What the API makes through its last argument, released with the scope.
template <typename T, typename Make>
Owned<T> made(void (*release)(T*), Make make) {
  T* found = nullptr;
  check(make(&found));
  return Owned<T>(found, release);
}

class Graph {
 public:
  explicit Graph(const char* path)
      : env_(made<OrtEnv>(api->ReleaseEnv, [](OrtEnv** out) { return api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "tasks", out); })),
        memory_(made<OrtMemoryInfo>(api->ReleaseMemoryInfo, [](OrtMemoryInfo** out) {
          return api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out);
        })),
        options_(made<OrtSessionOptions>(api->ReleaseSessionOptions, api->CreateSessionOptions)),
        session_(made<OrtSession>(api->ReleaseSession, [&](OrtSession** out) {
          return api->CreateSession(env_.get(), path, options_.get(), out);
        })) {
    OrtAllocator* allocator = nullptr;
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    size_t count = 0;
    check(api->SessionGetOutputCount(session_.get(), &count));
    for (size_t index = 0; index < count; ++index) {
      char* name = nullptr;
      check(api->SessionGetOutputName(session_.get(), index, allocator, &name));
      outputs_.emplace_back(name);
      check(api->AllocatorFree(allocator, name));
    }
  }

  // New tokens behind a prompt, from no past at all: nothing says that there is a prefix but the options of the runs.
  std::vector<int64_t> generate(const std::vector<int64_t>& prompt, size_t count, const OrtLoraAdapter* adapter) const {
    const auto options = made<OrtRunOptions>(api->ReleaseRunOptions, api->CreateRunOptions);
    if (adapter != nullptr) check(api->RunOptionsAddActiveLoraAdapter(options.get(), adapter));
    std::vector<int64_t> ids = prompt, found;
    std::vector<Owned<OrtValue>> past;
    int64_t length = 0;
    while (found.size() < count) {
      std::vector<int64_t> positions(ids.size()), mask(length + ids.size(), 1);
      for (int64_t& position : positions) position = length++;
      std::vector<Owned<OrtValue>> outputs = run(ids, mask, positions, past, options.get());
      found.push_back(most_likely(outputs[0].get()));
      outputs.erase(outputs.begin());
      past = std::move(outputs);
      ids = {found.back()};
    }
    return found;
  }

 private:
  std::vector<Owned<OrtValue>> run(std::vector<int64_t>& ids, std::vector<int64_t>& mask, std::vector<int64_t>& positions,
                                   const std::vector<Owned<OrtValue>>& past, const OrtRunOptions* options) const {
    const Owned<OrtValue> tensors[] = {tensor(ids), tensor(mask), tensor(positions)};
    std::vector<std::string> names = {"input_ids", "attention_mask", "position_ids"};
    std::vector<const OrtValue*> values = {tensors[0].get(), tensors[1].get(), tensors[2].get()};
    for (size_t index = 0; index < past.size(); ++index) {  // present.0.key goes on as past_key_values.0.key
      names.push_back("past_key_values" + outputs_[index + 1].substr(std::string("present").size()));
      values.push_back(past[index].get());
    }
    std::vector<const char*> input_names, output_names;
    for (const std::string& name : names) input_names.push_back(name.c_str());
    for (const std::string& name : outputs_) output_names.push_back(name.c_str());
    std::vector<OrtValue*> results(outputs_.size(), nullptr);
    check(api->Run(session_.get(), options, input_names.data(), values.data(), values.size(), output_names.data(),
                   output_names.size(), results.data()));
    std::vector<Owned<OrtValue>> owned;
    for (OrtValue* result : results) owned.emplace_back(result, api->ReleaseValue);
    return owned;
  }

  Owned<OrtValue> tensor(std::vector<int64_t>& numbers) const {
    const int64_t shape[] = {1, static_cast<int64_t>(numbers.size())};
    return made<OrtValue>(api->ReleaseValue, [&](OrtValue** out) {
      return api->CreateTensorWithDataAsOrtValue(memory_.get(), numbers.data(), numbers.size() * sizeof(int64_t), shape, 2,
                                                 ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, out);
    });
  }

  // Of the last row of logits [1, sequence, vocabulary].
  static int64_t most_likely(OrtValue* logits) {
    const auto info = made<OrtTensorTypeAndShapeInfo>(api->ReleaseTensorTypeAndShapeInfo, [&](OrtTensorTypeAndShapeInfo** out) {
      return api->GetTensorTypeAndShape(logits, out);
    });
    int64_t shape[3];
    check(api->GetDimensions(info.get(), shape, 3));
    void* data = nullptr;
    check(api->GetTensorMutableData(logits, &data));
    const float* row = static_cast<const float*>(data) + (shape[1] - 1) * shape[2];
    return std::max_element(row, row + shape[2]) - row;
  }

  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSessionOptions> options_;
  Owned<OrtSession> session_;
  std::vector<std::string> outputs_;
};

std::vector<int64_t> numbers(const char* text) {
  std::vector<int64_t> found;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) found.push_back(std::stoll(part));
  return found;
}

void print(const std::vector<int64_t>& tokens) {
  for (size_t index = 0; index < tokens.size(); ++index) std::printf(index ? ",%lld" : "%lld", static_cast<long long>(tokens[index]));
  std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: tasks MODEL TOKEN,TOKEN,... NEW_TOKENS [ADAPTER ...]\n");
    return 2;
  }
  api = OrtGetApiBase()->GetApi(kAdaptersSince);
  if (api == nullptr) {
    std::fprintf(stderr, "expected onnxruntime 1.20 or later, found %s\n", OrtGetApiBase()->GetVersionString());
    return 1;
  }
  try {
    const Graph graph(arguments[1]);
    const std::vector<int64_t> prompt = numbers(arguments[2]);
    const size_t new_tokens = std::stoul(arguments[3]);
    print(graph.generate(prompt, new_tokens, nullptr));
    for (int index = 4; index < count; ++index) {
      const auto adapter = made<OrtLoraAdapter>(api->ReleaseLoraAdapter, [&](OrtLoraAdapter** out) {
        return api->CreateLoraAdapter(arguments[index], nullptr, out);
      });
      print(graph.generate(prompt, new_tokens, adapter.get()));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
