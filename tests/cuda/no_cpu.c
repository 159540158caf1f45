/* no_cpu.c - what a test program links in place of the CPU backend when it runs on another one only. */
#include "../../csrc/backend.h"

gd_status gd_backend_cpu_open(gd_context *context)
{
    return gd_fail(context, GD_EDEVICE, "device: this program has no CPU backend");
}

const char *gd_cpu_features(void) { return ""; }
