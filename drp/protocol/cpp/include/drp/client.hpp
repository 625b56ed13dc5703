// A C++17 client for `drp serve`, as a single header. It needs libzmq and msgpack-cxx.
//
//     drp::Client client("ipc:///run/user/1000/drp/server");
//     drp::Request request;
//     request.labels = {3, 1, 4};
//     drp::Run run = client.submit(request);
//     drp::Result result = run.result();
//     const float* numbers = result.samples.data<float>();
//
// Client and Run are thread-safe. Each Client has one thread, which owns the socket and blocks all signals. Every wait
// is bounded: if the server sends nothing for 10 s, it throws Error (lost). All failures are thrown as drp::Error.
// drp/client.h is the C interface, which does not throw. drp/protocol/SPEC.md specifies the protocol.
#pragma once

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <msgpack/pack.hpp>
#include <msgpack/sbuffer.hpp>
#include <msgpack/unpack.hpp>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace drp {

// ---------------------------------------------------------------------------------------------------------- errors

enum class Code {
    invalid = 1,  // the request is invalid: its options do not fit the model or each other
    busy,         // the server has reached its limit of requests
    draining,     // the server is shutting down
    version,      // the server uses another version of the protocol
    protocol,     // one side violated the protocol
    cancelled,    // the run was cancelled
    failed,       // the run failed: the denoiser raised, or all workers were lost
    lost,         // the connection was lost, or the server is silent
    timeout,      // the given time has passed
    closed,       // the client was closed
    refused,      // refused with a code that this client does not know
};

class Error : public std::runtime_error {
public:
    Error(Code error_code, const std::string& message) : std::runtime_error(message), code(error_code) {}
    Code code;
};

// --------------------------------------------------------------------------------------------------------- tensors

namespace detail {

struct Dtype {
    const char* name;
    std::size_t size;
};
inline constexpr Dtype kDtypes[] = {
    {"float64", 8}, {"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"complex64", 8}, {"complex128", 16},
    {"int64", 8},   {"int32", 4},   {"int16", 2},   {"int8", 1},     {"uint8", 1},     {"bool", 1},
};

template <class T>
constexpr const char* dtype_of() {
    if constexpr (std::is_same_v<T, double>) return "float64";
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, std::int64_t>) return "int64";
    if constexpr (std::is_same_v<T, std::int32_t>) return "int32";
    if constexpr (std::is_same_v<T, std::int16_t>) return "int16";
    if constexpr (std::is_same_v<T, std::int8_t>) return "int8";
    if constexpr (std::is_same_v<T, std::uint8_t>) return "uint8";
    if constexpr (std::is_same_v<T, bool>) return "bool";
    return "";
}

// Returns the size of a tensor in bytes; throws Error (code) if the dtype or the shape is invalid.
inline std::size_t nbytes(const std::string& dtype, const std::vector<std::int64_t>& shape, Code code) {
    std::size_t bytes = 0;
    for (const Dtype& known : kDtypes)
        if (dtype == known.name) bytes = known.size;
    if (bytes == 0) throw Error(code, "unknown dtype '" + dtype + "'");
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
    for (const std::int64_t size : shape) {
        if (size < 0 || static_cast<std::uint64_t>(size) > (std::uint64_t{1} << 48) / bytes)
            throw Error(code, "a tensor is too large");
        bytes *= static_cast<std::size_t>(size);
    }
    return bytes;
}

}  // namespace detail

// A contiguous tensor in C order. Copies share the memory, which is freed with the last copy.
struct Tensor {
    std::string dtype = "float32";
    std::vector<std::int64_t> shape;
    std::shared_ptr<const void> memory;

    std::size_t nbytes() const { return detail::nbytes(dtype, shape, Code::invalid); }

    std::size_t size() const {
        std::size_t count = 1;
        for (const std::int64_t each : shape) count *= static_cast<std::size_t>(each);
        return count;
    }

    // Returns the `size()` elements. Throws if the dtype is another one.
    template <class T>
    const T* data() const {
        if (dtype != detail::dtype_of<T>())
            throw Error(Code::invalid, "a tensor is " + dtype + ", read as another type");
        return static_cast<const T*>(memory.get());
    }

    // Makes a tensor that owns these elements.
    template <class T>
    static Tensor of(std::vector<T> numbers, std::vector<std::int64_t> shape) {
        Tensor tensor{detail::dtype_of<T>(), std::move(shape), nullptr};
        if (tensor.nbytes() != numbers.size() * sizeof(T))
            throw Error(Code::invalid, std::to_string(numbers.size()) + " numbers do not match their shape");
        const auto kept = std::make_shared<const std::vector<T>>(std::move(numbers));
        tensor.memory = std::shared_ptr<const void>(kept, kept->data());
        return tensor;
    }
};

// -------------------------------------------------------------------------------------------------------- messages

// The messages of the client protocol, with the names and bounds of their fields, as in SPEC.md. `fields(self, visit)`
// calls visit(name, member, bounds) for each field in order; encoding, decoding and validation are such visitors.
namespace protocol {

inline constexpr std::int64_t kVersion = 3;
inline constexpr std::size_t kMaxMessage = std::size_t{1} << 20, kMaxFrameBytes = std::size_t{1} << 28, kMaxFrames = 62;

struct Int {
    std::int64_t low, high;
};
struct Real {
    double low, high;
};
struct Text {
    std::size_t max;
};
struct Flag {};
struct Record {};
template <class Item>
struct List {
    std::size_t max;
    Item item;
};
template <std::size_t N>
struct OneOf {
    const char* names[N];
};
struct OptionValue {};  // whole | real | text | flag | list of reals
struct RuleOrName {};
struct CountsOrName {};

inline constexpr std::int64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();
inline constexpr Int kCount{0, (std::int64_t{1} << 31) - 1}, kTotal{0, kMaxInt64}, kWhole{-kMaxInt64 - 1, kMaxInt64};
inline constexpr Real kReal{-1e308, 1e308}, kSeconds{0, 1e9}, kPositive{0, 1e308};
inline constexpr Text kName{200}, kText{20000};
inline constexpr List<Int> kShape{16, kCount}, kLabels{100000, kWhole}, kCounts{10000, kCount};
inline constexpr List<Real> kReals{10000, kReal};
inline constexpr List<Text> kNames{256, kName}, kIncidents{64, Text{2000}};

struct Handle {
    std::int64_t pid = 0, fd = 0, nbytes = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("pid", self.pid, kCount);
        visit("fd", self.fd, kCount);
        visit("nbytes", self.nbytes, Int{0, std::int64_t{1} << 48});
    }
};

struct TensorData {
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::optional<std::int64_t> frame;
    std::optional<Handle> memory;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("dtype", self.dtype, kName);
        visit("shape", self.shape, kShape);
        visit("frame", self.frame, Int{1, kMaxFrames});
        visit("memory", self.memory, Record{});
    }
};

