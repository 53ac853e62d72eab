/* CRC-32C against the published vectors, against a bit-by-bit reference, and the two implementations against each
 * other. */
#include "../crc32c.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROOM = 3 * 4096 + 64 };

static int failures;
static unsigned char copied[ROOM + 1];

static void expect(uint32_t got, uint32_t want, const char *what, size_t len) {
    if (got == want)
        return;
    fprintf(stderr, "%s, %zu bytes: got %08x, want %08x\n", what, len, got, want);
    failures++;
}

static uint32_t bit_by_bit(const unsigned char *at, size_t len) {
    uint32_t crc = ~0u;

    for (; len; len--) {
        crc ^= *at++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
    }
    return ~crc;
}

static void expect_all(const unsigned char *data, size_t len, uint32_t want, const char *what) {
    uint32_t hardware;

    expect(edm_crc32c_by_table(data, len), want, what, len);
    expect(edm_crc32c(data, len), want, what, len);
    expect(edm_crc32c_copy(copied, data, len), want, what, len);
    if (memcmp(copied, data, len) || copied[len] != 0xa5) {
        fprintf(stderr, "%s, %zu bytes: not what was copied\n", what, len);
        failures++;
    }
    memset(copied, 0xa5, len);
    if (edm_crc32c_by_hardware(data, len, &hardware))
        expect(hardware, want, what, len);
}

/* RFC 3720, appendix B.4. */
static void published_vectors(void) {
    unsigned char data[32];

    memset(data, 0, sizeof data);
    expect_all(data, 32, 0x8a9136aau, "zeros");
    memset(data, 255, sizeof data);
    expect_all(data, 32, 0x62a8ab43u, "ones");
    for (int i = 0; i < 32; i++)
        data[i] = (unsigned char)i;
    expect_all(data, 32, 0x46dd794eu, "rising");
    expect_all((const unsigned char *)"123456789", 9, 0xe3069283u, "digits");
    expect_all(data, 0, 0, "nothing");
}

static void every_length_and_alignment(void) {
    unsigned char *data = malloc(ROOM);
    uint32_t pages[3];

    if (!data)
        abort();
    srand(1);
    for (int i = 0; i < ROOM; i++)
        data[i] = (unsigned char)rand();
    for (size_t len = 0; len < 1200; len++)
        expect_all(data + len % 8, len, bit_by_bit(data + len % 8, len), "random");
    for (size_t len = 4070; len < 4110; len++)
        expect_all(data + len % 8, len, bit_by_bit(data + len % 8, len), "about a page");
    expect_all(data, ROOM, bit_by_bit(data, ROOM), "three pages and more");

    edm_crc32c_pages(data + 1, 3, pages);
    for (int i = 0; i < 3; i++)
        expect(pages[i], bit_by_bit(data + 1 + i * 4096, 4096), "page of a batch", 4096);
    free(data);
}

int main(void) {
    uint32_t unused;

    memset(copied, 0xa5, sizeof copied);
    published_vectors();
    every_length_and_alignment();
    if (!edm_crc32c_by_hardware("", 0, &unused))
        printf("this CPU has no CRC-32C instruction: only the tables were tested\n");
    return failures ? 1 : 0;
}
