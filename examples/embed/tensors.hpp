// Passes tensors between C++ and Python by DLPack, without copies.
#pragma once

#include <ATen/dlpack.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "python.hpp"

// Memory that C++ allocates, and that Python may read and write. It is freed when neither uses it any more.
struct Buffer {
    explicit Buffer(std::vector<std::int64_t> sizes) : shape(std::move(sizes)) {
        std::size_t count = 1;
        for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
        numbers.resize(count);
    }
    std::vector<std::int64_t> shape;
    std::vector<float> numbers;
};

// Returns a torch tensor that views this buffer. The GIL must be held.
inline python::Object to_torch(const std::shared_ptr<Buffer>& buffer) {
    struct Context {
        DLManagedTensor tensor;
        std::shared_ptr<Buffer> buffer;
    };
    auto context = std::make_unique<Context>(Context{{}, buffer});
    context->tensor.dl_tensor.data = buffer->numbers.data();
    context->tensor.dl_tensor.device = {kDLCPU, 0};
    context->tensor.dl_tensor.ndim = static_cast<std::int32_t>(buffer->shape.size());
    context->tensor.dl_tensor.dtype = {kDLFloat, 32, 1};
    context->tensor.dl_tensor.shape = buffer->shape.data();  // no strides: C order
    context->tensor.manager_ctx = context.get();
    context->tensor.deleter = [](DLManagedTensor* self) { delete static_cast<Context*>(self->manager_ctx); };
    const auto destroy = [](PyObject* capsule) {  // a capsule that was consumed has another name
        if (PyCapsule_IsValid(capsule, "dltensor")) {
            auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
            tensor->deleter(tensor);
        }
    };
    const python::Object capsule = python::checked(PyCapsule_New(&context->tensor, "dltensor", destroy));
    context.release();  // now owned by the capsule
    return python::call(python::import("torch"), "from_dlpack", capsule);
}

// A tensor whose memory Python owns; this keeps it alive. Destroy it before the interpreter; the GIL is not needed.
struct CallDeleter {
    void operator()(DLManagedTensor* tensor) const { tensor->deleter(tensor); }
};
using ManagedTensor = std::unique_ptr<DLManagedTensor, CallDeleter>;

// Returns a view of a torch tensor. The GIL must be held.
inline ManagedTensor from_torch(const python::Object& tensor) {
    const python::Object capsule = python::call(tensor, "__dlpack__", "{}");
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.get(), "dltensor"));
    if (managed == nullptr || PyCapsule_SetName(capsule.get(), "used_dltensor") != 0) throw python::Error();
    return ManagedTensor(managed);
}

// Returns the address of a torch tensor's elements. The GIL must be held.
inline const void* data_ptr(const python::Object& tensor) {
    const python::Object address = python::call(tensor, "data_ptr", "{}");
    return PyLong_AsVoidPtr(address.get());
}