struct Condition {
    std::string name;
    TensorData tensor;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("name", self.name, kName);
        visit("tensor", self.tensor, Record{});
    }
};

struct Option {
    std::string name;
    std::variant<std::int64_t, double, std::string, bool, std::vector<double>> value;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("name", self.name, kName);
        visit("value", self.value, OptionValue{});
    }
};

struct Rule {
    double carry = 0, slope = 0;
    std::string axis = "index";
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("carry", self.carry, kReal);
        visit("slope", self.slope, kReal);
        visit("axis", self.axis, kName);
    }
};

struct Residual {
    std::int64_t index = 0;
    std::optional<double> value;  // nullopt: not finite
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("index", self.index, kCount);
        visit("value", self.value, kPositive);
    }
};

struct Evaluation {
    std::int64_t index = 0, worker = 0;
    double began = 0, ended = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("index", self.index, kCount);
        visit("worker", self.worker, kCount);
        visit("began", self.began, kReal);
        visit("ended", self.ended, kReal);
    }
};

struct ModelSpec {
    std::optional<std::vector<std::int64_t>> sample_shape;
    std::optional<std::int64_t> classes;
    std::optional<double> guidance;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("sample_shape", self.sample_shape, kShape);
        visit("classes", self.classes, kCount);
        visit("guidance", self.guidance, Real{-1e6, 1e6});
    }
};

struct Open {
    static constexpr const char* type = "Open";
    std::int64_t version = kVersion;
    std::string name;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("version", self.version, kCount);
        visit("name", self.name, kName);
    }
};

struct Welcome {
    static constexpr const char* type = "Welcome";
    std::int64_t version = 0;
    std::string model;
    ModelSpec spec;
    std::vector<std::string> devices;
    std::int64_t max_requests = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("version", self.version, kCount);
        visit("model", self.model, kName);
        visit("spec", self.spec, Record{});
        visit("devices", self.devices, kNames);
        visit("max_requests", self.max_requests, kCount);
    }
};

// The options of a run, without tensors. SPEC.md describes them and their defaults under Submit.
struct Settings {
    std::optional<std::vector<std::int64_t>> labels;
    std::optional<std::int64_t> count;
    std::optional<std::vector<std::int64_t>> shape;
    std::optional<double> guidance;
    std::int64_t steps = 48;
    std::string solver = "ddim";
    std::vector<Option> solver_options, grid;
    std::string prediction_type = "epsilon";
    double strength = 1.0;
    std::string mode = "window";
    std::optional<std::int64_t> drafts;
    std::optional<double> target_speedup;
    std::optional<std::int64_t> target_rounds;
    std::optional<double> stride;
    std::optional<std::variant<std::string, std::vector<std::int64_t>>> offsets;
    std::optional<std::variant<std::string, Rule>> rule;
    std::optional<double> tolerance = 0.0025;  // nullopt: infinite
    std::int64_t warmup = 0, sweeps = 0, seed = 0;
    bool residuals = false, progress = false;
    std::int64_t previews = 0;
    bool timeline = false;
};

struct Submit : Settings {
    static constexpr const char* type = "Submit";
    std::int64_t request = 0;
    std::vector<Condition> cond;
    std::optional<TensorData> noise, image;
    bool memory = false;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
        visit("labels", self.labels, kLabels);
        visit("count", self.count, kCount);
        visit("shape", self.shape, kShape);
        visit("cond", self.cond, List<Record>{60, {}});
        visit("guidance", self.guidance, kReal);
        visit("steps", self.steps, Int{0, 10000});
        visit("solver", self.solver, kName);
        visit("solver_options", self.solver_options, List<Record>{64, {}});
        visit("grid", self.grid, List<Record>{64, {}});
        visit("prediction_type", self.prediction_type, kName);
        visit("noise", self.noise, Record{});
        visit("image", self.image, Record{});
        visit("strength", self.strength, kReal);
        visit("mode", self.mode, kName);
        visit("drafts", self.drafts, kCount);
        visit("target_speedup", self.target_speedup, kReal);
        visit("target_rounds", self.target_rounds, kCount);
        visit("stride", self.stride, kReal);
        visit("offsets", self.offsets, CountsOrName{});
        visit("rule", self.rule, RuleOrName{});
        visit("tolerance", self.tolerance, kReal);
        visit("warmup", self.warmup, kCount);
        visit("sweeps", self.sweeps, kCount);
        visit("seed", self.seed, kTotal);
        visit("residuals", self.residuals, Flag{});
        visit("progress", self.progress, Flag{});
        visit("previews", self.previews, kCount);
        visit("timeline", self.timeline, Flag{});
        visit("memory", self.memory, Flag{});
    }
};

struct Accepted {
    static constexpr const char* type = "Accepted";
    std::int64_t request = 0, ahead = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
        visit("ahead", self.ahead, kCount);
    }
};

struct Refused {
    static constexpr const char* type = "Refused";
    std::optional<std::int64_t> request;
    std::string code, reason;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
        visit("code", self.code, kName);  // servers of other versions may send other codes
        visit("reason", self.reason, kText);
    }
};

struct Progress {
    static constexpr const char* type = "Progress";
    std::int64_t request = 0, step = 0, steps = 0, rounds = 0;
    std::optional<TensorData> preview;
    std::vector<Evaluation> evaluations;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
        visit("step", self.step, kCount);
        visit("steps", self.steps, kCount);
        visit("rounds", self.rounds, kCount);
        visit("preview", self.preview, Record{});
        visit("evaluations", self.evaluations, List<Record>{10000, {}});
    }
};

// The result of a run, without the samples. SPEC.md describes the fields under Finished.
struct RunSummary {
    std::string mode;
    std::int64_t drafts = 0, steps = 0;
    std::vector<std::string> devices;
    std::int64_t rounds = 0, evaluations = 0;
    double seconds = 0, device_seconds = 0, waited = 0;
    std::vector<Residual> residuals;
    std::vector<std::int64_t> cuts, evaluated;
    std::vector<std::string> incidents;
};

struct Finished : RunSummary {
    static constexpr const char* type = "Finished";
    std::int64_t request = 0;
    TensorData samples;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
        visit("samples", self.samples, Record{});
        visit("mode", self.mode, kName);
        visit("drafts", self.drafts, kCount);
        visit("steps", self.steps, kCount);
        visit("devices", self.devices, kNames);
        visit("rounds", self.rounds, kCount);
        visit("evaluations", self.evaluations, kCount);
        visit("seconds", self.seconds, kSeconds);
        visit("device_seconds", self.device_seconds, kSeconds);
        visit("waited", self.waited, kSeconds);
        visit("residuals", self.residuals, List<Record>{10000, {}});
        visit("cuts", self.cuts, kCounts);
        visit("evaluated", self.evaluated, kCounts);
        visit("incidents", self.incidents, kIncidents);
    }
};

