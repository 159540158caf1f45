/*
 * cores.c - how many cores are this process's: the least of
 *
 *     the processors that its thread may run on (affinity: taskset, Slurm, a cpuset), else those that are online
 *     the quota of its cgroup and of every cgroup around it (a container's, a systemd unit's), rounded up
 *
 * of which each of the processes that torchrun starts on a machine (LOCAL_WORLD_SIZE) takes its share. Where they were
 * bound to processors before they began (Slurm, numactl), the mask is the share already: a process beside this one
 * whose mask has none of its processors takes none of them. A quota is all processes' together.
 *
 * What cannot be read, or is not as it should be, limits nothing.
 */
#define _GNU_SOURCE /* sched_getaffinity() */
#include "cores.h"

#include <ctype.h>
#include <dirent.h>
#include <limits.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gendistiller.h"

#define MOST_CORES 1024
#define MOST_PROCESSORS 8192 /* Linux's own limit */
#define WORD_BITS (CHAR_BIT * sizeof(unsigned long))

/* A set of processors, as the kernel has it. */
struct mask {
    unsigned long words[MOST_PROCESSORS / WORD_BITS];
};

static long least(long a, long b) { return a < b ? a : b; }

/* ---- Files -------------------------------------------------------------------------------------------- */

/* root/a/b, or "" where that is too long to be a file. */
struct path {
    char text[2 * PATH_MAX];
};

static struct path path_to(const char *root, const char *a, const char *b)
{
    struct path path;
    const int length = snprintf(path.text, sizeof path.text, "%s%s/%s", root, a, b);
    if (length < 0 || (size_t)length >= sizeof path.text)
        path.text[0] = '\0';
    return path;
}

/* The beginning of a small file; 0 where there is none. */
static int read_start(struct path path, char *text, size_t size)
{
    FILE *file = fopen(path.text, "re");
    if (!file)
        return 0;
    const size_t length = fread(text, 1, size - 1, file);
    fclose(file);
    text[length] = '\0';
    return length > 0;
}

/* An integer and nothing but white space or the end after it; moves *text past it. Huge ones become LONG_MAX. */
static int take_number(const char **text, long *number)
{
    char *end;
    *number = strtol(*text, &end, 10);
    if (end == *text || (*end != '\0' && !isspace((unsigned char)*end)))
        return 0;
    *text = end;
    return 1;
}

/* ---- Processors --------------------------------------------------------------------------------------- */

static long count(const struct mask *mask)
{
    long bits = 0;
    for (size_t i = 0; i < sizeof mask->words / sizeof *mask->words; i++)
        bits += __builtin_popcountl(mask->words[i]);
    return bits;
}

static int overlap(const struct mask *a, const struct mask *b)
{
    for (size_t i = 0; i < sizeof a->words / sizeof *a->words; i++)
        if (a->words[i] & b->words[i])
            return 1;
    return 0;
}

/* The calling thread's; empty where the system has no such thing. */
static struct mask own_mask(void)
{
    struct mask mask = {{0}};
#ifdef CPU_COUNT
    if (sched_getaffinity(0, sizeof mask, (cpu_set_t *)&mask) != 0)
        memset(&mask, 0, sizeof mask);
#endif
    return mask;
}

/* Of a line "Cpus_allowed:\tff,ffffffff": hexadecimal, the highest processors first. */
static int parse_mask(const char *text, struct mask *mask)
{
    size_t digits = 0;
    memset(mask, 0, sizeof *mask);
    text += strspn(text, " \t");
    const size_t length = strspn(text, "0123456789abcdefABCDEF,");
    for (size_t i = length; i > 0; i--) {
        const char digit[2] = {text[i - 1], '\0'};
        if (digit[0] == ',')
            continue;
        const unsigned long bits = strtoul(digit, NULL, 16);
        if (4 * digits + 4 > MOST_PROCESSORS)
            return bits == 0;
        mask->words[4 * digits / WORD_BITS] |= bits << 4 * digits % WORD_BITS;
        digits++;
    }
    return digits > 0;
}

/* ---- Processes beside this one ------------------------------------------------------------------------ */

