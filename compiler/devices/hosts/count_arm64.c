/* A plugin of qemu's user-mode emulation that counts executed A64 instructions by class.
 *
 * The guest marks a place by getpriority(PRIO_PROCESS, 0x0ED6E000 + label), a process that
 * cannot exist. At every mark one line is written to standard error:
 *
 *     edgec-count LABEL total=N load_store=N ...
 *
 * with all instructions executed since the start. `load_store`, `simd`, `sve` and `sme` are
 * parts of `total`; the rest are parts of `simd`, which includes scalar floating point. Inside
 * SVE and SME nothing is told apart.
 *
 * Encodings: Arm Architecture Reference Manual for A-profile (DDI 0487), C4.1. One thread:
 * the counters are not atomic. Interface: version 1 of qemu-plugin.h, declared below.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
typedef struct {
    const char *target_name;
    struct { int min, cur; } version;
    bool system_emulation;
} plugin_info; /* the beginning of qemu_info_t */
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int op, void *, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(
    plugin_id, void (*)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

enum { GETPRIORITY = 141, MARK = 0x0ED6E000, LABELS = 0xFFF };

enum class {
    TOTAL, LOAD_STORE, SIMD, FMA_FP32, FMA_FP16, WIDENING, DOT, I8MM, BF16, SVE, SME, CLASSES
};
static const char *const names[CLASSES] = {
    "total", "load_store", "simd", "fma_fp32", "fma_fp16", "widening", "dot", "i8mm", "bf16",
    "sve", "sme",
};
static uint64_t counted[CLASSES];

/* A word belongs to the first pattern with (word & mask) == bits. */
static const struct { uint32_t mask, bits; enum class class; } simd_patterns[] = {
    {0xBFE0FC00, 0x0E809400, DOT},      /* SDOT, vectors */
    {0xBFE0FC00, 0x2E809400, DOT},      /* UDOT */
    {0xBFE0FC00, 0x0E809C00, DOT},      /* USDOT */
    {0xBFC0F400, 0x0F80E000, DOT},      /* SDOT, by element */
    {0xBFC0F400, 0x2F80E000, DOT},      /* UDOT */
    {0xBFC0F400, 0x0F80F000, DOT},      /* USDOT */
    {0xBFC0F400, 0x0F00F000, DOT},      /* SUDOT */
    {0xFFE0FC00, 0x4E80A400, I8MM},     /* SMMLA */
    {0xFFE0FC00, 0x6E80A400, I8MM},     /* UMMLA */
    {0xFFE0FC00, 0x4E80AC00, I8MM},     /* USMMLA */
    {0xFFE0FC00, 0x6E40EC00, BF16},     /* BFMMLA */
    {0xBFE0FC00, 0x2E40FC00, BF16},     /* BFDOT, vectors */
    {0xBFC0F400, 0x0F40F000, BF16},     /* BFDOT, by element */
    {0xBFE0FC00, 0x2EC0FC00, BF16},     /* BFMLALB, BFMLALT, vectors */
    {0xBFC0F400, 0x0FC0F000, BF16},     /* BFMLALB, BFMLALT, by element */
    {0xBF60FC00, 0x0E20CC00, FMA_FP32}, /* FMLA, FMLS, vectors */
    {0xBFC0B400, 0x0F801000, FMA_FP32}, /* FMLA, FMLS, by element */
    {0xFFC00000, 0x1F000000, FMA_FP32}, /* FMADD, FMSUB, FNMADD, FNMSUB */
    {0xBF60FC00, 0x0E400C00, FMA_FP16}, /* FMLA, FMLS, vectors */
    {0xBFC0B400, 0x0F001000, FMA_FP16}, /* FMLA, FMLS, by element */
    {0xFFC00000, 0x1FC00000, FMA_FP16}, /* FMADD, FMSUB, FNMADD, FNMSUB */
    {0xBF60FC00, 0x0E20EC00, FMA_FP16}, /* FMLAL, FMLSL */
    {0xBF60FC00, 0x2E20CC00, FMA_FP16}, /* FMLAL2, FMLSL2 */
    {0x9F20DC00, 0x0E208000, WIDENING}, /* SMLAL, UMLAL, SMLSL, UMLSL, vectors */
    {0x9F20FC00, 0x0E20C000, WIDENING}, /* SMULL, UMULL, vectors */
    {0x9F00B400, 0x0F002000, WIDENING}, /* SMLAL, UMLAL, SMLSL, UMLSL, by element */
    {0x9F00F400, 0x0F00A000, WIDENING}, /* SMULL, UMULL, by element */
};

static enum class group(uint32_t word)
{
    uint32_t op0 = word >> 25 & 15;

    if (op0 == 2)
        return SVE;
    if (op0 == 0 && word >> 31)
        return SME;
    if ((op0 & 5) == 4)
        return LOAD_STORE;
    if ((op0 & 7) == 7)
        return SIMD;
    return TOTAL;
}

static void classify(uint32_t word, uint64_t *numbers)
{
    enum class found = group(word);

    numbers[TOTAL]++;
    if (found == TOTAL)
        return;
    numbers[found]++;
    if (found != SIMD)
        return;
    for (size_t i = 0; i < sizeof simd_patterns / sizeof *simd_patterns; i++) {
        if ((word & simd_patterns[i].mask) == simd_patterns[i].bits) {
            numbers[simd_patterns[i].class]++;
            return;
        }
    }
}

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    uint64_t numbers[CLASSES] = {0};
    size_t length = qemu_plugin_tb_n_insns(block);
    uint32_t word;

    (void)id;
    for (size_t i = 0; i < length; i++) {
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        classify(word, numbers);
    }
    for (int class = 0; class < CLASSES; class++)
        if (numbers[class])
            qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &counted[class],
                                                     numbers[class]);
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t which, uint64_t who,
                   uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    char line[CLASSES * 40];
    int length;

    (void)id, (void)cpu, (void)which, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != GETPRIORITY || (who & ~(uint64_t)LABELS) != MARK)
        return;
    length = snprintf(line, sizeof line, "edgec-count %u", (unsigned)(who & LABELS));
    for (int class = 0; class < CLASSES; class++)
        length += snprintf(line + length, sizeof line - length, " %s=%" PRIu64, names[class],
                           counted[class]);
    fprintf(stderr, "%s\n", line);
}

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

__attribute__((visibility("default"))) int
qemu_plugin_install(plugin_id id, const plugin_info *info, int argc, char **argv)
{
    (void)argc, (void)argv;
    if (strcmp(info->target_name, "aarch64") != 0) {
        fprintf(stderr, "edgec-count: these are instructions of aarch64, not of %s\n",
                info->target_name);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
