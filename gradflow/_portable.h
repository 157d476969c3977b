/* What compilers say in their own ways. */
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
/* The widest vectors that the machine has, chosen when the library is loaded. */
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

#if defined(_MSC_VER)
#define restrict __restrict
#define INLINE static __forceinline
#define PUBLIC __declspec(dllexport)
#define PREFETCH(address) ((void)(address))
#else
#define INLINE static inline __attribute__((always_inline))
#define PUBLIC
#define PREFETCH(address) __builtin_prefetch(address) /* of an address that may lie behind the end: it cannot fail */
#endif

#if defined(__GNUC__) && !defined(_WIN32)
#define INTERNAL __attribute__((visibility("hidden")))
#else
#define INTERNAL
#endif

enum { LINE = 64 /* bytes that come from memory together */ };
