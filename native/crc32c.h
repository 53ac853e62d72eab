/*
 * CRC-32C of pages: by carry-less multiplication or the CPU's own instruction where it has them, else by tables.
 *
 * `edm_crc32c`, `edm_crc32c_pages` and `edm_crc32c_copy` choose by themselves and are what everyone calls. The others
 * are the choices, named so that a test can hold them against each other.
 */
#ifndef EDM_CRC32C_H
#define EDM_CRC32C_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint32_t edm_crc32c(const void *data, size_t len);
void edm_crc32c_pages(const void *pages, size_t n_pages, uint32_t *out);

/* Copy `len` bytes and return their CRC-32C, in one pass where the CPU can; `to` and `from` do not overlap. */
uint32_t edm_crc32c_copy(void *to, const void *from, size_t len);

/* By tables, on any CPU. */
uint32_t edm_crc32c_by_table(const void *data, size_t len);

/* By the CPU's instruction; false, with `*out` untouched, where this CPU has none. */
bool edm_crc32c_by_hardware(const void *data, size_t len, uint32_t *out);

/* By carry-less multiplication (native/crc32c_wide.c): whether this CPU can, to be asked before the two below. They go
   on from `crc` (not inverted) over `steps` (at least 1) times so many bytes. */
#define EDM_CRC32C_WIDE_STEP 256
bool edm_crc32c_wide_prepare(void);
uint32_t edm_crc32c_wide(uint32_t crc, const void *data, size_t steps);
uint32_t edm_crc32c_wide_copy(uint32_t crc, void *to, const void *data, size_t steps);

#endif
