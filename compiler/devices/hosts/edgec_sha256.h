/* SHA-256 (FIPS 180-4) and the CRC-32 of zip files. */
#ifndef EDGEC_SHA256_H
#define EDGEC_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct EdgecSha256 {
    uint32_t state[8];
    uint64_t size; /* bytes so far */
    unsigned char block[64];
} EdgecSha256;

void edgec_sha256_start(EdgecSha256 *hash);
void edgec_sha256_add(EdgecSha256 *hash, const unsigned char *data, size_t size);
void edgec_sha256_end(EdgecSha256 *hash, char hex[65]);

uint32_t edgec_crc32(uint32_t before, const unsigned char *data, size_t size);

#endif
