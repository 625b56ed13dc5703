// Runs drp's leader inside a C++ program.
//
//     embed PYTHON    the interpreter of the environment that has drp
//     embed           modules from PYTHONPATH
//
// Several threads sample concurrently, each from its own noise into its own memory, without copies between C++ and
// Python. The leader is closed and created again. The program then checks that signal handlers and the settings of
// torch and multiprocessing are unchanged, and that samples equal those of drp.reference. Exit status 0 means success.

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "leader.hpp"
#include "python.hpp"
#include "tensors.hpp"

namespace {

constexpr int kThreads = 4, kRuns = 3, kSteps = 6, kDevices = 2;

// Python code that describes the state which a library must not change, and that collects log records.
constexpr const char* kHelpers = R"(
import gc, hashlib, logging, multiprocessing.spawn, os, random, sys, threading, warnings
import numpy, psutil, torch, torch.multiprocessing
import drp

def settings():
    states = (torch.get_rng_state().numpy().tobytes(), repr(numpy.random.get_state()), repr(random.getstate()))
    return repr([
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.multiprocessing.get_sharing_strategy(),
        multiprocessing.get_start_method(allow_none=True), multiprocessing.spawn.get_executable(),
        multiprocessing.active_children(), [hashlib.sha256(repr(state).encode()).hexdigest() for state in states],
        dict(os.environ), os.getcwd(), sorted(os.sched_getaffinity(0)), sys.path, sys.argv, sys.getswitchinterval(),
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.filters, gc.get_threshold(),
        logging.root.level, logging.root.handlers, psutil.Process().children(), psutil.Process().num_fds(),
    ])

class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

records = Records()
logging.getLogger("drp").addHandler(records)
logging.getLogger("drp").setLevel(logging.DEBUG)

def reference(labels, steps, noise, devices):
    return drp.reference("digits", labels=labels, steps=steps, noise=noise, devices=devices).samples
)";

struct Signals {
    std::vector<struct sigaction> actions;
    sigset_t blocked = {};

    Signals() {
        for (int number = 1; number < NSIG; ++number) {
            struct sigaction action = {};
            if (sigaction(number, nullptr, &action) == 0) actions.push_back(action);
        }
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    }
    bool operator==(const Signals& other) const {
        const auto same = [](const struct sigaction& a, const struct sigaction& b) {
            return a.sa_flags == b.sa_flags && a.sa_handler == b.sa_handler;
        };
        return std::equal(actions.begin(), actions.end(), other.actions.begin(), other.actions.end(), same) &&
               std::memcmp(&blocked, &other.blocked, sizeof blocked) == 0;
    }
};

python::Object helpers() {
    const python::Gil gil;
    python::Object module = python::checked(PyModule_New("helpers"));
    PyObject* names = PyModule_GetDict(module.get());
    PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins());
    python::checked(PyRun_String(kHelpers, Py_file_input, names, names));
    return module;
}

std::string settings(const python::Object& helper) {
    const python::Gil gil;
    return python::text(python::call(helper, "settings", "{}"));
}

std::shared_ptr<Buffer> standard_normal(const std::vector<std::int64_t>& shape, unsigned seed) {
    auto buffer = std::make_shared<Buffer>(shape);
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (float& number : buffer->numbers) number = normal(generator);
    return buffer;
}

bool equal(const DLTensor& a, const DLTensor& b) {
    std::size_t count = 1;
    for (int i = 0; i < a.ndim; ++i) count *= static_cast<std::size_t>(a.shape[i]);
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape) && a.byte_offset == 0 &&
           b.byte_offset == 0 && std::memcmp(a.data, b.data, count * sizeof(float)) == 0;
}

struct Sample {
    std::vector<long> labels;
    std::shared_ptr<Buffer> noise;
    Sampled sampled;
};

