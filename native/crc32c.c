/*
 * CRC-32C, the checksum every page carries from eviction to restore. Where the CPU can, native/crc32c_wide.c takes most
 * of it.
 *
 * The instruction has a latency of three cycles and a throughput of one, so three streams run side by side over thirds
 * of the data, and are joined by multiplying with x^(8 * length) modulo the polynomial, which is a table lookup.
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, CRC32; RFC 3720 appendix B.4 for test vectors.
 */
#include "crc32c.h"

#include <endian.h>
#include <string.h>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define POLYNOMIAL 0x82f63b78u /* bit-reversed 0x1edc6f41 */
#define PAGE_BYTES 4096

/* Lengths of one stream: 3 * LONG + 16 is one page; SHORT serves what is smaller. Both are multiples of 8. */
#define LONG 1360
#define SHORT 128

static uint32_t by_byte[8][256]; /* slicing by eight */
static bool have_hardware, have_wide;

static inline uint64_t load64(const unsigned char *at) {
    uint64_t value;

    memcpy(&value, at, sizeof value);
    return le64toh(value);
}

static uint32_t table_update(uint32_t crc, const unsigned char *at, size_t len) {
    for (; len >= 8; at += 8, len -= 8) {
        uint64_t v = load64(at) ^ crc;

        crc = by_byte[7][v & 255] ^ by_byte[6][v >> 8 & 255] ^ by_byte[5][v >> 16 & 255] ^ by_byte[4][v >> 24 & 255] ^
              by_byte[3][v >> 32 & 255] ^ by_byte[2][v >> 40 & 255] ^ by_byte[1][v >> 48 & 255] ^ by_byte[0][v >> 56];
    }
    for (; len; at++, len--)
        crc = crc >> 8 ^ by_byte[0][(crc ^ *at) & 255];
    return crc;
}

static void fill_byte_tables(void) {
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;

        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        by_byte[0][n] = crc;
    }
    for (uint32_t n = 0; n < 256; n++)
        for (int k = 1; k < 8; k++)
            by_byte[k][n] = by_byte[k - 1][n] >> 8 ^ by_byte[0][by_byte[k - 1][n] & 255];
}

#if defined(__x86_64__) || defined(__aarch64__)

#if defined(__x86_64__)
#define HARDWARE __attribute__((target("sse4.2")))

HARDWARE static inline uint64_t step8(uint64_t crc, uint64_t value) { return __builtin_ia32_crc32di(crc, value); }

HARDWARE static inline uint32_t step1(uint32_t crc, unsigned char value) { return __builtin_ia32_crc32qi(crc, value); }

static bool detect_hardware(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2");
}
#else
#define HARDWARE

static inline uint64_t step8(uint64_t crc, uint64_t value) {
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(value));
    return crc;
}

static inline uint32_t step1(uint32_t crc, unsigned char value) {
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(value));
    return crc;
}

static bool detect_hardware(void) { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
#endif

static uint32_t after_long[4][256], after_short[4][256];

/* What `crc` becomes when the table's number of zero bytes follows. */
static inline uint32_t shift(uint32_t (*table)[256], uint32_t crc) {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
}

static void fill_shift_table(uint32_t (*table)[256], size_t zeros) {
    static const unsigned char nothing[LONG];

    for (int bit = 0; bit < 32; bit++) {
        uint32_t moved = table_update(1u << bit, nothing, zeros);
        uint32_t low = 1u << bit % 8;

        for (uint32_t n = low; n < 256; n++)
            if (n & low)
                table[bit / 8][n] ^= moved;
    }
}

HARDWARE static inline uint32_t three_streams(uint32_t crc, const unsigned char *at, size_t stream,
                                              uint32_t (*table)[256]) {
    // 64 bits wide, as the instruction is: narrowing each step costs half of the speed.
    uint64_t first = crc, second = 0, third = 0;

    for (const unsigned char *end = at + stream; at < end; at += 8) {
        first = step8(first, load64(at));
        second = step8(second, load64(at + stream));
        third = step8(third, load64(at + 2 * stream));
    }
    return shift(table, shift(table, (uint32_t)first) ^ (uint32_t)second) ^ (uint32_t)third;
}

HARDWARE static uint32_t hardware_update(uint32_t crc, const unsigned char *at, size_t len) {
    for (; len >= 3 * LONG; at += 3 * LONG, len -= 3 * LONG)
        crc = three_streams(crc, at, LONG, after_long);
    for (; len >= 3 * SHORT; at += 3 * SHORT, len -= 3 * SHORT)
        crc = three_streams(crc, at, SHORT, after_short);
    for (; len >= 8; at += 8, len -= 8)
        crc = (uint32_t)step8(crc, load64(at));
    for (; len; at++, len--)
        crc = step1(crc, *at);
    return crc;
}

static void prepare_hardware(void) {
    fill_shift_table(after_long, LONG);
    fill_shift_table(after_short, SHORT);
    have_hardware = detect_hardware();
}

#else

static uint32_t hardware_update(uint32_t crc, const unsigned char *at, size_t len) {
    return table_update(crc, at, len);
}

static void prepare_hardware(void) {}

#endif

/* When the module is loaded: no call needs to ask whether the tables are there. */
__attribute__((constructor)) static void prepare(void) {
    fill_byte_tables();
    prepare_hardware();
    have_wide = have_hardware && edm_crc32c_wide_prepare();
}

uint32_t edm_crc32c_by_table(const void *data, size_t len) { return ~table_update(~0u, data, len); }

bool edm_crc32c_by_hardware(const void *data, size_t len, uint32_t *out) {
    if (!have_hardware)
        return false;
    *out = ~hardware_update(~0u, data, len);
    return true;
}

uint32_t edm_crc32c(const void *data, size_t len) {
    const unsigned char *at = data;
    uint32_t crc = ~0u;

    if (have_wide && len >= EDM_CRC32C_WIDE_STEP) {
        size_t steps = len / EDM_CRC32C_WIDE_STEP;

        crc = edm_crc32c_wide(crc, at, steps);
        at += steps * EDM_CRC32C_WIDE_STEP;
        len %= EDM_CRC32C_WIDE_STEP;
    }
    return ~(have_hardware ? hardware_update(crc, at, len) : table_update(crc, at, len));
}

uint32_t edm_crc32c_copy(void *to, const void *from, size_t len) {
    if (have_wide && len && len % EDM_CRC32C_WIDE_STEP == 0)
        return ~edm_crc32c_wide_copy(~0u, to, from, len / EDM_CRC32C_WIDE_STEP);
    memcpy(to, from, len);
    return edm_crc32c(to, len);
}

void edm_crc32c_pages(const void *pages, size_t n_pages, uint32_t *out) {
    const unsigned char *page = pages;

    for (size_t i = 0; i < n_pages; i++, page += PAGE_BYTES)
        out[i] = edm_crc32c(page, PAGE_BYTES);
}
