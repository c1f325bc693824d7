/* SPDX-License-Identifier: GPL-2.0-only */
/* As the kernel's: @y is a power of two. */
#ifndef TEST_LINUX_MATH_H
#define TEST_LINUX_MATH_H

#define round_down(x, y) ((x) & ~((__typeof__(x))((y) - 1)))

#endif /* TEST_LINUX_MATH_H */
