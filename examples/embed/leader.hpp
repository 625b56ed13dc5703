// A C++ wrapper of drp.Leader. Any thread may construct, call and close it; the wrapper acquires the GIL.
#pragma once

#include <future>
#include <memory>
#include <utility>
#include <vector>

#include "python.hpp"
#include "tensors.hpp"

// A submitted run.
class Run {
public:
    // `future` is the result of drp.Leader.submit. The GIL must be held.
    explicit Run(python::Object future) : future_(std::move(future)) {
        auto done = std::make_unique<std::promise<void>>();
        done_ = done->get_future();
        const python::Object capsule = python::checked(PyCapsule_New(done.get(), nullptr, [](PyObject* self) {
            delete static_cast<std::promise<void>*>(PyCapsule_GetPointer(self, nullptr));
        }));
        done.release();  // now owned by the capsule
        static PyMethodDef callback = {"on_done", &Run::on_done, METH_O, nullptr};
        python::call(future_, "add_done_callback", python::checked(PyCFunction_New(&callback, capsule.get())));
    }

    // Waits until the run is over. The GIL must not be held.
    void wait() const { done_.wait(); }

    // Returns the samples; throws the error of the run if it failed. The GIL must be held.
    python::Object samples() const { return python::attribute(python::call(future_, "result", "{}"), "samples"); }

private:
    // Called in the leader's thread, which holds the GIL.
    static PyObject* on_done(PyObject* self, PyObject*) {
        static_cast<std::promise<void>*>(PyCapsule_GetPointer(self, nullptr))->set_value();
        Py_RETURN_NONE;
    }

    python::Object future_;
    std::future<void> done_;
};

struct Sampled {
    ManagedTensor samples;
    bool copied;  // whether the memory of any tensor differs between C++ and Python
};

class Leader {
public:
    Leader(const char* model, int devices) {
        const python::Gil gil;
        leader_ = python::call(python::import("drp"), "Leader", "{s:s,s:i}", "model", model, "devices", devices);
    }

    // Samples from this noise into `out`, or into memory that Python allocates if `out` is null. Releases the GIL while
    // it waits. Throws python::Error if the run is refused or fails.
    Sampled sample(const std::vector<long>& labels, int steps, const std::shared_ptr<Buffer>& noise,
                   const std::shared_ptr<Buffer>& out) const {
        bool copied = false;
        const Run run = [&] {
            const python::Gil gil;
            const python::Object from = to_torch(noise);
            const python::Object into = out ? to_torch(out) : python::Object(Py_NewRef(Py_None));
            copied |= data_ptr(from) != noise->numbers.data();
            copied |= out && data_ptr(into) != out->numbers.data();
            const python::Object list = python::checked(PyList_New(0));
            for (const long label : labels) PyList_Append(list.get(), python::checked(PyLong_FromLong(label)).get());
            return Run(python::call(leader_, "submit", "{s:O,s:i,s:O,s:O}", "labels", list.get(), "steps", steps,
                                    "noise", from.get(), "out", into.get()));
        }();
        run.wait();
        const python::Gil gil;
        const python::Object samples = run.samples();
        ManagedTensor tensor = from_torch(samples);
        copied |= tensor->dl_tensor.data != data_ptr(samples);
        copied |= out && tensor->dl_tensor.data != out->numbers.data();
        return {std::move(tensor), copied};
    }

    // Ends the workers; running runs end with an error.
    void close() {
        const python::Gil gil;
        python::call(leader_, "close", "{}");
    }

private:
    python::Object leader_;
};
