/* XXH3-64 with seed 0, of data whose size is a multiple of 16: slots of chunks are no other.
 *
 * After the description of the algorithm in the documentation of xxHash; the constants are part of
 * it.
 */
#include "core.h"

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
#define PRIME_MX1 0x165667919E3779F9u

#define STRIPE 64
#define SECRET_BYTES 192
#define STRIPES_PER_BLOCK ((SECRET_BYTES - STRIPE) / 8)
#define BLOCK (STRIPE * STRIPES_PER_BLOCK)

static const uint8_t secret[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint64_t fold(uint64_t a, uint64_t b)
{
#ifdef __SIZEOF_INT128__
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
#else
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t low = a0 * b0, middle = a1 * b0 + (low >> 32), other = a0 * b1 + (uint32_t)middle;
    uint64_t high = a1 * b1 + (middle >> 32) + (other >> 32);
    return high ^ (other << 32 | (uint32_t)low);
#endif
}

static uint64_t avalanche(uint64_t hash)
{
    hash ^= hash >> 37;
    hash *= PRIME_MX1;
    return hash ^ hash >> 32;
}

static uint64_t mix16(const uint8_t *data, const uint8_t *key)
{
    return fold(load64(data) ^ load64(key), load64(data + 8) ^ load64(key + 8));
}

static uint64_t swap64(uint64_t value)
{
    uint64_t swapped = 0;
    for (int byte = 0; byte < 8; byte++)
        swapped = swapped << 8 | (value >> 8 * byte & 255);
    return swapped;
}

static uint64_t of_16(const uint8_t *data)
{
    uint64_t low = load64(data) ^ load64(secret + 24) ^ load64(secret + 32);
    uint64_t high = load64(data + 8) ^ load64(secret + 40) ^ load64(secret + 48);
    return avalanche(16 + swap64(low) + high + fold(low, high));
}

static uint64_t of_32_to_128(const uint8_t *data, size_t size)
{
    uint64_t hash = size * PRIME64_1;
    for (size_t pair = (size - 1) / 32 + 1; pair-- > 0;) {
        hash += mix16(data + 16 * pair, secret + 32 * pair);
        hash += mix16(data + size - 16 * (pair + 1), secret + 32 * pair + 16);
    }
    return avalanche(hash);
}

static uint64_t of_129_to_240(const uint8_t *data, size_t size)
{
    uint64_t hash = size * PRIME64_1;
    for (size_t round = 0; round < 8; round++)
        hash += mix16(data + 16 * round, secret + 16 * round);
    hash = avalanche(hash);
    for (size_t round = 8; round < size / 16; round++)
        hash += mix16(data + 16 * round, secret + 16 * (round - 8) + 3);
    return avalanche(hash + mix16(data + size - 16, secret + 136 - 17));
}

static void scramble(uint64_t acc[8])
{
    for (int lane = 0; lane < 8; lane++) {
        acc[lane] ^= acc[lane] >> 47;
        acc[lane] ^= load64(secret + SECRET_BYTES - STRIPE + 8 * lane);
        acc[lane] *= PRIME32_1;
    }
}

static uint64_t of_many(const uint8_t *data, size_t size)
{
    uint64_t acc[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                       PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const kernel_set *set = kernels();
    size_t blocks = (size - 1) / BLOCK;
    for (size_t block = 0; block < blocks; block++) {
        set->xxh3_stripes(acc, data + block * BLOCK, secret, STRIPES_PER_BLOCK);
        scramble(acc);
    }
    size_t stripes = (size - 1 - blocks * BLOCK) / STRIPE;
    set->xxh3_stripes(acc, data + blocks * BLOCK, secret, stripes);
    set->xxh3_stripes(acc, data + size - STRIPE, secret + SECRET_BYTES - STRIPE - 7, 1);
    uint64_t hash = size * PRIME64_1;
    for (int pair = 0; pair < 4; pair++)
        hash += fold(acc[2 * pair] ^ load64(secret + 11 + 16 * pair),
                     acc[2 * pair + 1] ^ load64(secret + 19 + 16 * pair));
    return avalanche(hash);
}

uint64_t xxh3_of_slot(const uint8_t *data, size_t size)
{
    if (size <= 16)
        return of_16(data);
    if (size <= 128)
        return of_32_to_128(data, size);
    return size <= 240 ? of_129_to_240(data, size) : of_many(data, size);
}
