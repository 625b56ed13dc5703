// A CUDA device for torch whose memory is the host's: tensors are on "cuda:0" to "cuda:3", kernels are the CPU's.
//
// It is for tests on machines without a GPU. As on a GPU, an operation on tensors of two devices raises, and so does a
// generator of the host for numbers on a device. Memory that was not written yet is not zero. What is not modelled:
// streams, since every kernel ends before its call returns; limits of memory; and the rounding of CUDA's kernels.
//
//   allocator    the CPU's memory, labelled with the current device
//   guard        the current device of each thread
//   generator    the CPU's generator with other seeds, so that its numbers differ from the host's
//   hooks        what torch asks whether there is CUDA
//   fallback     every operation: check the devices, call the CPU's kernel on the same memory, label the results
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <set>
#include <unordered_map>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Stream;

constexpr int COUNT = 4;
static thread_local DeviceIndex current = 0;

// Allocator

struct HostCudaAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t nbytes) override {
        auto memory = new c10::DataPtr(c10::GetCPUAllocator()->allocate(nbytes));
        if (nbytes) std::memset(memory->get(), 0x7f, nbytes);  // So that a read before the first write shows.
        auto free = [](void* context) { delete static_cast<c10::DataPtr*>(context); };
        return {memory->get(), memory, free, Device(DeviceType::CUDA, current)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, std::size_t nbytes) const override {
        default_copy_data(to, from, nbytes);
    }
};
static HostCudaAllocator allocator;

// Guard

struct HostCudaGuard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return DeviceType::CUDA; }
    Device exchangeDevice(Device device) const override {
        Device before(DeviceType::CUDA, current);
        current = device.index();
        return before;
    }
    Device getDevice() const override { return Device(DeviceType::CUDA, current); }
    void setDevice(Device device) const override { current = device.index(); }
    void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
    Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
    Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
    Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
    Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
    DeviceIndex deviceCount() const noexcept override { return COUNT; }
    void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, HostCudaGuard)

// Generator

struct HostCudaGenerator final : c10::GeneratorImpl {
    explicit HostCudaGenerator(DeviceIndex index)
        : GeneratorImpl(Device(DeviceType::CUDA, index), DispatchKeySet(DispatchKey::CUDA)),
          inner(c10::make_intrusive<at::CPUGeneratorImpl>(1)) {}
    void set_current_seed(uint64_t seed) override {
        this->given_seed = seed;
        inner->set_current_seed(seed ^ 0x5bd1e995);  // The host's numbers are others.
    }
    uint64_t current_seed() const override { return given_seed; }
    uint64_t seed() override {
        set_current_seed(inner->seed());
        return given_seed;
    }
    void set_offset(uint64_t offset) override { inner->set_offset(offset); }
    uint64_t get_offset() const override { return inner->get_offset(); }
    void set_state(const c10::TensorImpl& state) override { inner->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner->get_state(); }
    c10::GeneratorImpl* clone_impl() const override {
        auto* copy = new HostCudaGenerator(device().index());
        copy->given_seed = given_seed;
        copy->inner->set_state(*inner->get_state());
        return copy;
    }

    c10::intrusive_ptr<at::CPUGeneratorImpl> inner;
    uint64_t given_seed = 0;
};

static at::Generator& default_generator(DeviceIndex index) {
    static std::vector<at::Generator> generators = [] {
        std::vector<at::Generator> made;
        for (int i = 0; i < COUNT; i++) {
            made.push_back(at::make_generator<HostCudaGenerator>(i));
            made.back().set_current_seed(0);
        }
        return made;
    }();
    return generators.at(index < 0 ? current : index);
}

static at::Generator inner_of(const at::Generator& generator) {
    return at::Generator(static_cast<HostCudaGenerator*>(generator.unsafeGetGeneratorImpl())->inner);
}

// Hooks