/* "pid (any name) state parent ..." */
static int parse_stat(const char *text, long *pid, long *parent)
{
    const char *rest = strrchr(text, ')');
    if (!take_number(&text, pid) || !rest || rest[1] != ' ' || rest[2] == '\0')
        return 0;
    rest += 3;
    return take_number(&rest, parent);
}

/* Mask of process number `name` where it is another child of `parent`. */
static int is_beside(const char *root, const char *name, long self, long parent, struct mask *mask)
{
    char text[8192], folder[32];
    long pid, its_parent;
    if (snprintf(folder, sizeof folder, "/proc/%.16s", name) < 0 ||
        !read_start(path_to(root, folder, "stat"), text, sizeof text) || !parse_stat(text, &pid, &its_parent) ||
        pid == self || its_parent != parent || !read_start(path_to(root, folder, "status"), text, sizeof text))
        return 0;
    const char *line = strstr(text, "\nCpus_allowed:");
    return line != NULL && parse_mask(line + strlen("\nCpus_allowed:"), mask);
}

/* Of `processes` local ones, how many share the processors of this one's mask. Those that torchrun or Slurm starts on a
 * machine have one parent. One that is not there yet counts. */
static long sharers(const char *root, const struct mask *own, long processes)
{
    char text[1024];
    long self, parent, apart = 0;
    DIR *folder = NULL;
    if (read_start(path_to(root, "/proc/self", "stat"), text, sizeof text) && parse_stat(text, &self, &parent))
        folder = opendir(path_to(root, "", "proc").text);
    for (struct dirent *entry; folder && (entry = readdir(folder)) != NULL;) {
        struct mask mask;
        if (isdigit((unsigned char)entry->d_name[0]) && is_beside(root, entry->d_name, self, parent, &mask))
            apart += !overlap(own, &mask);
    }
    if (folder)
        closedir(folder);
    return apart < processes ? processes - apart : 1;
}

/* ---- Quotas ------------------------------------------------------------------------------------------- */

/* Whole cores that `quota` microseconds in each `period` are; LONG_MAX where that is no limit. */
static long whole_cores(long quota, long period)
{
    return quota < 1 || period < 1 || quota == LONG_MAX ? LONG_MAX : (quota - 1) / period + 1;
}

/* Limit of one cgroup, a folder: version 2 has "QUOTA PERIOD" or "max PERIOD", version 1 a file each, -1 for none. */
static long limit_of(const char *root, const char *folder, int version)
{
    char text[128], period_text[128];
    const char *at = text, *period_at = version == 2 ? text : period_text;
    long quota, period;
    const int there = version == 2 ? read_start(path_to(root, folder, "cpu.max"), text, sizeof text)
                                   : read_start(path_to(root, folder, "cpu.cfs_quota_us"), text, sizeof text) &&
                          read_start(path_to(root, folder, "cpu.cfs_period_us"), period_text, sizeof period_text);
    if (!there || !take_number(&at, &quota))
        return LONG_MAX;
    if (version == 2)
        period_at = at;
    return take_number(&period_at, &period) ? whole_cores(quota, period) : LONG_MAX;
}

/* Least limit of the folders from `mount`/`below` up to `mount`. */
static long limit_up_to(const char *root, const char *mount, const char *below, int version)
{
    struct path path = path_to("", mount, below);
    const size_t shortest = strlen(mount);
    long limit = LONG_MAX;
    for (size_t length = strlen(path.text); length >= shortest && length > 0;) {
        limit = least(limit, limit_of(root, path.text, version));
        while (length > 0 && path.text[length - 1] != '/')
            length--;
        path.text[length > 0 ? --length : 0] = '\0';
    }
    return limit;
}

/* Of "\040" and the like, which stand for white space in mountinfo, in place. */
static void unescape(char *text)
{
    char *to = text;
    for (; *text; text++, to++) {
        if (text[0] == '\\' && strspn(text + 1, "01234567") >= 3) {
            *to = (char)((text[1] - '0') * 64 + (text[2] - '0') * 8 + text[3] - '0');
            text += 3;
        } else {
            *to = *text;
        }
    }
    *to = '\0';
}

/* Whether a list by commas has "cpu". */
static int has_cpu(const char *list)
{
    for (; *list; list += strcspn(list, ","), list += *list == ',')
        if (strncmp(list, "cpu", 3) == 0 && (list[3] == ',' || list[3] == '\0'))
            return 1;
    return 0;
}

