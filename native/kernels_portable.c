/* Kernels for any machine. */
#define KERNELS kernels_portable
#define NAME "portable"
#include "kernels.inc.h"
