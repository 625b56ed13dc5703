// Tensors between C++ and Python by DLPack: both see the same memory, nothing is copied.
#pragma once

#include <ATen/dlpack.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "python.hpp"

// Memory of this program, which Python may read and write. It lives as long as either of the two uses it.
struct Buffer {
    explicit Buffer(std::vector<std::int64_t> sizes) : shape(std::move(sizes)) {
        std::size_t count = 1;
        for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
        numbers.resize(count);
    }
    std::vector<std::int64_t> shape;
    std::vector<float> numbers;
};

// A torch tensor that is this buffer. Needs the GIL.
inline python::Object lend(const std::shared_ptr<Buffer>& buffer) {
    struct Lent {
        DLManagedTensor tensor;
        std::shared_ptr<Buffer> buffer;
    };
    auto lent = std::make_unique<Lent>(Lent{{}, buffer});
    lent->tensor.dl_tensor.data = buffer->numbers.data();
    lent->tensor.dl_tensor.device = {kDLCPU, 0};
    lent->tensor.dl_tensor.ndim = static_cast<std::int32_t>(buffer->shape.size());
    lent->tensor.dl_tensor.dtype = {kDLFloat, 32, 1};
    lent->tensor.dl_tensor.shape = buffer->shape.data();  // no strides: in C order
    lent->tensor.manager_ctx = lent.get();
    lent->tensor.deleter = [](DLManagedTensor* self) { delete static_cast<Lent*>(self->manager_ctx); };
    const auto destroy = [](PyObject* capsule) {  // only if nobody took the tensor: it is renamed when taken
        if (PyCapsule_IsValid(capsule, "dltensor")) {
            auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
            tensor->deleter(tensor);
        }
    };
    const python::Object capsule = python::checked(PyCapsule_New(&lent->tensor, "dltensor", destroy));
    lent.release();  // the capsule's now
    return python::call(python::import("torch"), "from_dlpack", capsule);
}

// A tensor of Python's: its memory lives until this does. Destroy it before the interpreter; it needs no GIL.
struct Release {
    void operator()(DLManagedTensor* tensor) const { tensor->deleter(tensor); }
};
using Taken = std::unique_ptr<DLManagedTensor, Release>;

// Takes a torch tensor over. Needs the GIL.
inline Taken take(const python::Object& tensor) {
    const python::Object capsule = python::call(tensor, "__dlpack__", "{}");
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.get(), "dltensor"));
    if (managed == nullptr || PyCapsule_SetName(capsule.get(), "used_dltensor") != 0) throw python::Error();
    return Taken(managed);
}

// Where a torch tensor's numbers are. Needs the GIL.
inline const void* address(const python::Object& tensor) {
    const python::Object number = python::call(tensor, "data_ptr", "{}");
    return PyLong_AsVoidPtr(number.get());
}
