/* SPDX-License-Identifier: GPL-2.0-only */
/* As the kernel's: both operands are evaluated once. */
#ifndef TEST_LINUX_MINMAX_H
#define TEST_LINUX_MINMAX_H

#define min(a, b)                              \
	({                                     \
		__typeof__(a) min_a = (a);     \
		__typeof__(b) min_b = (b);     \
		min_a < min_b ? min_a : min_b; \
	})

#endif /* TEST_LINUX_MINMAX_H */