struct Ack {
    static constexpr const char* type = "Ack";
    std::int64_t request = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
    }
};

struct Cancel {
    static constexpr const char* type = "Cancel";
    std::int64_t request = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
    }
};

struct Ended {
    static constexpr const char* type = "Ended";
    std::int64_t request = 0;
    std::string code, reason;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("request", self.request, kCount);
        visit("code", self.code, OneOf<3>{{"cancelled", "failed", "draining"}});
        visit("reason", self.reason, kText);
    }
};

struct Query {
    static constexpr const char* type = "Query";
    std::string what;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("what", self.what, OneOf<2>{{"status", "metrics"}});
    }
};

struct Status {
    static constexpr const char* type = "Status";
    std::string state;
    bool healthy = false;
    std::string reason;
    std::int64_t clients = 0, requests = 0, max_requests = 0;
    double uptime = 0, since_progress = 0;
    std::int64_t finished = 0, cancelled = 0, failed = 0, refused = 0;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("state", self.state, OneOf<3>{{"serving", "draining", "lost"}});
        visit("healthy", self.healthy, Flag{});
        visit("reason", self.reason, kText);
        visit("clients", self.clients, kCount);
        visit("requests", self.requests, kCount);
        visit("max_requests", self.max_requests, kCount);
        visit("uptime", self.uptime, kSeconds);
        visit("since_progress", self.since_progress, kSeconds);
        visit("finished", self.finished, kTotal);
        visit("cancelled", self.cancelled, kTotal);
        visit("failed", self.failed, kTotal);
        visit("refused", self.refused, kTotal);
    }
};

struct Metrics {
    static constexpr const char* type = "Metrics";
    std::string text;
    template <class Self, class Visit>
    static void fields(Self& self, Visit&& visit) {
        visit("text", self.text, Text{200000});
    }
};

struct Heartbeat {
    static constexpr const char* type = "Heartbeat";
    template <class Self, class Visit>
    static void fields(Self&, Visit&&) {}
};

using ToServer = std::variant<Open, Submit, Ack, Cancel, Query>;
using ToClient = std::variant<Welcome, Accepted, Refused, Progress, Finished, Ended, Status, Metrics, Heartbeat>;

// ----- validation

// Returns the number of code points, or nullopt if the text is not valid UTF-8.
inline std::optional<std::size_t> characters(const char* text, std::size_t size) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text);
    std::size_t count = 0;
    for (std::size_t i = 0; i < size; ++count) {
        const unsigned char first = bytes[i];
        const std::size_t length = first < 0x80   ? 1
                                   : first < 0xC2 ? 0
                                   : first < 0xE0 ? 2
                                   : first < 0xF0 ? 3
                                   : first < 0xF5 ? 4
                                                  : 0;
        if (length == 0 || size - i < length) return std::nullopt;
        for (std::size_t j = 1; j < length; ++j)
            if ((bytes[i + j] & 0xC0) != 0x80) return std::nullopt;
        // Overlong forms, surrogates, and values above the last code point.
        if ((first == 0xE0 && bytes[i + 1] < 0xA0) || (first == 0xED && bytes[i + 1] > 0x9F) ||
            (first == 0xF0 && bytes[i + 1] < 0x90) || (first == 0xF4 && bytes[i + 1] > 0x8F))
            return std::nullopt;
        i += length;
    }
    return count;
}

inline bool within(std::int64_t value, Int bounds) { return bounds.low <= value && value <= bounds.high; }
inline bool within(double value, Real bounds) { return bounds.low <= value && value <= bounds.high; }  // false for NaN
inline bool within(const std::string& value, Text bounds) {
    const auto count = characters(value.data(), value.size());
    return count && *count <= bounds.max;
}
template <std::size_t N>
bool within(const std::string& value, OneOf<N> bounds) {
    return std::find(bounds.names, bounds.names + N, value) != bounds.names + N;
}

template <class Value, class Bounds>
void check(const Value& value, Bounds bounds, const char* name, Code code) {
    if (!within(value, bounds)) throw Error(code, std::string(name) + " is not within its bounds");
}

struct Ignore {
    template <class... Field>
    void operator()(Field&&...) const {}
};
template <class T>
using IsRecord = decltype(T::fields(std::declval<T&>(), Ignore{}));

// ----- encoding

class Writer {
public:
    template <class Message>
    static std::vector<char> write(const Message& message) {
        Writer writer;
        std::uint32_t count = 1;
        Message::fields(message, [&](auto&&...) { ++count; });
        writer.packer_.pack_map(count);
        writer.pack("type", Text{kName});
        writer.pack(Message::type, Text{kName});
        writer.pack_fields(message);
        if (writer.buffer_.size() > kMaxMessage) throw Error(Code::invalid, "a message is longer than 1,048,576 bytes");
        return {writer.buffer_.data(), writer.buffer_.data() + writer.buffer_.size()};
    }

private:
    template <class T>
    void pack_fields(const T& record) {
        T::fields(record, [&](const char* name, const auto& value, auto bounds) {
            pack(name, kName);
            name_ = name;
            pack(value, bounds);
        });
    }
    void pack(const std::string& value, Text bounds) {
        check(value, bounds, name_, Code::invalid);
        packer_.pack_str(static_cast<std::uint32_t>(value.size()));
        packer_.pack_str_body(value.data(), static_cast<std::uint32_t>(value.size()));
    }
    template <std::size_t N>
    void pack(const std::string& value, OneOf<N> bounds) {
        check(value, bounds, name_, Code::invalid);
        pack(value, kText);
    }
    void pack(std::int64_t value, Int bounds) {
        check(value, bounds, name_, Code::invalid);
        packer_.pack_int64(value);
    }
    void pack(double value, Real bounds) {
        check(value, bounds, name_, Code::invalid);
        std::uint64_t bits;  // not pack_double, which in some versions writes 2.0 as an integer
        std::memcpy(&bits, &value, sizeof bits);
        char bytes[9] = {'\xcb'};
        for (int i = 0; i < 8; ++i) bytes[1 + i] = static_cast<char>(bits >> (56 - 8 * i));
        buffer_.write(bytes, sizeof bytes);
    }
    void pack(bool value, Flag) { value ? packer_.pack_true() : packer_.pack_false(); }
    template <class T, class = IsRecord<T>>
    void pack(const T& record, Record) {
        std::uint32_t count = 0;
        T::fields(record, [&](auto&&...) { ++count; });
        packer_.pack_map(count);
        pack_fields(record);
    }
    template <class T, class Item>
    void pack(const std::vector<T>& values, List<Item> bounds) {
        if (values.size() > bounds.max) throw Error(Code::invalid, std::string(name_) + " has too many items");
        packer_.pack_array(static_cast<std::uint32_t>(values.size()));
        for (const T& value : values) pack(value, bounds.item);
    }
    template <class T, class Bounds>
    void pack(const std::optional<T>& value, Bounds bounds) {
        if (value)
            pack(*value, bounds);
        else
            packer_.pack_nil();
    }
    void pack(const decltype(Option::value)& value, OptionValue) {
        std::visit([&](const auto& each) { pack_option(each); }, value);
    }
    void pack_option(std::int64_t value) { pack(value, kWhole); }
    void pack_option(double value) { pack(value, kReal); }
    void pack_option(const std::string& value) { pack(value, kName); }
    void pack_option(bool value) { pack(value, Flag{}); }
    void pack_option(const std::vector<double>& value) { pack(value, kReals); }
    void pack(const std::variant<std::string, Rule>& value, RuleOrName) {
        if (const auto* name = std::get_if<std::string>(&value))
            pack(*name, kName);
        else
            pack(std::get<Rule>(value), Record{});
    }
    void pack(const std::variant<std::string, std::vector<std::int64_t>>& value, CountsOrName) {
        if (const auto* name = std::get_if<std::string>(&value))
            pack(*name, kName);
        else
            pack(std::get<std::vector<std::int64_t>>(value), kCounts);
    }

