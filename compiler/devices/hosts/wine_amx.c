/* AMX for a Windows program under wine on Linux; not for an app.
 *
 * Windows gives every program the tile registers that CPUID shows; Linux does so on request
 * (arch_prctl, Documentation/arch/x86/xstate.rst), which a Windows program never makes: ONNX
 * Runtime's int8 kernels would end with an illegal instruction. On Windows this does nothing.
 */
#include <windows.h>

enum { SYS_ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18 };

static void __attribute__((constructor)) request_tiles(void)
{
    HMODULE library = GetModuleHandleW(L"ntdll.dll");
    if (!library || !GetProcAddress(library, "wine_get_version"))
        return;
    long long result = SYS_ARCH_PRCTL; /* afterwards 0, or an error: then there is no AMX */
    __asm__ volatile("syscall"
                     : "+a"(result)
                     : "D"((long long)ARCH_REQ_XCOMP_PERM), "S"((long long)XFEATURE_XTILE_DATA)
                     : "rcx", "r11", "memory");
}
