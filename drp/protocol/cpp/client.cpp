// The C interface: exceptions of drp/client.hpp become return codes.
#include <drp/client.h>

#include <cmath>
#include <drp/client.hpp>
#include <new>

static_assert(static_cast<int>(drp::Code::refused) == DRP_REFUSED && static_cast<int>(drp::Code::lost) == DRP_LOST);

struct drp_client {
    drp::Client client;
};

struct drp_run {
    drp::Run run;
    std::optional<drp::Progress> progress;
    std::optional<drp::Result> result;
    std::vector<const char*> incidents;
};

namespace {

thread_local std::string last_error;

drp_code set_error(drp_code code, const char* message) noexcept {
    try {
        last_error = message;
    } catch (...) {
        last_error.clear();
    }
    return code;
}

// Calls `act` and returns the code of the exception that it throws, if any.
template <class Act>
drp_code guarded(Act act) noexcept {
    try {
        return act();
    } catch (const drp::Error& error) {
        return set_error(static_cast<drp_code>(error.code), error.what());
    } catch (const std::exception& error) {
        return set_error(DRP_ERROR, error.what());
    } catch (...) {
        return set_error(DRP_ERROR, "an unknown error");
    }
}

const char* non_null(const char* text, const char* what) {
    if (text == nullptr) throw drp::Error(drp::Code::invalid, std::string(what) + " is NULL");
    return text;
}

template <class T>
std::vector<T> list(const T* first, std::size_t count) {
    return first == nullptr ? std::vector<T>() : std::vector<T>(first, first + count);
}

template <class T>
std::optional<T> nullopt_if(bool none, T value) {
    return none ? std::nullopt : std::optional<T>(std::move(value));
}

drp::Tensor copy(const drp_tensor& tensor) {
    drp::Tensor copied{non_null(tensor.dtype, "a dtype"), list(tensor.shape, tensor.dimensions), nullptr};
    const std::size_t bytes = copied.nbytes();
    if (bytes > 0 && tensor.data == nullptr) throw drp::Error(drp::Code::invalid, "a tensor's data is NULL");
    const std::shared_ptr<void> memory(::operator new(bytes), [](void* it) { ::operator delete(it); });
    if (bytes > 0) std::memcpy(memory.get(), tensor.data, bytes);
    copied.memory = memory;
    return copied;
}

drp_tensor view(const drp::Tensor& tensor) {
    return {tensor.dtype.c_str(), tensor.shape.data(), tensor.shape.size(), tensor.memory.get()};
}

std::vector<drp::Option> options(const drp_option* first, std::size_t count) {
    std::vector<drp::Option> made;
    for (const drp_option& option : list(first, count)) {
        drp::Option each{non_null(option.name, "an option's name"), std::int64_t{0}};
        switch (option.kind) {
            case DRP_WHOLE:
                each.value = option.value.whole;
                break;
            case DRP_REAL:
                each.value = option.value.real;
                break;
            case DRP_TEXT:
                each.value = std::string(non_null(option.value.text, "an option's text"));
                break;
            case DRP_FLAG:
                each.value = option.value.flag != 0;
                break;
            case DRP_REALS:
                each.value = list(option.value.reals.numbers, option.value.reals.count);
                break;
            default:
                throw drp::Error(drp::Code::invalid, "unknown kind of an option");
        }
        made.push_back(std::move(each));
    }
    return made;
}

drp::Request request_of(const drp_request& from) {
    drp::Request request;
    request.labels = nullopt_if(from.labels == nullptr, list(from.labels, from.labels_count));
    request.count = nullopt_if(from.count < 0, from.count);
    request.shape = nullopt_if(from.shape == nullptr, list(from.shape, from.dimensions));
    for (const drp_condition& each : list(from.cond, from.cond_count))
        request.cond.emplace_back(non_null(each.name, "a condition's name"), copy(each.tensor));
    request.guidance = nullopt_if(std::isnan(from.guidance), from.guidance);
    request.steps = from.steps;
    request.solver = non_null(from.solver, "solver");
    request.solver_options = options(from.solver_options, from.solver_options_count);
    request.grid = options(from.grid, from.grid_count);
    request.prediction_type = non_null(from.prediction_type, "prediction_type");
    if (from.noise != nullptr) request.noise = copy(*from.noise);
    if (from.image != nullptr) request.image = copy(*from.image);
    request.strength = from.strength;
    request.mode = non_null(from.mode, "mode");
    request.drafts = nullopt_if(from.drafts < 0, from.drafts);
    request.target_speedup = nullopt_if(std::isnan(from.target_speedup), from.target_speedup);
    request.target_rounds = nullopt_if(from.target_rounds < 0, from.target_rounds);
    request.stride = nullopt_if(std::isnan(from.stride), from.stride);
    if (from.offsets != nullptr)
        request.offsets = list(from.offsets, from.offsets_count);
    else if (from.offsets_name != nullptr)
        request.offsets = std::string(from.offsets_name);
    if (from.rule != nullptr) request.rule = std::string(from.rule);
    request.tolerance = nullopt_if(std::isinf(from.tolerance), from.tolerance);
    request.warmup = from.warmup;
    request.sweeps = from.sweeps;
    request.seed = from.seed;
    request.residuals = from.residuals != 0;
    request.progress = from.progress != 0;
    request.previews = from.previews;
    return request;
}

}  // namespace