    msgpack::sbuffer buffer_;
    msgpack::packer<msgpack::sbuffer> packer_{buffer_};
    const char* name_ = "type";
};

template <class Message>
std::vector<char> encode(const Message& message) {
    return Writer::write(message);
}

// ----- decoding

class Reader {
public:
    template <class T>
    static T read(const msgpack::object& map) {
        T record;
        Reader().unpack_fields(map, record, 1);
        return record;
    }

private:
    using Type = msgpack::type::object_type;

    [[noreturn]] void refuse(const char* wanted) const {
        throw Error(Code::protocol, std::string(name_) + " is not " + wanted);
    }
    // `extra` is the number of further fields: 1 for a message, which has a type.
    template <class T>
    void unpack_fields(const msgpack::object& object, T& record, std::uint32_t extra) {
        if (object.type != Type::MAP) refuse("a map");
        const msgpack::object_map& map = object.via.map;
        std::uint32_t count = extra;
        T::fields(record, [&](const char* name, auto& value, auto bounds) {
            ++count;
            const msgpack::object_kv *first = map.ptr, *end = first + map.size;
            const auto* found = std::find_if(first, end, [&](const auto& each) { return is(each.key, name); });
            name_ = name;
            if (found == end) refuse("present");
            unpack(found->val, value, bounds);
        });
        if (map.size != count) refuse("the last field: the map has others");
    }
    static bool is(const msgpack::object& object, const char* text) {
        return object.type == Type::STR && object.via.str.size == std::strlen(text) &&
               std::memcmp(object.via.str.ptr, text, object.via.str.size) == 0;
    }
    void unpack(const msgpack::object& object, std::int64_t& value, Int bounds) {
        if (object.type == Type::NEGATIVE_INTEGER)
            value = object.via.i64;
        else if (object.type == Type::POSITIVE_INTEGER && object.via.u64 <= static_cast<std::uint64_t>(kMaxInt64))
            value = static_cast<std::int64_t>(object.via.u64);
        else
            refuse("a 64-bit signed integer");
        check(value, bounds, name_, Code::protocol);
    }
    void unpack(const msgpack::object& object, double& value, Real bounds) {
        if (object.type == Type::FLOAT32 || object.type == Type::FLOAT64)
            value = object.via.f64;
        else if (object.type == Type::NEGATIVE_INTEGER)
            value = static_cast<double>(object.via.i64);
        else if (object.type == Type::POSITIVE_INTEGER)
            value = static_cast<double>(object.via.u64);
        else
            refuse("a number");
        check(value, bounds, name_, Code::protocol);
    }
    void unpack(const msgpack::object& object, bool& value, Flag) {
        if (object.type != Type::BOOLEAN) refuse("true or false");
        value = object.via.boolean;
    }
    template <class Bounds>
    void unpack(const msgpack::object& object, std::string& value, Bounds bounds) {
        if (object.type != Type::STR) refuse("text");
        value.assign(object.via.str.ptr, object.via.str.size);
        check(value, bounds, name_, Code::protocol);
    }
    template <class T, class = IsRecord<T>>
    void unpack(const msgpack::object& object, T& record, Record) {
        unpack_fields(object, record, 0);
    }
    template <class T, class Item>
    void unpack(const msgpack::object& object, std::vector<T>& values, List<Item> bounds) {
        if (object.type != Type::ARRAY || object.via.array.size > bounds.max) refuse("a list, or has too many items");
        values.resize(object.via.array.size);
        for (std::uint32_t i = 0; i < object.via.array.size; ++i)
            unpack(object.via.array.ptr[i], values[i], bounds.item);
    }
    template <class T, class Bounds>
    void unpack(const msgpack::object& object, std::optional<T>& value, Bounds bounds) {
        if (object.type == Type::NIL)
            value.reset();
        else
            unpack(object, value.emplace(), bounds);
    }
    void unpack(const msgpack::object& object, decltype(Option::value)& value, OptionValue) {
        switch (object.type) {
            case Type::POSITIVE_INTEGER:
            case Type::NEGATIVE_INTEGER:
                return unpack(object, value.emplace<std::int64_t>(), kWhole);
            case Type::FLOAT32:
            case Type::FLOAT64:
                return unpack(object, value.emplace<double>(), kReal);
            case Type::STR:
                return unpack(object, value.emplace<std::string>(), kName);
            case Type::BOOLEAN:
                return unpack(object, value.emplace<bool>(), Flag{});
            default:
                return unpack(object, value.emplace<std::vector<double>>(), kReals);
        }
    }
    void unpack(const msgpack::object& object, std::variant<std::string, Rule>& value, RuleOrName) {
        if (object.type == Type::STR)
            unpack(object, value.emplace<std::string>(), kName);
        else
            unpack(object, value.emplace<Rule>(), Record{});
    }
    void unpack(const msgpack::object& object, std::variant<std::string, std::vector<std::int64_t>>& value,
                CountsOrName) {
        if (object.type == Type::STR)
            unpack(object, value.emplace<std::string>(), kName);
        else
            unpack(object, value.emplace<std::vector<std::int64_t>>(), kCounts);
    }

    const char* name_ = "a message";
};

template <class Messages>
struct MessageTypes;
template <class... Each>
struct MessageTypes<std::variant<Each...>> {
    static void match(const std::string& type, const msgpack::object& object,
                      std::optional<std::variant<Each...>>& found) {
        ((type == Each::type ? void(found = Reader::read<Each>(object)) : void()), ...);
    }
};

