// SPDX-License-Identifier: GPL-2.0-only
/*
 * events.bpf.c - whether programs can hear of readers on this kernel, and from what.
 *
 * The programs of access_events.bpf.h that do nothing: user space loads and attaches those in
 * question for a moment, which tells more than the names of functions do.
 */
#include "kernel.bpf.h"

#include <bpf/bpf_helpers.h>

#include "access_events.bpf.h"

static __always_inline int heard(struct address_space *mapping, u64 from, u64 to)
{
	return 0;
}

ACCESS_PROGRAMS(try, 12, heard, heard, heard)

char LICENSE[] SEC("license") = "GPL";
