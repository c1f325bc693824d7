/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's bit operations, for one thread. */
#ifndef TEST_LINUX_BITOPS_H
#define TEST_LINUX_BITOPS_H

#include <linux/types.h>

#define TEST_LONG_BITS (8 * sizeof(long))

static inline bool test_bit(unsigned long nr, const unsigned long *bits)
{
	return bits[nr / TEST_LONG_BITS] >> (nr % TEST_LONG_BITS) & 1;
}

static inline void set_bit(unsigned long nr, unsigned long *bits)
{
	bits[nr / TEST_LONG_BITS] |= 1UL << (nr % TEST_LONG_BITS);
}

static inline bool test_and_clear_bit(unsigned long nr, unsigned long *bits)
{
	bool was = test_bit(nr, bits);

	bits[nr / TEST_LONG_BITS] &= ~(1UL << (nr % TEST_LONG_BITS));
	return was;
}

#endif /* TEST_LINUX_BITOPS_H */