// Decodes a message, one of those in the variant; throws Error (protocol) for anything else.
template <class Messages>
Messages decode(const void* data, std::size_t size) {
    if (size > kMaxMessage) throw Error(Code::protocol, "a message is longer than 1,048,576 bytes");
    msgpack::object_handle handle;
    try {
        std::size_t end = 0;
        bool referenced = false;
        const msgpack::unpack_limit limit(100000, 256, kMaxMessage, 0, 0, 8);
        const auto refer = [](msgpack::type::object_type, std::size_t, void*) { return true; };
        handle = msgpack::unpack(static_cast<const char*>(data), size, end, referenced, refer, nullptr, limit);
        if (end != size) throw Error(Code::protocol, "a frame has more than one message");
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        throw Error(Code::protocol, std::string("not MessagePack: ") + error.what());
    }
    const msgpack::object& object = handle.get();
    if (object.type != msgpack::type::MAP) throw Error(Code::protocol, "a message is not a map");
    std::string type;
    for (std::uint32_t i = 0; i < object.via.map.size; ++i) {
        const msgpack::object_kv& field = object.via.map.ptr[i];
        if (field.key.type != msgpack::type::STR) throw Error(Code::protocol, "a field's name is not text");
        if (std::string(field.key.via.str.ptr, field.key.via.str.size) == "type" &&
            field.val.type == msgpack::type::STR)
            type.assign(field.val.via.str.ptr, field.val.via.str.size);
    }
    std::optional<Messages> message;
    MessageTypes<Messages>::match(type, object, message);
    if (!message)
        throw Error(Code::protocol, "unknown message type" + (within(type, Text{80}) ? " '" + type + "'" : ""));
    return *std::move(message);
}

}  // namespace protocol

// -------------------------------------------------------------------------------------------------------- requests

using protocol::Evaluation;
using protocol::Option;
using protocol::Residual;
using protocol::Rule;
using protocol::Status;
using protocol::Welcome;

// The options of a run: the fields of protocol::Settings, and tensors, which are sent without a copy.
struct Request : protocol::Settings {
    std::vector<std::pair<std::string, Tensor>> cond;
    std::optional<Tensor> noise, image;
    // Samples of at least this many bytes arrive in shared memory, over ipc://.
    std::size_t shared_from = std::size_t{1} << 18;
};

struct Progress {
    std::int64_t step = 0, steps = 0, rounds = 0;
    std::optional<Tensor> preview;
    std::vector<Evaluation> evaluations;
};

struct Result : protocol::RunSummary {
    Tensor samples;  // float32 [count, ...]
};

// The server's public key and this client's key pair, 40 characters of Z85 each.
struct Keys {
    std::string server, public_key, secret_key;
};

// ------------------------------------------------------------------------------------------------- the connection

namespace detail {

// A frame of a message, and the owner of its bytes.
struct Frame {
    std::shared_ptr<const void> memory;
    std::size_t size = 0;
};

inline Frame frame_of(std::vector<char> bytes) {
    const auto kept = std::make_shared<const std::vector<char>>(std::move(bytes));
    return {std::shared_ptr<const void>(kept, kept->data()), kept->size()};
}

[[noreturn]] inline void throw_zmq_error(const char* what) {
    throw Error(Code::lost, std::string(what) + ": " + zmq_strerror(zmq_errno()));
}

struct CloseSocket {
    void operator()(void* socket) const { zmq_close(socket); }
};
struct EndContext {
    void operator()(void* context) const {
        while (zmq_ctx_term(context) != 0 && zmq_errno() == EINTR) continue;
    }
};
using Socket = std::unique_ptr<void, CloseSocket>;
using Context = std::unique_ptr<void, EndContext>;

// A file descriptor.
class Descriptor {
public:
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (fd_ >= 0) ::close(fd_);
    }
    int get() const { return fd_; }

private:
    int fd_;
};

// Maps a tensor in the server's shared memory, read-only.
inline Tensor map_shared(const protocol::TensorData& data) {
    const protocol::Handle& handle = *data.memory;
    const std::size_t bytes = nbytes(data.dtype, data.shape, Code::protocol);
    const std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat status = {};
    if (file.get() < 0 || fstat(file.get(), &status) != 0)
        throw Error(Code::protocol,
                    "shared memory of the server cannot be opened: " + std::string(std::strerror(errno)));
    const auto size = static_cast<std::size_t>(handle.nbytes);
    if (status.st_size != handle.nbytes || bytes > size || size == 0)
        throw Error(Code::protocol, "shared memory has the wrong size");
    const int seals = fcntl(file.get(), F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) throw Error(Code::protocol, "shared memory is not sealed");
    void* start = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), 0);
    if (start == MAP_FAILED) throw Error(Code::protocol, "shared memory cannot be mapped");
    return {data.dtype, data.shape, std::shared_ptr<const void>(start, [size](void* it) { munmap(it, size); })};
}

// The tensor frames of a received message. Each must be named exactly once.
class Received {
public:
    explicit Received(std::deque<Frame> frames) : frames_(std::move(frames)) {}

    Tensor tensor(const protocol::TensorData& data) {
        const std::size_t bytes = nbytes(data.dtype, data.shape, Code::protocol);
        const std::size_t place = data.frame ? static_cast<std::size_t>(*data.frame) : 0;
        if (data.memory || place == 0 || place > frames_.size() || !frames_[place - 1].memory)
            throw Error(Code::protocol, "a tensor's frame is missing, or named twice");
        const Frame frame = std::exchange(frames_[place - 1], Frame{});
        if (frame.size != bytes) throw Error(Code::protocol, "a frame is not as long as its tensor");
        return {data.dtype, data.shape, aligned(frame)};
    }

    void check_all_used() const {
        for (const Frame& frame : frames_)
            if (frame.memory) throw Error(Code::protocol, "a frame is not named by any field");
    }

private:
    // libzmq may return a pointer into one of its buffers that is not aligned for the elements.
    static std::shared_ptr<const void> aligned(const Frame& frame) {
        if (reinterpret_cast<std::uintptr_t>(frame.memory.get()) % alignof(std::max_align_t) == 0) return frame.memory;
        std::shared_ptr<void> copy(::operator new(frame.size), [](void* it) { ::operator delete(it); });
        std::memcpy(copy.get(), frame.memory.get(), frame.size);
        return copy;
    }

    std::deque<Frame> frames_;
};

// The state of a run, shared by the connection and the caller. The connection's mutex guards all but `number`.
struct RunState {
    explicit RunState(std::int64_t own) : number(own) {}
    const std::int64_t number;
    std::condition_variable changed;
    std::deque<Progress> progress;
    std::optional<Result> result;
    std::optional<Error> error;
    bool over() const { return result || error; }
};

// A query that was sent, and its reply.
template <class Reply>
struct PendingQuery {
    std::optional<Reply> reply;
};

