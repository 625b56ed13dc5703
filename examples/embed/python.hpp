// RAII wrappers for CPython: references, exceptions, the GIL and the interpreter.
#pragma once

#include <Python.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace python {

// Holds the GIL for a scope, in any thread. Scopes may be nested.
class Gil {
public:
    Gil() : state_(PyGILState_Ensure()) {}
    ~Gil() { PyGILState_Release(state_); }
    Gil(const Gil&) = delete;
    Gil& operator=(const Gil&) = delete;

private:
    PyGILState_STATE state_;
};

// An owned reference to a Python object. Moving and destroying it do not need the GIL; everything else does.
class Object {
public:
    Object() = default;
    explicit Object(PyObject* owned) : pointer_(owned) {}
    Object(Object&& other) noexcept : pointer_(std::exchange(other.pointer_, nullptr)) {}
    Object& operator=(Object&& other) noexcept {
        std::swap(pointer_, other.pointer_);
        return *this;
    }
    Object(const Object&) = delete;
    Object& operator=(const Object&) = delete;
    ~Object() {
        if (pointer_ == nullptr) return;
        const Gil gil;
        Py_DECREF(pointer_);
    }

    PyObject* get() const { return pointer_; }

private:
    PyObject* pointer_ = nullptr;
};

// A Python exception: "ValueError: steps is 0; ...".
class Error : public std::runtime_error {
public:
    Error() : std::runtime_error(fetch()) {}

private:
    // Returns the text of the current exception and clears it.
    static std::string fetch() {
#if PY_VERSION_HEX >= 0x030C0000
        const Object value(PyErr_GetRaisedException());
#else
        PyObject *kind = nullptr, *raised = nullptr, *traceback = nullptr;
        PyErr_Fetch(&kind, &raised, &traceback);
        PyErr_NormalizeException(&kind, &raised, &traceback);
        const Object value(raised), others[] = {Object(kind), Object(traceback)};
#endif
        const Object words(PyObject_Str(value.get()));
        const char* text = words.get() ? PyUnicode_AsUTF8(words.get()) : nullptr;
        PyErr_Clear();
        return std::string(Py_TYPE(value.get())->tp_name) + ": " + (text ? text : "");
    }
};

// Wraps a new reference from the C API; throws the Python exception if it is null.
inline Object checked(PyObject* result) {
    if (result == nullptr) throw Error();
    return Object(result);
}

// Calls the method `name` of `of` with keyword arguments, which `Py_BuildValue` makes.
template <typename... Values>
Object call(const Object& of, const char* name, const char* keywords, Values... values) {
    const Object function = checked(PyObject_GetAttrString(of.get(), name));
    const Object options = checked(Py_BuildValue(keywords, values...));
    const Object none = checked(PyTuple_New(0));
    return checked(PyObject_Call(function.get(), none.get(), options.get()));
}

// Calls the method `name` of `of` with one argument.
inline Object call(const Object& of, const char* name, const Object& argument) {
    const Object function = checked(PyObject_GetAttrString(of.get(), name));
    return checked(PyObject_CallOneArg(function.get(), argument.get()));
}

inline Object import(const char* name) { return checked(PyImport_ImportModule(name)); }

inline Object attribute(const Object& of, const char* name) { return checked(PyObject_GetAttrString(of.get(), name)); }

inline std::string text(const Object& of) {
    const Object words = checked(PyObject_Str(of.get()));
    const char* bytes = PyUnicode_AsUTF8(words.get());
    if (bytes == nullptr) throw Error();
    return bytes;
}

// The interpreter. There can be one per program, since torch cannot be imported a second time. After construction, no
// thread holds the GIL.
class Interpreter {
public:
    // `python` is the interpreter of the environment that has drp: its modules are imported, and workers run it. If it
    // is empty, modules are found by PYTHONPATH, and `program` is the interpreter's name.
    Interpreter(const std::string& python, const char* program) {
        PyConfig config;
        if (python.empty()) {
            PyConfig_InitPythonConfig(&config);
            config.install_signal_handlers = 0;
            config.parse_argv = 0;
        } else {
            PyConfig_InitIsolatedConfig(&config);  // no environment variables, no signal handlers, no locale
        }
        PyStatus status =
            PyConfig_SetBytesString(&config, &config.program_name, python.empty() ? program : python.c_str());
        if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
        PyConfig_Clear(&config);
        if (PyStatus_Exception(status)) throw std::runtime_error(status.err_msg ? status.err_msg : "no Python");
        main_thread_ = PyEval_SaveThread();  // releases the GIL, so that the leader's thread can run
    }
    Interpreter(const Interpreter&) = delete;
    Interpreter& operator=(const Interpreter&) = delete;
    ~Interpreter() {
        PyEval_RestoreThread(main_thread_);
        Py_FinalizeEx();
    }

private:
    PyThreadState* main_thread_;
};

}  // namespace python
