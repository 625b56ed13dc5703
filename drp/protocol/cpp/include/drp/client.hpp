// A client of `drp serve`, for C++17, on libzmq and msgpack-cxx: one header, to be included anywhere.
//
//     drp::Client client("ipc:///run/user/1000/drp/server");
//     drp::Request request;
//     request.labels = {3, 1, 4};
//     drp::Run run = client.submit(request);
//     drp::Result result = run.result();
//     const float* numbers = result.samples.data<float>();
//
// All of Client and Run may be used from any thread, at the same time; a thread of the client's own has the socket, and
// receives no signals. Every wait ends: after 10 s without a word from the server there is an Error (lost).
// What fails throws drp::Error. drp/client.h has the same for C, where nothing throws.
// The bytes, and what they mean: drp/protocol/SPEC.md.
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
    invalid = 1,  // the request cannot be: its options do not fit the model or each other
    busy,         // the server has as many requests as it takes
    draining,     // the server is about to end
    version,      // the server speaks another version of the protocol
    protocol,     // one side broke the protocol
    cancelled,    // the run was cancelled
    failed,       // the run failed: the denoiser raised, or all workers were lost
    lost,         // the server is gone, or silent
    timeout,      // not in time
    closed,       // the client was closed
    refused,      // for a reason that this client does not know
};

class Error : public std::runtime_error {
public:
    Error(Code why, const std::string& words) : std::runtime_error(words), code(why) {}
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

// The bytes of a tensor; throws what `code` says if they cannot be counted.
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

// Numbers in C order. Copies share the memory; whoever holds the last one ends it.
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

    // The numbers, of which there are `size()`. Throws if they are of another type.
    template <class T>
    const T* data() const {
        if (dtype != detail::dtype_of<T>())
            throw Error(Code::invalid, "a tensor is " + dtype + ", read as another type");
        return static_cast<const T*>(memory.get());
    }

    // A tensor of these numbers, which it owns.
    template <class T>
    static Tensor of(std::vector<T> numbers, std::vector<std::int64_t> shape) {
        Tensor tensor{detail::dtype_of<T>(), std::move(shape), nullptr};
        if (tensor.nbytes() != numbers.size() * sizeof(T))
            throw Error(Code::invalid, std::to_string(numbers.size()) + " numbers are not as many as their shape says");
        const auto kept = std::make_shared<const std::vector<T>>(std::move(numbers));
        tensor.memory = std::shared_ptr<const void>(kept, kept->data());
        return tensor;
    }
};

// -------------------------------------------------------------------------------------------------------- messages

// The client protocol's messages, each with its fields' names and bounds, as in SPEC.md. `fields(self, visit)` calls
// visit(name, member, bounds) for each field in order: writing, reading and checking are visits.
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
    std::size_t most;
};
struct Flag {};
struct Record {};
template <class Item>
struct List {
    std::size_t most;
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
    std::optional<double> value;  // none: not finite
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

// What a run is asked for, tensors apart; the meanings are in SPEC.md under Submit, and so are the defaults.
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
    std::optional<double> tolerance = 0.0025;  // none: infinite
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
        visit("code", self.code, kName);  // other versions may have codes of their own
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

// What a run came to, the samples apart; the meanings are in SPEC.md under Finished.
struct Facts {
    std::string mode;
    std::int64_t drafts = 0, steps = 0;
    std::vector<std::string> devices;
    std::int64_t rounds = 0, evaluations = 0;
    double seconds = 0, device_seconds = 0, waited = 0;
    std::vector<Residual> residuals;
    std::vector<std::int64_t> cuts, evaluated;
    std::vector<std::string> incidents;
};

struct Finished : Facts {
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

// ----- what holds of values, whether they go or come

// The characters (code points) of UTF-8; none if it is not that.
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
        // Overlong forms, halves of surrogate pairs, and what is past the last code point.
        if ((first == 0xE0 && bytes[i + 1] < 0xA0) || (first == 0xED && bytes[i + 1] > 0x9F) ||
            (first == 0xF0 && bytes[i + 1] < 0x90) || (first == 0xF4 && bytes[i + 1] > 0x8F))
            return std::nullopt;
        i += length;
    }
    return count;
}