// The connection, and the thread that owns the socket. No exception leaves the thread.
class Connection {
public:
    Connection(std::string address, const std::string& name, const std::optional<Keys>& keys)
        : address_(std::move(address)), context_(zmq_ctx_new()), wakeup_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (!context_ || wakeup_.get() < 0) throw_zmq_error("no context");
        if (!keys && address_.rfind("tcp://", 0) == 0)  // Without keys, the server would not answer.
            throw Error(Code::invalid, "no keys are given for '" + address_ + "'; `drp keys` makes them");
        socket_.reset(zmq_socket(context_.get(), ZMQ_DEALER));
        if (!socket_) throw_zmq_error("no socket");
        set(ZMQ_LINGER, 200);  // for the last Cancel messages
        const std::int64_t max_size = static_cast<std::int64_t>(protocol::kMaxFrameBytes);
        if (zmq_setsockopt(socket_.get(), ZMQ_MAXMSGSIZE, &max_size, sizeof max_size) != 0)
            throw_zmq_error("ZMQ_MAXMSGSIZE");
        if (keys) {
            set_key(ZMQ_CURVE_SERVERKEY, keys->server);
            set_key(ZMQ_CURVE_PUBLICKEY, keys->public_key);
            set_key(ZMQ_CURVE_SECRETKEY, keys->secret_key);
        }
        const int events = ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
        if (zmq_socket_monitor(socket_.get(), "inproc://events", events) != 0) throw_zmq_error("no monitor");
        monitor_.reset(zmq_socket(context_.get(), ZMQ_PAIR));
        if (!monitor_ || zmq_connect(monitor_.get(), "inproc://events") != 0) throw_zmq_error("no monitor");
        if (zmq_connect(socket_.get(), address_.c_str()) != 0) {
            if (zmq_errno() == EINVAL || zmq_errno() == EPROTONOSUPPORT)
                throw Error(Code::invalid, "'" + address_ + "' is not an address; give ipc://PATH or tcp://HOST:PORT");
            throw_zmq_error("cannot connect");
        }
        outgoing_.push_back({frame_of(protocol::encode(protocol::Open{protocol::kVersion, name}))});
        sigset_t all, before;  // the program's own threads handle signals
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            thread_ = std::thread([this] { serve(); });
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;
    ~Connection() { close(); }

    Welcome open(double seconds) {
        std::unique_lock lock(mutex_);
        if (!changed_.wait_for(lock, to_duration(seconds), [&] { return welcome_ || error_; }))
            throw Error(Code::timeout, "no server answers at " + address_ + " within the timeout");
        if (!welcome_) throw Error(*error_);
        return *welcome_;
    }

    std::shared_ptr<RunState> submit(protocol::Submit submit, std::deque<Frame> tensors) {
        std::unique_lock lock(mutex_);
        do submit.request = next_++ % (protocol::kCount.high + 1);
        while (runs_.count(submit.request));
        tensors.push_front(frame_of(protocol::encode(submit)));
        auto run = std::make_shared<RunState>(submit.request);
        enqueue(std::move(tensors), [&] { runs_[run->number] = run; });
        return run;
    }

    void cancel(const RunState& run) {
        const std::lock_guard lock(mutex_);
        if (!run.over() && !error_ && !closing_)
            enqueue({frame_of(protocol::encode(protocol::Cancel{run.number}))}, [] {});
    }

    // Waits until `predicate()` is true, at most for `seconds` if given. Returns the lock.
    template <class Condition>
    std::unique_lock<std::mutex> wait(RunState& run, std::optional<double> seconds, Condition predicate) {
        std::unique_lock lock(mutex_);
        if (seconds)
            run.changed.wait_for(lock, to_duration(*seconds), predicate);
        else
            run.changed.wait(lock, predicate);
        return lock;
    }

    template <class Reply>
    Reply query_server(const char* what, std::deque<std::shared_ptr<PendingQuery<Reply>>> Connection::* pending,
                       double seconds) {
        std::unique_lock lock(mutex_);
        const auto query = std::make_shared<PendingQuery<Reply>>();
        enqueue({frame_of(protocol::encode(protocol::Query{what}))}, [&] { (this->*pending).push_back(query); });
        if (!changed_.wait_for(lock, to_duration(seconds), [&] { return query->reply || error_; }))
            throw Error(Code::timeout, std::string("no ") + what + " within the timeout");
        if (!query->reply) throw Error(*error_);
        return *std::move(query->reply);
    }

    void close() {
        {
            const std::lock_guard lock(mutex_);
            closing_ = true;
            notify();
        }
        const std::lock_guard lock(joining_);
        if (thread_.joinable()) thread_.join();
    }

    bool local() const { return address_.rfind("ipc://", 0) == 0; }

    std::deque<std::shared_ptr<PendingQuery<Status>>> statuses_;
    std::deque<std::shared_ptr<PendingQuery<protocol::Metrics>>> metrics_;

private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::seconds kServerTimeout{10};

    static std::chrono::duration<double> to_duration(double seconds) {
        return std::chrono::duration<double>(std::clamp(seconds, 0.0, 1e8));
    }
    void set(int option, int value) {
        if (zmq_setsockopt(socket_.get(), option, &value, sizeof value) != 0) throw_zmq_error("a socket's option");
    }
    void set_key(int option, const std::string& key) {
        if (key.size() != 40 || zmq_setsockopt(socket_.get(), option, key.c_str(), 41) != 0)
            throw Error(Code::invalid, "a key is not 40 characters of Z85; `drp keys` makes them");
    }

    // Called by other threads, with the mutex held.

    void notify() const { (void)eventfd_write(wakeup_.get(), 1); }

    template <class Note>
    void enqueue(std::deque<Frame> message, Note note) {
        if (error_) throw Error(*error_);
        if (closing_) throw Error(Code::closed, "the client is closed");
        if (!awaits_reply()) last_received_ = Clock::now();  // the server owed no reply until now
        note();
        outgoing_.push_back(std::move(message));
        notify();
    }
    bool awaits_reply() const { return !welcome_ || !runs_.empty() || !statuses_.empty() || !metrics_.empty(); }

    // Called by the connection's thread.

    void serve() noexcept {
        Error why(Code::closed, "the client is closed");
        try {
            while (run_once()) continue;
        } catch (const Error& error) {
            why = error;
        } catch (const std::exception& error) {
            why = Error(Code::lost, error.what());
        }
        fail_all(why);
    }

    bool run_once() {
        bool has_outgoing;
        {
            const std::lock_guard lock(mutex_);
            if (closing_) return false;
            if (welcome_ && awaits_reply() && Clock::now() - last_received_ > kServerTimeout)
                throw Error(Code::lost, "the server at " + address_ + " has been silent for 10 s");
            has_outgoing = !outgoing_.empty();
        }
        zmq_pollitem_t items[] = {
            {socket_.get(), 0, static_cast<short>(has_outgoing ? ZMQ_POLLIN | ZMQ_POLLOUT : ZMQ_POLLIN), 0},
            {monitor_.get(), 0, ZMQ_POLLIN, 0},
            {nullptr, wakeup_.get(), ZMQ_POLLIN, 0}};
        if (zmq_poll(items, 3, 1000) < 0 && zmq_errno() != EINTR) throw_zmq_error("the connection");
        eventfd_t ignored;
        if (items[2].revents) (void)eventfd_read(wakeup_.get(), &ignored);
        while (receive()) continue;
        flush();
        if (items[1].revents) check_monitor();
        return true;
    }