struct CUDAHooks final : at::CUDAHooksInterface {
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex current_device() const override { return current; }
    DeviceIndex getCurrentDevice() const override { return current; }
    void setCurrentDevice(DeviceIndex index) const override { current = index; }
    DeviceIndex deviceCount() const override { return COUNT; }
    int getNumGPUs() const override { return COUNT; }
    const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
    at::Generator getNewGenerator(DeviceIndex index) const override {
        return at::make_generator<HostCudaGenerator>(index < 0 ? current : index);
    }
    c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// The same memory, as tensors of the host and of a device

template <typename Owner>
static void release(void* owner) {
    delete static_cast<Owner*>(owner);
}

static Tensor set_layout(Tensor made, const Tensor& tensor) {
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
    return made;
}

static Tensor with_layout_of(const Tensor& tensor, c10::Storage storage, DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), tensor.dtype());
    return set_layout(std::move(made), tensor);
}

// A view also has the base's other keys, such as those of inference mode.
static Tensor view_of(const Tensor& base, const Tensor& tensor) {
    auto storage = base.storage();
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), base.key_set(),
                                                         tensor.dtype());
    return set_layout(std::move(made), tensor);
}

static Tensor to_host(const Tensor& tensor) {
    auto storage = tensor.storage();
    auto keep = new c10::Storage(storage);
    c10::DataPtr data(const_cast<void*>(storage.data()), keep, &release<c10::Storage>, Device(DeviceType::CPU));
    c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
    return with_layout_of(tensor, std::move(same), DispatchKey::CPU);
}

static Tensor to_device(const Tensor& tensor, DeviceIndex index) {
    auto storage = tensor.storage();
    auto keep = new Tensor(tensor);
    c10::DataPtr data(const_cast<void*>(storage.data()), keep, &release<Tensor>, Device(DeviceType::CUDA, index));
    c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), &allocator, true);
    return with_layout_of(tensor, std::move(same), DispatchKey::CUDA);
}

// Operations

// Those that take no number of the host, even as a tensor without dimensions.
static const std::set<std::string> STRICT = {"aten::addmm",
                                             "aten::baddbmm",
                                             "aten::bmm",
                                             "aten::cat",
                                             "aten::convolution",
                                             "aten::embedding",
                                             "aten::equal",
                                             "aten::gather",
                                             "aten::index_add_",
                                             "aten::index_copy_",
                                             "aten::index_select",
                                             "aten::linear",
                                             "aten::mm",
                                             "aten::native_group_norm",
                                             "aten::native_layer_norm",
                                             "aten::scaled_dot_product_attention",
                                             "aten::scatter",
                                             "aten::scatter_",
                                             "aten::searchsorted",
                                             "aten::stack",
                                             "aten::take"};
// Those whose indices may be on the host.
static const std::set<std::string> INDEXING = {"aten::index", "aten::index_put", "aten::index_put_",
                                               "aten::_index_put_impl_"};

// The device of an operation's arguments. Raises if they are on several.
static Device device_of(const c10::FunctionSchema& schema, at::ArrayRef<IValue> arguments) {
    const auto& name = schema.name();
    std::optional<Device> device;
    bool mixed = false;
    std::vector<std::pair<Tensor, bool>> on_host;  // Tensors, and whether they are written to.
    auto check = [&](const Tensor& tensor, bool is_written) {
        if (!tensor.defined()) return;
        if (!tensor.is_cuda()) {
            on_host.emplace_back(tensor, is_written);
            return;
        }
        TORCH_CHECK(!device || *device == tensor.device(), name,
                    ": Expected all tensors to be on the same device, but found at least two devices, ", *device,
                    " and ", tensor.device(), "!");
        device = tensor.device();
    };
    for (size_t i = 0; i < arguments.size(); i++) {
        const auto& argument = schema.arguments()[i];
        const auto& value = arguments[i];
        const bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
        const bool is_index = INDEXING.count(name) && argument.name() == "indices";
        if (value.isTensor()) {
            check(value.toTensor(), is_written);
        } else if (value.isList()) {
            for (const auto& element : value.toListRef())
                if (element.isTensor() && !(is_index && element.toTensor().defined() && element.toTensor().is_cpu()))
                    check(element.toTensor(), is_written);
        } else if (value.isDevice() && value.toDevice().is_cuda() && !device) {
            device = value.toDevice();
        }
    }
    TORCH_CHECK(device, name, ": no tensor is on a GPU");
    for (const auto& [tensor, is_written] : on_host) mixed |= tensor.dim() > 0 || is_written || STRICT.count(name);
    TORCH_CHECK(!mixed, name, ": Expected all tensors to be on the same device, but found at least two devices, ",
                *device, " and cpu!");
    return device->has_index() ? *device : Device(DeviceType::CUDA, current);
}

