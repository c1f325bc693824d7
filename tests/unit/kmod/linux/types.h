/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's types for code of kmod/ that is compiled for user space. */
#ifndef TEST_LINUX_TYPES_H
#define TEST_LINUX_TYPES_H

#include_next <linux/types.h>
#include <stdbool.h>
#include <stddef.h>

typedef __u64 u64;
typedef __u32 u32;
typedef __s32 s32;
typedef __s64 s64;
typedef unsigned long pgoff_t;

#endif /* TEST_LINUX_TYPES_H */
