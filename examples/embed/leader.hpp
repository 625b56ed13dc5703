// drp.Leader for C++: made, asked and closed from any thread, none of which needs to know of the GIL.
#pragma once

#include <future>
#include <memory>
#include <utility>
#include <vector>

#include "python.hpp"
#include "tensors.hpp"

// One run that was submitted.
class Run {
public:
    // `pending` is what drp.Leader.submit returned. Needs the GIL.
    explicit Run(python::Object pending) : pending_(std::move(pending)) {
        auto told = std::make_unique<std::promise<void>>();
        over_ = told->get_future();
        const python::Object capsule = python::checked(PyCapsule_New(told.get(), nullptr, [](PyObject* self) {
            delete static_cast<std::promise<void>*>(PyCapsule_GetPointer(self, nullptr));
        }));
        told.release();  // the capsule's now
        static PyMethodDef tell = {"tell", &Run::tell, METH_O, nullptr};
        python::call(pending_, "add_done_callback", python::checked(PyCFunction_New(&tell, capsule.get())));
    }

    // Waits for its end, without the GIL.
    void wait() const { over_.wait(); }

    // The samples, or the error of the run. Needs the GIL.
    python::Object samples() const { return python::attribute(python::call(pending_, "result", "{}"), "samples"); }

private:
    // Called in the leader's thread, which has the GIL.
    static PyObject* tell(PyObject* self, PyObject*) {
        static_cast<std::promise<void>*>(PyCapsule_GetPointer(self, nullptr))->set_value();
        Py_RETURN_NONE;
    }

    python::Object pending_;
    std::future<void> over_;
};

struct Sampled {
    Taken samples;
    bool copied;  // whether any tensor was elsewhere on the two sides
};

class Leader {
public:
    Leader(const char* model, int devices) {
        const python::Gil gil;
        leader_ = python::call(python::import("drp"), "Leader", "{s:s,s:i}", "model", model, "devices", devices);
    }

    // Samples from this noise: into `out`, or if there is none into memory that Python makes. The GIL is free while
    // this waits. Throws python::Error if the run is refused or fails.
    Sampled sample(const std::vector<long>& labels, int steps, const std::shared_ptr<Buffer>& noise,
                   const std::shared_ptr<Buffer>& out) const {
        bool copied = false;
        const Run run = [&] {
            const python::Gil gil;
            const python::Object from = lend(noise);
            const python::Object into = out ? lend(out) : python::Object(Py_NewRef(Py_None));
            copied |= address(from) != noise->numbers.data();
            copied |= out && address(into) != out->numbers.data();
            const python::Object list = python::checked(PyList_New(0));
            for (const long label : labels) PyList_Append(list.get(), python::checked(PyLong_FromLong(label)).get());
            return Run(python::call(leader_, "submit", "{s:O,s:i,s:O,s:O}", "labels", list.get(), "steps", steps,
                                    "noise", from.get(), "out", into.get()));
        }();
        run.wait();
        const python::Gil gil;
        const python::Object samples = run.samples();
        Taken taken = take(samples);
        copied |= taken->dl_tensor.data != address(samples);
        copied |= out && taken->dl_tensor.data != out->numbers.data();
        return {std::move(taken), copied};
    }

    // Ends the workers; runs under way end with an error.
    void close() {
        const python::Gil gil;
        python::call(leader_, "close", "{}");
    }

private:
    python::Object leader_;
};