inline bool holds(std::int64_t value, Int bounds) { return bounds.low <= value && value <= bounds.high; }
inline bool holds(double value, Real bounds) { return bounds.low <= value && value <= bounds.high; }  // false for NaN
inline bool holds(const std::string& value, Text bounds) {
    const auto count = characters(value.data(), value.size());
    return count && *count <= bounds.most;
}
template <std::size_t N>
bool holds(const std::string& value, OneOf<N> bounds) {
    return std::find(bounds.names, bounds.names + N, value) != bounds.names + N;
}

template <class Value, class Bounds>
void check(const Value& value, Bounds bounds, const char* name, Code code) {
    if (!holds(value, bounds)) throw Error(code, std::string(name) + " is not within its bounds");
}

struct Look {
    template <class... Field>
    void operator()(Field&&...) const {}
};
template <class T>
using IsRecord = decltype(T::fields(std::declval<T&>(), Look{}));

// ----- to bytes

class Writer {
public:
    template <class Message>
    static std::vector<char> write(const Message& message) {
        Writer writer;
        std::uint32_t count = 1;
        Message::fields(message, [&](auto&&...) { ++count; });
        writer.packer_.pack_map(count);
        writer.put("type", Text{kName});
        writer.put(Message::type, Text{kName});
        writer.put_fields(message);
        if (writer.buffer_.size() > kMaxMessage) throw Error(Code::invalid, "a message is longer than 1,048,576 bytes");
        return {writer.buffer_.data(), writer.buffer_.data() + writer.buffer_.size()};
    }

private:
    template <class T>
    void put_fields(const T& record) {
        T::fields(record, [&](const char* name, const auto& value, auto bounds) {
            put(name, kName);
            name_ = name;
            put(value, bounds);
        });
    }
    void put(const std::string& value, Text bounds) {
        check(value, bounds, name_, Code::invalid);
        packer_.pack_str(static_cast<std::uint32_t>(value.size()));
        packer_.pack_str_body(value.data(), static_cast<std::uint32_t>(value.size()));
    }
    template <std::size_t N>
    void put(const std::string& value, OneOf<N> bounds) {
        check(value, bounds, name_, Code::invalid);
        put(value, kText);
    }
    void put(std::int64_t value, Int bounds) {
        check(value, bounds, name_, Code::invalid);
        packer_.pack_int64(value);
    }
    void put(double value, Real bounds) {
        check(value, bounds, name_, Code::invalid);
        std::uint64_t bits;  // not pack_double, which in some versions makes an integer of 2.0: those are two things
        std::memcpy(&bits, &value, sizeof bits);
        char bytes[9] = {'\xcb'};
        for (int i = 0; i < 8; ++i) bytes[1 + i] = static_cast<char>(bits >> (56 - 8 * i));
        buffer_.write(bytes, sizeof bytes);
    }
    void put(bool value, Flag) { value ? packer_.pack_true() : packer_.pack_false(); }
    template <class T, class = IsRecord<T>>
    void put(const T& record, Record) {
        std::uint32_t count = 0;
        T::fields(record, [&](auto&&...) { ++count; });
        packer_.pack_map(count);
        put_fields(record);
    }
    template <class T, class Item>
    void put(const std::vector<T>& values, List<Item> bounds) {
        if (values.size() > bounds.most) throw Error(Code::invalid, std::string(name_) + " has too many items");
        packer_.pack_array(static_cast<std::uint32_t>(values.size()));
        for (const T& value : values) put(value, bounds.item);
    }
    template <class T, class Bounds>
    void put(const std::optional<T>& value, Bounds bounds) {
        if (value)
            put(*value, bounds);
        else
            packer_.pack_nil();
    }
    void put(const decltype(Option::value)& value, OptionValue) {
        std::visit([&](const auto& each) { put_option(each); }, value);
    }
    void put_option(std::int64_t value) { put(value, kWhole); }
    void put_option(double value) { put(value, kReal); }
    void put_option(const std::string& value) { put(value, kName); }
    void put_option(bool value) { put(value, Flag{}); }
    void put_option(const std::vector<double>& value) { put(value, kReals); }
    void put(const std::variant<std::string, Rule>& value, RuleOrName) {
        if (const auto* name = std::get_if<std::string>(&value))
            put(*name, kName);
        else
            put(std::get<Rule>(value), Record{});
    }
    void put(const std::variant<std::string, std::vector<std::int64_t>>& value, CountsOrName) {
        if (const auto* name = std::get_if<std::string>(&value))
            put(*name, kName);
        else
            put(std::get<std::vector<std::int64_t>>(value), kCounts);
    }

