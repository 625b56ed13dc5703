// The entry points for C: what drp/client.hpp throws, they return.
#include <drp/client.h>

#include <cmath>
#include <drp/client.hpp>
#include <new>

static_assert(static_cast<int>(drp::Code::refused) == DRP_REFUSED && static_cast<int>(drp::Code::lost) == DRP_GONE);

struct drp_client {
    drp::Client client;
};

struct drp_run {
    drp::Run run;
    std::optional<drp::Progress> news;
    std::optional<drp::Result> result;
    std::vector<const char*> incidents;
};

namespace {

thread_local std::string last_error;

drp_code note(drp_code code, const char* words) noexcept {
    try {
        last_error = words;
    } catch (...) {
        last_error.clear();
    }
    return code;
}

// Calls `act`, and turns what it throws into a code.
template <class Act>
drp_code guarded(Act act) noexcept {
    try {
        return act();
    } catch (const drp::Error& error) {
        return note(static_cast<drp_code>(error.code), error.what());
    } catch (const std::exception& error) {
        return note(DRP_ERROR, error.what());
    } catch (...) {
        return note(DRP_ERROR, "an unknown error");
    }
}

const char* given(const char* text, const char* what) {
    if (text == nullptr) throw drp::Error(drp::Code::invalid, std::string(what) + " is NULL");
    return text;
}

template <class T>
std::vector<T> list(const T* first, std::size_t count) {
    return first == nullptr ? std::vector<T>() : std::vector<T>(first, first + count);
}

template <class T>
std::optional<T> unless(bool none, T value) {
    return none ? std::nullopt : std::optional<T>(std::move(value));
}

drp::Tensor copy(const drp_tensor& tensor) {
    drp::Tensor copied{given(tensor.dtype, "a dtype"), list(tensor.shape, tensor.dimensions), nullptr};
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
        drp::Option each{given(option.name, "an option's name"), std::int64_t{0}};
        switch (option.kind) {
            case DRP_WHOLE:
                each.value = option.value.whole;
                break;
            case DRP_REAL:
                each.value = option.value.real;
                break;
            case DRP_TEXT:
                each.value = std::string(given(option.value.text, "an option's text"));
                break;
            case DRP_FLAG:
                each.value = option.value.flag != 0;
                break;
            case DRP_REALS:
                each.value = list(option.value.reals.numbers, option.value.reals.count);
                break;
            default:
                throw drp::Error(drp::Code::invalid, "an option's kind is none");
        }
        made.push_back(std::move(each));
    }
    return made;
}

drp::Request request_of(const drp_request& from) {
    drp::Request request;
    request.labels = unless(from.labels == nullptr, list(from.labels, from.labels_count));
    request.count = unless(from.count < 0, from.count);
    request.shape = unless(from.shape == nullptr, list(from.shape, from.dimensions));
    for (const drp_condition& each : list(from.cond, from.cond_count))
        request.cond.emplace_back(given(each.name, "a condition's name"), copy(each.tensor));
    request.guidance = unless(std::isnan(from.guidance), from.guidance);
    request.steps = from.steps;
    request.solver = given(from.solver, "solver");
    request.solver_options = options(from.solver_options, from.solver_options_count);
    request.grid = options(from.grid, from.grid_count);
    request.prediction_type = given(from.prediction_type, "prediction_type");
    if (from.noise != nullptr) request.noise = copy(*from.noise);
    if (from.image != nullptr) request.image = copy(*from.image);
    request.strength = from.strength;
    request.mode = given(from.mode, "mode");
    request.drafts = unless(from.drafts < 0, from.drafts);
    request.target_speedup = unless(std::isnan(from.target_speedup), from.target_speedup);
    request.target_rounds = unless(from.target_rounds < 0, from.target_rounds);
    request.stride = unless(std::isnan(from.stride), from.stride);
    if (from.offsets != nullptr)
        request.offsets = list(from.offsets, from.offsets_count);
    else if (from.offsets_name != nullptr)
        request.offsets = std::string(from.offsets_name);
    if (from.rule != nullptr) request.rule = std::string(from.rule);
    request.tolerance = unless(std::isinf(from.tolerance), from.tolerance);
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
            options.keys = {given(keys->server, "a key"), given(keys->public_key, "a key"),
                            given(keys->secret_key, "a key")};
        options.timeout = timeout;
        *client = new drp_client{drp::Client(given(address, "address"), options)};
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
        if (!now.healthy) note(DRP_OK, now.reason.c_str());
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
        run->news = run->run.next();
        if (!run->news) return DRP_OVER;
        const bool seen = run->news->preview.has_value();
        *progress = {run->news->step, run->news->steps, run->news->rounds, seen,
                     seen ? view(*run->news->preview) : drp_tensor()};
        return DRP_OK;
    });
}

drp_code drp_run_wait(const drp_run* run, double seconds) {
    return guarded([&] { return run->run.wait(seconds) ? DRP_OK : note(DRP_TIMEOUT, "the run is not over in time"); });
}

drp_code drp_run_result(drp_run* run, drp_result* result) {
    return guarded([&] {
        if (!run->result) {
            run->result = run->run.result();
            for (const std::string& incident : run->result->incidents) run->incidents.push_back(incident.c_str());
        }
        const drp::Result& facts = *run->result;
        *result = {view(facts.samples),   facts.drafts,         facts.steps,          facts.rounds,
                   facts.evaluations,     facts.seconds,        facts.device_seconds, facts.waited,
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
