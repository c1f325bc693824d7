// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_return - returns a register it never set
 *
 * When to use: must be rejected by the verifier: a hook returns a number.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

/* Written in assembler: a C compiler would set the return value to something. */
SEC("struct_ops/fail_return_readahead")
__attribute__((naked)) int fail_return_readahead(void)
{
	asm volatile("exit;");
}

PAGECACHE_POLICY(fail_return, .readahead = (void *)fail_return_readahead);