// What an operation's results on the host are as results on the device.
class Results {
public:
    explicit Results(Device device) : device(device) {}

    // Return an argument on the host. One without elements that is `out=` gets memory of its own, for any result.
    Tensor host(const Tensor& tensor, bool is_out) {
        if (!tensor.defined() || !tensor.is_cuda()) return tensor;
        const bool is_new = is_out && tensor.numel() == 0;
        Tensor same = is_new ? at::empty({0}, tensor.options().device(at::kCPU)) : to_host(tensor);
        if (is_new) resized.emplace_back(tensor, same);
        by_tensor.emplace(same.unsafeGetTensorImpl(), tensor);
        by_storage.emplace(same.storage().unsafeGetStorageImpl(), tensor);
        return same;
    }

    void finish() {
        for (auto& [tensor, result] : resized) {
            tensor.resize_(result.sizes());
            to_host(tensor).copy_(result);
        }
    }

    // Return a result on the device: an argument itself, a view of one, or a new tensor.
    Tensor back(const Tensor& result) {
        if (!result.defined() || !result.is_cpu()) return result;
        if (auto found = by_tensor.find(result.unsafeGetTensorImpl()); found != by_tensor.end()) return found->second;
        auto found = by_storage.find(result.storage().unsafeGetStorageImpl());
        return found == by_storage.end() ? to_device(result, device.index()) : view_of(found->second, result);
    }

private:
    Device device;
    std::unordered_map<c10::TensorImpl*, Tensor> by_tensor;
    std::unordered_map<c10::StorageImpl*, Tensor> by_storage;
    std::vector<std::pair<Tensor, Tensor>> resized;
};

static bool is_generator(const c10::Argument& argument) {
    const auto optional = argument.type()->cast<c10::OptionalType>();
    return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

static IValue on_host(const IValue& value, const c10::Argument& argument, Device device, Results& results) {
    if (value.isTensor()) return results.host(value.toTensor(), argument.is_out());
    if (value.isTensorList()) {
        std::vector<Tensor> all;
        for (const auto& tensor : value.toTensorVector()) all.push_back(results.host(tensor, false));
        return all;
    }
    if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
        auto list = value.toList().copy();
        for (size_t i = 0; i < list.size(); i++)
            if (IValue element = list.get(i); element.isTensor()) list.set(i, results.host(element.toTensor(), false));
        return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return Device(DeviceType::CPU);
    if (value.isGenerator()) {
        const auto generator = value.toGenerator();
        TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
                    generator.device().type(), "'");
        return inner_of(generator);
    }
    if (value.isNone() && is_generator(argument)) return inner_of(default_generator(device.index()));
    return value;
}