extern "C" {

drp_code drp_client_open(const char* address, const char* name, const drp_keys* keys, double timeout,
                         drp_client** client) {
    return guarded([&] {
        drp::Client::Options options;
        if (name != nullptr) options.name = name;
        if (keys != nullptr)
            options.keys = {non_null(keys->server, "a key"), non_null(keys->public_key, "a key"),
                            non_null(keys->secret_key, "a key")};
        options.timeout = timeout;
        *client = new drp_client{drp::Client(non_null(address, "address"), options)};
        return DRP_OK;
    });
}

void drp_client_close(drp_client* client) {
    guarded([&] {
        delete client;
        return DRP_OK;
    });
}

drp_code drp_client_status(const drp_client* client, double timeout, drp_status* status) {
    return guarded([&] {
        const drp::Status now = client->client.status(timeout);
        *status = {now.healthy,   now.clients, now.requests, now.max_requests, now.finished,
                   now.cancelled, now.failed,  now.refused,  now.uptime,       now.since_progress};
        if (!now.healthy) set_error(DRP_OK, now.reason.c_str());
        return DRP_OK;
    });
}

void drp_request_init(drp_request* request) {
    *request = {};
    request->count = request->drafts = request->target_rounds = -1;
    request->guidance = request->target_speedup = request->stride = NAN;
    request->steps = 48;
    request->solver = "ddim";
    request->prediction_type = "epsilon";
    request->strength = 1.0;
    request->mode = "window";
    request->tolerance = 0.0025;
}

drp_code drp_client_submit(const drp_client* client, const drp_request* request, drp_run** run) {
    return guarded([&] {
        *run = new drp_run{client->client.submit(request_of(*request)), std::nullopt, std::nullopt, {}};
        return DRP_OK;
    });
}

drp_code drp_run_next(drp_run* run, drp_progress* progress) {
    return guarded([&] {
        run->progress = run->run.next();
        if (!run->progress) return DRP_END;
        const bool has_preview = run->progress->preview.has_value();
        *progress = {run->progress->step, run->progress->steps, run->progress->rounds, has_preview,
                     has_preview ? view(*run->progress->preview) : drp_tensor()};
        return DRP_OK;
    });
}

drp_code drp_run_wait(const drp_run* run, double seconds) {
    return guarded([&] {
        return run->run.wait(seconds) ? DRP_OK : set_error(DRP_TIMEOUT, "the run is not over within the given time");
    });
}

drp_code drp_run_result(drp_run* run, drp_result* result) {
    return guarded([&] {
        if (!run->result) {
            run->result = run->run.result();
            for (const std::string& incident : run->result->incidents) run->incidents.push_back(incident.c_str());
        }
        const drp::Result& source = *run->result;
        *result = {view(source.samples),  source.drafts,        source.steps,          source.rounds,
                   source.evaluations,    source.seconds,       source.device_seconds, source.waited,
                   run->incidents.data(), run->incidents.size()};
        return DRP_OK;
    });
}

drp_code drp_run_cancel(const drp_run* run) {
    return guarded([&] {
        run->run.cancel();
        return DRP_OK;
    });
}

void drp_run_free(drp_run* run) {
    guarded([&] {
        delete run;
        return DRP_OK;
    });
}

const char* drp_last_error(void) { return last_error.c_str(); }
}