    msgpack::sbuffer buffer_;
    msgpack::packer<msgpack::sbuffer> packer_{buffer_};
    const char* name_ = "type";
};

template <class Message>
std::vector<char> encode(const Message& message) {
    return Writer::write(message);
}

// ----- from bytes

class Reader {
public:
    template <class T>
    static T read(const msgpack::object& map) {
        T record;
        Reader().take_fields(map, record, 1);
        return record;
    }

private:
    using Type = msgpack::type::object_type;

    [[noreturn]] void refuse(const char* wanted) const {
        throw Error(Code::protocol, std::string(name_) + " is not " + wanted);
    }
    // `surplus` is how many fields there are besides: the type of a message.
    template <class T>
    void take_fields(const msgpack::object& object, T& record, std::uint32_t surplus) {
        if (object.type != Type::MAP) refuse("a map");
        const msgpack::object_map& map = object.via.map;
        std::uint32_t count = surplus;
        T::fields(record, [&](const char* name, auto& value, auto bounds) {
            ++count;
            const msgpack::object_kv *first = map.ptr, *end = first + map.size;
            const auto* found = std::find_if(first, end, [&](const auto& each) { return is(each.key, name); });
            name_ = name;
            if (found == end) refuse("there");
            take(found->val, value, bounds);
        });
        if (map.size != count) refuse("one of a map with these fields alone");
    }
    static bool is(const msgpack::object& object, const char* text) {
        return object.type == Type::STR && object.via.str.size == std::strlen(text) &&
               std::memcmp(object.via.str.ptr, text, object.via.str.size) == 0;
    }
    void take(const msgpack::object& object, std::int64_t& value, Int bounds) {
        if (object.type == Type::NEGATIVE_INTEGER)
            value = object.via.i64;
        else if (object.type == Type::POSITIVE_INTEGER && object.via.u64 <= static_cast<std::uint64_t>(kMaxInt64))
            value = static_cast<std::int64_t>(object.via.u64);
        else
            refuse("a whole number that can be");
        check(value, bounds, name_, Code::protocol);
    }
    void take(const msgpack::object& object, double& value, Real bounds) {
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
    void take(const msgpack::object& object, bool& value, Flag) {
        if (object.type != Type::BOOLEAN) refuse("true or false");
        value = object.via.boolean;
    }
    template <class Bounds>
    void take(const msgpack::object& object, std::string& value, Bounds bounds) {
        if (object.type != Type::STR) refuse("text");
        value.assign(object.via.str.ptr, object.via.str.size);
        check(value, bounds, name_, Code::protocol);
    }
    template <class T, class = IsRecord<T>>
    void take(const msgpack::object& object, T& record, Record) {
        take_fields(object, record, 0);
    }
    template <class T, class Item>
    void take(const msgpack::object& object, std::vector<T>& values, List<Item> bounds) {
        if (object.type != Type::ARRAY || object.via.array.size > bounds.most) refuse("a list of so many items");
        values.resize(object.via.array.size);
        for (std::uint32_t i = 0; i < object.via.array.size; ++i) take(object.via.array.ptr[i], values[i], bounds.item);
    }
    template <class T, class Bounds>
    void take(const msgpack::object& object, std::optional<T>& value, Bounds bounds) {
        if (object.type == Type::NIL)
            value.reset();
        else
            take(object, value.emplace(), bounds);
    }
    void take(const msgpack::object& object, decltype(Option::value)& value, OptionValue) {
        switch (object.type) {
            case Type::POSITIVE_INTEGER:
            case Type::NEGATIVE_INTEGER:
                return take(object, value.emplace<std::int64_t>(), kWhole);
            case Type::FLOAT32:
            case Type::FLOAT64:
                return take(object, value.emplace<double>(), kReal);
            case Type::STR:
                return take(object, value.emplace<std::string>(), kName);
            case Type::BOOLEAN:
                return take(object, value.emplace<bool>(), Flag{});
            default:
                return take(object, value.emplace<std::vector<double>>(), kReals);
        }
    }
    void take(const msgpack::object& object, std::variant<std::string, Rule>& value, RuleOrName) {
        if (object.type == Type::STR)
            take(object, value.emplace<std::string>(), kName);
        else
            take(object, value.emplace<Rule>(), Record{});
    }
    void take(const msgpack::object& object, std::variant<std::string, std::vector<std::int64_t>>& value,
              CountsOrName) {
        if (object.type == Type::STR)
            take(object, value.emplace<std::string>(), kName);
        else
            take(object, value.emplace<std::vector<std::int64_t>>(), kCounts);
    }

    const char* name_ = "a message";
};

template <class Messages>
struct Kinds;
template <class... Each>
struct Kinds<std::variant<Each...>> {
    static void match(const std::string& type, const msgpack::object& object,
                      std::optional<std::variant<Each...>>& found) {
        ((type == Each::type ? void(found = Reader::read<Each>(object)) : void()), ...);
    }
};

// The message in these bytes, one of those in the variant; throws Error (protocol) for anything else.
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
        if (end != size) throw Error(Code::protocol, "there is more than one message in a frame");
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        throw Error(Code::protocol, std::string("not MessagePack: ") + error.what());
    }
    const msgpack::object& object = handle.get();
    if (object.type != msgpack::type::MAP) throw Error(Code::protocol, "a message is no map");
    std::string type;
    for (std::uint32_t i = 0; i < object.via.map.size; ++i) {
        const msgpack::object_kv& field = object.via.map.ptr[i];
        if (field.key.type != msgpack::type::STR) throw Error(Code::protocol, "a field's name is no text");
        if (std::string(field.key.via.str.ptr, field.key.via.str.size) == "type" &&
            field.val.type == msgpack::type::STR)
            type.assign(field.val.via.str.ptr, field.val.via.str.size);
    }
    std::optional<Messages> message;
    Kinds<Messages>::match(type, object, message);
    if (!message)
        throw Error(Code::protocol, "unknown message type" + (holds(type, Text{80}) ? " '" + type + "'" : ""));
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

