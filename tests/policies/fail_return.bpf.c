// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_return - returns an address
 *
 * When to use: must be rejected by the verifier: a hook returns a number.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

/* Written in assembler: no C compiler lets a pointer out of a function that returns s32. */
SEC("struct_ops/fail_return_readahead")
__attribute__((naked)) int fail_return_readahead(void)
{
	asm volatile("r0 = r10; exit;");
}

PAGECACHE_POLICY(fail_return, .readahead = (void *)fail_return_readahead);
