/* A C client for `drp serve`: the interface of the library drp_client_c. No exception crosses it.
 *
 * A function returns DRP_OK (0) or an error code; drp_last_error() then describes the error, for the calling thread.
 * Output parameters are set only if a function returns DRP_OK. All functions are thread-safe, but an object must not be
 * in use by another thread when drp_client_close or drp_run_free frees it. Every wait is bounded: if the server sends
 * nothing for 10 s, the code is DRP_LOST. For C++ there is drp/client.hpp, a single header that needs no library.
 */
#ifndef DRP_CLIENT_H
#define DRP_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum drp_code {
    DRP_OK = 0,
    DRP_INVALID = 1,   /* the request is invalid: its options do not fit the model or each other */
    DRP_BUSY = 2,      /* the server has reached its limit of requests */
    DRP_DRAINING = 3,  /* the server is shutting down */
    DRP_VERSION = 4,   /* the server uses another version of the protocol */
    DRP_PROTOCOL = 5,  /* one side violated the protocol */
    DRP_CANCELLED = 6, /* the run was cancelled */
    DRP_FAILED = 7,    /* the run failed: the denoiser raised, or all workers were lost */
    DRP_LOST = 8,      /* the connection was lost, or the server is silent */
    DRP_TIMEOUT = 9,   /* the given time has passed */
    DRP_CLOSED = 10,   /* the client was closed */
    DRP_REFUSED = 11,  /* refused with a code that this client does not know */
    DRP_END = 12,      /* the run is over: there are no further progress updates */
    DRP_ERROR = 13     /* any other error, such as a lack of memory */
} drp_code;

typedef struct drp_client drp_client;
typedef struct drp_run drp_run;

/* The server's public key and this client's key pair, 40 characters of Z85 each. Only for tcp://. */
typedef struct drp_keys {
    const char* server;
    const char* public_key;
    const char* secret_key;
} drp_keys;

/* A contiguous tensor in C order. The caller's memory must stay valid until the call returns; the memory of a run's
 * tensor is valid until drp_run_free. */
typedef struct drp_tensor {
    const char* dtype; /* "float32"; see SPEC.md */
    const int64_t* shape;
    size_t dimensions;
    const void* data;
} drp_tensor;

/* A tensor that is passed to the denoiser. */
typedef struct drp_condition {
    const char* name;
    drp_tensor tensor;
} drp_condition;

typedef enum drp_kind { DRP_WHOLE, DRP_REAL, DRP_TEXT, DRP_FLAG, DRP_REALS } drp_kind;

/* An option of a solver or a grid. `kind` selects the member of `value`. */
typedef struct drp_option {
    const char* name;
    drp_kind kind;
    union {
        int64_t whole;
        double real;
        const char* text;
        int flag;
        struct {
            const double* numbers;
            size_t count;
        } reals;
    } value;
} drp_option;

/* The options of a run; SPEC.md describes them under Submit. drp_request_init sets the defaults. */
typedef struct drp_request {
    const int64_t* labels; /* NULL: none */
    size_t labels_count;
    int64_t count;        /* -1: as many as labels, else 1 */
    const int64_t* shape; /* NULL: the model's */
    size_t dimensions;
    const drp_condition* cond;
    size_t cond_count;
    double guidance; /* NAN: the model's */
    int64_t steps;
    const char* solver;
    const drp_option* solver_options;
    size_t solver_options_count;
    const drp_option* grid;
    size_t grid_count;
    const char* prediction_type;
    const drp_tensor* noise; /* NULL: the seed's */
    const drp_tensor* image; /* NULL: none */
    double strength;
    const char* mode;
    int64_t drafts;         /* -1: one per device */
    double target_speedup;  /* NAN: none */
    int64_t target_rounds;  /* -1: none */
    double stride;          /* NAN: the default of the mode and the solver */
    const int64_t* offsets; /* NULL: use offsets_name */
    size_t offsets_count;
    const char* offsets_name; /* NULL: dense */
    const char* rule;         /* NULL: the default */
    double tolerance;         /* INFINITY is allowed */
    int64_t warmup, sweeps, seed;
    int residuals, progress;
    int64_t previews;
} drp_request;

typedef struct drp_progress {
    int64_t step, steps, rounds;
    int has_preview;
    drp_tensor preview; /* valid until the next drp_run_next of this run */
} drp_progress;

typedef struct drp_result {
    drp_tensor samples; /* float32 [count, ...], valid until drp_run_free */
    int64_t drafts, steps, rounds, evaluations;
    double seconds, device_seconds, waited;
    const char* const* incidents; /* the workers lost during the run, valid until drp_run_free */
    size_t incidents_count;
} drp_result;

typedef struct drp_status {
    int healthy;
    int64_t clients, requests, max_requests, finished, cancelled, failed, refused;
    double uptime, since_progress;
} drp_status;

/* Connects to a server and waits at most `timeout` seconds for its answer. `name` appears in the server's log; `keys`
 * may be NULL. */
drp_code drp_client_open(const char* address, const char* name, const drp_keys* keys, double timeout,
                         drp_client** client);

/* Cancels all runs, closes the connection and frees the client. Its runs must still be freed. */
void drp_client_close(drp_client* client);

/* Queries the status of the server. */
drp_code drp_client_status(const drp_client* client, double timeout, drp_status* status);

/* Sets all options to their defaults. */
void drp_request_init(drp_request* request);

/* Submits a run and returns immediately. Tensors are copied. */
drp_code drp_client_submit(const drp_client* client, const drp_request* request, drp_run** run);

/* Waits for the next progress update; returns DRP_END when the run is over, even if it failed. */
drp_code drp_run_next(drp_run* run, drp_progress* progress);

/* Waits at most this many seconds for the end of a run: DRP_OK if it is over, else DRP_TIMEOUT. */
drp_code drp_run_wait(const drp_run* run, double seconds);

/* Waits for the result of a run. Returns the error of a run that has none. */
drp_code drp_run_result(drp_run* run, drp_result* result);

/* Cancels a run. drp_run_result then returns DRP_CANCELLED, or DRP_OK if the samples had already arrived. */
drp_code drp_run_cancel(const drp_run* run);

/* Cancels a run, unless it is over, and frees the run and its samples. */
void drp_run_free(drp_run* run);

/* Returns the message of this thread's last error, valid until the thread's next call. */
const char* drp_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