// What a run is asked for: the fields of protocol::Settings, and tensors. They are sent from where they are.
struct Request : protocol::Settings {
    std::vector<std::pair<std::string, Tensor>> cond;
    std::optional<Tensor> noise, image;
    // Let samples of this many bytes or more come in shared memory, over ipc://.
    std::size_t shared_from = std::size_t{1} << 18;
};

struct Progress {
    std::int64_t step = 0, steps = 0, rounds = 0;
    std::optional<Tensor> preview;
    std::vector<Evaluation> evaluations;
};

struct Result : protocol::Facts {
    Tensor samples;  // float32 [count, ...]
};

// Public key of the server, and this client's pair, in Z85: 40 characters each.
struct Keys {
    std::string server, public_key, secret_key;
};

// ------------------------------------------------------------------------------------------------- the conversation

namespace detail {

// One frame, and what has its bytes.
struct Frame {
    std::shared_ptr<const void> memory;
    std::size_t size = 0;
};

inline Frame frame_of(std::vector<char> bytes) {
    const auto kept = std::make_shared<const std::vector<char>>(std::move(bytes));
    return {std::shared_ptr<const void>(kept, kept->data()), kept->size()};
}

[[noreturn]] inline void fail(const char* what) {
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

// Maps a tensor that the server shares, to be read.
inline Tensor map_shared(const protocol::TensorData& data) {
    const protocol::Handle& handle = *data.memory;
    const std::size_t bytes = nbytes(data.dtype, data.shape, Code::protocol);
    const std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat facts = {};
    if (file.get() < 0 || fstat(file.get(), &facts) != 0)
        throw Error(Code::protocol,
                    "shared memory of the server cannot be opened: " + std::string(std::strerror(errno)));
    const auto size = static_cast<std::size_t>(handle.nbytes);
    if (facts.st_size != handle.nbytes || bytes > size || size == 0)
        throw Error(Code::protocol, "shared memory is not as long as it should be");
    const int seals = fcntl(file.get(), F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) throw Error(Code::protocol, "shared memory is not sealed");
    void* start = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), 0);
    if (start == MAP_FAILED) throw Error(Code::protocol, "shared memory cannot be mapped");
    return {data.dtype, data.shape, std::shared_ptr<const void>(start, [size](void* it) { munmap(it, size); })};
}