ManagedTensor reference(const python::Object& helper, const Sample& samples) {
    const python::Gil gil;
    const python::Object list = python::checked(PyList_New(0));
    for (const long label : samples.labels) PyList_Append(list.get(), python::checked(PyLong_FromLong(label)).get());
    const python::Object noise = to_torch(samples.noise);
    return from_torch(python::call(helper, "reference", "{s:O,s:i,s:O,s:i}", "labels", list.get(), "steps", kSteps,
                                   "noise", noise.get(), "devices", kDevices));
}

// Creates a leader in a thread that ends, samples in several threads, and closes it. The samples outlive the leader.
std::vector<Sample> use_leader(unsigned seed) {
    std::optional<Leader> created;
    std::thread([&] { created.emplace("digits", kDevices); }).join();
    Leader& leader = *created;
    std::vector<Sample> samples(kThreads * kRuns);
    std::vector<std::thread> threads;
    for (unsigned place = 0; place < kThreads; ++place) {
        threads.emplace_back([&, place] {
            for (unsigned run = 0; run < kRuns; ++run) try {
                    const std::int64_t count = 1 + run % 2;
                    const auto labels = std::vector<long>(static_cast<std::size_t>(count), static_cast<long>(place));
                    const auto noise = standard_normal({count, 1, 28, 28}, seed + place * kRuns + run);
                    const auto out = run < 2 ? std::make_shared<Buffer>(noise->shape) : nullptr;
                    samples[place * kRuns + run] = {labels, noise, leader.sample(labels, kSteps, noise, out)};
                } catch (const std::exception& error) {
                    std::cerr << error.what() << std::endl;
                }
        });
    }
    for (std::thread& thread : threads) thread.join();
    try {
        leader.sample({1}, 0, standard_normal({1, 1, 28, 28}, seed), nullptr);
        samples.emplace_back();  // counts as a failed run
    } catch (const python::Error& error) {
        std::cout << "refused: " << error.what() << std::endl;
    }
    leader.close();
    return samples;
}

// Compares samples with drp.reference; returns the number of failures.
int check(const std::vector<Sample>& samples, const python::Object& helper) {
    int lost = 0, copies = 0, wrong = 0;
    for (const Sample& run : samples) {
        lost += !run.sampled.samples;
        copies += run.sampled.copied;
        wrong += run.sampled.samples && !equal(run.sampled.samples->dl_tensor, reference(helper, run)->dl_tensor);
    }
    std::cout << kThreads << " threads, " << samples.size() << " runs: " << lost << " failed, " << copies << " copied, "
              << wrong << " differ from drp.reference" << std::endl;
    return lost + copies + wrong;
}

int embed(const std::string& environment, const char* program) {
    // The program's own handlers. Without one for SIGINT, CPython installs its own when `signal` is first imported.
    for (const int number : {SIGINT, SIGTERM}) std::signal(number, [](int) { std::_Exit(3); });
    const Signals signals;
    const python::Interpreter interpreter(environment, program);
    const python::Object helper = helpers();
    const std::string before = settings(helper);

    const std::vector<Sample> first = use_leader(1), second = use_leader(2);

    const bool same_settings = settings(helper) == before, same_signals = Signals() == signals;
    const int wrong = check(first, helper) + check(second, helper);
    const python::Gil gil;
    const python::Object lines = python::attribute(python::attribute(helper, "records"), "lines");
    std::cout << "settings, child processes, descriptors: " << (same_settings ? "as before" : "CHANGED") << '\n'
              << "signal handlers: " << (same_signals ? "as before" : "CHANGED") << '\n'
              << "logged: " << PyList_Size(lines.get())
              << " records, the first: " << python::text(python::checked(PySequence_GetItem(lines.get(), 0)))
              << std::endl;
    return wrong + !same_settings + !same_signals;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return embed(count > 1 ? arguments[1] : "", arguments[0]) == 0 ? 0 : 1;
    } catch (const std::exception& error) {
        std::cerr << error.what() << std::endl;
        return 2;
    }
}
