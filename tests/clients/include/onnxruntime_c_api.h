// What examples/adapters/tasks.cpp takes of onnxruntime's C API, for where its own header is not to be had: no package of PyPI,
// npm or Debian 12 brings it. Places in the table never change (onnxruntime's rule: functions are added behind the last one).
// With the real header in CPLUS_INCLUDE_PATH or -I before this folder, that is taken.

#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTensorTypeAndShapeInfo;
struct OrtLoraAdapter;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7 };

struct OrtApi {
  void* from_0[2];
  const char* (*GetErrorMessage)(const OrtStatus*);
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char*, OrtEnv**);
  void* from_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**);
  void* from_8[1];
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,
                    const char* const*, size_t, OrtValue**);
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);
  void* from_11[20];
  OrtStatus* (*SessionGetOutputCount)(const OrtSession*, size_t*);
  void* from_32[5];
  OrtStatus* (*SessionGetOutputName)(const OrtSession*, size_t, OrtAllocator*, char**);
  void* from_38[1];
  OrtStatus* (*CreateRunOptions)(OrtRunOptions**);
  void* from_40[9];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t,
                                               ONNXTensorElementDataType, OrtValue**);
  void* from_50[1];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
  void* from_52[10];
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
  void* from_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
  void* from_66[3];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);
  void* from_70[6];
  OrtStatus* (*AllocatorFree)(OrtAllocator*, void*);
  void* from_77[1];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**);
  void* from_79[13];
  void (*ReleaseEnv)(OrtEnv*);
  void (*ReleaseStatus)(OrtStatus*);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
  void (*ReleaseSession)(OrtSession*);
  void (*ReleaseValue)(OrtValue*);
  void (*ReleaseRunOptions)(OrtRunOptions*);
  void* from_98[1];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
  void (*ReleaseSessionOptions)(OrtSessionOptions*);
  void* from_101[179];
  OrtStatus* (*CreateLoraAdapter)(const char*, OrtAllocator*, OrtLoraAdapter**);
  void* from_281[1];
  void (*ReleaseLoraAdapter)(OrtLoraAdapter*);
  OrtStatus* (*RunOptionsAddActiveLoraAdapter)(OrtRunOptions*, const OrtLoraAdapter*);
};
static_assert(offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void*), "a gap is wrong");
static_assert(offsetof(OrtApi, RunOptionsAddActiveLoraAdapter) == 283 * sizeof(void*), "a gap is wrong");

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t);
  const char* (*GetVersionString)();
};

extern "C" const OrtApiBase* OrtGetApiBase();