// The tensor frames that came with a message. Each is named once.
class Received {
public:
    explicit Received(std::deque<Frame> frames) : frames_(std::move(frames)) {}

    Tensor take(const protocol::TensorData& data) {
        const std::size_t bytes = nbytes(data.dtype, data.shape, Code::protocol);
        const std::size_t place = data.frame ? static_cast<std::size_t>(*data.frame) : 0;
        if (data.memory || place == 0 || place > frames_.size() || !frames_[place - 1].memory)
            throw Error(Code::protocol, "a tensor's frame is missing, or named twice");
        const Frame frame = std::exchange(frames_[place - 1], Frame{});
        if (frame.size != bytes) throw Error(Code::protocol, "a frame is not as long as its tensor");
        return {data.dtype, data.shape, aligned(frame)};
    }

    void done() const {
        for (const Frame& frame : frames_)
            if (frame.memory) throw Error(Code::protocol, "no field names a frame");
    }

private:
    // libzmq may hand out the middle of a buffer of its own, where numbers cannot be read as such.
    static std::shared_ptr<const void> aligned(const Frame& frame) {
        if (reinterpret_cast<std::uintptr_t>(frame.memory.get()) % alignof(std::max_align_t) == 0) return frame.memory;
        std::shared_ptr<void> copy(::operator new(frame.size), [](void* it) { ::operator delete(it); });
        std::memcpy(copy.get(), frame.memory.get(), frame.size);
        return copy;
    }

    std::deque<Frame> frames_;
};

// A run as the line and its caller share it; all but `number` under the line's mutex.
struct RunState {
    explicit RunState(std::int64_t own) : number(own) {}
    const std::int64_t number;
    std::condition_variable changed;
    std::deque<Progress> news;
    std::optional<Result> result;
    std::optional<Error> error;
    bool over() const { return result || error; }
};

// A question that was asked, and its answer.
template <class Answer>
struct Question {
    std::optional<Answer> answer;
};

// The connection, and the thread that has the socket. Nothing that leaves the thread is an exception.
class Line {
public:
    Line(std::string address, const std::string& name, const std::optional<Keys>& keys)
        : address_(std::move(address)), context_(zmq_ctx_new()), wakeup_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (!context_ || wakeup_.get() < 0) fail("no context");
        socket_.reset(zmq_socket(context_.get(), ZMQ_DEALER));
        if (!socket_) fail("no socket");
        set(ZMQ_LINGER, 200);  // a last Cancel has a moment to leave
        const std::int64_t most = static_cast<std::int64_t>(protocol::kMaxFrameBytes);
        if (zmq_setsockopt(socket_.get(), ZMQ_MAXMSGSIZE, &most, sizeof most) != 0) fail("ZMQ_MAXMSGSIZE");
        if (keys) {
            set_key(ZMQ_CURVE_SERVERKEY, keys->server);
            set_key(ZMQ_CURVE_PUBLICKEY, keys->public_key);
            set_key(ZMQ_CURVE_SECRETKEY, keys->secret_key);
        }
        const int events = ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
        if (zmq_socket_monitor(socket_.get(), "inproc://events", events) != 0) fail("no monitor");
        monitor_.reset(zmq_socket(context_.get(), ZMQ_PAIR));
        if (!monitor_ || zmq_connect(monitor_.get(), "inproc://events") != 0) fail("no monitor");
        if (zmq_connect(socket_.get(), address_.c_str()) != 0) {
            if (zmq_errno() == EINVAL || zmq_errno() == EPROTONOSUPPORT)
                throw Error(Code::invalid, "'" + address_ + "' is no address; give ipc://PATH or tcp://HOST:PORT");
            fail("cannot connect");
        }
        outgoing_.push_back({frame_of(protocol::encode(protocol::Open{protocol::kVersion, name}))});
        sigset_t all, before;  // signals are for the program's own threads
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
    Line(const Line&) = delete;
    Line& operator=(const Line&) = delete;
    ~Line() { close(); }

