/*
 * CRC-32C of pages: by the CPU's own instruction where it has one, else by tables.
 *
 * `edm_crc32c` and `edm_crc32c_pages` choose by themselves and are what everyone calls. The two below are the choices,
 * named so that a test can hold them against each other.
 */
#ifndef EDM_CRC32C_H
#define EDM_CRC32C_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint32_t edm_crc32c(const void *data, size_t len);
void edm_crc32c_pages(const void *pages, size_t n_pages, uint32_t *out);

/* By tables, on any CPU. */
uint32_t edm_crc32c_by_table(const void *data, size_t len);

/* By the CPU's instruction; false, with `*out` untouched, where this CPU has none. */
bool edm_crc32c_by_hardware(const void *data, size_t len, uint32_t *out);

#endif
