/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's 64-bit atomics by those of the compiler. */
#ifndef TEST_LINUX_ATOMIC_H
#define TEST_LINUX_ATOMIC_H

#include <linux/types.h>

typedef struct {
	s64 counter;
} atomic64_t;

#define atomic64_read(v) __atomic_load_n(&(v)->counter, __ATOMIC_RELAXED)
#define atomic64_add(n, v) ((void)__atomic_add_fetch(&(v)->counter, n, __ATOMIC_RELAXED))
#define atomic64_sub(n, v) ((void)__atomic_sub_fetch(&(v)->counter, n, __ATOMIC_RELAXED))
#define atomic64_add_return(n, v) __atomic_add_fetch(&(v)->counter, n, __ATOMIC_SEQ_CST)
#define atomic64_xchg(v, n) __atomic_exchange_n(&(v)->counter, n, __ATOMIC_SEQ_CST)

#endif /* TEST_LINUX_ATOMIC_H */
