/*
 * The calls Python makes into the C core (`edm._native.lib`): the manual of the native module.
 *
 * Plain declarations only, no preprocessor lines: cffi reads this very file, and C sources include it after
 * <stdbool.h>, <stddef.h> and <stdint.h>.
 */

/* CRC-32C (Castagnoli, as in iSCSI and ext4) of `len` bytes at `data`; 0 for no bytes. Any alignment, any thread. */
uint32_t edm_crc32c(const void *data, size_t len);

/* CRC-32C of each of `n_pages` pages of 4096 bytes at `pages`, into `out[0..n_pages)`. Any alignment, any thread. */
void edm_crc32c_pages(const void *pages, size_t n_pages, uint32_t *out);