static void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
    const auto& schema = operation.schema();
    const auto count = schema.arguments().size();
    auto arguments = torch::jit::last(*stack, count);
    const Device device = device_of(schema, arguments);
    Results results(device);
    torch::jit::Stack inner;
    for (size_t i = 0; i < count; i++) inner.push_back(on_host(arguments[i], schema.arguments()[i], device, results));
    torch::jit::drop(*stack, count);
    operation.callBoxed(&inner);
    results.finish();
    for (auto& value : inner) {
        if (value.isTensor()) {
            stack->emplace_back(results.back(value.toTensor()));
        } else if (value.isTensorList()) {
            std::vector<Tensor> all;
            for (const auto& tensor : value.toTensorVector()) all.push_back(results.back(tensor));
            stack->emplace_back(all);
        } else {
            stack->push_back(std::move(value));
        }
    }
}

static Tensor& copy_(Tensor& self, const Tensor& source, bool) {
    auto to = self.is_cuda() ? to_host(self) : self;
    to.copy_(source.is_cuda() ? to_host(source) : source);
    return self;
}

static Device placed(std::optional<Device> given) {
    auto device = given.value_or(Device(DeviceType::CUDA, current));
    if (!device.has_index()) device = Device(DeviceType::CUDA, current);
    TORCH_CHECK(device.index() < COUNT, "CUDA error: invalid device ordinal");
    return device;
}

static Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    c10::OptionalDeviceGuard guard(placed(device));
    const auto keys = DispatchKeySet(DispatchKey::CUDA);
    return Tensor(at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format));
}

static Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
    c10::OptionalDeviceGuard guard(placed(device));
    const auto keys = DispatchKeySet(DispatchKey::CUDA);
    return Tensor(at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype)));
}

static const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
    c10::OptionalDeviceGuard guard(self.device());
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    const size_t nbytes = at::detail::computeStorageNbytesContiguous(size, self.element_size(), self.storage_offset());
    auto storage = self.storage();
    if (nbytes > storage.nbytes()) {
        auto larger = allocator.allocate(nbytes);
        if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
        storage.set_data_ptr_noswap(std::move(larger));
        storage.set_nbytes(nbytes);
    }
    return self;
}

static Tensor& set_(Tensor& self, c10::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
    self.unsafeGetTensorImpl()->set_storage_offset(offset);
    return self;
}

static Tensor& set_tensor(Tensor& self, const Tensor& source) {
    return set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

static Tensor& set_storage(Tensor& self, c10::Storage source) {
    const int64_t count = source.nbytes() / self.element_size();
    return set_(self, source, 0, {count}, {1});
}

static void record_stream(Tensor&, Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("copy_", copy_);
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("resize_", resize_);
    library.impl("set_.source_Storage_storage_offset", set_);
    library.impl("set_.source_Tensor", set_tensor);
    library.impl("set_.source_Storage", set_storage);
    library.impl("record_stream", record_stream);
    // torch divides these into operations that depend on the device; the host's kernels are called as a whole.
    for (auto name : {"convolution", "_convolution", "scaled_dot_product_attention", "linear", "layer_norm",
                      "group_norm", "rms_norm"})
        library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

static const int registered = [] {
    c10::SetAllocator(DeviceType::CUDA, &allocator, 1);
    return 0;
}();

static Tensor from_address(int64_t address, int64_t nbytes, int index) {
    c10::DataPtr data(reinterpret_cast<void*>(address), Device(DeviceType::CUDA, index));
    c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), &allocator, false);
    const auto bytes = caffe2::TypeMeta::Make<uint8_t>();
    auto tensor =
        at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CUDA), bytes);
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous({nbytes});
    return tensor;
}

static int set_device(int index) {
    const int before = current;
    TORCH_CHECK(index < COUNT, "CUDA error: invalid device ordinal");
    if (index >= 0) current = index;
    return before;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.attr("COUNT") = COUNT;
    module.def("from_address", &from_address, "Return the bytes at an address as a tensor of a device.");
    module.def("device", [] { return static_cast<int>(current); });
    module.def("set_device", &set_device, "Set the current device, unless negative, and return the last one.");
    module.def("generator", [](int index) { return default_generator(index); });
}
