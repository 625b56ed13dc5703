/* Tests of the C interface: every code and every kind of argument, with a server of the tiny denoiser. */
#include <drp/client.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "line %d: %s; %s\n", __LINE__, #condition, drp_last_error()); \
            return 1;                                                                     \
        }                                                                                 \
    } while (0)

static float noise_numbers[64];

int main(int count, char** arguments) {
    const int64_t labels[] = {7}, shape[] = {1, 1, 8, 8}, other_shape[] = {1, 1, 4, 4};
    const double sigmas[] = {0.5, 0.25};
    drp_tensor noise = {"float32", shape, 4, noise_numbers};
    drp_option options[2] = {{"order", DRP_WHOLE, {2}}, {"final_step", DRP_REALS, {0}}};
    drp_option spread = {"sigmas", DRP_TEXT, {0}};
    drp_client* client = NULL;
    drp_run *run = NULL, *other = NULL;
    drp_request request;
    drp_progress progress;
    drp_result result, again;
    drp_status status;
    int seen = 0;

    CHECK(count == 2);
    for (int i = 0; i < 64; ++i) noise_numbers[i] = (float)(i % 7 - 3) / 2;
    CHECK(drp_client_open(NULL, NULL, NULL, 1.0, &client) == DRP_INVALID && client == NULL);
    CHECK(strstr(drp_last_error(), "address is NULL") != NULL);
    CHECK(drp_client_open("ipc:///no/such/socket", NULL, NULL, 0.2, &client) == DRP_TIMEOUT && client == NULL);
    CHECK(drp_client_open(arguments[1], "entry points", NULL, 10.0, &client) == DRP_OK);

    drp_request_init(&request);
    request.labels = labels;
    request.labels_count = 1;
    request.steps = 8;
    request.previews = 2;
    request.noise = &noise;
    request.solver = "dpmsolver++";
    request.solver_options = options;
    request.solver_options_count = 1;
    spread.value.text = "karras";
    request.grid = &spread;
    request.grid_count = 1;
    request.drafts = 2;
    CHECK(drp_client_submit(client, &request, &run) == DRP_OK);
    while (drp_run_next(run, &progress) == DRP_OK)
        if (progress.has_preview) {
            CHECK(progress.preview.dimensions == 4 && memcmp(progress.preview.shape, shape, sizeof shape) == 0);
            ++seen;
        }
    CHECK(seen > 0 && drp_run_next(run, &progress) == DRP_END);
    CHECK(drp_run_result(run, &result) == DRP_OK && drp_run_result(run, &again) == DRP_OK);
    CHECK(result.steps == 8 && result.drafts == 2 && again.evaluations == result.evaluations);
    CHECK(result.incidents_count == 0 && again.samples.data == result.samples.data);
    CHECK(fwrite(result.samples.data, sizeof(float), 64, stdout) == 64);
    CHECK(drp_run_cancel(run) == DRP_OK && drp_run_result(run, &result) == DRP_OK);
    drp_run_free(run);

    noise.shape = other_shape; /* refused by the server; further down, by the client */
    CHECK(drp_client_submit(client, &request, &run) == DRP_OK && drp_run_result(run, &result) == DRP_INVALID);
    CHECK(strstr(drp_last_error(), "noise is torch.float32 [1, 1, 4, 4]") != NULL);
    drp_run_free(run);
    noise.dtype = "float31";
    CHECK(drp_client_submit(client, &request, &run) == DRP_INVALID);
    noise.dtype = "float32";
    noise.data = NULL;
    CHECK(drp_client_submit(client, &request, &run) == DRP_INVALID);
    request.noise = NULL;
    request.steps = -1;
    CHECK(drp_client_submit(client, &request, &run) == DRP_INVALID && strstr(drp_last_error(), "steps") != NULL);
    request.steps = 8;
    options[1].value.reals.numbers = sigmas;
    options[1].value.reals.count = 2;
    request.solver_options_count = 2;
    CHECK(drp_client_submit(client, &request, &run) == DRP_OK && drp_run_result(run, &result) == DRP_INVALID);
    drp_run_free(run);
    options[0].kind = (drp_kind)99;
    CHECK(drp_client_submit(client, &request, &run) == DRP_INVALID);
    request.solver = NULL;
    CHECK(drp_client_submit(client, &request, &run) == DRP_INVALID &&
          strstr(drp_last_error(), "solver is NULL") != NULL);

    drp_request_init(&request);
    request.labels = labels;
    request.labels_count = 1;
    request.steps = 900;
    CHECK(drp_client_submit(client, &request, &run) == DRP_OK && drp_run_wait(run, 0.0) == DRP_TIMEOUT);
    CHECK(drp_client_submit(client, &request, &other) == DRP_OK);
    CHECK(drp_client_status(client, 10.0, &status) == DRP_OK && status.healthy && status.requests == 2);
    CHECK(drp_run_cancel(run) == DRP_OK && drp_run_wait(run, 10.0) == DRP_OK &&
          drp_run_result(run, &result) == DRP_CANCELLED);
    drp_run_free(run);
    drp_client_close(client); /* before its last run */
    CHECK(drp_run_result(other, &result) == DRP_CLOSED && drp_run_cancel(other) == DRP_OK);
    drp_run_free(other);
    drp_run_free(NULL);
    drp_client_close(NULL);
    return 0;
}
