/* Fuzz targets: each takes any bytes and aborts, or trips a sanitizer, where the core breaks a
 * promise. */
#ifndef CODECLLM_FUZZ_TARGETS_H
#define CODECLLM_FUZZ_TARGETS_H

#include "../core.h"

int fuzz_table(const uint8_t *data, size_t size);
int fuzz_decode(const uint8_t *data, size_t size);
int fuzz_encode(const uint8_t *data, size_t size);
int fuzz_fit(const uint8_t *data, size_t size);
int fuzz_check(const uint8_t *data, size_t size);
int fuzz_run(const uint8_t *data, size_t size);
int fuzz_pack(const uint8_t *data, size_t size);
int fuzz_rows(const uint8_t *data, size_t size);

#endif
