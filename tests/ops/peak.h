/*
 * peak.h - what a thread could do at most: multiply-adds on registers alone, with the widest vectors of the
 * instruction set that the library chose.
 */
#ifndef OPS_PEAK_H
#define OPS_PEAK_H

/* Floating-point operations a second of one thread. */
double peak_flops(void);

#endif