/* This process's cgroup: of /proc/self/cgroup's lines "ID:CONTROLLERS:PATH" that of version 2, which names none, or
 * that which has "cpu". */
static int own_cgroup(const char *root, int version, char *cgroup, size_t size)
{
    FILE *file = fopen(path_to(root, "/proc/self", "cgroup").text, "re");
    char *line = NULL;
    size_t room = 0;
    int found = 0;
    while (file && !found && getline(&line, &room, file) > 0) {
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        path[strcspn(path, "\n")] = '\0';
        found = version == 2 ? strcmp(line, "0:") == 0 : has_cpu(controllers + 1);
        if (found && path[0] == '/' && strlen(path) < size)
            memcpy(cgroup, path, strlen(path) + 1);
        else
            found = 0;
    }
    free(line);
    if (file)
        fclose(file);
    return found;
}

struct mount {
    char *top, *point; /* the cgroup that is mounted, and where */
};

/* "ID PARENT DEVICE TOP POINT OPTIONS [TAGS...] - TYPE SOURCE OPTIONS", cut up; whether it is the version's, and has
 * "cpu". */
static int parse_mount(char *line, int version, struct mount *mount)
{
    char *words[6], *save = NULL, *end = strstr(line, " - ");
    if (!end)
        return 0;
    *end = '\0';
    char type[16] = "", options[512] = "";
    if (sscanf(end + 3, "%15s %*s %511s", type, options) < 1 ||
        strcmp(type, version == 2 ? "cgroup2" : "cgroup") != 0 || (version == 1 && !has_cpu(options)))
        return 0;
    for (int i = 0; i < 6; i++)
        if (!(words[i] = strtok_r(i ? NULL : line, " ", &save)))
            return 0;
    *mount = (struct mount){words[3], words[4]};
    unescape(mount->top);
    unescape(mount->point);
    return mount->point[0] == '/';
}

/* What of `cgroup` lies below the one that is mounted, "" for that itself; NULL where it does not lie there, or the
 * names go up, past what this process's namespace shows. */
static const char *below(const char *cgroup, const char *top)
{
    const size_t length = strcmp(top, "/") == 0 ? 0 : strlen(top);
    if (strncmp(cgroup, top, length) != 0 || (cgroup[length] != '/' && cgroup[length] != '\0') || strstr(cgroup, "/.."))
        return NULL;
    return cgroup[length] == '/' ? cgroup + length + 1 : "";
}

/* A container may see its own cgroup as a mount's top, while its path is the host's or the namespace's: what is mounted
 * is then the nearest that is known, and counts where no mount has the path. */
static long quota(const char *root, int version)
{
    char cgroup[PATH_MAX], *line = NULL;
    size_t room = 0;
    long inside = LONG_MAX, outside = LONG_MAX;
    int found = 0;
    if (!own_cgroup(root, version, cgroup, sizeof cgroup))
        return LONG_MAX;
    FILE *file = fopen(path_to(root, "/proc/self", "mountinfo").text, "re");
    while (file && getline(&line, &room, file) > 0) {
        struct mount mount;
        if (!parse_mount(line, version, &mount))
            continue;
        const char *rest = below(cgroup, mount.top);
        if (rest)
            inside = least(inside, limit_up_to(root, mount.point, rest, version));
        else
            outside = least(outside, limit_of(root, mount.point, version));
        found = found || rest;
    }
    free(line);
    if (file)
        fclose(file);
    return found ? inside : outside;
}

/* ---- The answer --------------------------------------------------------------------------------------- */

int gd_usable_cores_below(const char *root, const char *local_processes)
{
    const struct mask own = own_mask();
    long processes = 1, sharing = 1, cores = count(&own);
    if (!local_processes || !take_number(&local_processes, &processes) || processes < 1)
        processes = 1;
    if (cores == 0)
        cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (processes > 1)
        sharing = sharers(root, &own, processes);
    cores = least(cores / sharing, least(quota(root, 1), quota(root, 2)) / processes);
    return (int)(cores < 1 ? 1 : least(cores, MOST_CORES));
}

int gd_usable_cores(void)
{
    return gd_usable_cores_below("", getenv("LOCAL_WORLD_SIZE"));
}
