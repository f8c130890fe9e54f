/* Which kernels this machine can run. */
#include "core.h"

static const kernel_set *in_use;

size_t kernels_supported(const kernel_set *sets[3])
{
    size_t count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("popcnt");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[count++] = &kernels_avx512;
    if (avx2)
        sets[count++] = &kernels_avx2;
#elif defined(__aarch64__)
    sets[count++] = &kernels_neon;
#endif
    sets[count++] = &kernels_portable;
    return count;
}

const kernel_set *kernels(void)
{
    const kernel_set *set = __atomic_load_n(&in_use, __ATOMIC_RELAXED);
    if (!set) { /* threads that meet here choose the same */
        const kernel_set *sets[3];
        kernels_supported(sets);
        set = sets[0];
        __atomic_store_n(&in_use, set, __ATOMIC_RELAXED);
    }
    return set;
}

int kernels_use(const char *name)
{
    const kernel_set *sets[3];
    size_t count = kernels_supported(sets);
    for (size_t number = 0; number < count; number++)
        if (!strcmp(sets[number]->name, name)) {
            __atomic_store_n(&in_use, sets[number], __ATOMIC_RELAXED);
            return 0;
        }
    return -1;
}
