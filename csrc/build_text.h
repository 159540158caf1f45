/*
 * build_text.h - names a build of backend.h, so that a library tells a plug-in that was compiled against another one.
 *
 * What is hashed is the text of backend.h and of every header of ours that it includes, byte for byte: it changes with
 * each member, their order and meaning, and cannot be forgotten, as sizes and hand-kept numbers can. The assembler
 * puts the text into the object (each header ends with GD_EMBED_HEADER(__FILE__)), so that a compiler by hand needs
 * no flag. Sizes are hashed too: flags of a compiler such as -fshort-enums move members of the same text.
 *
 * Included before backend.h, by one file of the library and one of the plug-in.
 */
#ifndef GD_BUILD_TEXT_H
#define GD_BUILD_TEXT_H

#ifdef GD_BACKEND_H
#error "build_text.h: backend.h is included before it"
#endif
#ifdef __ELF__
/* One section, whose subsections follow one another by number wherever a compiler puts the statements. */
#define GD_HEADERS(subsection, what) __asm__(".pushsection gd_headers, " subsection ", \"a\"\n" what "\n.popsection");
#define GD_EMBED_HEADER(file) GD_HEADERS("1", ".incbin \"" file "\"")
GD_HEADERS("0", ".globl gd_headers_begin\n.hidden gd_headers_begin\ngd_headers_begin:")
GD_HEADERS("2", ".globl gd_headers_end\n.hidden gd_headers_end\ngd_headers_end:")
extern const unsigned char gd_headers_begin[] __attribute__((visibility("hidden")));
extern const unsigned char gd_headers_end[] __attribute__((visibility("hidden")));
#else /* no such system has CUDA: sizes alone */
static const unsigned char gd_headers_begin[1];
#define gd_headers_end gd_headers_begin
#endif

#include "backend.h"

#include <stdio.h>

#define GD_BUILD_TEXT 80 /* bytes; other builds write as many */

/* FNV-1a of 64 bits. */
static inline uint64_t gd_hash_bytes(uint64_t hash, const void *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        hash = (hash ^ ((const unsigned char *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

/* The version and the hash, as "0.1.0 (backend.h 0123456789abcdef)". */
static inline void gd_build_text(char text[GD_BUILD_TEXT])
{
    const uint64_t sizes[] = {
        sizeof(struct gd_backend), sizeof(struct gd_context), sizeof(struct gd_attention_backward),
        sizeof(struct gd_config), sizeof(enum gd_activation), sizeof(size_t),
    };
    uint64_t hash = gd_hash_bytes(0xcbf29ce484222325u, gd_headers_begin, (size_t)(gd_headers_end - gd_headers_begin));
    hash = gd_hash_bytes(hash, sizes, sizeof sizes);
    snprintf(text, GD_BUILD_TEXT, "%.40s (backend.h %016llx)", GD_VERSION, (unsigned long long)hash);
}

#endif
