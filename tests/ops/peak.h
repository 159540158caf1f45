/*
 * peak.h - what a thread could do at most: multiply-adds on registers alone, with the widest vectors of the
 * instruction set that the library chose.
 */
#ifndef OPS_PEAK_H
#define OPS_PEAK_H

#include "../../csrc/gendistiller.h"

/* Operations a second of one thread; float32's where the library has no instruction for that precision. */
double peak_flops(const char *precision);

#endif