    void flush() {
        while (true) {
            std::deque<Frame> message;
            {
                const std::lock_guard lock(mutex_);
                if (outgoing_.empty()) return;
                message = std::move(outgoing_.front());
                outgoing_.pop_front();
            }
            for (std::size_t i = 0; i < message.size(); ++i) {
                if (send(message[i], i + 1 < message.size())) continue;
                if (i > 0) throw_zmq_error("the connection");  // libzmq accepts or refuses whole messages
                const std::lock_guard lock(mutex_);
                outgoing_.push_front(std::move(message));  // sent when there is room
                return;
            }
        }
    }

    // Sends a frame without copying it; returns false if there is no room.
    bool send(const Frame& frame, bool more) {
        auto kept = std::make_unique<std::shared_ptr<const void>>(frame.memory);
        const auto release = [](void*, void* hint) { delete static_cast<std::shared_ptr<const void>*>(hint); };
        zmq_msg_t message;
        void* data = const_cast<void*>(frame.memory.get());
        if (zmq_msg_init_data(&message, data, frame.size, release, kept.get()) != 0) throw_zmq_error("no memory");
        kept.release();  // the message's now
        if (zmq_msg_send(&message, socket_.get(), ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0)) >= 0) return true;
        const int error = zmq_errno();
        zmq_msg_close(&message);
        if (error != EAGAIN && error != EINTR) throw_zmq_error("the connection");
        return false;
    }

    // Receives and handles one message; returns false if there is none.
    bool receive() {
        std::deque<Frame> frames;
        bool more = true;
        while (more) {
            const auto close = [](zmq_msg_t* message) {
                zmq_msg_close(message);
                delete message;
            };
            const std::shared_ptr<zmq_msg_t> message(new zmq_msg_t, close);
            zmq_msg_init(message.get());
            if (zmq_msg_recv(message.get(), socket_.get(), ZMQ_DONTWAIT) < 0) {
                if (zmq_errno() == EAGAIN || zmq_errno() == EINTR) return false;
                throw_zmq_error("the connection");
            }
            more = zmq_msg_more(message.get()) != 0;
            frames.push_back(
                {std::shared_ptr<const void>(message, zmq_msg_data(message.get())), zmq_msg_size(message.get())});
        }
        const auto message = protocol::decode<protocol::ToClient>(frames.front().memory.get(), frames.front().size);
        frames.pop_front();
        if (frames.size() > protocol::kMaxFrames) throw Error(Code::protocol, "a message has too many tensors");
        Received tensors(std::move(frames));
        std::visit([&](const auto& each) { on(each, tensors); }, message);
        tensors.check_all_used();
        const std::lock_guard lock(mutex_);
        last_received_ = Clock::now();
        return true;
    }

    // Throws if the monitor reports that the connection was closed.
    void check_monitor() {
        while (true) {
            unsigned char event[6] = {};
            if (zmq_recv(monitor_.get(), event, sizeof event, ZMQ_DONTWAIT) < 0) return;
            char from[256];
            zmq_recv(monitor_.get(), from, sizeof from, ZMQ_DONTWAIT);
            std::uint16_t what;
            std::memcpy(&what, event, sizeof what);
            const std::lock_guard lock(mutex_);
            // Until the server has answered, libzmq reconnects by itself.
            if (welcome_ || what == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
                throw Error(Code::lost, "the server at " + address_ + " has closed the connection");
        }
    }

    void on(const Welcome& message, Received&) {
        const std::lock_guard lock(mutex_);
        welcome_ = message;
        changed_.notify_all();
    }
    void on(const protocol::Accepted&, Received&) {}
    void on(const protocol::Heartbeat&, Received&) {}
    void on(const protocol::Progress& message, Received& tensors) {
        Progress progress{message.step, message.steps, message.rounds, std::nullopt, message.evaluations};
        if (message.preview) progress.preview = tensors.tensor(*message.preview);
        const std::lock_guard lock(mutex_);
        RunState& run = *find(message.request);
        run.progress.push_back(std::move(progress));
        run.changed.notify_all();
    }
    void on(const protocol::Finished& message, Received& tensors) {
        Result result;
        static_cast<protocol::RunSummary&>(result) = message;
        std::optional<Error> error;
        if (!message.samples.memory || !local()) {
            result.samples = tensors.tensor(message.samples);
        } else {
            try {
                result.samples = map_shared(message.samples);
            } catch (const Error& failure) {  // e.g. in another process namespace; other runs are not affected
                error = failure;
            }
        }
        const std::lock_guard lock(mutex_);
        finish(message.request, [&](RunState& run) {
            if (error)
                run.error = error;
            else
                run.result = std::move(result);
        });
        if (message.samples.memory) outgoing_.push_back({frame_of(protocol::encode(protocol::Ack{message.request}))});
    }
    void on(const protocol::Ended& message, Received&) {
        static const std::map<std::string, Code> codes = {
            {"cancelled", Code::cancelled}, {"failed", Code::failed}, {"draining", Code::draining}};
        const std::lock_guard lock(mutex_);
        const std::string reason = message.reason.empty() ? message.code : message.reason;
        finish(message.request, [&](RunState& run) { run.error.emplace(codes.at(message.code), reason); });
    }
    void on(const protocol::Refused& message, Received&) {
        static const std::map<std::string, Code> codes = {{"version", Code::version},
                                                          {"protocol", Code::protocol},
                                                          {"invalid", Code::invalid},
                                                          {"busy", Code::busy},
                                                          {"draining", Code::draining}};
        const auto known = codes.find(message.code);
        const Error error(known == codes.end() ? Code::refused : known->second, message.reason);
        if (!message.request) throw error;  // the whole connection was refused
        const std::lock_guard lock(mutex_);
        finish(*message.request, [&](RunState& run) { run.error = error; });
    }
    void on(const Status& message, Received&) { resolve(statuses_, message); }
    void on(const protocol::Metrics& message, Received&) { resolve(metrics_, message); }

    template <class Reply>
    void resolve(std::deque<std::shared_ptr<PendingQuery<Reply>>>& pending, const Reply& message) {
        const std::lock_guard lock(mutex_);
        if (pending.empty()) throw Error(Code::protocol, "the server sent a reply that was not requested");
        pending.front()->reply = message;
        pending.pop_front();
        changed_.notify_all();
    }
    std::shared_ptr<RunState> find(std::int64_t number) const {
        const auto found = runs_.find(number);
        if (found == runs_.end()) throw Error(Code::protocol, "the server named an unknown request");
        return found->second;
    }
    template <class How>
    void finish(std::int64_t number, How how) {
        const std::shared_ptr<RunState> run = find(number);
        how(*run);
        runs_.erase(number);
        run->changed.notify_all();
    }

    void fail_all(const Error& why) noexcept {
        try {
            std::vector<std::int64_t> left;
            {
                const std::lock_guard lock(mutex_);
                error_ = why;
                for (auto& [number, run] : runs_) {
                    left.push_back(number);
                    run->error = why;
                    run->changed.notify_all();
                }
                runs_.clear();
                statuses_.clear();
                metrics_.clear();
                if (why.code == Code::closed)
                    for (const std::int64_t number : left)
                        outgoing_.push_back({frame_of(protocol::encode(protocol::Cancel{number}))});
                changed_.notify_all();
            }
            if (why.code == Code::closed) flush();
        } catch (...) {
            // The connection is closed anyway; only the last Cancel messages are lost.
        }
        zmq_socket_monitor(socket_.get(), nullptr, 0);
        monitor_.reset();
        socket_.reset();
    }

    const std::string address_;
    Context context_;
    Socket monitor_, socket_;
    Descriptor wakeup_;
    std::mutex mutex_, joining_;
    std::condition_variable changed_;
    std::deque<std::deque<Frame>> outgoing_;
    std::map<std::int64_t, std::shared_ptr<RunState>> runs_;
    std::optional<Welcome> welcome_;
    std::optional<Error> error_;
    std::int64_t next_ = 1;
    bool closing_ = false;
    Clock::time_point last_received_ = Clock::now();
    std::thread thread_;
};

}  // namespace detail

