/* cores.h - what gd_usable_cores() finds out, from anywhere. */
#ifndef GD_CORES_H
#define GD_CORES_H

/* gd_usable_cores(), of a tree that has proc/ in it and what proc/self/mountinfo names; "" is the machine's.
 * local_processes: LOCAL_WORLD_SIZE, or NULL. */
int gd_usable_cores_below(const char *root, const char *local_processes);

#endif
