/*
 * CRC-32C by carry-less multiplication, 256 bytes a step: four accumulators of four 128-bit lanes each, for CPUs with
 * AVX-512 and VPCLMULQDQ. A page takes a quarter of the time it takes by the CRC instruction.
 *
 * A lane stands for a polynomial that is congruent to all data it has taken in. To take in what lies `bits` further on
 * is to multiply it by x^bits modulo the polynomial: its two halves each by a constant of 33 bits. Bits are reflected,
 * as in the CRC instruction, which in the end reduces the last lane.
 * Source: V. Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction, Intel, 2009.
 */
#include "crc32c.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.2")))
#define STEP EDM_CRC32C_WIDE_STEP
#define LANE 128u

struct fold {
    uint64_t low, high;
};

static struct fold by_step[1], by_register[1], by_lane[4];

/* x^n modulo the polynomial, reflected, in the 33 bits that a reflected product needs. */
static uint64_t power(uint32_t n) {
    uint32_t value = 1u << 31;

    for (; n; n--)
        value = value & 1 ? value >> 1 ^ 0x82f63b78u : value >> 1;
    return (uint64_t)value << 1;
}

static struct fold fold_by(uint32_t bits) { return (struct fold){power(bits + 32), power(bits - 32)}; }

bool edm_crc32c_wide_prepare(void) {
    *by_step = fold_by(8 * STEP);
    *by_register = fold_by(4 * LANE);
    for (uint32_t lane = 0; lane < 3; lane++)
        by_lane[lane] = fold_by((3 - lane) * LANE);
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.2");
}

WIDE static inline __m512i fold(__m512i lanes, __m512i by, __m512i more) {
    __m512i low = _mm512_clmulepi64_epi128(lanes, by, 0x00), high = _mm512_clmulepi64_epi128(lanes, by, 0x11);

    return _mm512_ternarylogic_epi64(low, high, more, 0x96); /* the XOR of all three */
}

WIDE static inline __m512i everywhere(const struct fold *by) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)by));
}

WIDE static inline __m512i take(const unsigned char *at, unsigned char *to, size_t i) {
    __m512i bytes = _mm512_loadu_si512(at + i * sizeof(__m512i));

    if (to)
        _mm512_storeu_si512(to + i * sizeof(__m512i), bytes);
    return bytes;
}

/* Inlined into both callers, so that neither asks in its loop whether it copies. */
WIDE __attribute__((always_inline)) static inline uint32_t update(uint32_t crc, const unsigned char *at, size_t steps,
                                                                  unsigned char *to) {
    __m512i step = everywhere(by_step), next = everywhere(by_register);
    __m512i a = take(at, to, 0), b = take(at, to, 1), c = take(at, to, 2), d = take(at, to, 3);

    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (size_t i = 4; i < 4 * steps; i += 4) {
        a = fold(a, step, take(at, to, i));
        b = fold(b, step, take(at, to, i + 1));
        c = fold(c, step, take(at, to, i + 2));
        d = fold(d, step, take(at, to, i + 3));
    }
    d = fold(fold(fold(a, next, b), next, c), next, d);

    /* Three lanes onto the last, which the constants of zero leave out. */
    __m512i moved = fold(d, _mm512_loadu_si512(by_lane), _mm512_setzero_si512());
    __m128i last = _mm512_extracti32x4_epi32(d, 3);
    for (int lane = 0; lane < 3; lane++) {
        last = _mm_xor_si128(last, _mm512_castsi512_si128(moved));
        moved = _mm512_shuffle_i64x2(moved, moved, 0x39);
    }
    uint64_t left = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(last));
    return (uint32_t)_mm_crc32_u64(left, (uint64_t)_mm_extract_epi64(last, 1));
}

WIDE uint32_t edm_crc32c_wide(uint32_t crc, const void *data, size_t steps) { return update(crc, data, steps, NULL); }

WIDE uint32_t edm_crc32c_wide_copy(uint32_t crc, void *to, const void *data, size_t steps) {
    return update(crc, data, steps, to);
}

#else

bool edm_crc32c_wide_prepare(void) { return false; }

uint32_t edm_crc32c_wide(uint32_t crc, const void *data, size_t steps) {
    (void)data, (void)steps;
    return crc;
}

uint32_t edm_crc32c_wide_copy(uint32_t crc, void *to, const void *data, size_t steps) {
    (void)to, (void)data, (void)steps;
    return crc;
}

#endif
