/* A client of `drp serve`, for C: the entry points of the library drp_client, across which no exception passes.
 *
 * Each returns 0 (DRP_OK) or says what went wrong; drp_last_error() then says it in words, for the calling thread. What
 * a function returns through a pointer is set only if it returns DRP_OK. All functions may be called from any thread,
 * but for the two that end something: nobody may be using what they end. Every wait ends: after 10 s without a word
 * from the server with DRP_GONE. C++ has drp/client.hpp, which is one header and needs no library of ours.
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
    DRP_INVALID = 1,   /* the request cannot be: its options do not fit the model or each other */
    DRP_BUSY = 2,      /* the server has as many requests as it takes */
    DRP_DRAINING = 3,  /* the server is about to end */
    DRP_VERSION = 4,   /* the server speaks another version of the protocol */
    DRP_PROTOCOL = 5,  /* one side broke the protocol */
    DRP_CANCELLED = 6, /* the run was cancelled */
    DRP_FAILED = 7,    /* the run failed: the denoiser raised, or all workers were lost */
    DRP_GONE = 8,      /* the server is gone, or silent */
    DRP_TIMEOUT = 9,   /* not in time */
    DRP_CLOSED = 10,   /* the client was closed */
    DRP_REFUSED = 11,  /* for a reason that this client does not know */
    DRP_OVER = 12,     /* the run is over: there is no more news */
    DRP_ERROR = 13     /* no memory, or the like */
} drp_code;

typedef struct drp_client drp_client;
typedef struct drp_run drp_run;

/* Keys in Z85, 40 characters each: the server's public one, and this client's pair. Only for tcp://. */
typedef struct drp_keys {
    const char* server;
    const char* public_key;
    const char* secret_key;
} drp_keys;

/* Numbers in C order: of the caller, who keeps them until the call returns, or of a run, until drp_run_free. */
typedef struct drp_tensor {
    const char* dtype; /* "float32"; see SPEC.md */
    const int64_t* shape;
    size_t dimensions;
    const void* data;
} drp_tensor;

/* A tensor for the denoiser. */
typedef struct drp_condition {
    const char* name;
    drp_tensor tensor;
} drp_condition;

typedef enum drp_kind { DRP_WHOLE, DRP_REAL, DRP_TEXT, DRP_FLAG, DRP_REALS } drp_kind;

/* An option of a solver or a grid: the member of `value` that `kind` names. */
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

/* What a run is asked for, as in SPEC.md under Submit. drp_request_init sets the defaults; then change what is to
 * differ. */
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
    int64_t drafts;         /* -1: one a device */
    double target_speedup;  /* NAN: none */
    int64_t target_rounds;  /* -1: none */
    double stride;          /* NAN: the default of the mode and the solver */
    const int64_t* offsets; /* NULL: those of the name */
    size_t offsets_count;
    const char* offsets_name; /* NULL: dense */
    const char* rule;         /* NULL: the best measured */
    double tolerance;         /* INFINITY is allowed */
    int64_t warmup, sweeps, seed;
    int residuals, progress;
    int64_t previews;
} drp_request;

typedef struct drp_progress {
    int64_t step, steps, rounds;
    int has_preview;
    drp_tensor preview; /* until the next drp_run_next of this run */
} drp_progress;

typedef struct drp_result {
    drp_tensor samples; /* float32 [count, ...], until drp_run_free */
    int64_t drafts, steps, rounds, evaluations;
    double seconds, device_seconds, waited;
    const char* const* incidents; /* what happened to workers meanwhile, incidents_count texts, until drp_run_free */
    size_t incidents_count;
} drp_result;

typedef struct drp_status {
    int healthy;
    int64_t clients, requests, max_requests, finished, cancelled, failed, refused;
    double uptime, since_progress;
} drp_status;

/* Connects to a server; `name` is for its log, `keys` may be NULL. Waits `timeout` seconds for its answer at most. */
drp_code drp_client_open(const char* address, const char* name, const drp_keys* keys, double timeout,
                         drp_client** client);

/* Cancels the runs under way, ends the session and frees the client; its runs are over, and still to be freed. */
void drp_client_close(drp_client* client);

/* Asks how the server is. */
drp_code drp_client_status(const drp_client* client, double timeout, drp_status* status);

void drp_request_init(drp_request* request);

/* Asks for a run and returns at once. Tensors are copied. */
drp_code drp_client_submit(const drp_client* client, const drp_request* request, drp_run** run);

/* Waits for news of a run; DRP_OVER when it is over, whatever it came to. */
drp_code drp_run_next(drp_run* run, drp_progress* progress);

/* Waits for the end of a run at most so long: DRP_OK if it is over, else DRP_TIMEOUT. */
drp_code drp_run_wait(const drp_run* run, double seconds);

/* Waits for the result of a run, or says what became of it. */
drp_code drp_run_result(drp_run* run, drp_result* result);

/* Asks for the end of a run; drp_run_result then is DRP_CANCELLED, or DRP_OK if it was over before. */
drp_code drp_run_cancel(const drp_run* run);

/* Cancels a run, unless it is over, and frees it with its samples. */
void drp_run_free(drp_run* run);

/* The last error of this thread, in words; until its next call. */
const char* drp_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
