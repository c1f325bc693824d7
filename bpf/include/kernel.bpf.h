/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kernel.bpf.h - the little that a policy needs of the kernel's headers: integer types, map
 * types and flags.  No vmlinux.h: policies see the kernel through pagecache_abi.h only.
 */
#ifndef KERNEL_BPF_H
#define KERNEL_BPF_H

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __s32 s32;
typedef __u64 u64;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

/* include/uapi/linux/bpf.h; these numbers never change. */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_EXIST = 2,
};

/* What bpf_get_ns_current_pid_tgid() writes. */
struct bpf_pidns_info {
	u32 pid;
	u32 tgid;
};

#endif /* KERNEL_BPF_H */