// ------------------------------------------------------------------------------------------------------- the client

// A submitted run. Copies refer to the same run; destroying the last one cancels it, unless it is over.
class Run {
public:
    // Waits for at most this many seconds; returns whether the run is over.
    bool wait(double seconds) const {
        const auto lock = connection_->wait(*state_, seconds, [&] { return state_->over(); });
        return state_->over();
    }

    // Waits for the next progress update; returns nullopt when the run is over. There are updates only if the request
    // sets `progress`, `previews` or `timeline`. Steps may be skipped if they are faster than the updates.
    std::optional<Progress> next() const {
        const auto lock =
            connection_->wait(*state_, std::nullopt, [&] { return state_->over() || !state_->progress.empty(); });
        if (state_->progress.empty()) return std::nullopt;
        Progress progress = std::move(state_->progress.front());
        state_->progress.pop_front();
        return progress;
    }

    // Waits for the result; throws the error of a run that has none.
    Result result() const {
        const auto lock = connection_->wait(*state_, std::nullopt, [&] { return state_->over(); });
        if (state_->error) throw Error(*state_->error);
        return *state_->result;
    }

    // Cancels the run: result() then throws Error (cancelled), unless the samples had already arrived.
    void cancel() const { connection_->cancel(*state_); }

private:
    friend class Client;
    Run(std::shared_ptr<detail::Connection> connection, std::shared_ptr<detail::RunState> state)
        : connection_(std::move(connection)), state_(std::move(state)) {
        cancel_on_release_ = std::shared_ptr<void>(nullptr, [connection = connection_, state = state_](void*) {
            try {
                connection->cancel(*state);
            } catch (const std::exception&) {
                // Without memory or a connection, the server ends the run itself.
            }
        });
    }

    std::shared_ptr<detail::Connection> connection_;
    std::shared_ptr<detail::RunState> state_;
    std::shared_ptr<void> cancel_on_release_;
};

// A session with a server.
class Client {
public:
    struct Options {
        std::string name = "C++";  // for the server's log
        std::optional<Keys> keys;  // for tcp://
        double timeout = 10.0;     // seconds to wait for the server's answer
    };

    // Connects; throws Error: timeout, version, lost, invalid.
    explicit Client(const std::string& address) : Client(address, Options()) {}
    Client(const std::string& address, const Options& options)
        : connection_(std::make_shared<detail::Connection>(address, options.name, options.keys)),
          welcome_(connection_->open(options.timeout)) {}

    // The served model and its devices.
    const Welcome& server() const { return welcome_; }

    // Submits a run and returns immediately. Throws Error (invalid) if the request cannot be encoded. If the server
    // refuses the request, result() throws.
    Run submit(const Request& request) const {
        protocol::Submit submit;
        static_cast<protocol::Settings&>(submit) = request;
        std::deque<detail::Frame> frames;
        for (const auto& [name, tensor] : request.cond) submit.cond.push_back({name, add(frames, tensor)});
        if (request.noise) submit.noise = add(frames, *request.noise);
        if (request.image) submit.image = add(frames, *request.image);
        submit.memory = connection_->local() && samples_of(request) >= request.shared_from;
        return Run(connection_, connection_->submit(std::move(submit), std::move(frames)));
    }

    // Submits a run and waits for its result.
    Result sample(const Request& request) const { return submit(request).result(); }

    Status status(double timeout = 10.0) const {
        return connection_->query_server("status", &detail::Connection::statuses_, timeout);
    }

    // The server's metrics, in the text format of Prometheus.
    std::string metrics(double timeout = 10.0) const {
        return connection_->query_server("metrics", &detail::Connection::metrics_, timeout).text;
    }

    // Cancels all runs and closes the connection; waiting calls throw Error (closed).
    void close() const { connection_->close(); }

    ~Client() { connection_->close(); }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;

private:
    static protocol::TensorData add(std::deque<detail::Frame>& frames, const Tensor& tensor) {
        const std::size_t bytes = tensor.nbytes();
        if (bytes > protocol::kMaxFrameBytes || frames.size() == protocol::kMaxFrames || (bytes > 0 && !tensor.memory))
            throw Error(Code::invalid, "a tensor has no memory, is longer than 2^28 bytes, or is one too many");
        frames.push_back({tensor.memory, bytes});
        return {tensor.dtype, tensor.shape, static_cast<std::int64_t>(frames.size()), std::nullopt};
    }

    std::size_t samples_of(const Request& request) const {
        double bytes = sizeof(float);
        bytes *= static_cast<double>(request.count    ? *request.count
                                     : request.labels ? std::int64_t(request.labels->size())
                                                      : 1);
        const auto& shape = request.shape ? request.shape : welcome_.spec.sample_shape;
        for (const std::int64_t size : shape.value_or(std::vector<std::int64_t>())) bytes *= static_cast<double>(size);
        return static_cast<std::size_t>(std::clamp(bytes, 0.0, 1e15));
    }

    std::shared_ptr<detail::Connection> connection_;
    Welcome welcome_;
};

}  // namespace drp