    Welcome open(double seconds) {
        std::unique_lock lock(mutex_);
        if (!changed_.wait_for(lock, to_duration(seconds), [&] { return welcome_ || error_; }))
            throw Error(Code::timeout, "no server answers at " + address_ + " in time");
        if (!welcome_) throw Error(*error_);
        return *welcome_;
    }

    std::shared_ptr<RunState> submit(protocol::Submit submit, std::deque<Frame> tensors) {
        std::unique_lock lock(mutex_);
        do submit.request = next_++ % (protocol::kCount.high + 1);
        while (runs_.count(submit.request));
        tensors.push_front(frame_of(protocol::encode(submit)));
        auto run = std::make_shared<RunState>(submit.request);
        put(std::move(tensors), [&] { runs_[run->number] = run; });
        return run;
    }

    void cancel(const RunState& run) {
        const std::lock_guard lock(mutex_);
        if (!run.over() && !error_ && !closing_) put({frame_of(protocol::encode(protocol::Cancel{run.number}))}, [] {});
    }

    // Waits until `true_now()`, which is about `run`; no longer than `seconds`, if that is given.
    template <class Condition>
    std::unique_lock<std::mutex> wait(RunState& run, std::optional<double> seconds, Condition true_now) {
        std::unique_lock lock(mutex_);
        if (seconds)
            run.changed.wait_for(lock, to_duration(*seconds), true_now);
        else
            run.changed.wait(lock, true_now);
        return lock;
    }

    template <class Answer>
    Answer ask(const char* what, std::deque<std::shared_ptr<Question<Answer>>> Line::* asked, double seconds) {
        std::unique_lock lock(mutex_);
        const auto question = std::make_shared<Question<Answer>>();
        put({frame_of(protocol::encode(protocol::Query{what}))}, [&] { (this->*asked).push_back(question); });
        if (!changed_.wait_for(lock, to_duration(seconds), [&] { return question->answer || error_; }))
            throw Error(Code::timeout, std::string("no answer to the question for the ") + what + " in time");
        if (!question->answer) throw Error(*error_);
        return *std::move(question->answer);
    }

    void close() {
        {
            const std::lock_guard lock(mutex_);
            closing_ = true;
            wake();
        }
        const std::lock_guard lock(joining_);
        if (thread_.joinable()) thread_.join();
    }

    bool local() const { return address_.rfind("ipc://", 0) == 0; }

    std::deque<std::shared_ptr<Question<Status>>> statuses_;
    std::deque<std::shared_ptr<Question<protocol::Metrics>>> metrics_;

private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::seconds kSilence{10};

    static std::chrono::duration<double> to_duration(double seconds) {
        return std::chrono::duration<double>(std::clamp(seconds, 0.0, 1e8));
    }
    void set(int option, int value) {
        if (zmq_setsockopt(socket_.get(), option, &value, sizeof value) != 0) fail("a socket's option");
    }
    void set_key(int option, const std::string& key) {
        if (key.size() != 40 || zmq_setsockopt(socket_.get(), option, key.c_str(), 41) != 0)
            throw Error(Code::invalid, "a key is not 40 characters of Z85; `drp keys` makes them");
    }

    // What other threads do, with the mutex held.

    void wake() const { (void)eventfd_write(wakeup_.get(), 1); }

    template <class Note>
    void put(std::deque<Frame> message, Note note) {
        if (error_) throw Error(*error_);
        if (closing_) throw Error(Code::closed, "the client is closed");
        if (!waits()) heard_ = Clock::now();  // until now the server had no cause to speak
        note();
        outgoing_.push_back(std::move(message));
        wake();
    }
    bool waits() const { return !welcome_ || !runs_.empty() || !statuses_.empty() || !metrics_.empty(); }

    // The thread.

    void serve() noexcept {
        Error why(Code::closed, "the client is closed");
        try {
            while (go_on()) continue;
        } catch (const Error& error) {
            why = error;
        } catch (const std::exception& error) {
            why = Error(Code::lost, error.what());
        }
        end(why);
    }

