/* Submits a run with one label to a server, shows its progress, and writes the samples as float32.
 *
 *     submit_c ADDRESS LABEL FILE
 */
#include <drp/client.h>
#include <stdio.h>
#include <stdlib.h>

static int write_samples(const drp_tensor* samples, const char* path) {
    size_t count = 1, i;
    FILE* file = fopen(path, "wb");
    if (file == NULL) return 0;
    for (i = 0; i < samples->dimensions; ++i) count *= (size_t)samples->shape[i];
    const int whole = fwrite(samples->data, sizeof(float), count, file) == count;
    return (fclose(file) == 0) & whole;
}

int main(int count, char** arguments) {
    drp_client* client = NULL;
    drp_run* run = NULL;
    drp_request request;
    drp_progress progress;
    drp_result result;
    drp_code code;
    int64_t label;
    size_t i;

    if (count != 4) {
        fprintf(stderr, "submit_c ADDRESS LABEL FILE\n");
        return 2;
    }
    label = strtoll(arguments[2], NULL, 10);
    drp_request_init(&request);
    request.labels = &label;
    request.labels_count = 1;
    request.progress = 1;

    code = drp_client_open(arguments[1], "submit_c", NULL, 10.0, &client);
    if (code == DRP_OK) code = drp_client_submit(client, &request, &run);
    while (code == DRP_OK && drp_run_next(run, &progress) == DRP_OK)
        fprintf(stderr, "\rstep %lld of %lld", (long long)progress.step, (long long)progress.steps);
    if (code == DRP_OK) code = drp_run_result(run, &result);
    for (i = 0; code == DRP_OK && i < result.incidents_count; ++i)
        fprintf(stderr, "\nmeanwhile %s", result.incidents[i]);
    if (code != DRP_OK)
        fprintf(stderr, "\nerror %d: %s\n", (int)code, drp_last_error());
    else if (!write_samples(&result.samples, arguments[3]))
        perror(arguments[3]), code = DRP_ERROR;
    else
        printf("%lld steps in %lld rounds\n", (long long)result.steps, (long long)result.rounds);
    drp_run_free(run);
    drp_client_close(client);
    return code == DRP_OK ? 0 : 1;
}
