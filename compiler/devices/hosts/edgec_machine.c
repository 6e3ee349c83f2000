#include "edgec_machine.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define IS_X86_64
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
#endif
#ifdef __APPLE__
#include <TargetConditionals.h>
#endif

const char *edgec_arch(void)
{
#if defined(IS_X86_64)
    return "x86_64";
#elif defined(__aarch64__) || defined(_M_ARM64)
    return "arm64";
#elif defined(__arm__)
    return "armhf";
#elif defined(__riscv) && __riscv_xlen == 64
    return "riscv64";
#else
    return "unknown";
#endif
}

const char *edgec_os(void)
{
#if defined(_WIN32)
    return "windows";
#elif defined(__ANDROID__)
    return "android";
#elif defined(__linux__)
    return "linux";
#elif defined(__APPLE__) && TARGET_OS_IPHONE
    return "ios";
#elif defined(__APPLE__)
    return "macos";
#else
    return "unknown";
#endif
}

#if defined(IS_X86_64)
const char *const edgec_features[] = {"avx2", "avx512", "fma", "vnni", NULL};

static void cpuid(uint32_t leaf, uint32_t part, uint32_t out[4])
{
#ifdef _MSC_VER
    __cpuidex((int *)out, (int)leaf, (int)part);
#else
    if (!__get_cpuid_count(leaf, part, &out[0], &out[1], &out[2], &out[3]))
        memset(out, 0, 4 * sizeof *out);
#endif
}

/* The registers that the operating system saves: XCR0. */
static uint64_t saved_state(void)
{
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#endif
}

bool edgec_has(const char *feature)
{
    uint32_t basic[4], seven[4], seven_one[4]; /* eax, ebx, ecx, edx */
    cpuid(1, 0, basic);
    if (!(basic[2] >> 27 & 1)) /* OSXSAVE: without it no AVX */
        return false;
    uint64_t state = saved_state();
    bool wide = (state & 0x6) == 0x6, wider = (state & 0xE6) == 0xE6;
    cpuid(7, 0, seven);
    memset(seven_one, 0, sizeof seven_one);
    if (seven[0] >= 1)
        cpuid(7, 1, seven_one);
    if (!strcmp(feature, "avx2"))
        return wide && seven[1] >> 5 & 1;
    if (!strcmp(feature, "fma"))
        return wide && basic[2] >> 12 & 1;
    if (!strcmp(feature, "avx512"))
        return wider && seven[1] >> 16 & 1;
    if (!strcmp(feature, "vnni")) /* AVX-512 VNNI or AVX-VNNI */
        return (wider && seven[2] >> 11 & 1) || (wide && seven_one[0] >> 4 & 1);
    return false;
}
#elif defined(__aarch64__) && defined(__linux__)
const char *const edgec_features[] = {"bf16", "dotprod", "fp16", "i8mm", "neon", "sme", "sve", NULL};

bool edgec_has(const char *feature)
{
    static const struct {
        const char *name;
        unsigned long entry; /* of the auxiliary vector: AT_HWCAP, AT_HWCAP2 */
        int bit;             /* Linux's asm/hwcap.h */
    } bits[] = {{"neon", 16, 1},  {"fp16", 16, 10}, {"dotprod", 16, 20}, {"sve", 16, 22},
                {"i8mm", 26, 13}, {"bf16", 26, 14}, {"sme", 26, 23}};
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        if (!strcmp(feature, bits[i].name))
            return getauxval(bits[i].entry) >> bits[i].bit & 1;
    return false;
}
#elif defined(__aarch64__) && defined(__APPLE__)
const char *const edgec_features[] = {"dotprod", "i8mm", "neon", NULL};

bool edgec_has(const char *feature)
{
    static const char *const keys[][2] = {{"dotprod", "hw.optional.arm.FEAT_DotProd"},
                                          {"i8mm", "hw.optional.arm.FEAT_I8MM"},
                                          {"neon", "hw.optional.neon"}};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int value = 0;
        size_t size = sizeof value;
        if (!strcmp(feature, keys[i][0]))
            return !sysctlbyname(keys[i][1], &value, &size, NULL, 0) && value;
    }
    return false;
}
#else
const char *const edgec_features[] = {NULL};

bool edgec_has(const char *feature)
{
    (void)feature;
    return false;
}
#endif
