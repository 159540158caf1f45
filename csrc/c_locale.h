/*
 * c_locale.h - the "C" locale for the calling thread: strtod() and snprintf() heed the program's,
 * whose decimal point may be a comma. The file that includes this defines _POSIX_C_SOURCE 200809L.
 */
#ifndef GD_C_LOCALE_H
#define GD_C_LOCALE_H

#include <locale.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif

struct gd_c_locale {
    locale_t c, old;
};

static inline struct gd_c_locale gd_c_locale_enter(void)
{
    struct gd_c_locale locale = {newlocale(LC_ALL_MASK, "C", (locale_t)0), (locale_t)0};
    if (locale.c)
        locale.old = uselocale(locale.c);
    return locale;
}

static inline void gd_c_locale_leave(struct gd_c_locale locale)
{
    if (locale.c) {
        uselocale(locale.old);
        freelocale(locale.c);
    }
}

#endif