    bool go_on() {
        bool speaks;
        {
            const std::lock_guard lock(mutex_);
            if (closing_) return false;
            if (welcome_ && waits() && Clock::now() - heard_ > kSilence)
                throw Error(Code::lost, "the server at " + address_ + " has been silent for 10 s");
            speaks = !outgoing_.empty();
        }
        zmq_pollitem_t items[] = {
            {socket_.get(), 0, static_cast<short>(speaks ? ZMQ_POLLIN | ZMQ_POLLOUT : ZMQ_POLLIN), 0},
            {monitor_.get(), 0, ZMQ_POLLIN, 0},
            {nullptr, wakeup_.get(), ZMQ_POLLIN, 0}};
        if (zmq_poll(items, 3, 1000) < 0 && zmq_errno() != EINTR) fail("the connection");
        eventfd_t ignored;
        if (items[2].revents) (void)eventfd_read(wakeup_.get(), &ignored);
        while (hear()) continue;
        speak();
        if (items[1].revents) look();
        return true;
    }

    void speak() {
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
                if (i > 0) fail("the connection");  // libzmq takes a message as a whole
                const std::lock_guard lock(mutex_);
                outgoing_.push_front(std::move(message));  // until there is room
                return;
            }
        }
    }

    // Sends a frame from where it lies; returns whether there was room.
    bool send(const Frame& frame, bool more) {
        auto kept = std::make_unique<std::shared_ptr<const void>>(frame.memory);
        const auto release = [](void*, void* hint) { delete static_cast<std::shared_ptr<const void>*>(hint); };
        zmq_msg_t message;
        void* data = const_cast<void*>(frame.memory.get());
        if (zmq_msg_init_data(&message, data, frame.size, release, kept.get()) != 0) fail("no memory");
        kept.release();  // the message's now
        if (zmq_msg_send(&message, socket_.get(), ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0)) >= 0) return true;
        const int error = zmq_errno();
        zmq_msg_close(&message);
        if (error != EAGAIN && error != EINTR) fail("the connection");
        return false;
    }

    // Takes a message, if there is one.
    bool hear() {
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
                fail("the connection");
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
        tensors.done();
        const std::lock_guard lock(mutex_);
        heard_ = Clock::now();
        return true;
    }

    // Looks at what became of the connection.
    void look() {
        while (true) {
            unsigned char event[6] = {};
            if (zmq_recv(monitor_.get(), event, sizeof event, ZMQ_DONTWAIT) < 0) return;
            char from[256];
            zmq_recv(monitor_.get(), from, sizeof from, ZMQ_DONTWAIT);
            std::uint16_t what;
            std::memcpy(&what, event, sizeof what);
            const std::lock_guard lock(mutex_);
            // Before the server has answered, libzmq tries again by itself.
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
        Progress news{message.step, message.steps, message.rounds, std::nullopt, message.evaluations};
        if (message.preview) news.preview = tensors.take(*message.preview);
        const std::lock_guard lock(mutex_);
        RunState& run = *find(message.request);
        run.news.push_back(std::move(news));
        run.changed.notify_all();
    }
    void on(const protocol::Finished& message, Received& tensors) {
        Result result;
        static_cast<protocol::Facts&>(result) = message;
        std::optional<Error> error;
        if (!message.samples.memory || !local()) {
            result.samples = tensors.take(message.samples);
        } else
            try {
                result.samples = map_shared(message.samples);
            } catch (
                const Error& bad) {  // in a container with other process numbers: this run's end, not the session's
                error = bad;
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
        if (!message.request) throw error;  // nothing goes on from there
        const std::lock_guard lock(mutex_);
        finish(*message.request, [&](RunState& run) { run.error = error; });
    }
    void on(const Status& message, Received&) { answer(statuses_, message); }
    void on(const protocol::Metrics& message, Received&) { answer(metrics_, message); }

    template <class Answer>
    void answer(std::deque<std::shared_ptr<Question<Answer>>>& asked, const Answer& message) {
        const std::lock_guard lock(mutex_);
        if (asked.empty()) throw Error(Code::protocol, "the server answers what nobody asked");
        asked.front()->answer = message;
        asked.pop_front();
        changed_.notify_all();
    }
    std::shared_ptr<RunState> find(std::int64_t number) const {
        const auto found = runs_.find(number);
        if (found == runs_.end()) throw Error(Code::protocol, "the server speaks of a request that is not there");
        return found->second;
    }
    template <class How>
    void finish(std::int64_t number, How how) {
        const std::shared_ptr<RunState> run = find(number);
        how(*run);
        runs_.erase(number);
        run->changed.notify_all();
    }

    void end(const Error& why) noexcept {
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
            if (why.code == Code::closed) speak();
        } catch (...) {
            // The last words of a connection that is closed now all the same.
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
    Clock::time_point heard_ = Clock::now();
    std::thread thread_;
};

}  // namespace detail

// ------------------------------------------------------------------------------------------------------- the client

// A run that was submitted. The last one to let go of it cancels it, unless it is over.
class Run {
public:
    // Waits at most so long; returns whether the run is over.
    bool wait(double seconds) const {
        const auto lock = line_->wait(*state_, seconds, [&] { return state_->over(); });
        return state_->over();
    }

    // The next news, or none when the run is over. There is none at all unless `progress`, `previews` or `timeline`
    // was asked for; steps that are done faster than they can be told are left out.
    std::optional<Progress> next() const {
        const auto lock = line_->wait(*state_, std::nullopt, [&] { return state_->over() || !state_->news.empty(); });
        if (state_->news.empty()) return std::nullopt;
        Progress news = std::move(state_->news.front());
        state_->news.pop_front();
        return news;
    }

    // Waits for the result; throws what became of the run if there is none.
    Result result() const {
        const auto lock = line_->wait(*state_, std::nullopt, [&] { return state_->over(); });
        if (state_->error) throw Error(*state_->error);
        return *state_->result;
    }

    // Asks for the end of the run: then its result is Error (cancelled), or the samples if they were there already.
    void cancel() const { line_->cancel(*state_); }

private:
    friend class Client;
    Run(std::shared_ptr<detail::Line> line, std::shared_ptr<detail::RunState> state)
        : line_(std::move(line)), state_(std::move(state)) {
        unwanted_ = std::shared_ptr<void>(nullptr, [line = line_, state = state_](void*) {
            try {
                line->cancel(*state);
            } catch (const std::exception&) {
                // Then there is no memory, or no connection, and the server sees to it.
            }
        });
    }

    std::shared_ptr<detail::Line> line_;
    std::shared_ptr<detail::RunState> state_;
    std::shared_ptr<void> unwanted_;
};

// A session with a server.
class Client {
public:
    struct Options {
        std::string name = "C++";  // for the server's log
        std::optional<Keys> keys;  // for tcp://
        double timeout = 10.0;     // seconds until the server must have answered
    };

    // Connects; throws Error: timeout, version, lost, invalid.
    explicit Client(const std::string& address) : Client(address, Options()) {}
    Client(const std::string& address, const Options& options)
        : line_(std::make_shared<detail::Line>(address, options.name, options.keys)),
          welcome_(line_->open(options.timeout)) {}

    // What is served, and by which devices.
    const Welcome& server() const { return welcome_; }

    // Asks for a run and returns at once. Throws Error (invalid) for what cannot be said in a message; what the server
    // thinks of the request, the run's result says.
    Run submit(const Request& request) const {
        protocol::Submit submit;
        static_cast<protocol::Settings&>(submit) = request;
        std::deque<detail::Frame> frames;
        for (const auto& [name, tensor] : request.cond) submit.cond.push_back({name, add(frames, tensor)});
        if (request.noise) submit.noise = add(frames, *request.noise);
        if (request.image) submit.image = add(frames, *request.image);
        submit.memory = line_->local() && samples_of(request) >= request.shared_from;
        return Run(line_, line_->submit(std::move(submit), std::move(frames)));
    }

    // Samples once.
    Result sample(const Request& request) const { return submit(request).result(); }

    Status status(double timeout = 10.0) const { return line_->ask("status", &detail::Line::statuses_, timeout); }

    // The server's metrics, in the text format of Prometheus.
    std::string metrics(double timeout = 10.0) const {
        return line_->ask("metrics", &detail::Line::metrics_, timeout).text;
    }

    // Cancels the runs under way and ends the session; what waits for them gets Error (closed).
    void close() const { line_->close(); }

    ~Client() { line_->close(); }
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

    std::shared_ptr<detail::Line> line_;
    Welcome welcome_;
};

}  // namespace drp
